"""Short dtypes, bad gradients, many devices, checkpoints: the chain in a real training run."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from forge_jax import optim

CONFIG = optim.MuGrokConfig.from_phase(1, grokfast_lambda=2.0, qk_clip_threshold=2.0)
SHAPES = {"q_proj": (8, 16), "k_proj": (8, 16), "up": (3, 8, 16), "norm": (8,)}
PARAMS = {
    name: jax.random.normal(jax.random.key(i), shape)
    for i, (name, shape) in enumerate(SHAPES.items())
}


def gradient(seed) -> Any:
    keys = jax.random.split(jax.random.key(100 + seed), len(SHAPES))
    return {n: jax.random.normal(k, SHAPES[n]) for n, k in zip(SHAPES, keys, strict=True)}


def train(tx, params: Any, state: Any, seeds) -> Any:
    update = jax.jit(tx.update)
    for seed in seeds:
        g = jax.tree.map(lambda g, p: g.astype(p.dtype), gradient(seed), params)
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def bits(tree) -> list[bytes]:
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def test_master_copy_keeps_bfloat16_params_at_the_rounded_float32_ones():
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    tx = optim.master_copy(optim.mugrok(CONFIG))
    before: Any = tx.init(params)
    state = before
    same = total = 0
    for seed in range(5):
        before, (params, state) = state, train(tx, params, state, [seed])
        for name, m in state.master.items():
            assert m.dtype == jnp.float32
            rounded, step = m.astype(jnp.bfloat16), m - before.master[name]
            gap = jnp.abs(params[name].astype(jnp.float32) - rounded.astype(jnp.float32))
            # Half a unit of the step, and half a unit where that rounding crosses a tie.
            assert jnp.all(gap <= 2.0**-8 * (jnp.abs(step) + jnp.abs(m)))
            far = jnp.abs(step) > 0.4 * jnp.abs(m)
            assert jnp.all(jnp.where(far, 0, gap) == 0)
            same, total = same + int((gap == 0).sum()), total + m.size
    print(f"{same} of {total} entries are the rounded copy")
    assert same > 0.9 * total


def test_master_copy_is_numpys_float32_sum():
    """The rate is a power of two, so that both round once; small steps are taken exactly."""
    rng = np.random.default_rng(0)
    start = rng.uniform(1, 2, 64).astype(jnp.bfloat16)
    grads = rng.standard_normal((20, 64)).astype(np.float32)
    tx = optim.master_copy(optax.sgd(2.0**-7))
    params: Any = {"w": jnp.asarray(start)}
    state: Any = tx.init(params)
    master = start.astype(np.float32)
    for g in grads:
        updates, state = tx.update({"w": jnp.asarray(g)}, state, params)
        params = optax.apply_updates(params, updates)
        master = master - np.float32(2.0**-7) * g
        np.testing.assert_array_equal(state.master["w"], master)
        np.testing.assert_array_equal(params["w"], master.astype(jnp.bfloat16))
    with pytest.raises(ValueError, match="`params` must be given to `update`"):
        tx.update(params, state)


def test_clipping_holds_for_the_copy_and_to_a_rounding_for_bfloat16():
    config = optim.MuGrokConfig(muon_lr=0.5, qk_clip_threshold=2.0)
    tx = optim.master_copy(optim.mugrok(config))
    params: Any = {"q_proj": jnp.zeros((8, 16), jnp.bfloat16)}
    state: Any = tx.init(params)
    update = jax.jit(tx.update)
    norms = []
    for seed in range(10):
        g = {"q_proj": gradient(seed)["q_proj"].astype(jnp.bfloat16)}
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
        both = (state.master["q_proj"], params["q_proj"])
        norms.append([np.linalg.norm(np.asarray(w, np.float64)) for w in both])
    exact, rounded = np.max(norms, axis=0)
    assert 1.99 < exact <= 2.0
    assert rounded <= 2.0 * (1 + 2.0**-8)


def test_steps_below_the_resolution_of_bfloat16_add_up():
    config = optim.MuGrokConfig.from_phase(7, fallback_lr=1e-4, fallback_weight_decay=0.0)
    params = {"z": jnp.ones(4, jnp.bfloat16)}
    ends = []
    for tx in (optim.mugrok(config), optim.master_copy(optim.mugrok(config))):
        p: Any = params
        state = tx.init(p)
        for _ in range(100):
            updates, state = tx.update({"z": jnp.ones(4, jnp.bfloat16)}, state, p)
            p = optax.apply_updates(p, updates)
        ends.append(float(p["z"][0]))
    assert ends[0] == 1.0
    assert ends[1] == pytest.approx(0.99, abs=2.0**-8)


def test_second_moments_of_bfloat16_params_are_float32():
    params = {"z": jnp.ones(4, jnp.bfloat16)}
    state = optim.mugrok(optim.MuGrokConfig.from_phase(7)).init(params)
    floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert len(floats) == 3
    assert all(x.dtype == jnp.float32 for x in floats)


@pytest.mark.parametrize("leaf", ["norm", "q_proj", "up"])
def test_non_finite_gradients_are_skipped_and_counted(leaf):
    tx = optax.apply_if_finite(optim.mugrok(CONFIG), max_consecutive_errors=5)
    want, _ = train(tx, PARAMS, tx.init(PARAMS), [0, 1])
    params, state = train(tx, PARAMS, tx.init(PARAMS), [0])
    for bad in (jnp.nan, jnp.inf):
        grads = gradient(7)
        grads[leaf] = grads[leaf].at[..., 0].set(bad)
        updates, state = tx.update(grads, state, params)
        assert not any(np.any(u) for u in jax.tree.leaves(updates))
    params, state = train(tx, params, state, [1])
    assert state.total_notfinite == 2
    assert state.notfinite_count == 0
    assert bits(params) == bits(want)


def test_too_many_bad_gradients_in_a_row_are_applied():
    """What optax does and the docs warn of: a run that never recovers should be seen to fail."""
    tx = optax.apply_if_finite(optim.mugrok(CONFIG), max_consecutive_errors=2)
    state, bad = tx.init(PARAMS), jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), PARAMS)
    update, moved = jax.jit(tx.update), []
    for _ in range(3):
        updates, state = update(bad, state, PARAMS)
        moved.append(any(np.any(u != 0) for u in jax.tree.leaves(updates)))
    assert moved == [False, False, True]


def test_short_gradients_are_accumulated_in_float32():
    params = {"z": jnp.ones(2, jnp.bfloat16)}
    many = optax.MultiSteps(optim.mugrok(optim.MuGrokConfig.from_phase(7)), 2)
    state: Any = many.init(params)
    g = {"z": jnp.array([1.0, 2.0**-10], jnp.bfloat16)}
    _, state = many.update(g, state, params)
    assert state.acc_grads["z"].dtype == jnp.float32
    updates: Any
    updates, state = many.update(jax.tree.map(jnp.negative, g), state, params)
    assert updates["z"].dtype == jnp.bfloat16
    assert state.gradient_step == 1


def test_accumulated_gradients_take_one_step():
    tx = optim.mugrok(CONFIG)
    many = optax.MultiSteps(tx, 4)
    params, _ = train(many, PARAMS, many.init(PARAMS), range(4))
    mean = jax.tree.map(lambda *g: sum(g) / 4, *(gradient(s) for s in range(4)))
    updates: Any = tx.update(mean, tx.init(PARAMS), PARAMS)[0]
    want = optax.apply_updates(PARAMS, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), params, want)


@pytest.mark.parametrize("wrap", [optim.mugrok, lambda c: optim.master_copy(optim.mugrok(c))])
def test_orbax_resumes_bit_for_bit(tmp_path, wrap):
    ocp = pytest.importorskip("orbax.checkpoint")
    tx = wrap(CONFIG)
    halfway = train(tx, PARAMS, tx.init(PARAMS), range(3))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", halfway)
    fresh = jax.tree.map(ocp.utils.to_shape_dtype_struct, (PARAMS, tx.init(PARAMS)))
    with ocp.StandardCheckpointer() as checkpointer:
        params, state = checkpointer.restore(tmp_path / "state", fresh)
    assert bits((params, state)) == bits(halfway)
    want = train(tx, halfway[0], halfway[1], range(3, 6))
    assert bits(train(tx, params, state, range(3, 6))) == bits(want)


def main():
    """Print the largest difference between 8 devices and one; run in a process of its own."""
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=auto)
    specs = {
        "q_proj": ("data", "model"),
        "k_proj": (None, "model"),
        "up": (None, "data", "model"),
        "norm": ("model",),
    }
    shard = {
        n: jax.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec)) for n, spec in specs.items()
    }
    tx = optim.mugrok(CONFIG, num_heads=2)

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def run(place):
        params = place(PARAMS)
        state = jax.jit(tx.init)(params)
        for seed in range(5):
            params, state = step(params, state, place(gradient(seed)))
        return params

    one, many = run(lambda tree: tree), run(lambda tree: jax.device_put(tree, shard))
    assert all(many[n].sharding.is_equivalent_to(shard[n], many[n].ndim) for n in specs)
    gaps = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - np.asarray(b)).max(), one, many)
    print(jax.device_count(), max(jax.tree.leaves(gaps)))


def test_eight_devices_equal_one():
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    root = Path(__file__).resolve().parents[2]
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, __file__], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    devices, gap = done.stdout.split()
    print(f"largest difference between {devices} devices and one after 5 steps: {gap}")
    assert int(devices) == 8
    assert float(gap) < 1e-5


if __name__ == "__main__":
    main()
