"""Endless or finite streams of items: reasoning-gym, programs, digits, hub or local datasets."""

import contextlib
import io
from collections.abc import Iterator
from itertools import islice
from random import Random

from experiments.data.splits import Split, distinct
from forge_jax.domains import Item, code, math, reasoning, vision

GYM = {
    "math": ("chain_sum", {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}),
    "reasoning": ("family_relationships", {"min_family_size": 4, "max_family_size": 6}),
    "bits": ("count_bits", {"min_n": 1, "max_n": 4095}),
}
"""reasoning-gym's name and settings; bits is the task without planted frequencies"""

HUB = {
    "math": ("gsm8k", "main", math.from_gsm8k),
    "code": ("mbpp", None, code.from_mbpp),
    "reasoning": ("ai2_arc", "ARC-Easy", reasoning.from_arc),
    "vision": ("textvqa", None, vision.from_textvqa),
}
"""the guide's datasets: hub name, configuration, row to item"""


def gym(task: str, seed: int) -> Iterator[Item]:
    """Items of a reasoning-gym task, without end."""
    import reasoning_gym

    name, settings = GYM[task]
    chunk = 10_000
    while True:
        rows = reasoning_gym.create_dataset(name, size=chunk, seed=seed, **settings)
        for i in range(chunk):
            yield Item(rows[i]["question"].strip() + "\n", rows[i]["answer"])
        seed += chunk  # item i of a dataset is drawn from seed + i: seeds one apart overlap


def programs(seed: int) -> Iterator[Item]:
    """Generated programs with their real output, without end."""
    rng = Random(seed)
    while True:
        source = code.program(rng)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(source, {})  # our own generator's text, from a closed grammar
        yield code.from_program(source, printed.getvalue())


def digits(image_token: str | None) -> Iterator[Item]:
    """scikit-learn's 1,797 real handwritten digits, 8 x 8."""
    from sklearn.datasets import load_digits

    data = load_digits()
    for image, digit in zip(data.images, data.target, strict=True):
        yield vision.from_digit((image / 16).astype("float32"), int(digit), image_token)


def procedural(domain: str, seed: int, image_token: str | None) -> Iterator[Item]:
    """The embedded source of a domain."""
    if domain == "code":
        return programs(seed)
    if domain == "vision":
        return digits(image_token)
    return gym(domain, seed)


def hub(domain: str, directory: str | None, image_token: str | None) -> Iterator[Item]:
    """The guide's dataset of a domain, from the hub or from a local copy in `directory`."""
    import datasets

    name, configuration, to_item = HUB[domain]
    rows = datasets.load_dataset(directory or name, configuration, split="train[:1000]")
    for row in rows:
        item = to_item(row, image_token) if domain == "vision" else to_item(row)  # type: ignore
        if item is not None:
            yield item


def take(items: Iterator[Item], split: Split, count: int) -> list[Item]:
    """The first `count` distinct items of a split.

    Raises:
      ValueError: a finite source has fewer.
    """
    taken = list(islice(distinct(items, split), count))
    if len(taken) < count:
        raise ValueError(f"The source has {len(taken)} {split} items, {count} were asked for.")
    return taken
