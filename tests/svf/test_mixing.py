"""Mixtures of experts against the formulas in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from forge_jax import svf

GUIDE = jnp.array([1.2, 0.8, 1.5, 0.9])  # the guide's own example mixture


@functools.cache
def setup(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "q_proj": {"kernel": jax.random.normal(keys[0], (6, 6)).astype(dtype)},
        "stack": jax.random.normal(keys[1], (2, 5, 8)).astype(dtype),
        "norm": jnp.ones(6, dtype),
    }
    axes = {"stack": svf.Axes((0,), (1,), (2,))}
    factors, z = jax.jit(lambda p: svf.decompose(p, lambda n, x: x.ndim > 1, axes))(params)
    experts = {
        n: 1 + 0.2 * jax.random.normal(k, (4, *v.shape))
        for k, (n, v) in zip(keys[2:], z.items(), strict=True)
    }
    return params, factors, z, experts


@pytest.mark.parametrize("mode", ["delta", "sum"])
def test_mix_matches_the_formula(mode):
    _, _, _, experts = setup()
    got = svf.mix(experts, GUIDE, mode)
    for name, stacked in experts.items():
        want = np.ones(stacked.shape[1:]) if mode == "delta" else np.zeros(stacked.shape[1:])
        for a, z in zip(np.asarray(GUIDE), np.asarray(stacked), strict=True):
            want = want + a * ((z - 1) if mode == "delta" else z)
        np.testing.assert_allclose(got[name], want, rtol=1e-5)


def test_zero_is_the_base_and_a_unit_vector_is_the_expert():
    _, _, z, experts = setup()
    for name, base in svf.mix(experts, jnp.zeros(4)).items():
        np.testing.assert_array_equal(base, z[name])
    for k in range(4):
        for name, one in svf.mix(experts, jnp.eye(4)[k]).items():
            np.testing.assert_allclose(one, experts[name][k], rtol=1e-6)


def test_modes_agree_where_the_coefficients_sum_to_one_and_only_there():
    _, _, _, experts = setup()
    for alpha, same in [(GUIDE / GUIDE.sum(), True), (GUIDE, False)]:
        delta, plain = svf.mix(experts, alpha), svf.mix(experts, alpha, "sum")
        for name in experts:
            assert np.allclose(delta[name], plain[name], atol=1e-5) == same
    ratio = np.mean(np.asarray(svf.mix(experts, GUIDE, "sum")["stack"]))
    assert 4 < ratio < 5  # the plain sum blows the weights up


def test_every_path_may_have_its_own_coefficients():
    _, _, _, experts = setup()
    alpha = {"stack": jnp.eye(4)[2], "q_proj/kernel": jnp.zeros(4)}
    got = svf.mix(experts, alpha)
    np.testing.assert_allclose(got["stack"], experts["stack"][2], rtol=1e-6)
    np.testing.assert_array_equal(got["q_proj/kernel"], np.ones(6))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_mixing_weights_is_materializing_the_mixture(dtype):
    params, factors, _, experts = setup(dtype)
    differences = svf.deltas(factors, experts)
    assert differences["stack"].shape == (4, 2, 5, 8)
    assert differences["stack"].dtype == jnp.float32
    want = svf.materialize(factors, svf.mix(experts, GUIDE))
    got = svf.mix_weights(params, differences, GUIDE)
    assert jax.tree.structure(got) == jax.tree.structure(params)
    atol = 1e-5 if dtype == jnp.float32 else 4e-2
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype == dtype
        np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), atol=atol)
    assert not np.allclose(got["stack"].astype(float), params["stack"].astype(float), atol=0.1)


def test_mix_of_a_population_is_differentiable():
    _, _, _, experts = setup()
    population = jax.random.uniform(jax.random.key(9), (5, 4), maxval=2.0)
    together = jax.vmap(lambda a: svf.mix(experts, a))(population)
    np.testing.assert_allclose(
        together["stack"][3], svf.mix(experts, population[3])["stack"], rtol=1e-6
    )
    grad = jax.grad(lambda a: svf.mix(experts, a)["stack"].sum())(GUIDE)
    np.testing.assert_allclose(grad, (experts["stack"] - 1).sum((1, 2)), atol=1e-4)


@pytest.mark.parametrize("alpha", [jnp.ones(3), jnp.ones(()), jnp.ones((4, 4))])
def test_alpha_of_the_wrong_length_is_refused(alpha):
    params, factors, _, experts = setup()
    with pytest.raises(ValueError, match="`alpha` must have shape"):
        svf.mix(experts, alpha)
    with pytest.raises(ValueError, match="`alpha` must have shape"):
        svf.mix_weights(params, svf.deltas(factors, experts), alpha)


def test_what_does_not_fit_is_refused():
    params, factors, _, experts = setup()
    with pytest.raises(ValueError, match=r"missing=\['stack'\]"):
        svf.mix(experts, {"q_proj/kernel": jnp.ones(4)})
    with pytest.raises(ValueError, match="'delta' or 'sum'"):
        svf.mix(experts, GUIDE, "mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"missing=\['stack'\]"):
        svf.deltas(factors, {"q_proj/kernel": experts["q_proj/kernel"]})
    with pytest.raises(ValueError, match="experts, "):
        svf.deltas(factors, {n: v[0] for n, v in experts.items()})
    with pytest.raises(ValueError, match="stack"):
        svf.mix_weights({"norm": params["norm"]}, svf.deltas(factors, experts), GUIDE)
