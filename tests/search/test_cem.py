"""CEM: one step against NumPy, optima it must find, and evosax's own machinery around it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evosax.core.restart import RestartParams, SimpleRestart, generation_cond
from evosax.problems import BBOBProblem

from forge_jax.search import CEM


def reference(mean, std, genes, fitness, elites, smoothing, floor):
    """One refit in NumPy: finite members only, standard deviation about the elites' mean."""
    finite = [i for i in np.argsort(fitness, kind="stable") if np.isfinite(fitness[i])][:elites]
    if not finite:
        return mean, np.maximum(std, floor)
    best = genes[finite]
    new_mean = smoothing * mean + (1 - smoothing) * best.mean(axis=0)
    new_std = smoothing * std + (1 - smoothing) * best.std(axis=0)
    return new_mean, np.maximum(new_std, floor)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("failed", [0, 28, 32])
def test_a_step_equals_the_reference(failed, smoothing):
    rng = np.random.default_rng(failed)
    genes = rng.normal(size=(32, 5)).astype(np.float32)
    fitness = rng.normal(size=32).astype(np.float32)
    fitness[:failed] = rng.permutation([np.nan, np.inf, -np.inf] * 11)[:failed]
    algorithm = CEM(32, jnp.zeros(5))
    assert algorithm.num_elites == 6
    params = algorithm.default_params.replace(smoothing=smoothing, std_min=0.4)
    state = algorithm.init(jax.random.key(0), jnp.full(5, 0.2), params)
    after, metrics = algorithm.tell(jax.random.key(1), genes, fitness, state, params)
    mean, std = reference(np.full(5, 0.2), np.full(5, 0.5), genes, fitness, 6, smoothing, 0.4)
    np.testing.assert_allclose(after.mean, mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(after.std, std, rtol=1e-5)
    finite = np.where(np.isfinite(fitness), fitness, np.inf)
    assert float(after.best_fitness) == finite.min() == float(metrics["best_fitness"])
    if failed < 32:
        np.testing.assert_array_equal(after.best_solution, genes[finite.argmin()])


@pytest.mark.parametrize(("target", "optimum"), [(0.3, 0.3), (1.7, 1.0), (-4.0, 0.0)])
def test_quadratic_optimum_inside_and_at_a_bound(target, optimum, getkey):
    algorithm = CEM(32, {"alpha": jnp.zeros(4)})
    params = algorithm.default_params.replace(lower=0.0, upper=1.0)
    traces = []

    def generation(state, key):
        traces.append(1)
        ask_key, tell_key = jax.random.split(key)
        population, state = algorithm.ask(ask_key, state, params)
        genes = population["alpha"]
        fitness = ((genes - target) ** 2).sum(axis=1)
        # Every seventh evaluation fails.
        fitness = jnp.where(jnp.arange(32) % 7 == 0, jnp.nan, fitness)
        state, metrics = algorithm.tell(tell_key, population, fitness, state, params)
        return state, (metrics, genes.min(), genes.max())

    state = algorithm.init(getkey(), {"alpha": jnp.full(4, 0.5)}, params)
    keys = jax.random.split(getkey(), 60)
    state, (metrics, low, high) = jax.jit(lambda s: jax.lax.scan(generation, s, keys))(state)
    assert len(traces) == 1
    assert float(low.min()) >= 0
    assert float(high.max()) <= 1
    np.testing.assert_allclose(algorithm.get_mean(state)["alpha"], optimum, atol=0.01)
    np.testing.assert_allclose(algorithm.get_best_solution(state)["alpha"], optimum, atol=0.01)
    assert (np.diff(metrics["best_fitness"]) <= 0).all()


def test_evosax_problem_and_restart_controller(getkey):
    """evosax's usual loop on its own problem, with its own restart around our strategy."""
    problem = BBOBProblem("sphere", num_dims=3, f_opt=0.0, x_opt=jnp.array([1.0, -2.0, 0.5]))
    algorithm = CEM(40, jnp.zeros(3))
    params = algorithm.default_params.replace(std_init=2.0)
    # Typed for evosax's own classes and states; ours only look like them.
    conditions: Any = (generation_cond,)
    controller: Any = SimpleRestart(conditions, RestartParams(generation_threshold=30))
    restarts = controller.init()
    problem_state = problem.init(getkey())
    state = algorithm.init(getkey(), jnp.zeros(3), params)
    for _ in range(35):
        population, state = algorithm.ask(getkey(), state, params)
        fitness, problem_state, _ = problem.eval(getkey(), population, problem_state)
        state, metrics = algorithm.tell(getkey(), population, fitness, state, params)
        if controller.should_restart(population, fitness, state, params, restarts):
            best = float(metrics["best_fitness"])
            state, restarts = controller.restart(getkey(), algorithm, state, params, restarts)
            assert float(state.best_fitness) == best
    assert restarts.restart_counter == 1
    assert int(state.generation_counter) == 5
    assert float(state.best_fitness) < 1e-3


def test_the_best_is_evaluated_again_and_may_lose(getkey):
    algorithm = CEM(10, jnp.zeros(2), reevaluate_best=True)
    params = algorithm.default_params
    state = algorithm.init(getkey(), jnp.zeros(2), params)
    population, state = algorithm.ask(getkey(), state, params)
    state, _ = algorithm.tell(getkey(), population, jnp.arange(10.0)[::-1] - 5, state, params)
    lucky = population[9]
    np.testing.assert_array_equal(state.best_solution, lucky)
    population, state = algorithm.ask(getkey(), state, params)
    np.testing.assert_array_equal(population[0], lucky)
    fitness = jnp.arange(10.0).at[0].set(3.0)
    again, _ = algorithm.tell(getkey(), population, fitness, state, params)
    assert float(again.best_fitness) == 1
    np.testing.assert_array_equal(again.best_solution, population[1])
    # Without the option the lucky value stays.
    plain = CEM(10, jnp.zeros(2))
    kept, _ = plain.tell(getkey(), population, fitness, state, params)
    assert float(kept.best_fitness) == -5


def test_a_tie_everywhere_keeps_the_spread_at_its_floor(getkey):
    algorithm = CEM(8, jnp.zeros(3))
    params = algorithm.default_params.replace(std_min=jnp.array([0.1, 0.2, 0.3]))
    state = algorithm.init(getkey(), jnp.zeros(3), params)
    state, _ = algorithm.tell(getkey(), jnp.ones((8, 3)), jnp.zeros(8), state, params)
    np.testing.assert_allclose(state.std, [0.1, 0.2, 0.3])
    np.testing.assert_array_equal(state.mean, jnp.ones(3))


def test_refusals_say_what_was_wanted():
    with pytest.raises(ValueError, match=r"`elite_ratio` must lie in \(0, 1\], got 0"):
        CEM(8, jnp.zeros(3), elite_ratio=0)
    algorithm = CEM(8, jnp.zeros(3))
    params, key = algorithm.default_params, jax.random.key(0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        algorithm.elite_ratio = 0.5  # pyright: ignore[reportAttributeAccessIssue]
    state = algorithm.init(key, jnp.zeros(3), params)
    with pytest.raises(ValueError, match=r"`fitness` must be \(8,\), got \(8, 2\)"):
        algorithm.tell(key, jnp.zeros((8, 3)), jnp.zeros((8, 2)), state, params)
    with pytest.raises(ValueError, match=r"got \(1, 4\)"):
        algorithm.init(key, jnp.zeros(4), params)
    with pytest.raises(ValueError, match="`lower` must hold 1 or 3 values"):
        algorithm.ask(key, state, params.replace(lower=jnp.zeros(2)))
