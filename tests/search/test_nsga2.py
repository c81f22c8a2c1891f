"""NSGA-II: fronts it must reach, what may survive, and pymoo as the oracle of its parts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pymoo.core.population import Population
from pymoo.core.problem import Problem
from pymoo.operators.crossover.sbx import cross_sbx
from pymoo.operators.mutation.pm import mut_pm
from pymoo.operators.survival.rank_and_crowding import RankAndCrowding
from scipy.stats import ks_2samp

from forge_jax.search import NSGA2, hypervolume
from forge_jax.search.nsga2 import COPY, FAILED, _copies
from forge_jax.search.variation import polynomial_mutation, simulated_binary_crossover


def zdt1(x):
    g = 1 + 9 * x[:, 1:].mean(axis=1)
    return jnp.stack([x[:, 0], g * (1 - jnp.sqrt(x[:, 0] / g))], axis=1)


cross, mutate = jax.jit(simulated_binary_crossover), jax.jit(polynomial_mutation)

# One search for most tests: its three methods compile once.
ROWS, GENES = 20, 3
SMALL = NSGA2(ROWS, jnp.zeros(GENES))
PARAMS = SMALL.default_params


def evaluated(seed=0):
    """Random genomes in the unit box and random fitness."""
    rng = np.random.default_rng(seed)
    return jnp.float32(rng.random((ROWS, GENES))), jnp.float32(rng.random((ROWS, 2)))


def begin(population, fitness, violation=None):
    violation = jnp.zeros(ROWS) if violation is None else violation
    return SMALL.init(jax.random.key(0), population, fitness, PARAMS, violation)


def survivors(state, population, fitness, violation=None):
    violation = jnp.zeros(ROWS) if violation is None else violation
    return SMALL.tell(jax.random.key(1), population, fitness, state, PARAMS, violation)[0]


def same_distribution(ours, theirs):
    """Two-sample Kolmogorov-Smirnov test at one in a thousand."""
    _, chance = ks_2samp(np.ravel(ours), np.float32(np.ravel(theirs)))
    return float(np.asarray(chance)) > 1e-3


def test_zdt1_front_in_one_scan(getkey):
    """20,000 evaluations: every point of the true front has a member within 0.05."""
    algorithm = NSGA2(100, jnp.zeros(30))
    params = algorithm.default_params
    traces = []

    def generation(state, key):
        traces.append(1)
        ask_key, tell_key = jax.random.split(key)
        population, state = algorithm.ask(ask_key, state, params)
        return algorithm.tell(tell_key, population, zdt1(population), state, params)

    @jax.jit
    def search(key):
        init_key, key = jax.random.split(key)
        population = jax.random.uniform(init_key, (100, 30))
        state = algorithm.init(init_key, population, zdt1(population), params)
        return state, *jax.lax.scan(generation, state, jax.random.split(key, 200))

    first, state, metrics = search(getkey())
    assert len(traces) == 1
    grid = np.linspace(0, 1, 1001)
    true = np.stack([grid, 1 - np.sqrt(grid)], axis=1)
    distance = np.linalg.norm(true[:, None] - np.asarray(state.fitness), axis=-1)
    assert distance.min(axis=1).max() < 0.05
    assert distance.min(axis=1).mean() < 0.01
    assert int(metrics["front_size"][-1]) > 90
    assert int(state.generation_counter) == 200
    assert metrics["best_fitness"].shape == (200, 2)
    reference = np.array([1.1, 7.0])
    assert hypervolume(state.fitness, reference) > hypervolume(first.fitness, reference) + 1


def test_evosax_loop_with_pytrees(getkey):
    """The loop of evosax's own examples, as it stands there, on pytree genomes."""
    solution = {"alpha": jnp.zeros(3), "rho": jnp.zeros(())}
    algorithm = NSGA2(20, solution)
    lower = {"alpha": jnp.zeros(3), "rho": jnp.float32(0.1)}
    params = algorithm.default_params.replace(lower=lower, upper=2.0)

    @jax.jit
    def evaluate(x):
        return jnp.stack([((x["alpha"] - 1.5) ** 2).sum(axis=1), x["rho"]], axis=1)

    population = {"alpha": jax.random.uniform(getkey(), (20, 3)), "rho": jnp.ones(20)}
    state = algorithm.init(getkey(), population, evaluate(population), params)
    for _ in range(60):
        population, state = algorithm.ask(getkey(), state, params)
        assert population["alpha"].shape == (20, 3)
        assert population["rho"].shape == (20,)
        assert float(population["alpha"].min()) >= 0
        assert float(population["alpha"].max()) <= 2
        assert float(population["rho"].min()) >= np.float32(0.1)
        state, metrics = algorithm.tell(getkey(), population, evaluate(population), state, params)
    assert float(metrics["best_fitness"][0]) < 0.01
    assert float(metrics["best_fitness"][1]) < 0.105
    assert algorithm.get_population(state)["rho"].shape == (20,)


