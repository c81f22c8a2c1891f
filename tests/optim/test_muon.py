"""Muon against NumPy and torch, and the factors of a matrix's shape."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers

from forge_jax import optim

GRADS = np.random.default_rng(0).standard_normal((20, 6, 40)).astype(np.float32)


def reference(grads, momentum, nesterov):
    """Muon in NumPy and float64: momentum, then five polynomials of the whole matrix."""
    m, out = np.zeros(grads.shape[1:]), []
    for g in np.asarray(grads, np.float64):
        m = momentum * m + (1 - momentum) * g
        x = momentum * m + (1 - momentum) * g if nesterov else m
        x = x / np.linalg.norm(x)
        for _ in range(5):
            gram = x @ x.T
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        out.append(x)
    return np.stack(out)


def run(tx, grads) -> Any:
    def step(state, g):
        updates, state = tx.update(g, state)
        return state, updates

    return jax.lax.scan(step, tx.init(jax.tree.map(lambda g: g[0], grads)), grads)


@pytest.mark.parametrize("momentum", [0.0, 0.95])
@pytest.mark.parametrize("nesterov", [False, True])
def test_matches_reference(momentum, nesterov):
    got = np.asarray(run(optim.scale_by_muon(momentum, nesterov=nesterov), {"w": GRADS})[1]["w"])
    want = reference(GRADS, momentum, nesterov)
    error = np.linalg.norm(got - want, axis=(1, 2)) / np.linalg.norm(want, axis=(1, 2))
    print(f"largest relative difference in 20 steps: {error.max():.1e}")
    assert error.max() <= 1e-6


def test_a_stack_of_layers_is_a_batch_of_matrices():
    grads = {"layers": np.random.default_rng(1).standard_normal((4, 3, 6, 10)).astype(np.float32)}
    got = run(optim.scale_by_muon(), grads)[1]["layers"]
    for layer in range(3):
        want = reference(grads["layers"][:, layer], 0.95, False)
        np.testing.assert_allclose(got[:, layer], want, atol=5e-6)


def test_a_layout_joins_axes():
    """A kernel (inputs, heads, width) is one matrix (inputs, heads * width)."""

    def joined(path, leaf):
        return MuonDimensionNumbers(0, (1, 2))

    got = run(optim.scale_by_muon(layout=joined), GRADS.reshape(20, 6, 8, 5))[1]
    np.testing.assert_allclose(got.reshape(20, 6, 40), reference(GRADS, 0.95, False), atol=5e-6)

    def overlapping(path, leaf):
        return MuonDimensionNumbers(0, (0, 1))

    with pytest.raises(ValueError, match="two kinds of axes"):
        run(optim.scale_by_muon(layout=overlapping), GRADS)


@pytest.mark.parametrize(
    ("scale", "wide", "tall"), [("none", 1, 1), ("width", 2, 1), ("rms", 4, 4)]
)
def test_update_scale(scale, wide, tall):
    """A flax kernel (100, 400) has 400 outputs; declared to be torch's it has 100."""
    updates = {"w": jnp.full((100, 400), 0.5)}
    for layout, factor in ((optim.flax_layout, wide), (optim.torch_layout, tall)):
        tx = optim.scale_by_fan(scale, layout)
        got: Any = tx.update(updates, tx.init(updates))[0]
        chex.assert_trees_all_close(got, {"w": jnp.full((100, 400), 0.5 * factor)})


def test_rms_scale_gives_entries_of_a_fifth():
    tx = optax.chain(optim.scale_by_muon(coeffs="svd"), optim.scale_by_fan("rms"))
    got = run(tx, {"w": np.random.default_rng(2).standard_normal((1, 48, 16)).astype(np.float32)})[
        1
    ]
    np.testing.assert_allclose(np.sqrt(np.mean(np.square(got["w"]))), 0.2, rtol=1e-5)


@pytest.mark.torch
@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
def test_direction_of_torch_muon(adjust):
    """torch iterates in bfloat16, so that directions are compared, step by step."""
    torch = pytest.importorskip("torch")
    grads = np.random.default_rng(3).standard_normal((10, 96, 160)).astype(np.float32)
    start = np.random.default_rng(4).standard_normal((96, 160)).astype(np.float32)
    p = torch.nn.Parameter(torch.tensor(start))
    muon = torch.optim.Muon([p], lr=0.02, weight_decay=0.1, adjust_lr_fn=adjust)
    config = optim.MuGrokConfig(muon_lr=0.02, enable_grokfast=False, use_qk_clip=False)
    scales: dict[str, Any] = {"original": "width", "match_rms_adamw": "rms"}
    tx = optim.mugrok(
        config,
        nesterov=True,
        muon_weight_decay=0.1,
        layout=optim.torch_layout,
        update_scale=scales[adjust],
    )
    params: Any = {"w": jnp.asarray(start)}
    state = tx.init(params)
    update = jax.jit(tx.update)
    worst = 1.0
    for g in grads:
        before = p.detach().numpy().copy()
        p.grad = torch.tensor(g)
        muon.step()
        theirs = (p.detach().numpy() - before).ravel().astype(np.float64)
        updates, state = update({"w": jnp.asarray(g)}, state, params)
        params = optax.apply_updates(params, updates)
        ours = np.asarray(updates["w"], np.float64).ravel()
        cosine = ours @ theirs / np.linalg.norm(ours) / np.linalg.norm(theirs)
        np.testing.assert_allclose(np.linalg.norm(ours), np.linalg.norm(theirs), rtol=2e-2)
        worst = min(worst, cosine)
    print(f"smallest cosine to torch.optim.Muon ({adjust}): {worst:.6f}")
    assert worst >= 0.999


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"momentum": 1.0}, "momentum"),
        ({"steps": -1}, "steps"),
        ({"coeffs": "newton"}, "coeffs"),
    ],
)
def test_refuses(kwargs, message):
    with pytest.raises(ValueError, match=message):
        optim.scale_by_muon(**kwargs)


def test_refuses_vectors_and_unknown_scales():
    with pytest.raises(ValueError, match=r"block/bias \(3,\)"):
        optim.scale_by_muon().init({"block": {"bias": jnp.ones(3), "w": jnp.ones((2, 2))}})
    unknown: Any = "fan"
    with pytest.raises(ValueError, match="'none', 'width' or 'rms'"):
        optim.scale_by_fan(unknown)
