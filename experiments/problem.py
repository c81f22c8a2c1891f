"""What all seeds of a Phase 7 run share: the model, its tasks, the compiled scoring."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from experiments import model as models
from experiments.data.rewards import Reward, reward_of
from experiments.data.splits import Split
from experiments.data.tasks import Task, first, load_tasks
from experiments.files import read_json
from experiments.scoring import Mixtures, Score, make_params_scorer, make_scorer
from forge_jax import parallel
from interop.formats import sha256_file

CACHE = Path(".cache/svd")
"""where decompositions are kept, unless told otherwise"""


class Problem(NamedTuple):
    """A checkpoint and the tasks it is to be adapted to."""

    model: models.Model
    weights: models.Weights
    tasks: list[Task]  # one expert each
    unplanted: list[Task]  # scored and reported apart
    new_tokens: int  # that a response may have
    scorer: Any  # see scoring.make_scorer
    params_scorer: Any  # see scoring.make_params_scorer
    mesh: Mesh | None = None  # where `weights` lie; None is one device


def set_up(
    path: Path,
    *,
    select: str,
    domains: Sequence[str],
    unplanted: Sequence[str],
    source: str,
    data: str | None,
    stop_token: bool,
    counts: dict[Split, int],
    free_tokens: int,
    chunk: int,
    cache: Path | None = CACHE,
    max_full: int | None = None,
    mesh: Mesh | None = None,
    reward: str = "task",
) -> Problem:
    """Load the checkpoint and the tasks.

    An answer that must be exact is as long as the longest; one that is read out of free text may
    take `free_tokens`. `cache` is where decompositions are kept. `reward` is a name for
    `data.rewards.reward_of`; tasks apart keep their own.

    Raises:
      ValueError, OSError: a file cannot be read, a task has too few items, or a prompt and its
        answer are longer than the context.
    """
    if not domains or len(set(domains)) < len(domains):
        raise ValueError(f"`--domains` must name one or more domains, each once, got {domains}.")
    rewarded = reward_of(reward)
    made, weights = models.load(path, select, cache, max_full)
    weights = {
        "factors": parallel.shard_params(mesh, weights["factors"]),
        "projector": parallel.shard(mesh, weights["projector"], parallel.REPLICATED),
    }

    def tasks(names: Sequence[str], source: str, own: Reward | None = None) -> list[Task]:
        return load_tasks(
            names,
            made.tokenizer,
            source=source,
            directory=data,
            image_token=made.image_token,
            counts=counts,
            bos=made.bos,
            eos=made.eos if stop_token else None,
            reward=own,
        )

    planted = tasks(domains, source, rewarded)
    longest = planted[0].batches["test"].answers.shape[1]
    length = longest if all(t.is_exact for t in planted) else max(longest, free_tokens)
    apart = tasks(unplanted, "procedural")
    prompt = max(t.batches["test"].tokens.shape[1] for t in (*planted, *apart))
    models.check_length(made.decoder.spec, prompt, length)
    scorer = make_scorer(made, chunk=chunk, max_new_tokens=length, mesh=mesh)
    params_scorer = make_params_scorer(made, length)
    return Problem(made, weights, planted, apart, length, scorer, params_scorer, mesh)


def run_settings(folder: Path) -> dict[str, Any]:
    """What a phase7 run set its problem up with; arguments of `set_up`.

    Raises:
      ValueError: the directory is that of another kind of run, or of none.
    """
    names = ("select", "source", "data", "stop_token", "free_tokens", "max_full", "reward")
    file = folder / "config.json"
    found = read_json(file) if file.is_file() else {}
    if lacking := [name for name in names if name not in found]:
        raise ValueError(f"{folder} is no phase7 run: its config.json lacks {', '.join(lacking)}.")
    return {name: found[name] for name in names}


def experts_sha256(folder: Path | None) -> str | None:
    """What names the experts in a run directory: the digest of its manifest, which has theirs."""
    return None if folder is None else sha256_file(folder / "manifest.json")


def stacked(experts: Mapping[str, Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """The z of all experts for each path, (K, r)."""
    first = next(iter(experts.values()))
    return {path: np.stack([e[path] for e in experts.values()]) for path in first}


def answers(task: Task, split: Split) -> list[str]:
    """The answers of a split, in order."""
    return [item.answer for item in task.items[split]]


def score_all(
    problem: Problem,
    mixtures: Mixtures,
    tasks: Sequence[Task],
    split: Split,
    count: int | None = None,
) -> list[Score]:
    """The score of P candidates on the first `count` items, or all, of every task's split."""
    return [
        problem.scorer(
            problem.weights,
            mixtures,
            first(task.batches[split], count),
            task,
            answers(task, split)[:count],
        )
        for task in tasks
    ]