def test_there_is_no_scalar_archive():
    state = begin(*evaluated())
    assert not hasattr(state, "best_solution")
    assert not hasattr(state, "best_fitness")


def test_better_offspring_survive_and_worse_do_not():
    state = begin(*evaluated())
    offspring = jnp.full((ROWS, GENES), 0.25) + jnp.arange(ROWS)[:, None] / 100
    better = survivors(state, offspring, state.fitness - 2)
    np.testing.assert_array_equal(np.sort(better.population, axis=0), offspring)
    worse = survivors(state, offspring, state.fitness + 2)
    np.testing.assert_array_equal(np.sort(worse.population, 0), np.sort(state.population, 0))


@pytest.mark.parametrize("constrained", [False, True])
def test_survivors_equal_pymoo(constrained):
    rng = np.random.default_rng(3)
    genes = rng.random((2 * ROWS, GENES)).astype(np.float32)
    fitness = rng.random((2 * ROWS, 2)).astype(np.float32)
    # About a quarter feasible, so that infeasible members survive as well.
    missed = np.maximum(rng.normal(0.7, 1, 2 * ROWS), 0).astype(np.float32) * constrained
    problem = Problem(n_var=GENES, n_obj=2, n_ieq_constr=int(constrained))
    merged = Population.new(X=genes, F=fitness.astype(float), G=missed[:, None].astype(float))
    kept = RankAndCrowding().do(problem, merged, n_survive=ROWS)

    def rows_of(values):
        return {tuple(row) for row in np.asarray(values, np.float32).tolist()}

    state = begin(genes[:ROWS], fitness[:ROWS], missed[:ROWS])
    state = survivors(state, genes[ROWS:], fitness[ROWS:], missed[ROWS:])
    assert rows_of(state.population) == rows_of(kept.get("X"))
    if not constrained:
        ours = np.column_stack([state.population, state.rank])
        assert rows_of(ours) == rows_of(np.column_stack([kept.get("X"), kept.get("rank")]))


def test_feasible_beats_infeasible():
    violation = jnp.where(jnp.arange(ROWS) < 5, 0.0, jnp.arange(ROWS))
    state = begin(*evaluated(), violation)
    assert int(state.rank[:5].max()) < int(state.rank[5:].min())
    assert (jnp.diff(state.rank[5:]) > 0).all()
    offspring, better = state.population + 1e-3, state.fitness - 9
    after = survivors(state, offspring, better, jnp.ones(ROWS))
    assert int((after.violation == 0).sum()) == 5
    assert int((after.violation == 1).sum()) == 15
    failed = survivors(state, offspring, better, jnp.full(ROWS, jnp.nan))
    np.testing.assert_array_equal(np.sort(failed.violation), np.sort(state.violation))


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_failed_members_are_no_parents(bad, getkey):
    """Parents are told from failures by their genes, and children stay near their parents."""
    close = PARAMS.replace(crossover_eta=1e4, mutation_eta=1e4)
    good = jnp.arange(ROWS) % 10 == 3
    genes = jnp.where(good[:, None], 0.1, 0.9) + jax.random.uniform(getkey(), (ROWS, GENES)) / 100
    failed = jnp.stack([jnp.full(ROWS, bad), genes[:, 0]], axis=1)
    state = begin(genes, jnp.where(good[:, None], genes[:, :2], failed))
    assert (state.rank == FAILED).tolist() == (~good).tolist()
    for _ in range(10):
        assert float(SMALL.ask(getkey(), state, close)[0].max()) < 0.2


