"""Statistics of z, whole and by matrix."""

import numpy as np
import pytest

from experiments.forms import z_statistics


def test_statistics_are_those_of_the_vectors():
    """z = 1 + delta of the second expert, by NumPy."""
    rng = np.random.default_rng(0)
    delta = {"a/kernel": rng.normal(size=(2, 5)), "b/kernel": rng.normal(3, 1, size=(2, 3))}
    found = z_statistics(delta, 1)
    whole = np.concatenate([1 + delta["a/kernel"][1], 1 + delta["b/kernel"][1]])
    vectors = {
        "": whole,
        "/a/kernel": 1 + delta["a/kernel"][1],
        "/b/kernel": 1 + delta["b/kernel"][1],
    }
    for suffix, z in vectors.items():
        for name in ("mean", "std", "min", "max"):
            assert found.pop(f"z_{name}{suffix}") == pytest.approx(getattr(np, name)(z))
    assert not found
