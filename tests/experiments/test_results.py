"""The choice of the mixture, the paired gain, the summary, the cost model's prediction."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from experiments import results
from experiments.data.batches import Batch
from experiments.data.tasks import Task
from experiments.experts import Settings
from experiments.measure import cost_model
from experiments.mixture import Found
from experiments.mixture import Settings as Mixing
from experiments.scoring import Score
from forge_jax import search, svf
from forge_jax.domains import exact

DOMAINS = ("math", "code")


def correctness(seed, rates):
    """One seed's table: row -> domain -> (items,) bool, right at the given rates."""
    rng = np.random.default_rng(seed)
    return {
        row: {d: rng.random(200) < rate for d, rate in zip(DOMAINS, pair, strict=True)}
        for row, pair in rates.items()
    }


RATES = {
    "base": (0.0, 0.1),
    "math": (0.9, 0.2),
    "code": (0.1, 0.9),
    "uniform": (0.6, 0.6),
    "alpha_one": (0.7, 0.3),
    "best": (0.8, 0.85),
}


def test_gain_of_one_domain_is_the_paired_interval_of_scipy():
    correct = {row: {"math": table["math"]} for row, table in correctness(0, RATES).items()}
    got = results.gain([correct], ["math"], ["uniform"])
    differences = correct["best"]["math"].astype(float) - correct["uniform"]["math"]
    low, high = stats.norm.interval(0.95, differences.mean(), stats.sem(differences))
    np.testing.assert_allclose(
        [got["mean"], got["low"], got["high"]], [differences.mean(), low, high], rtol=1e-4
    )


def test_gain_is_over_the_better_rival_of_each_seed():
    per_seed = [correctness(seed, RATES) for seed in range(3)]
    got = results.gain(per_seed, DOMAINS, ("uniform", "alpha_one"))
    means = [
        {row: np.mean([table[row][d].mean() for d in DOMAINS]) for row in table}
        for table in per_seed
    ]
    want = np.mean([m["best"] - max(m["uniform"], m["alpha_one"]) for m in means])
    assert got["mean"] == pytest.approx(want)
    assert got["low"] < got["mean"] < got["high"]


def test_summary_keeps_unplanted_tasks_apart_and_says_nothing_of_a_share_of_nothing():
    table = correctness(0, {**RATES, "math": (0.0, 0.2)})
    for row in table.values():
        row["bits"] = np.ones(5, bool)
    got = results.summary([table], DOMAINS, ["bits"], [4])
    assert set(got["best"]) == set(DOMAINS)
    assert got["unplanted"]["best"] == {"bits": 1.0}
    assert got["kept"]["math"] is None
    assert got["kept"]["code"] == pytest.approx(
        table["best"]["code"].mean() / table["code"]["code"].mean()
    )


def test_the_best_keeps_the_limit_and_is_never_without_a_number():
    accuracy = np.array([0.9, 0.8, 0.95, 0.99])
    assert results.best_of(accuracy, np.array([0.5, 0.2, 2.0, np.nan]), 1.0) == 0
    assert results.best_of(accuracy, np.array([5.0, 2.0, 2.0, np.nan]), 1.0) == 2
    assert results.best_of(np.array([0.9, 0.9]), np.array([0.5, 0.2]), 1.0) == 1
    # the base, last, keeps every limit: it wins by accuracy alone
    assert results.best_of(np.array([0.9, 0.8, 0.3]), np.array([1.5, 2.0, 0.0]), 1.0) == 0
    assert results.best_of(np.array([0.2, 0.1, 0.3]), np.array([1.5, 2.0, 0.0]), 1.0) == 2
    with pytest.raises(ValueError, match="finite"):
        results.best_of(accuracy, np.full(4, np.nan), 1.0)


