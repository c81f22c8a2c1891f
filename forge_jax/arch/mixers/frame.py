"""What a mixer is told besides its tokens."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from forge_jax.arch.layers import linear


class Frame(NamedTuple):
    """Positions and traced scalars of one call; the same in every layer."""

    positions: Int[Array, " time"]
    # of queries and of keys, where they rotate; for a latent cache of all positions of the context
    turn: Float[Array, "2 2 places half"] | None
    knobs: dict[str, Any]  # scalars that need no new program
    step: Int[Array, ""] | int  # training steps taken, for Performer's redraws
    live: Any = 1.0  # weight of the losses beside; 0 in a loop that is not taken
    condition: Any = None  # (batch, time, H) of these tokens, where the document has one
    kv: Float[Array, "batch time width"] | None = None  # of other stages, in place of the tokens
    mem: Float[Array, "batch time width"] | None = None  # of other stages, besides
    ahead: Bool[Array, ""] | None = None  # given where tokens see later ones


def source(
    x: Float[Array, "batch time width"], frame: Frame, dtype: jnp.dtype
) -> Float[Array, "batch time width"]:
    """What is asked: a mixer's tokens, or those of `kv_from`, plus a map of those of `mem_from`.

    Queries, and what gates a mixer's output, come from its own tokens. Call it inside a compact
    module; that of memory is the Free Transformer's way to hand in its latent (Fleuret 2025).
    """
    asked = x if frame.kv is None else frame.kv
    return asked if frame.mem is None else asked + linear("mem", x.shape[-1], dtype)(frame.mem)
