"""The mesh that every sharded program runs on."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

AXES = ("data", "model", "population")
"""rows of a batch; parts of each matrix; candidates of a population, or experts in training

The first is the outermost: with several hosts the rows are what is shared out among them, and the
matrices, whose parts talk most, stay within one.
"""


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """Return a mesh of `devices` (None: all of them) with the axes `AXES`; those not named are 1.

    Raises:
        ValueError: an axis is unknown or below 1, or the sizes do not use up the devices.
    """
    unknown = sorted(set(sizes) - set(AXES))
    if unknown:
        raise ValueError(f"`sizes` may name the axes {', '.join(AXES)}, got {', '.join(unknown)}.")
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    wanted = " x ".join(f"{axis}={n}" for axis, n in zip(AXES, shape, strict=True))
    if min(shape) < 1:
        raise ValueError(f"Every axis of a mesh must be at least 1, got {wanted}.")
    devices = jax.devices() if devices is None else devices
    if math.prod(shape) != len(devices):
        raise ValueError(
            f"A mesh of {wanted} needs {math.prod(shape)} devices, got {len(devices)}."
        )
    # Auto: the compiler places what lies between arguments; by default types would carry shardings.
    return jax.make_mesh(shape, AXES, (AxisType.Auto,) * len(AXES), devices=devices)
