"""What the diagnostics report is what NumPy finds, and they cost nothing when off."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from forge_jax import optim

PARAMS = {
    "q_proj": jnp.eye(4, 6),
    "stack": jnp.ones((2, 3, 5)),
    "bias": jnp.ones(6),
}
CONFIG = optim.MuGrokConfig(
    muon_lr=1.0, grokfast_lambda=2.0, grokfast_alpha=0.5, qk_clip_threshold=1.0
)


def gradient(seed) -> Any:
    keys = jax.random.split(jax.random.key(seed), 3)
    return {n: jax.random.normal(k, PARAMS[n].shape) for n, k in zip(PARAMS, keys, strict=True)}


def norm(tree):
    return np.sqrt(sum(np.sum(np.square(np.asarray(x, np.float64))) for x in jax.tree.leaves(tree)))


def test_every_number_is_the_measured_one():
    tx = optim.mugrok(CONFIG, diagnostics=True, num_heads=2)
    state = tx.init(PARAMS)
    assert not any(optim.diagnostics(state).values())
    grads = gradient(0)
    updates: Any
    updates, state = jax.jit(tx.update)(grads, state, PARAMS)
    found = {key: float(value) for key, value in optim.diagnostics(state).items()}
    ema = jax.tree.map(lambda g: 0.5 * g, grads)
    filtered = jax.tree.map(lambda g, h: g + 2.0 * h, grads, ema)
    mean = {name: 0.05 * filtered[name] for name in ("q_proj", "stack")}
    ortho = jax.tree.map(optim.orthogonalize, mean)
    matrices = [ortho["q_proj"], *ortho["stack"]]
    errors = [np.linalg.norm(o @ o.T - np.eye(len(o))) / np.sqrt(len(o)) for o in matrices]
    heads = np.split(np.asarray(PARAMS["q_proj"] - ortho["q_proj"]), 2, axis=1)
    heads = np.array([np.linalg.norm(h) for h in heads])
    want = {
        "gradient/norm": norm(grads),
        "grokfast/ema_norm": norm(ema),
        "grokfast/filter_ratio": 2.0 * 0.5,
        "muon/ortho_error": np.mean(errors),
        "muon/ns_iterations": 5,
        "qk_clip/num_clipped": (heads > 1).sum(),
        "qk_clip/max_norm": heads.max(),
        "update/norm": norm(updates),
    }
    assert found == pytest.approx(want, rel=1e-4)


def test_measuring_changes_nothing_and_parts_that_are_off_have_no_entry():
    grads = gradient(1)
    plain, measured = (optim.mugrok(CONFIG, diagnostics=on) for on in (False, True))
    want: Any = plain.update(grads, plain.init(PARAMS), PARAMS)[0]
    got: Any = measured.update(grads, measured.init(PARAMS), PARAMS)[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, want)
    off = optim.mugrok(optim.MuGrokConfig.from_phase(7, enable_grokfast=False), diagnostics=True)
    assert set(optim.diagnostics(off.init(PARAMS))) == {"gradient/norm", "update/norm"}


def test_polishing_is_counted_and_lowers_the_error():
    tx = optim.mugrok(CONFIG, diagnostics=True, tol=1e-3)
    found = optim.diagnostics(tx.update(gradient(2), tx.init(PARAMS), PARAMS)[1])
    assert found["muon/ns_iterations"] > 5
    assert found["muon/ortho_error"] < 1e-3


def test_free_when_off():
    def operations(on):
        tx = optim.mugrok(CONFIG, diagnostics=on)
        return str(jax.make_jaxpr(tx.update)(PARAMS, tx.init(PARAMS), PARAMS)).count("dot_general")

    tx = optim.mugrok(CONFIG)
    assert "metrics" not in str(jax.tree.structure(tx.init(PARAMS)))
    assert operations(False) < operations(True)
    with pytest.raises(ValueError, match="diagnostics=True"):
        optim.diagnostics(tx.init(PARAMS))


def test_every_member_of_a_vmapped_population_has_its_own():
    tx = optim.mugrok(CONFIG, diagnostics=True)
    params = jax.tree.map(lambda p: jnp.stack([p, p]), PARAMS)
    grads = jax.tree.map(lambda a, b: jnp.stack([a, 2 * b]), gradient(0), gradient(0))
    state = jax.vmap(tx.update)(grads, jax.vmap(tx.init)(params), params)[1]
    norms = optim.diagnostics(state)["gradient/norm"]
    np.testing.assert_allclose(norms[1], 2 * norms[0], rtol=1e-6)
