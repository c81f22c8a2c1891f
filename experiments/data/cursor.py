"""Rows of packed documents without end, drawn by shares, from a state of a few integers.

Where the drawing stands is a dict of small arrays, which a checkpoint holds like any other leaf:
the same state and shares give the same rows.
"""

import functools
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import NamedTuple
from zlib import crc32

import numpy as np
from jaxtyping import Int
from tokenizers import Tokenizer

from experiments.data.corpora import Example
from experiments.data.packing import Document, Rows, encode_document, pack, stack_rows

Cursor = dict[str, np.ndarray]
"""taken: documents taken of every set, in the sets' order; pending: set and document that begin the
next row, or -1; draws: batches drawn so far"""


class Documents(NamedTuple):
    """Encoded documents of one data set, in three arrays."""

    tokens: Int[np.ndarray, " all"]
    starts: Int[np.ndarray, " documents_and_end"]
    learned_from: Int[np.ndarray, " documents"]

    def __len__(self) -> int:
        return len(self.learned_from)

    def document(self, index: int) -> Document:
        """Document number `index`."""
        begin, end = self.starts[index : index + 2]
        return Document(self.tokens[begin:end].tolist(), int(self.learned_from[index]))


def encode_all(
    tokenizer: Tokenizer, found: Iterable[Example], eos: int, length: int, vocabulary: int
) -> Documents:
    """Every example as documents of at most `length` tokens.

    Raises:
        ValueError: a token id is not below `vocabulary`.
    """
    encoded = [
        d for e in found for d in fit(encode_document(tokenizer, e, eos), not e.prompt, length)
    ]
    ids = [np.asarray(d.tokens, np.int32) for d in encoded]
    tokens = np.concatenate(ids) if ids else np.zeros(0, np.int32)
    if tokens.size and tokens.max() >= vocabulary:
        raise ValueError(
            f"A token id must be below {vocabulary} (`vocabulary`), got {tokens.max()}."
        )
    starts = np.cumsum([0, *map(len, ids)])
    return Documents(tokens, starts, np.array([d.learned_from for d in encoded], np.int32))


def fit(document: Document, is_text: bool, length: int) -> Iterator[Document]:
    """The document in `length` tokens: a text in pieces, a question without its beginning."""
    tokens, cut = document.tokens, len(document.tokens) - length
    if not is_text and cut > 0:
        # what is learned is at the end
        yield Document(tokens[cut:], max(document.learned_from - cut, 1))
        return
    for start in range(0, len(tokens), length):
        piece = tokens[start : start + length]
        if len(piece) > 1:
            yield Document(piece, max(document.learned_from - start, 1))


@functools.lru_cache(maxsize=64)
def order(seed: tuple[int, ...], name: str, epoch: int, count: int) -> np.ndarray:
    """The order in which the documents of a set come in its pass number `epoch`."""
    return np.random.default_rng([*seed, crc32(name.encode()), epoch]).permutation(count)


def start_cursor(sets: int) -> Cursor:
    """Nothing drawn yet."""
    return {
        "taken": np.zeros(sets, np.int64),
        "pending": np.full(2, -1, np.int64),
        "draws": np.zeros((), np.int64),
    }


def next_rows(
    documents: Mapping[str, Documents],
    shares: Mapping[str, float],
    cursor: Cursor,
    *,
    rows: int,
    length: int,
    pad: int,
    seed: tuple[int, ...],
) -> tuple[Rows, Cursor]:
    """The next `rows` rows of `length` tokens, and the cursor behind them.

    Each document is of a set drawn by `shares`; a set gives all its documents, in an order of its
    own, before one comes again. The document that does not fit any more begins the next rows.
    """
    names, taken = list(documents), cursor["taken"].copy()
    chances = np.array([shares.get(name, 0.0) for name in names])
    rng = np.random.default_rng([*seed, int(cursor["draws"])])
    last = cursor["pending"]

    def stream() -> Iterator[Document]:
        nonlocal last
        if last[0] >= 0:
            yield documents[names[last[0]]].document(last[1])
        while True:
            which = rng.choice(len(names), p=chances)
            found = documents[names[which]]
            epoch, place = divmod(int(taken[which]), len(found))
            index = order(seed, names[which], epoch, len(found))[place]
            taken[which] += 1
            last = np.array([which, index])
            yield found.document(index)

    got = stack_rows(list(islice(pack(stream(), length, pad), rows)))
    return got, {"taken": taken, "pending": last, "draws": cursor["draws"] + 1}
