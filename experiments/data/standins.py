"""Examples for every category of phase 1 without a network, asked for by name (`--data offline`).

They are generated tasks and one packaged public-domain story, not the data sets: a run on them
shows that training works, and says nothing about the data sets' scores.
"""

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from experiments.data.corpora import CATEGORIES, Example, question
from experiments.data.sources import STREAM, programs

TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "math": ("chain_sum", {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2}),
    "science": ("simple_geometry", {}),
    "reasoning": ("syllogism", {}),
    "qa": ("needle_haystack", {"min_num_statements": 3, "max_num_statements": 6}),
    "commonsense": ("family_relationships", {}),
}
"""category -> reasoning-gym's task and settings; code and language have generators of their own"""
CHUNK = 1000


def standins(category: str, seed: int) -> Iterator[Example]:
    """Examples of a category without end; two seeds draw different ones.

    Raises:
        ValueError: there is no such category.
    """
    if category not in CATEGORIES:
        raise ValueError(f"There is no category {category!r}; there are {', '.join(CATEGORIES)}.")
    pairs = {"code": _programs, "language": _sentences}.get(category)
    drawn = pairs(seed) if pairs else _tasks(category, seed)
    for prompt, answer in drawn:
        yield Example(prompt, answer, category, f"offline:{category}")


def _tasks(category: str, seed: int) -> Iterator[tuple[str, str]]:
    import reasoning_gym

    name, settings = TASKS[category]
    # datasets of neighbouring seeds overlap
    for start in itertools.count(seed * STREAM, CHUNK):
        rows = reasoning_gym.create_dataset(name, size=CHUNK, seed=start, **settings)
        for i in range(CHUNK):
            yield question(rows[i]["question"]), rows[i]["answer"]


def _programs(seed: int) -> Iterator[tuple[str, str]]:
    for item in programs(seed):
        yield question(item.prompt), item.answer


def _sentences(seed: int) -> Iterator[tuple[str, str]]:
    """Runs of four sentences of a story, the beginnings in a random order, over and over."""
    import reasoning_gym

    text = Path(reasoning_gym.__file__).with_name("data").joinpath("in_the_year_2889.txt")
    body = re.split(r"\*\*\* (?:START|END) OF .*?\*\*\*", text.read_text("utf-8"))[1]
    sentences = re.split(r"(?<=[.!?])\s+", " ".join(body.split()))
    rng = Random(seed)
    while True:
        begin = rng.randrange(len(sentences) - 3)
        yield "", " ".join(sentences[begin : begin + 4])
