"""Mathematics: the final number counts."""

import re
from collections.abc import Mapping
from decimal import Decimal

from forge_jax.domains.item import Item, signed

NUMBER = re.compile(r"(?:(?<!\w)-)?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")
"""a sign that is no minus between numbers, digits with or without thousands' commas, decimals"""


def final_number(text: str) -> str | None:
    """The last number after the last `####`, else the last number at all; None if there is none.

    The convention of GSM8K (Cobbe et al. 2021), and the usual fallback of its evaluations. Equal
    numbers are equal texts: without commas, leading zeros, or zeros after the point.
    """
    numbers = NUMBER.findall(text.rsplit("####", 1)[-1]) or NUMBER.findall(text)
    if not numbers:
        return None
    number = format(Decimal(numbers[-1].replace(",", "")), "f")
    return number.rstrip("0").rstrip(".") if "." in number else number


def from_gsm8k(row: Mapping[str, str]) -> Item:
    """A row of the hub's `gsm8k` (fields question, answer)."""
    number = final_number(row["answer"])
    if number is None:
        raise ValueError(f"A gsm8k answer must hold a number, got {row['answer']!r}.")
    return Item(f"Question: {row['question'].strip()}\nAnswer: ", number)


def reward(completion: str, answer: str) -> float:
    """+1 where the completion's final number is the answer, else -1."""
    number = final_number(completion)
    return signed(number is not None and number == final_number(answer))
