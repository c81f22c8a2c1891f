"""The published test sets as questions: options to choose from, or text to write."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from experiments import sandbox
from experiments.data.splits import Split, distinct
from forge_jax.domains import Item, math

NAMES = ("gsm8k", "humaneval", "quartz", "hellaswag")


class Choice(NamedTuple):
    """A question whose options are continuations of its prompt."""

    prompt: str
    options: tuple[str, ...]
    right: int


class Written(NamedTuple):
    """A question that a text answers."""

    prompt: str
    is_right: Callable[[str], bool]  # of the response
    ends: tuple[str, ...] = ()  # a response is cut before the first of these


class Exam(NamedTuple):
    """One set."""

    name: str
    questions: list[Choice] | list[Written]
    new_tokens: int = 0  # that a response may have


def gsm8k(row: dict[str, Any]) -> Written:
    """The final number counts; rows have `prompt` and `expected`."""
    answer = row["expected"]
    prompt = f"Question: {row['prompt'].strip()}\nAnswer:"
    return Written(prompt, lambda text: math.reward(text, answer) > 0, ("\nQuestion:",))


def humaneval(row: dict[str, Any]) -> Written:
    """The function is completed, and its tests run in the sandbox (Chen et al. 2021, pass@1)."""
    tests = f"{row['test']}\ncheck({row['entry_point']})"
    prompt = row["prompt"]
    ends = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\n```", "\nassert ")
    return Written(prompt, lambda text: sandbox.passes(prompt + text, tests, 10.0), ends)


def hellaswag(row: dict[str, Any]) -> Choice:
    """Which ending follows? (ctx, endings, expected_index)."""
    prompt = f"{row['activity_label']}: {row['ctx']}"
    return Choice(prompt, tuple(f" {x}" for x in row["endings"]), row["expected_index"])


BLANK = "_____"


def quartz(row: dict[str, Any]) -> Choice:
    """Which of two words fills the blank, answers the question or ends the sentence?

    The options' letters are not shown. After a blank the rest of the sentence is part of both.
    """
    stem, options, right = quartz_parts(row)
    before, blank, rest = stem.partition(BLANK)
    if blank:
        return Choice(before.rstrip(), tuple(f" {x}{rest}" for x in options), right)
    prompt = f"{stem}\nAnswer:" if stem.endswith("?") else stem
    return Choice(prompt, tuple(f" {x}" for x in options), right)


def quartz_parts(row: dict[str, Any]) -> tuple[str, tuple[str, ...], int]:
    """Stem, options and the place of the right one, from a row of chat messages."""
    stem, _, listed = row["input"][-1]["content"].partition("\n\n")
    options = [line.strip() for line in listed.splitlines() if line.strip()]
    if [option[:2] for option in options] != ["A:", "B:"]:
        raise KeyError("A: and B:")
    return stem.strip(), tuple(x[2:].strip() for x in options), {"A": 0, "B": 1}[row["ideal"]]


def quartz_item(row: dict[str, Any]) -> Item:
    """The same question for training: both options are named, the answer is the option's text."""
    stem, options, right = quartz_parts(row)
    return Item(f"{stem}\nOptions: {', '.join(options)}\nAnswer: ", options[right])


READERS = {"gsm8k": gsm8k, "humaneval": humaneval, "quartz": quartz, "hellaswag": hellaswag}
NEW_TOKENS = {"gsm8k": 160, "humaneval": 256}


def read_rows(directory: Path, name: str) -> list[dict[str, Any]]:
    """The lines of a set.

    Raises:
      ValueError: the file is missing, or not JSON lines.
    """
    path = directory / f"{name}.jsonl"
    if not path.exists():
        raise ValueError(f"{path} is missing: run `make data`.")
    try:
        return [json.loads(line) for line in path.read_text().splitlines() if line]
    except ValueError as error:
        raise ValueError(f"{path} is not a file of JSON lines: {error}.") from error


def load_exam(directory: Path, name: str, count: int) -> Exam:
    """The first `count` questions; of QuaRTz those of the test split.

    Training never sees those, but QuaRTz comes in pairs, of which one turns the other round, and a
    pair may lie on both sides of a split by content.

    Raises:
      ValueError: the file is missing, or its fields are others.
    """
    rows = read_rows(directory, name)
    try:
        if name == "quartz":
            rows = list(quartz_rows(rows, "test"))
        exam = Exam(name, [READERS[name](r) for r in rows[:count]], NEW_TOKENS.get(name, 0))
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"The rows of {directory / name}.jsonl lack {error}.") from error
    if len(exam.questions) < 2:
        raise ValueError(f"{directory / name}.jsonl has fewer than two questions.")
    return exam


def quartz_rows(rows: list[dict[str, Any]], split: Split) -> list[dict[str, Any]]:
    """The rows of a split; two rows of one question fall into the same, once."""
    by_prompt = {quartz_item(row).prompt: row for row in reversed(rows)}
    items = (quartz_item(row) for row in rows)
    return [by_prompt[item.prompt] for item in distinct(items, split)]
