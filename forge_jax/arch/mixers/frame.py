"""What a mixer is told besides its tokens."""

from typing import Any, NamedTuple

from jaxtyping import Array, Float, Int


class Frame(NamedTuple):
    """Positions and traced scalars of one call; the same in every layer."""

    positions: Int[Array, " time"]
    # of queries and of keys, where they rotate; for a latent cache of all positions of the context
    turn: Float[Array, "2 2 places half"] | None
    knobs: dict[str, Any]  # scalars that need no new program
    step: Int[Array, ""] | int  # training steps taken, for Performer's redraws
    live: Any = 1.0  # weight of the losses beside; 0 in a loop that is not taken
