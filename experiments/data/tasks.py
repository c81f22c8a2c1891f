"""A domain as the scripts use it: three splits, encoded once, and a reward."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from experiments.data.batches import Batch, encode
from experiments.data.rewards import Reward, check_tests, reward_of, unit_tests
from experiments.data.sources import hub, procedural, take
from experiments.data.splits import SHARES, Split, distinct
from forge_jax.domains import Item, code, exact, math, reasoning, vision

HUB_REWARDS: dict[str, Reward] = {
    "math": math.reward,
    "code": code.reward,
    "programs": unit_tests,
    "reasoning": reasoning.reward,
    "vision": vision.reward,
}


class Task(NamedTuple):
    """One domain's items and batches by split."""

    name: str
    items: dict[Split, list[Item]]
    batches: dict[Split, Batch]
    reward: Reward

    @property
    def is_exact(self) -> bool:
        """Whether only the answer itself earns the reward, so that no text need be generated."""
        return self.reward is exact


def load_items(
    name: str, source: str, directory: str | None, image_token: str | None, counts: dict[Split, int]
) -> dict[Split, list[Item]]:
    """The first items of every split: from the embedded generators, or the guide's real sets.

    A real set is finite: of it a split has as many items as there are, up to its count.

    Raises:
      ValueError: an embedded source has fewer, or a split of a real set has none.
    """
    if source == "hub":
        rows = list(hub(name, directory, image_token))
        found: dict[Split, list[Item]] = {
            split: list(distinct(rows, split))[: counts[split]] for split in SHARES
        }
        if empty := [split for split in SHARES if not found[split]]:
            raise ValueError(f"The set of {name} has no items for {', '.join(empty)}.")
        return found
    return {
        split: take(procedural(name, 0, image_token, directory), split, counts[split], name)
        for split in SHARES
    }


def load_tasks(
    names: Sequence[str],
    tokenizer: Tokenizer,
    *,
    source: str,
    directory: str | None,
    image_token: str | None,
    counts: dict[Split, int],
    bos: int | None,
    eos: int | None,
    reward: Reward | None = None,
) -> list[Task]:
    """The tasks, all with the same prompt and answer lengths so that they stack.

    `reward` takes the place of the tasks' own.
    """
    if not names:
        return []
    if source == "hub" and reward is None and "programs" in names:
        reward_of("unit_tests")  # refuses where no program can be run
    items = [load_items(n, source, directory, image_token, counts) for n in names]
    if reward is unit_tests:
        for by_split in items:
            check_tests(by_split["train"][0].answer)
    longest = [
        encode(tokenizer, [i for s in by_split.values() for i in s], bos=bos, eos=eos)
        for by_split in items
    ]
    prompt_length = max(b.tokens.shape[1] for b in longest)
    answer_length = max(b.answers.shape[1] for b in longest)

    def batch(chosen: list[Item]) -> Batch:
        lengths = {"prompt_length": prompt_length, "answer_length": answer_length}
        return encode(tokenizer, chosen, bos=bos, eos=eos, **lengths)

    return [
        Task(
            name,
            by_split,
            {split: batch(chosen) for split, chosen in by_split.items()},
            reward or (HUB_REWARDS[name] if source == "hub" else exact),
        )
        for name, by_split in zip(names, items, strict=True)
    ]


def select(batch: Batch, indices: np.ndarray) -> Batch:
    """Some items of a batch."""
    return Batch(*(leaf[indices] for leaf in batch))


def first(batch: Batch, count: int | None) -> Batch:
    """The first `count` items of a batch, or all."""
    return Batch(*(leaf[:count] for leaf in batch))
