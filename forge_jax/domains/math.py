"""Mathematics: the final number counts."""

import re
from collections.abc import Mapping

from forge_jax.domains.item import Item, signed

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def final_number(text: str) -> str | None:
    """The number after the last `####`, else the last number; without commas, None if none.

    The convention of GSM8K (Cobbe et al. 2021), and the usual fallback of its evaluations.
    """
    numbers = NUMBER.findall(text.rsplit("####", 1)[-1]) or NUMBER.findall(text)
    if not numbers:
        return None
    number = numbers[-1].replace(",", "")
    return number.rstrip("0").rstrip(".") if "." in number else number


def from_gsm8k(row: Mapping[str, str]) -> Item:
    """A row of the hub's `gsm8k` (fields question, answer)."""
    number = final_number(row["answer"])
    if number is None:
        raise ValueError(f"A gsm8k answer must hold a number, got {row['answer']!r}.")
    return Item(f"Question: {row['question'].strip()}\nAnswer: ", number)


def reward(completion: str, answer: str) -> float:
    """+1 where the completion's final number is the answer, else -1."""
    return signed(final_number(completion) == final_number(answer))
