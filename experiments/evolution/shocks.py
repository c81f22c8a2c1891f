"""Shocks: what a trained network makes of input that its training did not have.

They are held-out batches that were tampered with, of the same shapes, so that the compiled scoring
of a candidate takes them as they are.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from experiments.evolution.tasks import Batches


class Shocks(NamedTuple):
    """Pairs of batches, with the shock and without; the same targets are scored."""

    error_recovery: tuple[Batches, Batches]
    needle: tuple[Batches, Batches]


def swapped(held_out: Batches) -> tuple[Batches, Batches]:
    """Two neighbouring tokens in the middle of each row change places.

    Scored are the task's own targets behind the two, which are what they were.
    """
    length = held_out.scored.shape[-1]
    at = length // 2
    tokens = held_out.tokens.copy()
    tokens[..., [at, at + 1]] = held_out.tokens[..., [at + 1, at]]
    scored = held_out.scored & (np.arange(length) > at)
    return Batches(tokens, scored), Batches(held_out.tokens, scored)


def needles(held_out: Batches, vocabulary: int, seed: int = 0) -> tuple[Batches, Batches]:
    """Random tokens, among them one pair a, b; at the end a again: is b expected?

    a stands nowhere else. Scored is b alone. In the row without the needle another token follows
    the first a.
    """
    rng = np.random.default_rng(seed)
    shape = held_out.tokens.shape
    length = shape[-1] - 1
    a, b, other = np.moveaxis(
        rng.permuted(np.tile(np.arange(vocabulary), (*shape[:-1], 1)), axis=-1)[..., :3], -1, 0
    )
    tokens = rng.integers(vocabulary - 1, size=shape)
    tokens += tokens >= a[..., None]  # any token but a
    place = rng.integers(max(1, length // 2), size=shape[:-1])[..., None]
    for value, where in ((a, place), (a, length - 1), (b, length)):
        np.put_along_axis(tokens, np.broadcast_to(where, place.shape), value[..., None], -1)
    without = tokens.copy()
    np.put_along_axis(tokens, place + 1, b[..., None], -1)
    np.put_along_axis(without, place + 1, other[..., None], -1)
    scored = np.broadcast_to(np.arange(length) == length - 1, held_out.scored.shape)
    return Batches(tokens.astype(np.int32), scored), Batches(without.astype(np.int32), scored)


def make(held_out: Batches, vocabulary: int) -> Shocks:
    """The shocks of a task's held-out batches.

    Raises:
      ValueError: there are fewer than three tokens, or rows of fewer than four.
    """
    if vocabulary < 3 or held_out.scored.shape[-1] < 4:
        raise ValueError(
            f"Shocks need three tokens and rows of four, got {vocabulary} and rows of "
            f"{held_out.scored.shape[-1]}."
        )
    return Shocks(swapped(held_out), needles(held_out, vocabulary))


def measured(nats: Callable[[Batches], float], shocks: Shocks) -> dict[str, float]:
    """What the shocks do, in nats per scored target; `nats` scores batches.

    error_recovery: the loss that the swap costs; less is better. needle: the loss that having seen
    the needle saves; more is better, 0 is a network that does not look back.
    """
    after, before = map(nats, shocks.error_recovery)
    seen, unseen = map(nats, shocks.needle)
    return {"error_recovery": after - before, "needle": unseen - seen}
