"""The optimizer of Phase 7, against torch and by its properties."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from forge_jax import optim

GRADS = {
    "z": jax.random.normal(jax.random.key(0), (20, 6)),
    "w": 1e-3 * jax.random.normal(jax.random.key(1), (20, 3, 4)),
}
PARAMS = {"z": jnp.linspace(-1.0, 1.0, 6), "w": jnp.full((3, 4), 0.5)}


def train(config, grads=GRADS, params: Any = PARAMS) -> Any:
    """Return the parameters after every gradient."""
    tx = optim.mugrok(config)

    def step(carry, g):
        params, state = carry
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    return jax.lax.scan(step, (params, tx.init(params)), grads)[1]


@pytest.mark.torch
@pytest.mark.parametrize("decay", [0.01, 0.5])
def test_without_grokfast_it_is_torch_adamw(decay):
    torch = pytest.importorskip("torch")
    config = optim.MuGrokConfig.from_phase(7, grokfast_lambda=0.0, fallback_weight_decay=decay)
    got = train(config)
    for name, start in PARAMS.items():
        p = torch.nn.Parameter(torch.tensor(np.asarray(start)))
        adamw = torch.optim.AdamW([p], lr=2e-3, betas=(0.9, 0.999), weight_decay=decay)
        for t in range(20):
            p.grad = torch.tensor(np.asarray(GRADS[name][t]))
            adamw.step()
            np.testing.assert_allclose(got[name][t], p.detach().numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.torch
def test_grokfast_filters_what_adamw_sees():
    torch = pytest.importorskip("torch")
    got = train(optim.MuGrokConfig.from_phase(7, grokfast_lambda=2.0, grokfast_alpha=0.8))
    p = torch.nn.Parameter(torch.tensor(np.asarray(PARAMS["z"])))
    adamw = torch.optim.AdamW([p], lr=2e-3, weight_decay=0.01)
    mean = np.zeros(6)
    for g in np.asarray(GRADS["z"]):
        mean = 0.8 * mean + 0.2 * g
        p.grad = torch.tensor((g + 2.0 * mean).astype(np.float32))
        adamw.step()
    np.testing.assert_allclose(got["z"][-1], p.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_lion_follows_its_formula():
    config = optim.MuGrokConfig.from_phase(
        7, fallback_type="lion", enable_grokfast=False, fallback_betas=(0.9, 0.99)
    )
    got = train(config)["z"]
    p, m = np.asarray(PARAMS["z"], np.float64), np.zeros(6)
    for t, g in enumerate(np.asarray(GRADS["z"], np.float64)):
        p = p - 2e-3 * (np.sign(0.9 * m + 0.1 * g) + 0.01 * p)
        m = 0.99 * m + 0.01 * g
        np.testing.assert_allclose(got[t], p, rtol=1e-5, atol=1e-6)


def test_the_grokfast_switch_is_lambda_zero():
    off = train(optim.MuGrokConfig.from_phase(7, enable_grokfast=False))
    zero = train(optim.MuGrokConfig.from_phase(7, grokfast_lambda=0.0))
    on = train(optim.MuGrokConfig.from_phase(7, grokfast_lambda=2.0))
    np.testing.assert_allclose(off["z"], zero["z"], rtol=1e-6)
    assert not np.allclose(off["z"], on["z"], atol=1e-4)


def test_a_schedule_changes_the_update():
    decaying: Any = optax.linear_schedule(2e-3, 0.0, 10)
    config = optim.MuGrokConfig.from_phase(7, fallback_lr=decaying, fallback_weight_decay=0.0)
    steps = np.abs(np.diff(np.asarray(train(config)["z"]), axis=0)).mean(1)
    constant = train(optim.MuGrokConfig.from_phase(7, fallback_weight_decay=0.0))["z"]
    full = np.abs(np.diff(np.asarray(constant), axis=0)).mean(1)
    want = np.array([float(decaying(t)) for t in range(1, 20)]) / 2e-3
    np.testing.assert_allclose(steps, full * want, rtol=1e-3, atol=1e-7)
    assert steps[0] > 0
    assert steps[-1] == 0


def test_scales_without_gradient_stay_at_the_base_and_others_decay_to_it():
    delta = {"unused": jnp.zeros(3), "used": jnp.full(3, 0.4)}  # z - 1
    nothing = jax.tree.map(lambda d: jnp.zeros((50, *d.shape)), delta)
    config = optim.MuGrokConfig.from_phase(7, fallback_weight_decay=1.0)
    z = jax.tree.map(lambda d: 1 + d[-1], train(config, nothing, delta))
    np.testing.assert_array_equal(z["unused"], np.ones(3))
    np.testing.assert_allclose(z["used"], 1 + 0.4 * (1 - 2e-3) ** 50, rtol=1e-5)


def test_the_config_is_read_once():
    config = optim.MuGrokConfig.from_phase(7)
    tx = optim.mugrok(config)
    config.fallback_lr, config.enable_grokfast, config.grokfast_lambda = 100.0, False, 9.0
    g = jax.tree.map(lambda x: x[0], GRADS)
    updates: Any = tx.update(g, tx.init(PARAMS), PARAMS)[0]
    assert float(jnp.abs(updates["z"]).max()) < 3e-3


def test_traced_once_with_a_state_that_keeps_its_types():
    tx = optim.mugrok(optim.MuGrokConfig.from_phase(7))
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    traces = []

    @jax.jit
    def step(grads, state, params):
        traces.append(1)
        return tx.update(grads, state, params)

    state = tx.init(params)
    for t in range(2):
        g = jax.tree.map(lambda x: x[t].astype(jnp.bfloat16), GRADS)  # noqa: B023
        updates, state = step(g, state, params)
    assert len(traces) == 1
    assert all(u.dtype == jnp.bfloat16 for u in jax.tree.leaves(updates))


@pytest.mark.parametrize("phase", [1, 3, 5, 6])
def test_muon_is_refused(phase):
    with pytest.raises(ValueError, match=r"Muon is not in this version.*enable_muon=False"):
        optim.mugrok(optim.MuGrokConfig.from_phase(phase))


def test_qk_clip_is_refused_where_it_would_run():
    on = optim.MuGrokConfig.from_phase(7, use_qk_clip=True)
    with pytest.raises(ValueError, match="QK-clip is not in this version"):
        optim.mugrok(on)
    on.enable_muon_clip = False
    optim.mugrok(on)


def test_a_field_broken_after_creation_is_refused():
    config = optim.MuGrokConfig.from_phase(7)
    config.grokfast_alpha = 1.0
    with pytest.raises(ValueError, match="grokfast_alpha"):
        optim.mugrok(config)
