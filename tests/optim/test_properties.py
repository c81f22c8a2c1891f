"""What every transformation of the room must do, in one table."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from forge_jax import optim

CONFIG = optim.MuGrokConfig.from_phase(1, grokfast_lambda=2.0, qk_clip_threshold=1.0)
SHAPES = {
    "attn": {"q_proj": (6, 8), "k_proj": (6, 8), "bias": (8,)},
    "layers": {"up": (3, 6, 10)},
    "embed": (12, 6),
}
MATRICES = {"attn": {"q_proj": (6, 8), "k_proj": (6, 8)}, "layers": {"up": (3, 6, 10)}}
EXTRA = {"max_logits": {"attn": jnp.array([0.5, 2.0])}, "unknown": 1.0}
TABLE = {
    "grokfast_ema": (optim.grokfast_ema(0.9, 2.0), SHAPES),
    "grokfast_first": (optim.grokfast_ema(0.9, 2.0, init="first_gradient"), SHAPES),
    "scale_by_muon": (optim.scale_by_muon(), MATRICES),
    "scale_by_muon_polished": (optim.scale_by_muon(coeffs="polar_express", tol=1e-3), MATRICES),
    "scale_by_fan": (optim.scale_by_fan("width"), MATRICES),
    "qk_clip": (optim.qk_clip(1.0, 2), SHAPES),
    "qk_clip_logits": (optim.qk_clip_logits(1.0, 2), SHAPES),
    "mugrok": (optim.mugrok(CONFIG, num_heads=2, fallback=optim.is_embedding), SHAPES),
    "mugrok_measured": (optim.mugrok(CONFIG, diagnostics=True), SHAPES),
    "mugrok_lion": (optim.mugrok(optim.MuGrokConfig(fallback_type="lion")), SHAPES),
    "with_hyperparams": (optim.with_hyperparams(CONFIG), SHAPES),
    "master_copy": (optim.master_copy(optim.mugrok(CONFIG)), SHAPES),
    "apply_if_finite": (optax.apply_if_finite(optim.mugrok(CONFIG), 3), SHAPES),
    "phase_7": (optim.mugrok(optim.MuGrokConfig.from_phase(7)), SHAPES),
}
every = pytest.mark.parametrize("tx", [t for t, _ in TABLE.values()], ids=TABLE)
each = pytest.mark.parametrize(("tx", "shapes"), TABLE.values(), ids=TABLE)


def draw(seed, shapes, dtype=jnp.float32) -> Any:
    leaves, structure = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    drawn = [jax.random.normal(k, s, dtype) for k, s in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, drawn)


@each
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_one_trace_and_dtype_structure_and_state_are_kept(tx, shapes, dtype):
    params = draw(0, shapes, dtype)
    state: Any = tx.init(params)

    traces = []

    @jax.jit
    def update(grads, state, params):
        traces.append(1)
        return tx.update(grads, state, params, **EXTRA)

    for seed in range(3):
        updates, after = update(draw(seed + 1, shapes, dtype), state, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
        chex.assert_tree_all_finite((updates, after))
        state = after
    assert len(traces) == 1
    wide = [x.dtype for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert all(d == jnp.float32 for d in wide)
    jax.lax.cond(True, lambda: after, lambda: state)


@each
def test_scan_vmap_and_jit_agree(tx, shapes):
    params = draw(0, shapes)
    grads = jax.tree.map(lambda *g: jnp.stack(g), draw(1, shapes), draw(2, shapes))

    def steps(grads, params):
        def step(carry, g):
            params, state = carry
            updates, state = tx.update(g, state, params, **EXTRA)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), grads)[0][0]

    run = jax.jit(steps)
    scanned = run(grads, params)
    both = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x]), (grads, params))
    vmapped = jax.jit(jax.vmap(steps))(*both)
    members = [jax.tree.map(lambda x: x[i], vmapped) for i in range(2)]  # noqa: B023
    halved = run(*jax.tree.map(lambda x: 0.5 * x, (grads, params)))
    chex.assert_trees_all_close(members, [scanned, halved], atol=2e-5)
    state, p, update = tx.init(params), params, jax.jit(tx.update)
    for g in (draw(1, shapes), draw(2, shapes)):
        updates, state = update(g, state, p, **EXTRA)
        p = optax.apply_updates(p, updates)
    chex.assert_trees_all_close(p, scanned, atol=2e-5)


@each
def test_multi_steps_takes_the_mean(tx, shapes):
    params, a, b = (draw(seed, shapes) for seed in range(3))
    accumulated = optax.MultiSteps(tx, 2)
    state = accumulated.init(params)
    update = jax.jit(accumulated.update)
    nothing, state = update(a, state, params, **EXTRA)
    assert all(not np.any(u) for u in jax.tree.leaves(nothing))
    got, _ = update(b, state, params, **EXTRA)
    mean = jax.tree.map(lambda x, y: (x + y) / 2, a, b)
    want, _ = jax.jit(tx.update)(mean, tx.init(params), params, **EXTRA)
    chex.assert_trees_all_close(got, want, atol=2e-5)


@every
def test_takes_extra_arguments_by_type(tx):
    """A plain GradientTransformation refuses them when it is called alone."""
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