def test_what_is_chosen_is_the_best_at_full_rank_and_then_the_least_rank():
    """An accuracy that is known for every mixture and rank: alpha = (1, 0.5), rank 0.6 at least."""

    def scorer(weights, candidates, batch, task, wanted):
        off = np.abs(candidates.alphas["a"] - [1.0, 0.5]).sum(axis=1)
        right = 0.9 - 0.1 * off - 0.5 * np.maximum(0.6 - candidates.ranks, 0)
        right = np.where(np.isnan(off), 1.0, right)
        kl = np.where(candidates.alphas["a"][:, 0] > 1.5, 2.0, 0.1 * off)
        return Score(right[:, None], kl)

    task = Task("t", {"validation": []}, {"validation": Batch(*[np.zeros(1)] * 5)}, exact)
    wide = {"a": np.ones((4, 400), np.float32)}
    weights = {"factors": svf.decompose(wide, lambda path, leaf: True)[0]}
    problem: Any = SimpleNamespace(scorer=scorer, weights=weights, tasks=[task])
    alpha = np.array([[[0.2, 0.2]], [[1.0, 0.5]], [[1.1, 0.5]], [[1.9, 0.5]]], np.float32)
    genomes = {"alpha": alpha, "rank": np.array([1.0, 0.2, 1.0, 1.0])}
    found = Found(genomes, np.zeros((4, 4)), np.zeros(4), np.zeros(4), [])
    limits = {"kl_limit": 1.0, "lowest_rank": 0.1, "twin_loss": 0.01}
    chosen = results.choose(found, problem, {}, {"a": 0}, **limits)
    np.testing.assert_allclose(chosen.alpha, [[1.0, 0.5]])
    # of the ranks tried, one for each of 4 + 5 candidates, the last that costs at most 0.01
    ranks = np.linspace(1, 0.1, 9)
    assert chosen.twin_rank == pytest.approx(ranks[ranks >= 0.58].min())
    # a square matrix of half the rank is no smaller: no twin
    square = {"a": np.ones((4, 4), np.float32)}
    weights["factors"] = svf.decompose(square, lambda path, leaf: True)[0]
    assert results.choose(found, problem, {}, {"a": 0}, **limits).twin_rank == 1


@pytest.mark.parametrize(
    ("accuracy", "want"),
    [
        ([0.9, 0.9, 0.89, 0.5, 0.9], 2),
        ([0.9, 0.5, 0.9], 0),
        ([0.9, 0.91, 0.92], 2),
    ],
)
def test_the_rank_falls_until_it_first_costs_too_much(accuracy, want):
    assert results.last_kept(np.array(accuracy), accuracy[0] - 0.02) == want


def test_memory_falls_only_where_a_matrix_runs_factored():
    """The prediction is the full program's bytes less what the factored matrices save."""
    rng = np.random.default_rng(0)
    params = {"a": rng.normal(size=(12, 12)).astype(np.float32)}
    factors, _ = svf.decompose(params, lambda path, leaf: True)

    def timing(seconds, size):
        return {"forward": [seconds] * 3, "decode": [seconds] * 3, "memory": size}

    measured = {"1.0": timing(1.0, 10_000.0), "0.25": timing(0.5, 9_000.0)}
    costs = cost_model(factors, measured)
    latency, memory, throughput = costs.predict(np.array([1.0, 0.75, 0.25]))
    elements = np.array([144, 144, 3 * (12 + 12 + 1)])  # 9 (12 + 12) is no less than 12 x 12
    np.testing.assert_allclose(1e9 * memory, 10_000 + 4 * (elements - 144))
    # no coefficient may be negative, so two points are met closely, not exactly
    np.testing.assert_allclose(latency[[0, 2]], [1000, 500], rtol=0.02)
    np.testing.assert_allclose(throughput[[0, 2]], [-1, -2], rtol=0.02)
    noisy = {"1.0": {**timing(1.0, 1e4), "decode": [1.0, 2.0, 0.2]}, "0.25": timing(0.9, 9e3)}
    assert len(set(cost_model(factors, noisy).predict(np.array([1.0, 0.25]))[2].tolist())) == 1


@pytest.mark.parametrize(
    ("settings", "wrong", "named"),
    [
        (Settings, {"validate_every": 0}, "validate_every"),
        (Settings, {"samples": 1}, "samples"),
        (Settings, {"learning_rate": -1.0}, "learning_rate"),
        (Mixing, {"lowest_rank": 0.0}, "lowest_rank"),
        (Mixing, {"calibration_ranks": (1.0,)}, "calibration_ranks"),
        (Mixing, {"alpha_upper": -1.0}, "alpha_upper"),
        (Mixing, {"population": 1}, "population"),
    ],
)
def test_settings_out_of_range_are_refused(settings, wrong, named):
    with pytest.raises(ValueError, match=named):
        settings(**wrong).check()


def test_limits_are_the_guides():
    """100 ms, 2 GB, 50 tokens/s, 85 %, 1 nat: just outside each is a violation of it alone."""
    inside = {"accuracy": 0.86, "latency_ms": 99, "vram_gb": 1.9, "throughput_tps": 51, "kl": 0.9}
    outside = {"accuracy": 0.84, "latency_ms": 101, "vram_gb": 2.1, "throughput_tps": 49, "kl": 1.1}
    assert not any(search.violations(inside, search.Limits()).values())
    for name, value in outside.items():
        missed = search.violations({**inside, name: value}, search.Limits())
        assert [k for k, v in missed.items() if v > 0] == [name]
