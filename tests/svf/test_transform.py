"""The factored run of a Linen module against the same module on materialized parameters."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from forge_jax import svf

STACKED = svf.Axes((0,), (1,), (2,))


class Block(nn.Module):
    """A pre-norm MLP block in the form that `nn.scan` wants."""

    @nn.compact
    def __call__(self, x, _=None):
        h = nn.Dense(12, name="up_proj")(nn.LayerNorm()(x))
        return x + nn.Dense(8, name="down_proj", use_bias=False)(nn.gelu(h)), None


class Unrolled(nn.Module):
    @nn.compact
    def __call__(self, x):
        x, _ = Block(name="first")(x)
        x, _ = nn.remat(Block)(name="second")(x)
        return nn.Dense(5, name="head")(x)


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        layers = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return nn.Dense(5, name="head")(layers(name="layers")(x, None)[0])


def axes(path, leaf):
    return STACKED if leaf.ndim == 3 else None


@functools.cache
def setup(module):
    x = jax.random.normal(jax.random.key(1), (4, 3, 8))
    params = jax.jit(module.init)(jax.random.key(0), x)["params"]
    # Linen starts biases at zero, where a forgotten one would not show.
    bias = jax.random.normal(jax.random.key(2), (12,))
    params = jax.tree.map(lambda p: p + bias if p.shape[-1:] == (12,) else p, params)
    factors, z = jax.jit(lambda p: svf.decompose(p, svf.is_mlp, axes))(params)
    return x, params, factors, perturbed(z, 3)


def perturbed(z, seed, lead=()):
    keys = jax.random.split(jax.random.key(seed), len(z))
    return {
        n: v + 0.3 * jax.random.normal(k, (*lead, *v.shape))
        for k, (n, v) in zip(keys, z.items(), strict=True)
    }


def run(module, params, x) -> Any:
    """Run the module itself."""
    return jax.jit(module.apply)({"params": params}, x)


def run_factored(module, factors, x, s=None) -> Any:
    """Run the transformed module."""
    return jax.jit(svf.transform(module).apply)({"params": factors}, x, scales=s)


modules = pytest.mark.parametrize("module", [Unrolled(), Scanned()], ids=["unrolled", "scanned"])


@modules
def test_equals_the_materialized_module(module):
    x, params, factors, z = setup(module)
    got = run_factored(module, factors, x, svf.scales(factors, z))
    want = run(module, svf.materialize(factors, z), x)
    np.testing.assert_allclose(got, want, atol=1e-5)
    base = run(module, params, x)
    assert not np.allclose(got, base, atol=1e-2)
    without = run_factored(module, factors, x)
    np.testing.assert_allclose(without, base, atol=1e-5)


@modules
def test_each_row_may_have_its_own_scales(module):
    x, _, factors, z = setup(module)
    rows = perturbed(z, 7, lead=(4,))
    s = {n: v[:, None] for n, v in svf.scales(factors, rows).items()}
    got = run_factored(module, factors, x, s)
    for i in range(4):
        params = svf.materialize(factors, {n: v[i] for n, v in rows.items()})
        np.testing.assert_allclose(got[i], run(module, params, x[i]), atol=1e-5)
    assert not np.allclose(got[0], got[1])


@modules
def test_vmap_over_a_population_equals_the_folded_form(module):
    x, _, factors, z = setup(module)
    rows = perturbed(z, 7, lead=(4,))
    adapted = svf.transform(module)

    def one(z, x):
        return adapted.apply({"params": factors}, x, scales=svf.scales(factors, z))

    folded = {n: v[:, None] for n, v in svf.scales(factors, rows).items()}
    want = adapted.apply({"params": factors}, x, scales=folded)
    np.testing.assert_allclose(jax.vmap(one)(rows, x), want, atol=1e-5)


@modules
def test_gradient_of_z_equals_the_dense_form(module):
    x, _, factors, z = setup(module)
    adapted = svf.transform(module)

    def factored(z):
        y = adapted.apply({"params": factors}, x, scales=svf.scales(factors, z))
        return jnp.sin(y).sum()

    def dense(z):
        return jnp.sin(run(module, svf.materialize(factors, z), x)).sum()

    got, want = jax.jit(jax.grad(factored))(z), jax.jit(jax.grad(dense))(z)
    for name in z:
        np.testing.assert_allclose(got[name], want[name], atol=2e-4)
        assert np.abs(got[name]).max() > 1e-2


def test_gradient_of_z_equals_finite_differences():
    module = nn.Dense(4)
    x = jax.random.normal(jax.random.key(0), (6, 5))
    params = module.init(jax.random.key(1), x)["params"]
    factors, z = svf.decompose(params, lambda p, leaf: leaf.ndim == 2)
    s = svf.scales(factors, z)

    def loss(s):
        y = svf.transform(module).apply({"params": factors}, x, scales={"kernel": s})
        return jnp.sin(y).mean()

    check_grads(jax.jit(loss), (s["kernel"],), order=1, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("compute", [None, jnp.float32])
def test_half_precision_follows_the_module(compute):
    module = nn.Dense(6, dtype=compute)
    x = jax.random.normal(jax.random.key(0), (3, 8), jnp.bfloat16)
    params = jax.tree.map(
        lambda p: p.astype(jnp.bfloat16), module.init(jax.random.key(1), x)["params"]
    )
    factors, z = svf.decompose(params, lambda p, leaf: leaf.ndim == 2)
    z = perturbed(z, 3)
    got = run_factored(module, factors, x, svf.scales(factors, z))
    want = run(module, svf.materialize(factors, z), x)
    assert got.dtype == want.dtype
    np.testing.assert_allclose(got.astype(float), want.astype(float), atol=6e-2)
    assert not np.allclose(got.astype(float), run(module, params, x), atol=0.1)


def test_truncated_and_randomized_factors_run():
    module: Any = Unrolled()
    x, params, factors, z = setup(module)
    small = svf.truncate(factors, z, 0.5)
    assert isinstance(small["first"]["up_proj"]["kernel"], svf.Factors)
    got = run_factored(module, small, x)
    want = run(module, svf.materialize(small, svf.identity(small)), x)
    np.testing.assert_allclose(got, want, atol=1e-5)
    factors, z = svf.decompose(params, svf.is_mlp, max_full=4, key=jax.random.key(0))
    z = perturbed(z, 5)
    got = run_factored(module, factors, x, svf.scales(factors, z))
    want = run(module, svf.materialize(factors, z), x)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_traced_once_and_factors_are_arguments():
    module: Any = Scanned()
    x, _, factors, z = setup(module)
    traces = []

    @jax.jit
    def run(factors, z):
        traces.append(1)
        return run_factored(module, factors, x, svf.scales(factors, z))

    first, second = run(factors, z), run(factors, perturbed(z, 11))
    assert len(traces) == 1
    assert not np.allclose(first, second)
    other, _ = svf.decompose(module.init(jax.random.key(9), x)["params"], svf.is_mlp, axes)
    assert not np.allclose(run(other, z), first)
    assert len(traces) == 1


def test_the_module_is_left_as_it_was():
    module: Any = Unrolled()
    x, params, factors, z = setup(module)
    before = run(module, params, x)
    run_factored(module, factors, x, svf.scales(factors, z))
    np.testing.assert_array_equal(run(module, params, x), before)


def test_a_layer_that_is_no_dense_is_refused_by_name():
    module = nn.Embed(6, 4)
    tokens = jnp.zeros((2,), jnp.int32)
    params = module.init(jax.random.key(0), tokens)["params"]
    factors, _ = svf.decompose(params, lambda p, leaf: True)
    with pytest.raises(ValueError, match="Embed holds embedding"):
        svf.transform(module).apply({"params": factors}, tokens)


def test_a_dense_with_its_own_product_or_a_transposed_kernel_is_refused():
    x = jnp.ones((2, 4))
    params = nn.Dense(4).init(jax.random.key(0), x)["params"]
    factors, _ = svf.decompose(params, lambda p, leaf: leaf.ndim == 2)
    own = nn.Dense(4, dot_general=jax.lax.dot_general)
    with pytest.raises(ValueError, match="dot_general"):
        svf.transform(own).apply({"params": factors}, x)
    flipped, _ = svf.decompose(
        params, lambda p, leaf: leaf.ndim == 2, {"kernel": svf.Axes((), (1,), (0,))}
    )
    with pytest.raises(ValueError, match=r"\(inputs, outputs\)"):
        svf.transform(nn.Dense(4)).apply({"params": flipped}, x)


def test_scales_that_do_not_fit_are_refused():
    module: Any = Unrolled()
    x, _, factors, z = setup(module)
    s = svf.scales(factors, z)
    adapted = svf.transform(module)
    with pytest.raises(ValueError, match=r"unknown=.*typo"):
        adapted.apply({"params": factors}, x, scales=s | {"typo": jnp.ones(3)})
    with pytest.raises(ValueError, match="must end in"):
        adapted.apply({"params": factors}, x, scales={n: v[:-1] for n, v in s.items()})
