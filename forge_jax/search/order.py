"""Stable sorts as XLA's CPU does them fast: of one array of integers at a time.

There a sort of floats, or of an array together with the indices that `argsort` carries along, costs
about eight times one of integers alone. So values are turned into integers of the same order, and
an index is the lower part of what is sorted.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

_MOST = 2**16  # rows whose place and index fit into 32 bits


def places(values: Shaped[Array, " rows"]) -> Int[Array, " rows"]:
    """Count for each value those below it; equal ones share their place, NaN is above all."""
    codes = _codes(values)
    return jnp.searchsorted(jnp.sort(codes), codes)


def argsort(values: Shaped[Array, " rows"]) -> Int[Array, " rows"]:
    """Return `jnp.argsort(values)`."""
    return lexsort([values])


def lexsort(keys: Sequence[Shaped[Array, " rows"]]) -> Int[Array, " rows"]:
    """Return `jnp.lexsort(keys)`: the order by the last key, then by the one before it."""
    rows = len(keys[0])
    if rows > _MOST:
        return jnp.lexsort(tuple(keys)).astype(jnp.int32)
    *minor, major = keys
    place = places(major)
    for key in reversed(minor):
        place = places(_joined(place, places(key)))
    # every row another number: the sort is stable
    return (jnp.sort(_joined(place, jnp.arange(rows))) % rows).astype(jnp.int32)


def _joined(major, minor):
    """Two places as one number in their order."""
    return major.astype(jnp.uint32) * len(major) + minor.astype(jnp.uint32)


def _codes(values):
    """Integers in the order of the values: the bits of a float, those below zero flipped."""
    if not jnp.issubdtype(values.dtype, jnp.floating):
        return values.astype(jnp.int32) if values.dtype == bool else values
    values = jnp.where(values == 0, 0, values)  # -0 equals 0
    values = jnp.where(jnp.isnan(values), jnp.nan, values)
    integer = jnp.dtype(f"int{8 * values.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(values, integer)
    return jnp.where(bits < 0, bits ^ jnp.iinfo(integer).max, bits)
