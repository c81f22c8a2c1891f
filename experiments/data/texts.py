"""What phase 1 learns from and is judged by: examples of every data set, split and cleaned.

`offline` has the stand-ins, each in the place of one data set of its category; `hub` the data sets
themselves; a directory, those of them that lie there.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from experiments.data.corpora import CORPORA, Example, examples
from experiments.data.curriculum import STAGES
from experiments.data.splits import split_of
from experiments.data.standins import standins
from forge_jax.domains import Item

STANDS_FOR = {
    "gsm8k": "math",
    "mbpp": "code",
    "arc_easy": "science",
    "piqa": "commonsense",
    "wikitext": "language",
    "boolq": "qa",
    "strategyqa": "reasoning",
}
"""data set -> category of the stand-in that takes its place in the curriculum offline"""
RUN_OF_WORDS = 13
"""words that two texts may not share across splits"""
PATIENCE = 3000
"""examples without a new one after which a source counts as exhausted"""


class Texts(NamedTuple):
    """Examples by data set; a set without validation examples is not in `validation`."""

    train: dict[str, list[Example]]
    validation: dict[str, list[Example]]


def read_texts(
    data: str, *, train: int, validation: int, only: Sequence[str] = (), seed: int = 0
) -> Texts:
    """At most so many examples of every data set of the curriculum, or of those in `only`.

    Args:
        data: "offline", "hub" or a directory.
        train: examples of each data set to learn from.
        validation: examples of each to be judged by: of the set's own validation split or, where
            it has none, those whose hash says so.
        only: names of data sets.
        seed: of the stand-ins.

    Raises:
        ValueError: there is no such data set or directory, or nothing is left to learn from.
    """
    names = available(data, only)
    limits = {"train": train, "validation": validation}
    found: dict[str, dict[str, list[Example]]] = {}
    for name in names:
        if data == "offline":
            found[name] = divide(standins(STANDS_FOR[name], seed), limits)
            continue
        directory = None if data == "hub" else data
        if has_validation(name, directory):
            found[name] = {
                split: list(examples(name, directory=directory, split=split, limit=count))
                for split, count in limits.items()
            }
        else:
            found[name] = divide(examples(name, directory=directory), limits)
    held = {n: split["validation"] for n, split in found.items() if split["validation"]}
    kept = without_overlap({n: split["train"] for n, split in found.items()}, held)
    if empty := [n for n in names if not kept[n]]:
        raise ValueError(
            f"No examples to learn from in {', '.join(empty)}, once those are gone that are in "
            "the validation set."
        )
    if not held:
        raise ValueError(f"No validation examples in any of {', '.join(names)}.")
    return Texts(kept, held)


def available(data: str, only: Sequence[str]) -> list[str]:
    """The data sets to read, in the curriculum's order.

    Raises:
        ValueError: one of `only` is not to be had, or none is.
    """
    curriculum = STAGES[-1].datasets
    if data == "offline":
        there = [n for n in curriculum if n in STANDS_FOR]
    elif data == "hub":
        there = [*curriculum, *(n for n in only if n in CORPORA and n not in curriculum)]
    elif not Path(data).is_dir():
        raise ValueError(f"`--data` must be offline, hub or a directory, got {data!r}.")
    else:
        there = [n for n in CORPORA if lies_in(n, data)]
    if missing := [n for n in only if n not in there]:
        raise ValueError(
            f"With `--data {data}` there is no data set {', '.join(missing)}; there are "
            f"{', '.join(there) or 'none'}."
        )
    if not there:
        raise ValueError(f"The directory {data} holds none of the data sets {', '.join(CORPORA)}.")
    return [n for n in there if not only or n in only]


def lies_in(name: str, directory: str) -> bool:
    """Whether `directory` holds the data set."""
    return Path(directory, f"{name}.jsonl").is_file() or Path(directory, name).is_dir()


def has_validation(name: str, directory: str | None) -> bool:
    """Whether the data set has a validation split of its own there."""
    if directory is None or Path(directory, name).is_dir():
        return CORPORA[name].validation is not None
    return Path(directory, f"{name}.validation.jsonl").is_file()


def content(example: Example) -> str:
    """What tells an example from another: the words of its prompt, or of the text."""
    return " ".join(words(example.prompt or example.answer))


def words(text: str) -> list[str]:
    """Words and numbers in lower case, without marks."""
    return re.findall(r"\w+", text.casefold())


def divide(found: Iterable[Example], limits: dict[str, int]) -> dict[str, list[Example]]:
    """Different examples of every split by their hash, until all splits are full."""
    kept: dict[str, list[Example]] = {split: [] for split in limits}
    seen, stale = set(), 0
    for example in found:
        text = content(example)
        split, stale = split_of(Item(text, "")), stale + 1
        if split in limits and text not in seen and len(kept[split]) < limits[split]:
            seen.add(text)
            kept[split].append(example)
            stale = 0
        if stale == PATIENCE or all(len(kept[s]) == n for s, n in limits.items()):
            break
    return kept


def without_overlap(
    train: dict[str, list[Example]], held: dict[str, list[Example]]
) -> dict[str, list[Example]]:
    """`train` without what is in the validation examples of any data set.

    A question is there if its words are, a text if a run of `RUN_OF_WORDS` of its words is. The
    questions' own frames share such runs, which is why they are compared whole.
    """
    judged = list(chain.from_iterable(held.values()))
    questions = {content(e) for e in judged if e.prompt}
    runs = {run for e in judged if not e.prompt for run in word_runs(e)}

    def is_clean(example: Example) -> bool:
        if example.prompt:
            return content(example) not in questions
        return runs.isdisjoint(word_runs(example))

    return {name: [e for e in found if is_clean(e)] for name, found in train.items()}


def word_runs(example: Example) -> Iterator[tuple[str, ...]]:
    """Every run of words of a text; a shorter text is one run."""
    found = words(example.answer)
    for start in range(max(len(found) - RUN_OF_WORDS, 0) + 1):
        yield tuple(found[start : start + RUN_OF_WORDS])
