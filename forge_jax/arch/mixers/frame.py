"""What a mixer is told besides its tokens."""

from typing import Any, NamedTuple

from jaxtyping import Array, Float, Int


class Frame(NamedTuple):
    """Positions and traced scalars of one call; the same in every layer."""

    positions: Int[Array, " time"]
    turn: Float[Array, "2 2 time half"] | None  # of queries and of keys, where they rotate
    knobs: dict[str, Any]  # scalars that need no new program
    step: Int[Array, ""] | int  # training steps taken, for Performer's redraws
