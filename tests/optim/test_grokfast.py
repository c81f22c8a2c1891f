"""The Grokfast filter against NumPy, and the properties every transformation must have."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from forge_jax import optim


def reference(grads, alpha, lamb, init):
    """Grokfast-EMA in NumPy, one array."""
    h, out = (grads[0] if init == "first_gradient" else np.zeros_like(grads[0])), []
    for t, g in enumerate(grads):
        h = g if init == "first_gradient" and t == 0 else alpha * h + (1 - alpha) * g
        out.append(g + lamb * h)
    return np.stack(out)


def run(tx, grads) -> Any:
    def step(state, g):
        updates, state = tx.update(g, state)
        return state, updates

    return jax.lax.scan(step, tx.init(jax.tree.map(lambda g: g[0], grads)), grads)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.98])
@pytest.mark.parametrize("lamb", [0.0, 0.05, 2.0])
@pytest.mark.parametrize("init", ["zeros", "first_gradient"])
def test_matches_reference(alpha, lamb, init):
    grads = {
        "a": jax.random.normal(jax.random.key(0), (20, 3)),
        "b": {"c": jnp.linspace(-1, 1, 20)},
    }
    _, got = run(optim.grokfast_ema(alpha, lamb, init=init), grads)
    for a, g in zip(jax.tree.leaves(got), jax.tree.leaves(grads), strict=True):
        want = reference(np.asarray(g), alpha, lamb, init)
        np.testing.assert_allclose(a, want, rtol=0, atol=1e-6)


def test_slow_components_are_amplified_and_fast_ones_are_not():
    constant = jnp.ones((400, 1))
    alternating = constant * (-1.0) ** jnp.arange(400)[:, None]
    tx = optim.grokfast_ema(0.98, 2.0)
    assert abs(run(tx, constant)[1][-1, 0] - 3.0) < 1e-2
    assert abs(abs(run(tx, alternating)[1][-1, 0]) - 1.02) < 1e-2


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("init", ["zeros", "first_gradient"])
def test_dtype_and_structure_are_kept(dtype, init):
    params = {"w": jnp.ones((2, 3), dtype), "b": [jnp.ones(2, dtype)]}
    tx = optim.grokfast_ema(init=init)
    state: Any = tx.init(params)
    after: Any
    updates, after = tx.update(params, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    assert all(h.dtype == jnp.float32 for h in jax.tree.leaves(after.ema))
    kept = jax.lax.cond(True, lambda: after, lambda: state)
    np.testing.assert_allclose(kept.ema["w"], after.ema["w"])


def test_traced_once_and_works_in_multi_steps_and_masks():
    traces = []
    tx = optax.MultiSteps(optim.grokfast_ema(0.5, 1.0), every_k_schedule=2)
    params = {"w": jnp.zeros(3)}

    @jax.jit
    def step(grads, state):
        traces.append(1)
        return tx.update(grads, state, params)

    updates: Any = params
    state = tx.init(params)
    for value in (1.0, 3.0):
        updates, state = step({"w": jnp.full(3, value)}, state)
    assert len(traces) == 1
    np.testing.assert_allclose(updates["w"], 2.0 + 1.0 * 0.5 * 2.0)
    masked = optax.masked(optim.grokfast_ema(0.5, 1.0), {"w": True, "frozen": False})
    grads = {"w": jnp.ones(3), "frozen": jnp.ones(2)}
    updates = masked.update(grads, masked.init(grads))[0]
    np.testing.assert_allclose(updates["w"], 1.5)
    np.testing.assert_allclose(updates["frozen"], 1.0)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"alpha": 1.0}, "alpha.*1.0"),
        ({"alpha": -0.1}, "alpha"),
        ({"lamb": -1.0}, "lamb"),
        ({"lamb": float("nan")}, "lamb"),
        ({"init": "ones"}, "'zeros' or 'first_gradient'"),
    ],
)
def test_refuses(kwargs, message):
    with pytest.raises(ValueError, match=message):
        optim.grokfast_ema(**kwargs)
