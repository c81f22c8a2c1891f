"""What candidates learn: procedural tasks whose entropy is known, text, or the bytes of a file.

A task draws rows of tokens and says which targets are scored. Every batch is a function of (part,
seed, number), so all candidates see the same ones, also after a resume, and a held-out batch never
is a training batch: text is split by its bytes, a procedural task draws from another stream.
"""

import hashlib
import pydoc_data.topics
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Int
from scipy import stats

Part = Literal["train", "held_out"]
Rows = tuple[Int[np.ndarray, "rows time+1"], Bool[np.ndarray, "rows time"]]
HELD_OUT = 0.1  # share of a text, its end


class Task(NamedTuple):
    """A source of rows."""

    name: str
    vocabulary: int
    unit: str  # what a score is per: "byte", or "scored token"
    draw: Callable[[np.random.Generator, Part, int, int], Rows]  # of (rows, tokens to read)
    floor: Callable[[int], float] | None  # least possible nats per unit, by tokens to read
    digest: str = ""  # of the text


class Batches(NamedTuple):
    """Stacked batches; the target of tokens[..., t] is tokens[..., t + 1]."""

    tokens: np.ndarray  # (batches, rows, time + 1) int32
    scored: np.ndarray  # (batches, rows, time) bool: which targets count


def batches(
    task: Task, part: Part, seed: int, numbers: range, *, rows: int, length: int
) -> Batches:
    """The batches of these numbers in a part, each of `rows` rows of `length` targets."""
    stream = 0 if part == "train" else 1
    drawn = [
        task.draw(np.random.default_rng([stream, seed, i]), part, rows, length) for i in numbers
    ]
    tokens, scored = (np.stack(x) for x in zip(*drawn, strict=True))
    return Batches(tokens.astype(np.int32), scored)


def unigram_entropy(found: Batches, vocabulary: int) -> float:
    """Nats per unit of who knows only how often each scored target comes."""
    counts = np.bincount(found.tokens[..., 1:][found.scored], minlength=vocabulary)
    return float(stats.entropy(counts))


def markov(symbols: int = 16) -> Task:
    """A chain of order two, its table drawn once; scored where both predecessors are there."""
    table = np.random.default_rng(2).dirichlet(np.full(symbols, 0.2), size=(symbols, symbols))
    edges = table.cumsum(-1)
    entropy = -(table * np.log(np.maximum(table, 1e-300))).sum(-1)

    def draw(rng, part, rows, length):
        x = rng.integers(symbols, size=(rows, length + 1))
        u = rng.random((rows, length + 1))
        for t in range(2, length + 1):
            above = u[:, t, None] > edges[x[:, t - 2], x[:, t - 1]]
            x[:, t] = np.minimum(above.sum(-1), symbols - 1)
        return x, np.broadcast_to(np.arange(length) >= 1, (rows, length))

    def floor(length):
        """Mean over the scored targets of the entropy given the pair before."""
        pair, total = np.full((symbols, symbols), symbols**-2), 0.0
        for _ in range(length - 1):
            total += float((pair * entropy).sum())
            pair = np.einsum("ab,abc->bc", pair, table)
        return total / (length - 1)

    return Task("markov", symbols, "scored token", draw, floor)


def recall(keys: int = 32) -> Task:
    """Associative recall (Arora et al. 2023): pairs of key and value, then keys in any order.

    The first half of a row holds the pairs; the values after it are scored, and certain.
    """

    def draw(rng, part, rows, length):
        count = min(keys, max(1, (length + 1) // 4))
        key = rng.permuted(np.tile(np.arange(keys), (rows, 1)), axis=1)[:, :count]
        value = rng.integers(keys, 2 * keys, size=(rows, count))
        asked = rng.integers(count, size=(rows, (length + 2) // 2 - count))
        at = np.concatenate([np.tile(np.arange(count), (rows, 1)), asked], axis=1)
        pairs = np.stack([np.take_along_axis(x, at, 1) for x in (key, value)], axis=-1)
        target = np.arange(1, length + 1)
        scored = (target >= 2 * count) & (target % 2 == 1)
        return pairs.reshape(rows, -1)[:, : length + 1], np.tile(scored, (rows, 1))

    return Task("recall", 2 * keys, "scored token", draw, lambda length: 0.0)


def copy(symbols: int = 16) -> Task:
    """A random string, then the same again, which is scored."""

    def draw(rng, part, rows, length):
        half = (length + 1) // 2
        once = rng.integers(symbols, size=(rows, half))
        x = np.concatenate([once, once, once[:, :1]], axis=1)[:, : length + 1]
        return x, np.tile(np.arange(1, length + 1) >= half, (rows, 1))

    return Task("copy", symbols, "scored token", draw, lambda length: 0.0)


def sums(modulus: int = 5) -> Task:
    """Numbers and after each one the running sum in the modulus; the sums are scored."""

    def draw(rng, part, rows, length):
        x = rng.integers(modulus, size=(rows, (length + 2) // 2))
        y = modulus + x.cumsum(axis=1) % modulus
        both = np.stack([x, y], axis=-1).reshape(rows, -1)[:, : length + 1]
        return both, np.tile(np.arange(1, length + 1) % 2 == 1, (rows, 1))

    return Task("sums", 2 * modulus, "scored token", draw, lambda length: 0.0)


def bytes_of(name: str, content: bytes) -> Task:
    """Windows of a text, each byte scored; the last tenth is held out."""
    x = np.frombuffer(content, np.uint8)
    cut = int(len(x) * (1 - HELD_OUT))
    parts = {"train": x[:cut], "held_out": x[cut:]}

    def draw(rng, part, rows, length):
        text = parts[part]
        if len(text) <= length:
            raise ValueError(
                f"A row of {length + 1} bytes does not fit into the {part} part of {name}, "
                f"which has {len(text)}: use a longer text or a shorter --seq-len."
            )
        start = rng.integers(len(text) - length, size=(rows, 1))
        return text[start + np.arange(length + 1)], np.ones((rows, length), bool)

    return Task(name, 256, "byte", draw, None, hashlib.sha256(content).hexdigest()[:16])


def text() -> Task:
    """The reference manual that Python carries for `help()`."""
    topics = pydoc_data.topics.topics
    return bytes_of("text", "\n\n".join(topics[name] for name in sorted(topics)).encode())


TASKS: dict[str, Callable[[], Task]] = {f.__name__: f for f in (markov, recall, copy, sums, text)}


def load(name: str, file: Path | None = None) -> Task:
    """The task of this name, or the bytes of a file."""
    if file is not None:
        return bytes_of(file.name, file.read_bytes())
    return TASKS[name]()