def test_failed_members_do_not_survive_finite_ones():
    state = begin(*evaluated())
    failed = jnp.full((ROWS, 2), jnp.nan)
    after = survivors(state, state.population + 0.1, failed)
    np.testing.assert_array_equal(np.sort(after.fitness, 0), np.sort(state.fitness, 0))
    # Three finite members in all: they and copies of them fill the places.
    state = begin(state.population, state.fitness.at[3:].set(jnp.inf))
    after = survivors(state, state.population + 0.1, failed)
    assert bool(jnp.isfinite(after.fitness).all())
    assert len(np.unique(after.population, axis=0)) == 3
    assert int((after.rank == COPY).sum()) == ROWS - 3


def test_a_search_recovers_from_an_entirely_failed_population(getkey):
    state = begin(evaluated()[0], jnp.full((ROWS, 2), jnp.nan))
    children, state = SMALL.ask(getkey(), state, PARAMS)
    assert bool(jnp.isfinite(children).all())
    after = survivors(state, children, children[:, :2])
    assert bool(jnp.isfinite(after.fitness).all())


def test_copies_give_way_to_distinct_members():
    state = begin(*evaluated())
    best = state.population[jnp.argmin(state.rank)]
    # Copies of one member, told with a fitness that beats everything.
    offspring = jnp.tile(best, (ROWS, 1)).at[-1].set(0.5)
    fitness = jnp.zeros((ROWS, 2)).at[-1].set(0.999)
    after = survivors(state, offspring, fitness)
    assert len(np.unique(after.population, axis=0)) == ROWS
    # Where too few are distinct, copies stay but rank last.
    state = begin(offspring, fitness)
    assert (state.rank == COPY).tolist() == [False, *[True] * (ROWS - 2), False]


def test_copies_are_found_exactly():
    rng = np.random.default_rng(0)
    genes = rng.integers(0, 3, (3000, 6)).astype(np.float32) / 2
    fresh = np.unique(genes, axis=0, return_index=True)[1]
    want = ~np.isin(np.arange(3000), fresh)
    np.testing.assert_array_equal(_copies(jnp.asarray(genes), jnp.ones(3000, bool)), want)


def test_a_child_is_never_its_parent(getkey):
    state = begin(*evaluated())
    still = PARAMS.replace(crossover_rate=0.0, mutation_rate=0.0)
    children, _ = SMALL.ask(getkey(), state, still)
    same = (np.asarray(children)[:, None] == np.asarray(state.population)).sum(axis=-1).max(axis=1)
    assert set(same.tolist()) == {GENES - 1}


def test_rank_and_room_decide_who_is_a_parent(getkey):
    """One front with a crowded middle and four isolated members; then one member behind."""
    still = PARAMS.replace(crossover_rate=0.0, mutation_rate=0.0, mutation_eta=1e6)
    middle = 0.5 + jnp.linspace(0, 0.01, ROWS - 4)
    place = jnp.concatenate([jnp.array([0.0, 0.2, 0.8, 1.0]), middle])
    genes, fitness = jnp.tile(place[:, None], (1, GENES)), jnp.stack([place, 1 - place], axis=1)

    def children(fitness):
        state = begin(genes, fitness)
        asked = [SMALL.ask(getkey(), state, still)[0] for _ in range(20)]
        return jnp.sort(jnp.concatenate(asked), axis=1)[:, 1]

    isolated = float((jnp.abs(children(fitness) - 0.5) > 0.1).mean())
    assert isolated > 1.6 * 4 / ROWS
    behind = float((jnp.abs(children(fitness.at[0].set(2.0))) < 0.01).mean())
    assert behind < 0.2 / ROWS


