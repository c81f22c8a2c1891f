"""Reasoning: a word, or the letter of a choice."""

import re
from collections.abc import Mapping

from forge_jax.domains.item import Item, signed

LETTER = re.compile(r"\b([A-E1-5])\b")


def choice_letter(text: str) -> str | None:
    """The first choice named in `text` as a lone A to E or 1 to 5, else None.

    The article counts as the choice: of "A good guess is B" it is A.
    """
    match = LETTER.search(text)
    return match.group(1) if match else None


def from_arc(row: Mapping) -> Item:
    """A row of the hub's `ai2_arc` (fields question, choices, answerKey)."""
    choices = zip(row["choices"]["label"], row["choices"]["text"], strict=True)
    listed = "\n".join(f"{label}. {text}" for label, text in choices)
    return Item(f"Question: {row['question'].strip()}\n{listed}\nAnswer: ", row["answerKey"])


def reward(completion: str, answer: str) -> float:
    """+1 where the first choice the completion names is the answer, else -1."""
    return signed(choice_letter(completion) == answer)
