"""Sequences with known answers, drawn without end: what a memory or a recursion is good for.

Each generator takes a random stream and a number of rows and returns `Puzzle`; labels are next
tokens, as everywhere, and only answers have one.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from forge_jax.models.cognate import IGNORED

FILLER, QUERY, SYMBOLS = 0, 1, 2
"""tokens: what means nothing, what asks, and the first of those that mean something"""


class Puzzle(NamedTuple):
    """Rows of a task."""

    tokens: Int[np.ndarray, "rows time"]
    labels: Int[np.ndarray, "rows time"]
    group: Int[np.ndarray, " rows"]  # how hard a row is: a distance or a length


Draw = Callable[[np.random.Generator, int], Puzzle]


class Task(NamedTuple):
    """A generator, and the sizes that a model of it needs."""

    draw: Draw
    vocabulary: int
    length: int
    chance: float  # accuracy of the best blind guess


def answers_at(tokens, places) -> Int[np.ndarray, "rows time"]:
    """Labels that ask at `places` (rows, n) for the token that follows."""
    labels = np.full_like(tokens, IGNORED)
    rows = np.arange(len(tokens))[:, None]
    labels[rows, places] = tokens[rows, places + 1]
    return labels


def recall(
    distances: tuple[int, ...], pairs: int = 4, symbols: int = 8, questions: int = 4
) -> Task:
    """Pairs of key and value, filler, then some of the keys again: what was each one's value?

    The distance is that between a key and its question, if both orders are the same; filler fills
    what a shorter row leaves. Values are drawn one by one, so that none can be excluded. Of several
    questions the later ones can be guessed at by striking out the values that went before.
    """
    if not 1 <= questions <= pairs:
        raise ValueError(f"`questions` must be 1 to {pairs}, one for each pair, got {questions}.")
    if min(distances) < 2 * pairs:
        raise ValueError(f"A distance must be at least the {2 * pairs} tokens of all pairs.")
    length = max(distances) + 2 * questions

    def draw(rng, rows):
        group = rng.choice(distances, rows)
        tokens = np.full((rows, length), FILLER, np.int32)
        keys = SYMBOLS + rng.permuted(np.tile(np.arange(symbols), (rows, 1)), axis=1)[:, :pairs]
        values = SYMBOLS + symbols + rng.integers(symbols, size=(rows, pairs))
        order = rng.permuted(np.tile(np.arange(pairs), (rows, 1)), axis=1)[:, :questions]
        index, steps = np.arange(rows)[:, None], 2 * np.arange(pairs)
        tokens[index, steps], tokens[index, steps + 1] = keys, values
        places = group[:, None] + steps[:questions]
        tokens[index, places] = np.take_along_axis(keys, order, 1)
        tokens[index, places + 1] = np.take_along_axis(values, order, 1)
        return Puzzle(tokens, answers_at(tokens, places), group)

    return Task(draw, SYMBOLS + 2 * symbols, length, 1 / symbols)


def needle(distances: tuple[int, ...], symbols: int = 8) -> Task:
    """One marked value in a row of noise, asked for at the end."""
    length = max(distances) + 3

    def draw(rng, rows):
        group = rng.choice(distances, rows)
        noise = SYMBOLS + symbols
        tokens = noise + rng.integers(symbols, size=(rows, length)).astype(np.int32)
        index, values = np.arange(rows), SYMBOLS + rng.integers(symbols, size=rows)
        for place in (length - 2 - group, np.full(rows, length - 2)):
            tokens[index, place] = QUERY
            tokens[index, place + 1] = values
        return Puzzle(tokens, answers_at(tokens, np.full((rows, 1), length - 2)), group)

    return Task(draw, SYMBOLS + 2 * symbols, length, 1 / symbols)


def copy(lengths: tuple[int, ...], symbols: int = 8) -> Task:
    """Symbols, the question, and the same symbols again."""
    longest = max(lengths)
    length = 2 * longest + 1

    def draw(rng, rows):
        group = rng.choice(lengths, rows)
        tokens = np.full((rows, length), FILLER, np.int32)
        labels = np.full((rows, length), IGNORED, np.int32)
        for row, n in zip(range(rows), group, strict=True):
            word = SYMBOLS + rng.integers(symbols, size=n)
            tokens[row, : 2 * n + 1] = np.concatenate([word, [QUERY], word])
            labels[row, n : 2 * n] = word
        return Puzzle(tokens, labels, group)

    return Task(draw, SYMBOLS + symbols, length, 1 / symbols)


def modular(modulus: int, terms: tuple[int, ...]) -> Task:
    """A sum of numbers modulo a prime; the sum follows the question."""
    length = max(terms) + 2

    def draw(rng, rows):
        group = rng.choice(terms, rows)
        tokens = np.full((rows, length), FILLER, np.int32)
        labels = np.full((rows, length), IGNORED, np.int32)
        for row, n in zip(range(rows), group, strict=True):
            numbers = rng.integers(modulus, size=n)
            tokens[row, : n + 2] = [*(SYMBOLS + numbers), QUERY, SYMBOLS + numbers.sum() % modulus]
            labels[row, n] = tokens[row, n + 1]
        return Puzzle(tokens, labels, group)

    return Task(draw, SYMBOLS + modulus, length, 1 / modulus)
