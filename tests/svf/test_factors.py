"""Decomposing a pytree and building it again, against NumPy's SVD."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from forge_jax import svf


def is_matrix(path, leaf):
    return leaf.ndim == 2


def plain_params():
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "wide": {"kernel": jax.random.normal(keys[0], (6, 10)), "bias": jnp.arange(10.0)},
        "list": [jax.random.normal(keys[1], (9, 4)), jax.random.normal(keys[2], (5, 5))],
    }


def linen_params():
    module = nn.Sequential([nn.Dense(12), nn.gelu, nn.LayerNorm(), nn.Dense(3)])
    return module.init(jax.random.key(0), jnp.ones((2, 7)))["params"]


def nnx_state():
    return nnx.state(nnx.Linear(7, 5, rngs=nnx.Rngs(0)), nnx.Param)


def some_z(z, seed=1):
    keys = jax.random.split(jax.random.key(seed), len(z))
    return {
        n: 1 + 0.3 * jax.random.normal(k, v.shape)
        for k, (n, v) in zip(keys, z.items(), strict=True)
    }


@pytest.mark.parametrize("make", [plain_params, linen_params, nnx_state])
def test_ones_are_the_base_model_and_other_scales_are_not(make):
    params = make()
    factors, z = svf.decompose(params, is_matrix)
    same = svf.materialize(factors, z)
    assert jax.tree.structure(same) == jax.tree.structure(params)
    for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-6)
        assert a.dtype == b.dtype
    moved = svf.materialize(factors, some_z(z))
    assert any(
        not np.allclose(a, b, atol=1e-2)
        for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(params), strict=True)
    )


def test_a_materialized_nnx_state_runs():
    model = nnx.Linear(7, 5, rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)
    factors, z = svf.decompose(state, is_matrix)
    assert list(z) == ["kernel/value"]
    x = jnp.ones((2, 7))
    doubled = nnx.merge(graph, svf.materialize(factors, jax.tree.map(lambda v: 2 * v, z)))
    np.testing.assert_allclose(doubled(x), 2 * model(x), atol=1e-5)


def test_matches_numpy_svd():
    params = plain_params()
    factors, z = svf.decompose(params, is_matrix)
    z = some_z(z)
    assert set(z) == {"wide/kernel", "list/0", "list/1"}
    got = svf.materialize(factors, z)
    for name, want, new in [
        ("wide/kernel", params["wide"]["kernel"], got["wide"]["kernel"]),
        ("list/0", params["list"][0], got["list"][0]),
        ("list/1", params["list"][1], got["list"][1]),
    ]:
        u, s, vt = np.linalg.svd(np.asarray(want, np.float64), full_matrices=False)
        assert z[name].shape == (min(want.shape),)
        np.testing.assert_allclose(new, (u * (s * np.asarray(z[name]))) @ vt, atol=1e-5)
    leaf = factors["wide"]["kernel"]
    np.testing.assert_allclose(leaf.u.T @ leaf.u, np.eye(6), atol=1e-6)
    assert np.all(np.diff(leaf.s) <= 0)
    np.testing.assert_array_equal(got["wide"]["bias"], params["wide"]["bias"])


def test_bfloat16_is_decomposed_in_float32_and_restored():
    params = {"kernel": jax.random.normal(jax.random.key(0), (8, 6)).astype(jnp.bfloat16)}
    factors, z = svf.decompose(params, is_matrix)
    leaf = factors["kernel"]
    assert {leaf.u.dtype, leaf.s.dtype, leaf.vt.dtype, z["kernel"].dtype} == {jnp.dtype("float32")}
    out = svf.materialize(factors, z)["kernel"]
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out.astype(jnp.float32), params["kernel"].astype(jnp.float32))


def test_declared_axes_decompose_stacks_and_attention_kernels():
    # (layers, heads, features, head size): matrices of (features, heads * head size) per layer.
    w = jax.random.normal(jax.random.key(0), (2, 3, 8, 4))
    axes = {"qkv/kernel": svf.Axes(batch=(0,), inputs=(2,), outputs=(1, -1))}
    factors, z = svf.decompose({"qkv": {"kernel": w}}, lambda p, x: True, axes)
    assert z["qkv/kernel"].shape == (2, 8)
    z = some_z(z)
    got = svf.materialize(factors, z)["qkv"]["kernel"]
    for layer in range(2):
        matrix = np.asarray(w[layer]).transpose(1, 0, 2).reshape(8, 12)
        u, s, vt = np.linalg.svd(matrix, full_matrices=False)
        want = ((u * (s * np.asarray(z["qkv/kernel"][layer]))) @ vt).reshape(8, 3, 4)
        np.testing.assert_allclose(got[layer], want.transpose(1, 0, 2), atol=1e-5)


def test_a_declaration_may_transpose_a_matrix():
    w = jax.random.normal(jax.random.key(0), (5, 3))  # the (out, in) layout of torch
    factors, z = svf.decompose({"w": w}, is_matrix, lambda path, leaf: svf.Axes((), (1,), (0,)))
    assert factors["w"].u.shape == (3, 3)
    np.testing.assert_allclose(svf.materialize(factors, z)["w"], w, atol=1e-6)


def test_renormalized_scales_keep_their_sum_and_ignore_a_common_factor():
    factors, z = svf.decompose(plain_params(), is_matrix)
    z = jax.tree.map(jnp.abs, some_z(z))
    kept = svf.scales(factors, z, renormalize=True)
    for name, leaf in svf.named_factors(factors):
        s, mask = np.asarray(leaf.s), np.asarray(z[name])
        np.testing.assert_allclose(kept[name], s * mask * s.sum() / (s * mask).sum(), rtol=1e-5)
    scaled = svf.materialize(factors, {n: 4.4 * v for n, v in z.items()}, renormalize=True)
    for a, b in zip(
        jax.tree.leaves(scaled),
        jax.tree.leaves(svf.materialize(factors, z, renormalize=True)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_scales_take_a_population():
    factors, z = svf.decompose(plain_params(), is_matrix)
    rows = [some_z(z, seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *v: jnp.stack(v), *rows)
    for renormalize in (False, True):
        together = svf.scales(factors, stacked, renormalize)
        for i, row in enumerate(rows):
            for name, s in svf.scales(factors, row, renormalize).items():
                np.testing.assert_allclose(together[name][i], s, rtol=1e-6)


def test_materialize_is_traced_once():
    factors, z = svf.decompose(plain_params(), is_matrix)
    traces = []

    @jax.jit
    def build(factors, z):
        traces.append(1)
        return svf.materialize(factors, z)

    first, second = build(factors, z), build(factors, some_z(z))
    assert len(traces) == 1
    assert not np.allclose(first["list"][1], second["list"][1])


def test_gradient_of_z_is_the_projection_on_the_components():
    w = jax.random.normal(jax.random.key(0), (5, 4))
    g = jax.random.normal(jax.random.key(1), (5, 4))
    factors, z = svf.decompose({"w": w}, is_matrix)
    grad = jax.grad(lambda z: (svf.materialize(factors, z)["w"] * g).sum())(z)["w"]
    u, s, vt = np.linalg.svd(np.asarray(w), full_matrices=False)
    np.testing.assert_allclose(grad, s * np.einsum("mr,mn,rn->r", u, g, vt), atol=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: svf.decompose(p, lambda n, x: False), "none of the 4 leaves"),
        (lambda p: svf.decompose(p, lambda n, x: True), "wide/bias has shape .* no matrix"),
        (lambda p: svf.decompose({"w": jnp.ones((2, 3, 4))}, lambda n, x: True), "`axes`"),
        (
            lambda p: svf.decompose(
                {"w": jnp.ones((2, 3))}, is_matrix, {"w": svf.Axes((), (0,), (0,))}
            ),
            "each axis",
        ),
        (lambda p: svf.decompose({"w": jnp.ones((2, 3), jnp.int8)}, is_matrix), "int8"),
        (lambda p: svf.decompose(p, is_matrix, rank=3), "max_full"),
        (lambda p: svf.decompose(p, is_matrix, max_full=4), "`key`"),
    ],
)
def test_decompose_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call(plain_params())


def test_materialize_names_what_does_not_fit():
    factors, z = svf.decompose(plain_params(), is_matrix)
    with pytest.raises(ValueError, match=r"missing=\['list/0'\], unknown=\['typo'\]"):
        svf.materialize(factors, {n.replace("list/0", "typo"): v for n, v in z.items()})
    with pytest.raises(ValueError, match="list/0"):
        svf.materialize(factors, z | {"list/0": jnp.ones(3)})
    with pytest.raises(ValueError, match="shape"):
        svf.materialize(factors, {n: v[None] for n, v in z.items()})
