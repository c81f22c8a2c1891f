"""Examples to rows of tokens: several documents a row, each with its number, and labels.

The first document of a row is 1; padding is document 0 and is never learned. A document that does
not fit into what is left of a row begins the next one; one longer than a row loses its end.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int
from tokenizers import Tokenizer

from experiments.data.corpora import Example
from forge_jax.models.cognate import IGNORED


class Rows(NamedTuple):
    """Token rows as the model takes them; labels are the next tokens already."""

    tokens: Int[np.ndarray, "rows time"]
    labels: Int[np.ndarray, "rows time"]
    segments: Int[np.ndarray, "rows time"]


class Document(NamedTuple):
    """One example's tokens, the last of them the end of text."""

    tokens: list[int]
    learned_from: int  # the first token that is to be predicted


def encode_document(tokenizer: Tokenizer, example: Example, eos: int) -> Document:
    """Prompt, answer and `eos`; of a prompt nothing is learned, of text all but its first token."""
    prompt = tokenizer.encode(example.prompt, add_special_tokens=False).ids
    answer = tokenizer.encode(example.answer, add_special_tokens=False).ids
    return Document([*prompt, *answer, eos], max(len(prompt), 1))


def pack(documents: Iterable[Document], length: int, pad: int) -> Iterator[Rows]:
    """Rows of `length` tokens, one at a time, each with shape (1, length).

    Raises:
        ValueError: `length` is below 2: no token would have a next one.
    """
    if length < 2:
        raise ValueError(f"`length` must be at least 2, got {length}.")
    row: list[Document] = []
    used = 0
    for document in documents:
        cut = document._replace(tokens=document.tokens[:length])
        if used + len(cut.tokens) > length:
            yield _row(row, length, pad)
            row, used = [], 0
        row.append(cut)
        used += len(cut.tokens)
    if row:
        yield _row(row, length, pad)


def _row(documents: Sequence[Document], length: int, pad: int) -> Rows:
    """One row of whole documents."""
    tokens = np.full((1, length), pad, np.int32)
    labels = np.full((1, length), IGNORED, np.int32)
    segments = np.zeros((1, length), np.int32)
    start = 0
    for number, (ids, learned_from) in enumerate(documents, start=1):
        end = start + len(ids)
        tokens[0, start:end], segments[0, start:end] = ids, number
        labels[0, start + learned_from - 1 : end - 1] = ids[learned_from:]
        start = end
    return Rows(tokens, labels, segments)


def stack_rows(rows: Sequence[Rows]) -> Rows:
    """One batch of rows."""
    return Rows(*(np.concatenate(parts) for parts in zip(*rows, strict=True)))
