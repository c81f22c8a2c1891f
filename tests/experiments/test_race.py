"""What every race shares: differences, ratios of rounds, ceilings, tables."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from experiments.bench import race  # noqa: E402

pytestmark = pytest.mark.torch


def test_differences():
    a, b = {"x": jnp.ones(3), "y": jnp.zeros(2) + 2}, {"x": torch.ones(3), "y": torch.full((2,), 4)}
    assert race.relative(a, a) == 0
    assert race.relative(a, b) == 0.5
    assert race.relative(jnp.ones(3), torch.ones(4)) == np.inf
    assert race.unequal(jnp.arange(4), torch.tensor([0, 1, 2, 4])) == 0.25
    assert race.unequal(jnp.arange(4), torch.arange(3)) == np.inf


def test_a_nan_is_a_difference():
    whole, broken = jnp.ones(2), jnp.array([1.0, jnp.nan])
    entries = {
        "a": race.Contender(lambda: (whole, whole)),
        "b": race.Contender(lambda: (whole, broken)),
    }
    with pytest.raises(ValueError, match="nan"):
        race.check(race.Race("x", "x", {}, entries, race.relative, 1.0))


def test_the_median_is_of_the_rounds_ratios():
    """By hand: a slow second round, on both sides, changes no ratio; medians 2 and 5 do."""
    assert race.median_ratio([2.0, 60.0, 2.0], [1.0, 20.0, 5.0]) == 2.0
    assert race.median_ratio([1.0, 9.0], [1.0, 3.0]) == 2.0


def test_rounds_are_interleaved_and_the_first_is_not_counted():
    calls = []
    runs = {name: functools.partial(calls.append, name) for name in "ab"}
    seconds = race.interleaved(runs, 3)
    assert calls == list("ab" * 4)
    assert {name: len(taken) for name, taken in seconds.items()} == {"a": 3, "b": 3}


def test_ceilings_are_positive():
    rates = race.ceilings(32, 1)
    assert len(rates) == 4
    assert all(rate > 0 for rate in rates.values())
    assert next(iter(race.ceilings(32, 1, jnp.bfloat16))).startswith("bfloat16 product of 32")


def test_numbers_and_tables_are_shown():
    assert [race.shown(x) for x in (None, 1234.5, 0.0123456, 12.34)] == [
        "-",
        "1,234",
        "0.0123",
        "12.3",
    ]
    assert race.markdown(("a", "b"), [("1", "2")]) == "| a | b |\n|---|---|\n| 1 | 2 |"
