"""Truncation against the Eckart-Young error, and the randomized decomposition against the full."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from forge_jax import svf


def decaying(m, n, ratio=0.6, seed=0):
    """A matrix of singular values 1, ratio, ratio ** 2, ..."""
    keys = jax.random.split(jax.random.key(seed))
    r = min(m, n)
    u = jnp.linalg.qr(jax.random.normal(keys[0], (m, r)))[0]
    v = jnp.linalg.qr(jax.random.normal(keys[1], (n, r)))[0]
    return (u * ratio ** jnp.arange(r)) @ v.T


def every(path, leaf):
    return leaf.ndim >= 2


@pytest.mark.parametrize("fraction", [0.05, 0.25, 0.5, 0.9, 1.0])
def test_error_is_the_singular_tail(fraction):
    params = {"w": jax.random.normal(jax.random.key(0), (16, 24)), "b": jnp.ones(24)}
    factors, z = svf.decompose(params, every)
    small = svf.truncate(factors, z, fraction)
    rank = int(np.ceil(fraction * 16))
    stays_factored = rank * (16 + 24) < 16 * 24
    assert isinstance(small["w"], svf.Factors) == stays_factored
    dense = svf.materialize(small, svf.identity(small))["w"]
    s = np.linalg.svd(np.asarray(params["w"]), compute_uv=False)
    tail = np.sqrt((s[rank:] ** 2).sum())
    np.testing.assert_allclose(np.linalg.norm(dense - params["w"]), tail, atol=1e-4)
    assert np.linalg.matrix_rank(np.asarray(dense), tol=1e-4) == rank
    np.testing.assert_array_equal(small["b"], params["b"])


def test_scales_are_folded_in_and_stacks_are_cut_together():
    w = jax.random.normal(jax.random.key(0), (2, 8, 12))
    factors, z = svf.decompose({"w": w}, every, {"w": svf.Axes((0,), (1,), (2,))})
    z = jax.tree.map(lambda v: v + 0.3 * jax.random.normal(jax.random.key(1), v.shape), z)
    small = svf.truncate(factors, z, 0.5)
    assert small["w"].s.shape == (2, 4)
    got = svf.materialize(small, svf.identity(small))["w"]
    for layer in range(2):
        u, s, vt = np.linalg.svd(np.asarray(w[layer]), full_matrices=False)
        scale = s * np.asarray(z["w"][layer]) * (np.arange(8) < 4)
        np.testing.assert_allclose(got[layer], (u * scale) @ vt, atol=1e-5)


@pytest.mark.parametrize("fraction", [0, -0.5, 1.5, float("nan")])
def test_truncate_refuses_a_fraction_outside_its_range(fraction):
    factors, z = svf.decompose({"w": jnp.eye(4)}, every)
    with pytest.raises(ValueError, match="rank_fraction"):
        svf.truncate(factors, z, fraction)


@pytest.mark.parametrize("shape", [(60, 40), (40, 60)])
def test_randomized_finds_the_leading_components(shape):
    w = decaying(*shape)
    u, s, vt = jax.jit(svf.randomized_svd, static_argnums=1)(w, 8, jax.random.key(5))
    np.testing.assert_allclose(s, np.linalg.svd(np.asarray(w), compute_uv=False)[:8], rtol=1e-4)
    np.testing.assert_allclose(u.T @ u, np.eye(8), atol=1e-5)
    np.testing.assert_allclose(vt @ vt.T, np.eye(8), atol=1e-5)
    full = np.linalg.svd(np.asarray(w), full_matrices=False)
    best = (full[0][:, :8] * full[1][:8]) @ full[2][:8]
    np.testing.assert_allclose((u * s) @ vt, best, atol=1e-4)


def test_a_randomized_decomposition_keeps_the_base_model():
    params = {"big": jax.random.normal(jax.random.key(0), (40, 30)), "small": jnp.eye(6) * 2}
    factors, z = svf.decompose(params, every, max_full=10, rank=4, key=jax.random.key(1))
    assert {n: v.shape for n, v in z.items()} == {"big": (4,), "small": (6,)}
    assert factors["small"].rest is None
    for name, w in svf.materialize(factors, z).items():
        np.testing.assert_allclose(w, params[name], atol=1e-5)
    half = svf.materialize(factors, {"big": z["big"] * 0.5, "small": z["small"]})["big"]
    leaf = factors["big"]
    np.testing.assert_allclose(params["big"] - half, 0.5 * (leaf.u * leaf.s) @ leaf.vt, atol=1e-5)
    cut = svf.truncate(factors, z, 0.5)["big"]
    assert cut.rest is None
    assert cut.s.shape == (2,)
    whole = svf.truncate(factors, z, 1.0)["big"]
    np.testing.assert_allclose(whole, params["big"], atol=1e-5)


def test_randomized_refuses_an_impossible_rank():
    with pytest.raises(ValueError, match="rank"):
        svf.randomized_svd(jnp.eye(4), 5, jax.random.key(0))
