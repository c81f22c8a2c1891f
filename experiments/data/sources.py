"""Endless or finite streams of items: reasoning-gym, programs, digits, hub or local datasets."""

import contextlib
import io
import itertools
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from random import Random

import numpy as np

from experiments.data import exams
from experiments.data.splits import Split, distinct
from forge_jax.domains import Item, code, math, reasoning, vision

GYM = {
    "math": (
        "basic_arithmetic",
        {
            "min_terms": 2,
            "max_terms": 2,
            "min_digits": 1,
            "max_digits": 2,
            "operators": ["+"],
            "allow_parentheses": False,
            "allow_negation": False,
        },
    ),
    "reasoning": ("aiw", {"max_entities": 9}),
    "bits": ("count_bits", {"min_n": 1, "max_n": 4095}),
}
"""reasoning-gym's name and settings; bits is the task without planted frequencies"""

TASKS = ("sums", "largest", "code", "vision", "quartz", *GYM)
"""those of `procedural`"""

HUB = {
    "math": ("openai/gsm8k", "main"),
    "code": ("google-research-datasets/mbpp", None),
    "programs": ("google-research-datasets/mbpp", None),
    "reasoning": ("allenai/ai2_arc", "ARC-Easy"),
    "vision": ("lmms-lab/textvqa", None),
}
"""the guide's datasets: hub name and configuration; programs are to be written and pass their
tests, where code is to be read. This textvqa is the copy in Parquet: `datasets`
no longer runs loading scripts."""

CHUNK = 10_000
STREAM = 10**9
"""seeds of reasoning-gym between one stream of items and the next"""


def gym_dataset(task: str, seed: int, size: int):
    """A task's dataset, with its `score_answer`, in which item i is drawn from `seed` + i."""
    import reasoning_gym

    name, settings = GYM[task]
    if name == "aiw":  # its settings hold members of its own enumeration
        from reasoning_gym.logic.aiw import TaskType

        settings = {**settings, "task_types": [TaskType.SIBLINGS], "task_type_weights": [1.0]}
    return reasoning_gym.create_dataset(name, size=size, seed=seed, **settings)


def gym(task: str, seed: int) -> Iterator[Item]:
    """Items of a reasoning-gym task, without end; two seeds share no draw."""
    # datasets of neighbouring seeds overlap
    for start in itertools.count(seed * STREAM, CHUNK):
        rows = gym_dataset(task, start, CHUNK)
        for i in range(CHUNK):
            row = rows[i]
            yield Item(row["question"].strip() + "\n", row["answer"])


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

    pixels, labels = load_digits(return_X_y=True)
    for row, digit in zip(np.asarray(pixels, np.float32), np.asarray(labels), strict=True):
        image = row.reshape(vision.SIDE, vision.SIDE) / 16
        yield vision.from_digit(image, int(digit), image_token)


def sums() -> Iterator[Item]:
    """Every a + b and a - b of digits whose answer is one digit: 110 questions."""
    for a in range(10):
        for b in range(10):
            for sign, value in (("+", a + b), ("-", a - b)):
                if 0 <= value <= 9:
                    yield Item(f"Question: What is {a} {sign} {b}?\nAnswer: ", str(value))


def largest() -> Iterator[Item]:
    """Every order of every three digits, in a fixed shuffle: 720 questions."""
    for a, b, c in Random(0).sample(list(itertools.permutations(range(10), 3)), 720):
        prompt = f"Question: What is the largest of {a}, {b} and {c}?\nAnswer: "
        yield Item(prompt, str(max(a, b, c)))


def quartz(directory: str) -> Iterator[Item]:
    """The questions of QuaRTz, which `make data` fetches into `directory`."""
    return map(exams.quartz_item, exams.read_rows(Path(directory), "quartz"))


def procedural(
    domain: str, seed: int, image_token: str | None, directory: str | None = None
) -> Iterator[Item]:
    """The source of a domain that needs no hub; `directory` is where `make data` put QuaRTz."""
    if domain == "sums":
        return sums()
    if domain == "largest":
        return largest()
    if domain == "code":
        return programs(seed)
    if domain == "vision":
        return digits(image_token)
    if domain == "quartz":
        return quartz(directory or "data")
    if domain not in GYM:
        raise ValueError(f"There is no task {domain!r}; there are {', '.join(TASKS)}.")
    return gym(domain, seed)


def hub(domain: str, directory: str | None, image_token: str | None) -> Iterator[Item]:
    """The guide's dataset of a domain, from the hub or from a `local_copy` in `directory`.

    The first 1,000 rows of its train split; rows that make no item are left out.

    Raises:
      ValueError: `directory` is none, or a row lacks a field.
    """
    import datasets
    from datasets.exceptions import DatasetsError

    if domain not in HUB:
        raise ValueError(f"No hub dataset for {domain!r}; there are {', '.join(HUB)}.")
    path, configuration = HUB[domain] if directory is None else local_copy(domain, directory)
    to_item = {
        "math": math.from_gsm8k,
        "code": code.from_mbpp,
        "programs": code.to_write,
        "reasoning": reasoning.from_arc,
        "vision": partial(vision.from_textvqa, image_token=image_token),
    }[domain]
    try:
        rows = datasets.load_dataset(path, configuration, split="train[:1000]")
    except DatasetsError as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise ValueError(f"The set of {domain} at {path} cannot be read: {reason}") from error
    for row in rows:
        try:
            item = to_item(row)
        except KeyError as error:
            raise ValueError(f"The rows of {path} lack the field {error}.") from None
        if item is not None:
            yield item


def local_copy(domain: str, directory: str) -> tuple[str, str | None]:
    """Path and configuration under which `load_dataset` finds a domain's dataset in `directory`.

    `directory` holds a folder gsm8k, mbpp, ai2_arc or textvqa, or is that dataset itself. A clone
    of the hub's repository names its configurations in its README; without one they may be
    folders. Else all files are the dataset.
    """
    import datasets

    if not Path(directory).is_dir():
        raise ValueError(f"The dataset of {domain} wants a directory, got {directory}.")
    name, configuration = HUB[domain]
    own = Path(directory, name.rpartition("/")[2])
    path = own if own.is_dir() else Path(directory)
    if configuration is None or configuration in datasets.get_dataset_config_names(str(path)):
        return str(path), configuration
    folder = path / configuration
    return str(folder if folder.is_dir() else path), None


def take(items: Iterator[Item], split: Split, count: int, name: str = "the source") -> list[Item]:
    """The first `count` distinct items of a split.

    Raises:
      ValueError: the source has fewer.
    """
    taken = list(itertools.islice(distinct(items, split), count))
    if len(taken) < count:
        raise ValueError(f"Of {name} there are {len(taken)} {split} items, {count} were asked for.")
    return taken