@pytest.mark.parametrize(("first", "second"), [(0.2, 0.3), (0.9, 0.05), (0.0, 1.0)])
def test_crossover_is_distributed_as_in_pymoo(first, second, getkey):
    rows, low, high = 8000, np.zeros(1), np.ones(1)
    a, b = np.full((rows, 1), first), np.full((rows, 1), second)
    ours = cross(getkey(), *map(jnp.float32, (a, b, low, high)), eta=15.0, rate=0.9)
    ones = np.ones((rows, 1))
    rng = np.random.default_rng(0)
    theirs = cross_sbx(
        np.stack([a, b]), low, high, 15 * ones, 0.9 * 0.5, 0.5 * ones, random_state=rng
    )
    for mine, other in zip(ours, theirs, strict=True):
        assert same_distribution(mine, other)
    total = np.asarray(ours[0] + ours[1])
    assert np.asarray(ours).min() >= 0
    assert np.asarray(ours).max() <= 1
    assert np.abs(total.mean() - first - second) < 0.02


@pytest.mark.parametrize("gene", [0.0, 0.03, 0.6, 1.0])
def test_mutation_is_distributed_as_in_pymoo(gene, getkey):
    rows, low, high = 8000, np.full(1, -1.0), np.full(1, 3.0)
    genes = np.full((rows, 1), -1 + 4 * gene)
    ours = mutate(getkey(), *map(jnp.float32, (genes, low, high)), eta=20.0, rate=0.7)
    rng = np.random.default_rng(0)
    theirs = mut_pm(
        genes, low, high, np.full(rows, 20.0), np.full(rows, 0.7), False, random_state=rng
    )
    assert same_distribution(ours, theirs)
    assert np.asarray(ours).min() >= -1
    assert np.asarray(ours).max() <= 3


def test_operators_leave_fixed_genes_alone(getkey):
    low, high = jnp.array([0.0, 0.5]), jnp.array([1.0, 0.5])
    genes = jnp.stack([jax.random.uniform(getkey(), (50,)), jnp.full(50, 0.5)], axis=1)
    crossed, _ = simulated_binary_crossover(
        getkey(), genes, genes[::-1], low, high, eta=15.0, rate=1.0
    )
    mutated = polynomial_mutation(getkey(), crossed, low, high, eta=20.0, rate=1.0)
    assert (mutated[:, 1] == 0.5).all()
    assert (mutated[:, 0] != genes[:, 0]).all()


def test_it_is_frozen_and_odd_sizes_work(getkey):
    algorithm = NSGA2(7, jnp.zeros(2))
    with pytest.raises(dataclasses.FrozenInstanceError):
        algorithm.population_size = 9  # pyright: ignore[reportAttributeAccessIssue]
    genes = jax.random.uniform(getkey(), (7, 2))
    state = algorithm.init(getkey(), genes, genes, algorithm.default_params)
    assert algorithm.ask(getkey(), state, algorithm.default_params)[0].shape == (7, 2)


def test_refusals_say_what_was_wanted():
    genes, fitness = evaluated()
    key, state = jax.random.key(0), begin(genes, fitness)
    with pytest.raises(ValueError, match=r"`fitness` must be \(20, objectives\), got \(20,\)"):
        SMALL.init(key, genes, fitness[:, 0], PARAMS)
    with pytest.raises(ValueError, match="Want 20 members, got 4"):
        SMALL.init(key, genes[:4], fitness[:4], PARAMS)
    with pytest.raises(ValueError, match="Want 2 objectives, got 3"):
        SMALL.tell(key, genes, genes, state, PARAMS)
    with pytest.raises(ValueError, match=r"`violation` must be \(20,\)"):
        SMALL.tell(key, genes, fitness, state, PARAMS, violation=jnp.zeros(5))
    with pytest.raises(ValueError, match="`upper` must hold 1 or 3 values, got 2"):
        SMALL.ask(key, state, PARAMS.replace(upper=jnp.ones(2)))
    with pytest.raises(ValueError, match=r"\(population, \*\(3,\)\) in its array, got \(20, 4\)"):
        SMALL.init(key, jnp.zeros((20, 4)), fitness, PARAMS)
    with pytest.raises(ValueError, match="like `solution`"):
        SMALL.init(key, {"a": genes}, fitness, PARAMS)
    with pytest.raises(ValueError, match=r"floats, got int32 in \['a'\]"):
        NSGA2(6, {"a": jnp.zeros(3, jnp.int32)})
    with pytest.raises(ValueError, match="at least 2, got 1"):
        NSGA2(1, genes)
