"""Ranks, crowding and hypervolume against pymoo (moocore's C underneath)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pymoo.indicators.hv import HV
from pymoo.operators.survival.rank_and_crowding.metrics import calc_crowding_distance
from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting

from forge_jax.search import converged, crowding_distance, hypervolume, non_dominated_rank

rank_of = jax.jit(non_dominated_rank)
crowding_of = jax.jit(crowding_distance)


def pymoo_rank(fitness):
    return NonDominatedSorting().do(fitness.astype(np.float64), return_rank=True)[1]


def sample(rows, objectives, kind):
    """Random float32 fitness: continuous, with many ties, with repeated rows, or one long chain."""
    rng = np.random.default_rng(rows + objectives)
    values = rng.random((rows, objectives)).astype(np.float32)
    return {
        "continuous": values,
        "tied": np.round(values * 6),
        "repeated": values[rng.integers(0, max(1, rows // 3), rows)],
        "chain": np.sort(values, axis=0)[rng.permutation(rows)],
    }[kind]


@pytest.mark.parametrize("kind", ["continuous", "tied", "repeated", "chain"])
@pytest.mark.parametrize(("rows", "objectives"), [(1, 2), (129, 3), (2000, 2), (2000, 4)])
def test_ranks_equal_pymoo(rows, objectives, kind):
    fitness = sample(rows, objectives, kind)
    np.testing.assert_array_equal(rank_of(fitness), pymoo_rank(fitness))


def test_ranks_are_those_of_the_definition():
    """Peeling, row by row, smaller than anything that could share a mistake with the code."""
    fitness = sample(60, 3, "tied")
    left, expected = set(range(60)), {}
    while left:
        front = {
            i
            for i in left
            if not any(
                (fitness[j] <= fitness[i]).all() and (fitness[j] < fitness[i]).any() for j in left
            )
        }
        expected |= dict.fromkeys(front, len(set(expected.values())))
        left -= front
    assert [expected[i] for i in range(60)] == rank_of(fitness).tolist()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_failed_rows_rank_behind_every_finite_row(bad):
    fitness = sample(150, 2, "continuous")
    fitness[::3, 1] = bad
    rank = np.asarray(rank_of(fitness))
    finite = np.isfinite(fitness).all(axis=1)
    np.testing.assert_array_equal(rank[finite], pymoo_rank(fitness[finite]))
    assert set(rank[~finite]) == {rank[finite].max() + 1}


def test_all_failed_rows_share_rank_zero():
    assert rank_of(jnp.full((5, 2), jnp.nan)).tolist() == [0] * 5


def test_rank_runs_under_vmap_and_takes_integers():
    fitness = np.stack([sample(40, 2, "tied"), sample(40, 2, "continuous")])
    expected = np.stack([pymoo_rank(f) for f in fitness])
    np.testing.assert_array_equal(jax.vmap(non_dominated_rank)(jnp.asarray(fitness)), expected)
    whole = fitness[0].astype(np.int32)
    np.testing.assert_array_equal(rank_of(whole), expected[0])


def test_rank_wants_a_matrix():
    with pytest.raises(ValueError, match=r"\(population, objectives\), got \(3,\)"):
        non_dominated_rank(jnp.zeros(3))


@pytest.mark.parametrize("kind", ["continuous", "tied", "repeated", "chain"])
@pytest.mark.parametrize(("rows", "objectives"), [(100, 2), (400, 3)])
def test_crowding_equals_pymoo_within_each_rank(rows, objectives, kind):
    fitness = sample(rows, objectives, kind)
    rank = pymoo_rank(fitness)
    crowding = np.asarray(crowding_of(fitness, rank))
    for front in range(rank.max() + 1):
        rows_of = fitness[rank == front].astype(np.float64)
        few = len(rows_of) <= 2
        want = np.full(len(rows_of), np.inf) if few else calc_crowding_distance(rows_of)
        np.testing.assert_allclose(crowding[rank == front], want, rtol=1e-4, atol=1e-6)


def test_crowding_without_ranks_is_one_group_and_failed_rows_have_no_room():
    fitness = sample(30, 2, "continuous")
    want = calc_crowding_distance(fitness.astype(np.float64))
    np.testing.assert_allclose(crowding_distance(jnp.asarray(fitness)), want, rtol=1e-4)
    failed = np.concatenate([fitness, np.full((3, 2), np.nan, np.float32)])
    np.testing.assert_allclose(
        crowding_distance(jnp.asarray(failed)), np.r_[want, 0, 0, 0], rtol=1e-4
    )


@pytest.mark.parametrize("objectives", [1, 2, 3, 4])
@pytest.mark.parametrize("rows", [1, 7, 100])
def test_hypervolume_equals_pymoo(rows, objectives):
    rng = np.random.default_rng(rows)
    points = np.abs(rng.normal(size=(rows, objectives)))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    # Dominated rows, repeated rows, shared coordinates, rows beyond the reference.
    points = np.concatenate([points, points[: rows // 2], np.round(points, 1), points + 0.3])
    reference = np.linspace(1.1, 0.9, objectives)
    want = HV(ref_point=reference)(points)
    assert hypervolume(points, reference) == pytest.approx(want, rel=1e-12)


def test_hypervolume_by_hand_and_of_nothing():
    assert hypervolume([[1, 2], [2, 1]], [3, 3]) == 3
    assert hypervolume([[-1, -1, -1]], [1, 1, 1]) == 8
    assert hypervolume([[3, 0], [np.nan, 0], [-np.inf, 0]], [3, 3]) == 0
    assert hypervolume(jnp.zeros((0, 3)), jnp.ones(3)) == 0


@pytest.mark.parametrize(
    ("front", "reference"),
    [(np.ones((2, 5)), np.ones(5)), (np.ones((2, 2)), np.ones(3)), ([1], [2])],
)
def test_hypervolume_names_what_it_cannot_do(front, reference):
    with pytest.raises(ValueError, match="1 to 4 objectives"):
        hypervolume(front, reference)


def test_convergence_wants_a_full_quiet_window():
    rising = list(np.linspace(0.5, 0.9, 30))
    assert not converged(rising)
    assert not converged([*rising, *[0.9] * 9])
    assert converged([*rising, *[0.9] * 10])
    assert converged([*rising, *np.linspace(0.9, 0.905, 10)])
    assert not converged([0.9] * 10)
    assert not converged([0.0] * 50)
    assert not converged([*[0.9] * 20, np.nan, 0.9])
    assert converged([1.0, 1.0], window=1, tolerance=0.0)
    with pytest.raises(ValueError, match="`window` >= 1"):
        converged([1.0], window=0)
