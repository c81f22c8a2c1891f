"""The cost model: counts by hand, XLA's own flop count, and coefficients planted and found."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from forge_jax.search import Limits, cost, violations

SHAPES = [(64, 64), (64, 192), (192, 64)]


@pytest.mark.parametrize(
    ("shape", "fraction", "rank"),
    [
        ((64, 192), 1.0, 64),
        ((64, 64), 0.5, 32),
        ((64, 64), 0.501, 33),
        ((10, 30), 0.3, 3),
        ((10, 30), 0.31, 4),
        ((64, 64), 0.0, 1),
    ],
)
def test_deployed_rank(shape, fraction, rank):
    rows, columns = shape
    assert cost.deployed_rank(rows, columns, fraction) == rank
    assert int(cost.deployed_rank(rows, columns, float(np.float32(fraction)))) == rank
    assert int(jax.jit(lambda f: cost.deployed_rank(rows, columns, f))(fraction)) == rank


def test_a_matrix_runs_factored_only_where_that_is_cheaper():
    assert not cost.runs_factored(64, 64, 32)
    assert cost.runs_factored(64, 64, 31)
    assert cost.runs_factored(64, 192, 47)
    assert not cost.runs_factored(64, 192, 48)


@pytest.mark.parametrize("fraction", [1.0, 0.25])
def test_counts_equal_xla(fraction):
    """The flops and bytes of one matrix product as XLA counts them in its compiled program."""
    rows, columns, tokens = 64, 192, 32
    rank = int(cost.deployed_rank(rows, columns, fraction))
    x, u, s, vt = (jnp.ones(n) for n in ((tokens, rows), (rows, rank), rank, (rank, columns)))
    if fraction == 1.0:
        compiled = jax.jit(jnp.matmul).lower(x, jnp.ones((rows, columns))).compile()
    else:
        compiled = jax.jit(lambda x, u, s, vt: ((x @ u) * s) @ vt).lower(x, u, s, vt).compile()
    measured = compiled.cost_analysis()
    assert measured is not None
    counted = cost.counts([(rows, columns)], fraction, tokens)
    assert counted.flops == pytest.approx(measured["flops"], rel=1e-6)
    # XLA also counts a pass over the scaled activations, which our model leaves to the cache.
    assert counted.bytes <= measured["bytes accessed"] <= 1.5 * counted.bytes


def test_counts_add_up_and_follow_the_rank():
    one = cost.counts(SHAPES[:1], 1.0, 10)
    assert one == (2 * 10 * 64 * 64, 4 * (64 * 64 + 10 * 128))
    fractions = np.linspace(0.05, 1.0, 20)
    work = cost.counts(SHAPES, fractions, 10)
    assert work.flops.shape == (20,)
    assert (np.diff(work.flops) >= 0).all()
    assert work.flops[0] < 0.2 * work.flops[-1]
    np.testing.assert_allclose(work.bytes[4], cost.counts(SHAPES, fractions[4], 10).bytes)
    traced = jax.jit(lambda f: cost.counts(SHAPES, f, 10))(jnp.float32(fractions))
    np.testing.assert_allclose(traced.flops, work.flops, rtol=1e-6)
    np.testing.assert_allclose(traced.bytes, work.bytes, rtol=1e-6)


def test_planted_coefficients_are_found():
    """Prefill and decode runs separate flops from bytes; 1 % noise moves a prediction by 2 %."""
    truth = cost.LatencyModel(2e-3, 1e-11, 1e-10)
    runs = [
        cost.counts([(768, 3072)] * 24, fraction, tokens)
        for fraction in (0.1, 0.3, 0.5, 1.0)
        for tokens in (1, 64, 512)
    ]
    seconds = np.array([cost.predict(truth, run) for run in runs])
    np.testing.assert_allclose(cost.calibrate(runs, seconds), truth, rtol=1e-6)
    noise = 1 + 0.01 * np.random.default_rng(0).normal(size=len(runs))
    fitted = cost.calibrate(runs, seconds * noise)
    assert min(fitted) >= 0
    other = cost.counts([(768, 3072)] * 24, 0.2, 512)
    assert cost.predict(fitted, other) == pytest.approx(cost.predict(truth, other), rel=0.02)


def test_no_coefficient_is_negative_when_time_falls_with_work():
    runs = [cost.Counts(flops, 10.0) for flops in (1e9, 2e9, 3e9)]
    model = cost.calibrate(runs, [3.0, 2.0, 1.0])
    assert min(model) >= 0
    assert cost.predict(model, runs[0]) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("runs", "seconds"),
    [([(1.0, 1.0)], [1.0]), ([(1.0, 1.0)] * 2, [1.0]), ([(1.0, 1.0)] * 2, [1, 0])],
)
def test_calibration_refuses_what_it_cannot_fit(runs, seconds):
    with pytest.raises(ValueError, match="`runs` must be"):
        cost.calibrate([cost.Counts(*run) for run in runs], seconds)


def test_memory_is_parameters_and_temporaries():
    full = cost.memory(SHAPES, 1.0, 1000.0)
    assert full == 4 * (64 * 64 + 2 * 64 * 192) + 1000
    low = cost.memory(SHAPES, 0.25, 1000.0)
    assert low == 4 * (16 * 129 + 2 * 16 * 257) + 1000
    assert cost.memory(SHAPES, 0.25, 0.0, itemsize=2) == 2 * (16 * 129 + 2 * 16 * 257)


def test_noise_is_no_difference():
    rng = np.random.default_rng(0)
    slow, fast = rng.normal(1.0, 0.02, 15), rng.normal(0.8, 0.02, 15)
    assert cost.exceeds_noise(slow, fast)
    assert not cost.exceeds_noise(fast, slow)
    assert not cost.exceeds_noise(rng.normal(1.0, 0.02, 15), rng.normal(0.99, 0.02, 15))


def test_violations_are_fractions_of_the_larger_of_limit_and_value():
    kept = {"latency_ms": 80, "vram_gb": 1.9, "throughput_tps": 60, "accuracy": 0.9, "kl": 0.5}
    assert all(float(v) == 0 for v in violations(kept).values())
    missed = {"latency_ms": 150, "vram_gb": 2.5, "throughput_tps": 25, "accuracy": 0.425, "kl": 3.0}
    want = {
        "latency_ms": 1 / 3,
        "vram_gb": 0.2,
        "throughput_tps": 0.5,
        "accuracy": 0.5,
        "kl": 2 / 3,
    }
    for name, value in violations(missed).items():
        assert float(value) == pytest.approx(want.pop(name))
    assert want == {}


def test_a_hopeless_limit_does_not_drown_the_others():
    """Far too slow both ways: the accurate one must win, as its accuracy is within the limit."""
    found = violations({"latency_ms": jnp.array([1100.0, 620.0]), "accuracy": jnp.array([0.9, 0])})
    accurate, useless = np.sum([np.asarray(v) for v in found.values()], axis=0)
    assert accurate < useless


def test_an_infinite_value_is_no_violation_like_another():
    found = violations({"kl": jnp.array([jnp.inf, 1e30]), "accuracy": jnp.array([-jnp.inf, 0.0])})
    assert np.isinf(found["kl"]).tolist() == [True, False]
    assert np.isinf(found["accuracy"]).tolist() == [True, False]


def test_violations_of_a_population_and_of_chosen_limits():
    metrics = {"latency_ms": jnp.array([50.0, 300.0, jnp.nan]), "accuracy": jnp.zeros(3)}
    found = violations(metrics, Limits(latency_ms=200.0, accuracy=None))
    assert list(found) == ["latency_ms"]
    np.testing.assert_allclose(found["latency_ms"], [0, 1 / 3, np.nan], rtol=1e-6)
    with pytest.raises(ValueError, match=r"got \['latency'\]"):
        violations({"latency": 1.0})
