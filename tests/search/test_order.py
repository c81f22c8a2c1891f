"""Sorts and places, against NumPy's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from forge_jax.search import order

AWKWARD = np.array([0.0, -0.0, np.nan, np.inf, -np.inf, 1e-30, -1e-30, 3.0, -3.0, -np.nan] * 3)
KINDS = {
    "floats": lambda rng: rng.normal(size=300).astype(np.float32),
    "ties": lambda rng: rng.integers(-3, 4, 300).astype(np.float32),
    "awkward": lambda rng: rng.permutation(AWKWARD).astype(np.float32),
    "halves": lambda rng: rng.normal(size=300).astype(np.float16),
    "integers": lambda rng: rng.integers(-(2**31), 2**31, 300, dtype=np.int32),
    "unsigned": lambda rng: rng.integers(0, 2**32, 300, dtype=np.uint32),
    "booleans": lambda rng: rng.integers(0, 2, 300).astype(bool),
}


@pytest.mark.parametrize("kind", KINDS)
def test_one_key(kind):
    values = KINDS[kind](np.random.default_rng(0))
    found = jax.jit(order.argsort)(values)
    np.testing.assert_array_equal(found, np.argsort(values, kind="stable"))
    ordered = np.sort(values)
    np.testing.assert_array_equal(order.places(jnp.asarray(values)), ordered.searchsorted(values))


@pytest.mark.parametrize("rows", [1, 257, 65_536, 65_537])
def test_several_keys_up_to_and_beyond_what_32_bits_hold(rows):
    rng = np.random.default_rng(rows)
    keys = [rng.integers(0, 1 + rows // 300, rows).astype(np.float32) for _ in range(2)]
    keys[1][rows // 2 :: 7] = np.nan
    keys.append(rng.integers(0, 9, rows))
    np.testing.assert_array_equal(jax.jit(order.lexsort)(keys), np.lexsort(keys))
