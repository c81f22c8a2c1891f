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

    The first has an even place, so that in tasks of pairs the two are one pair. Scored are the
    task's own targets behind the two. Where the swap changes what they can be inferred from (it may
    hit what is asked for later) no network recovers wholly.
    """
    length = held_out.scored.shape[-1]
    at = -(-length // 4) * 2
    tokens = held_out.tokens.copy()
    tokens[..., [at, at + 1]] = held_out.tokens[..., [at + 1, at]]
    scored = held_out.scored & (np.arange(length) > at)
    return Batches(tokens, scored), Batches(held_out.tokens, scored)


def needles(held_out: Batches, vocabulary: int, seed: int = 0) -> tuple[Batches, Batches]:
    """Random tokens, among them a, b, c in a row; at the end a again: is b expected?

    a stands nowhere else. Scored is b alone. In the row without the needle b and c have changed
    places: it holds the same tokens, and c follows the first a.
    """
    rng = np.random.default_rng(seed)
    shape = held_out.tokens.shape
    length = shape[-1] - 1
    a, b, c = np.moveaxis(
        rng.permuted(np.tile(np.arange(vocabulary), (*shape[:-1], 1)), axis=-1)[..., :3], -1, 0
    )
    tokens = rng.integers(vocabulary - 1, size=shape)
    tokens += tokens >= a[..., None]  # any token but a
    place = rng.integers(max(1, length // 2 - 1), size=shape[:-1])[..., None]

    def row(second, third):
        found = tokens.copy()
        places = (place, place + 1, place + 2, length - 1, length)
        for value, where in zip((a, second, third, a, b), places, strict=True):
            np.put_along_axis(found, np.broadcast_to(where, place.shape), value[..., None], -1)
        return found.astype(np.int32)

    scored = np.broadcast_to(np.arange(length) == length - 1, held_out.scored.shape)
    return Batches(row(b, c), scored), Batches(row(c, b), scored)


def make(held_out: Batches, vocabulary: int) -> Shocks:
    """The shocks of a task's held-out batches.

    Raises:
      ValueError: there are fewer than three tokens, rows of fewer than six, or no target that is
        scored behind the middle.
    """
    length = held_out.scored.shape[-1]
    if vocabulary < 3 or length < 6:
        raise ValueError(
            f"The shocks of `--deep-steps` need three tokens and rows of six (`--seq-len`), got "
            f"{vocabulary} and rows of {length}."
        )
    found = Shocks(swapped(held_out), needles(held_out, vocabulary))
    if not found.error_recovery[0].scored.any():
        raise ValueError(
            f"The shocks of `--deep-steps` need a scored target behind a row's middle, rows of "
            f"{length} (`--seq-len`) have none."
        )
    return found


def measured(nats: Callable[[Batches], float], shocks: Shocks) -> dict[str, float]:
    """What the shocks do, in nats per scored target; `nats` scores batches.

    error_recovery: the loss that the swap costs. Who reads nothing pays nothing: it compares
    networks of like scores. needle: the loss that having seen b behind a saves; more is better, 0
    is a network that does not look up what followed.
    """
    after, before = map(nats, shocks.error_recovery)
    seen, unseen = map(nats, shocks.needle)
    return {"error_recovery": after - before, "needle": unseen - seen}
