"""Stencils, positions, quantised values and norms against plain definitions."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from forge_jax import arch
from forge_jax.arch import positions, quantize, sizes
from forge_jax.arch.ffn import balance_loss, keep_largest
from forge_jax.arch.knobs import arch_knobs
from forge_jax.arch.layers import Linear, make_norm
from forge_jax.arch.mixers.attention import averaged
from forge_jax.arch.stencils import visible
from forge_jax.arch.structure import LongRope, Scaling
from tests.arch.documents import edited

PATTERNS = [
    ({"kind": "full"}, lambda i, j: True),
    ({"kind": "local", "window": 3}, lambda i, j: i - j < 3),
    ({"kind": "local", "window": 3, "globals": 2}, lambda i, j: i - j < 3 or j < 2),
    ({"kind": "sliding", "window": 3, "stride": 4}, lambda i, j: j > i - i % 4 - 3),
    ({"kind": "dilated", "dilation": 3}, lambda i, j: (i - j) % 3 == 0),
    ({"kind": "dilated", "dilation": 3, "window": 2}, lambda i, j: i - j in (0, 3)),
    ({"kind": "dilated", "dilation": 1, "window": 2}, lambda i, j: i - j < 2),
    ({"kind": "block", "block": 4}, lambda i, j: i // 4 == j // 4),
    ({"kind": "ring", "block": 4}, lambda i, j: i // 4 - j // 4 <= 1),
    ({"kind": "ring", "block": 4, "stride": 2}, lambda i, j: j >= i - i % 2 - 4),
    ({"kind": "hybrid", "window": 2, "dilation": 5}, lambda i, j: i - j < 2 or (i - j) % 5 == 0),
    ({"kind": "hybrid", "window": 2, "dilation": 1}, lambda i, j: True),
]


@pytest.mark.parametrize(("stencil", "seen"), PATTERNS)
def test_a_stencil_is_causal_and_its_pattern(stencil, seen):
    spec = arch.canonical(arch.from_dict(edited({"arch.mix_unit.mixer.stencil": stencil})))
    (mixer,), knobs = sizes.attentions(spec.arch), arch_knobs(spec.arch)
    at = jnp.arange(32)
    got = visible(mixer.stencil, at, at, knobs["mixers"][0])
    wanted = [[j <= i and seen(i, j) for j in range(32)] for i in range(32)]
    np.testing.assert_array_equal(got, wanted)


THETA, DIMS, S = 10000.0, 8, 4.0
I = np.arange(DIMS // 2)
PLAIN = THETA ** (-2 * I / DIMS)
TURNS = 2048 * PLAIN / (2 * np.pi)
KEPT = np.clip((TURNS - 1) / 31, 0, 1)
FREQUENCIES = {
    "linear": PLAIN / S,
    "ntk": (THETA * S ** (DIMS / (DIMS - 2))) ** (-2 * I / DIMS),
    "yarn": KEPT * PLAIN + (1 - KEPT) * PLAIN / S,
    "longrope": PLAIN / (1 + (S**0.5 - 1) * (2 * I / DIMS) ** 2),
}


@pytest.mark.parametrize("kind", FREQUENCIES)
def test_scaled_frequencies(kind):
    shape = LongRope(alpha=0.5, beta=2.0) if kind == "longrope" else None
    scaling = Scaling(type=kind, factor=S, longrope=shape)
    for factor in (S, jnp.float32(S)):
        got = positions.frequencies(DIMS, THETA, scaling, factor, 2048)
        np.testing.assert_allclose(got, FREQUENCIES[kind], rtol=1e-5)
    # the slowest pair of ntk and linear reach the same angle: that is what ntk's theta is for
    if kind == "ntk":
        np.testing.assert_allclose(got[-1], PLAIN[-1] / S, rtol=1e-5)


def test_alibi_slopes():
    np.testing.assert_allclose(positions.alibi_slopes(8), 2.0 ** -np.arange(1, 9))
    six = [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]
    np.testing.assert_allclose(positions.alibi_slopes(6), six)


def test_relative_buckets():
    far = np.array([0, 15, 16, 31, 64, 127, 128, 5000, -3])
    np.testing.assert_array_equal(
        positions.buckets(jnp.asarray(far)), [0, 15, 16, 21, 26, 31, 31, 31, 0]
    )


@pytest.mark.parametrize(("quant", "error"), [("int8", 0.005), ("fp8", 0.07), ("nf4", 0.16)])
@pytest.mark.parametrize("dim", [6, 7, 128])
def test_quantised_values(quant, error, dim):
    x = np.random.default_rng(0).standard_normal((3, 5, dim)).astype(np.float32)
    kept = quantize.decode(quantize.encode(jnp.asarray(x), quant), dim, quant, jnp.float32)
    largest = np.abs(x).max(-1, keepdims=True)
    assert (np.abs(kept - x) <= error * largest).all()
    assert not np.array_equal(kept, x)
    again = quantize.decode(quantize.encode(kept, quant), dim, quant, jnp.float32)
    np.testing.assert_allclose(again, kept, rtol=1e-5)  # what is kept is kept
    gradient = jax.grad(lambda x: (quantize.through(x, quant) * 3).sum())(jnp.asarray(x))
    np.testing.assert_allclose(gradient, 3)
    packed = quantize.encode(jnp.asarray(x), quant)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(packed)) / 15
    assert held == quantize.bytes_of(dim, quant, 4) < 4 * dim


def test_nf4_takes_the_nearest_level():
    x = jnp.asarray([*np.linspace(-1, 1, 63), 1.0])
    kept = quantize.decode(quantize.encode(x, "nf4"), 64, "nf4", jnp.float32)
    nearest = quantize.NF4[np.abs(np.asarray(x)[:, None] - quantize.NF4).argmin(1)]
    np.testing.assert_allclose(kept, nearest, atol=1e-6)


def test_norms():
    x = np.random.default_rng(0).standard_normal((2, 16)).astype(np.float32)
    wanted = {
        "ScaleNorm": 4 * x / np.linalg.norm(x, axis=-1, keepdims=True),
        "RMSNorm": x / np.sqrt((x**2).mean(-1, keepdims=True)),
        "LayerNorm": (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True),
    }
    for kind, value in wanted.items():
        norm = make_norm(kind, "n", jnp.float32)  # pyright: ignore[reportArgumentType]
        y, _ = norm.init_with_output(jax.random.key(0), x)
        np.testing.assert_allclose(y, value, atol=1e-4)


def test_balance_is_least_for_an_even_load():
    even, skewed = jnp.full((8, 4), 0.25), jnp.tile(jnp.asarray([0.7, 0.1, 0.1, 0.1]), (8, 1))
    everyone = jnp.ones((8, 4))
    assert float(balance_loss(even, everyone)) == pytest.approx(1)
    first = keep_largest(skewed, 1)
    np.testing.assert_array_equal(first.sum(0), [8, 0, 0, 0])
    assert float(balance_loss(skewed, first)) == pytest.approx(2.8)
    pushed = jax.grad(lambda p: balance_loss(p, keep_largest(p, 1)))(skewed)
    assert (pushed[:, 0] > pushed[:, 1]).all()


def test_linear_maps_and_softmax_have_the_gradients_of_their_formulas():
    """Both bring backward passes of their own."""
    rng = np.random.default_rng(2)
    x, w, back = (jnp.asarray(rng.standard_normal(s)) for s in ((2, 5, 3), (3, 4), (2, 5, 4)))
    module = Linear(4, jnp.dtype("float32"))

    def mapped(x, w):
        y: Any = module.apply({"params": {"kernel": w}}, x)
        return (y * back).sum()

    got = jax.grad(mapped, (0, 1))(x, w)
    wanted = jax.grad(lambda x, w: (x @ w * back).sum(), (0, 1))(x, w)
    chex.assert_trees_all_close(got, wanted, rtol=1e-5)
    scores, v = (jnp.asarray(rng.standard_normal(s)) for s in ((2, 3, 2, 4, 5), (2, 3, 5, 6)))
    back = jnp.asarray(rng.standard_normal((2, 3, 2, 4, 6)))
    scores = 3 * scores.at[..., 4].set(-1e30)

    def plain(scores, v):
        return jnp.einsum("bhgts,bhsd->bhgtd", jax.nn.softmax(scores), v)

    for f in (lambda x: x, lambda x: x.astype(jnp.bfloat16)):
        given, near = (f(scores).astype(jnp.float32), f(v)), 2e-6 if f(v) is v else 0.1
        (one, got), (two, wanted) = (
            jax.value_and_grad(lambda *a, g=g: (g(*a) * back).sum(), (0, 1))(*given)
            for g in (averaged, plain)
        )
        assert abs(one - two) < near * 10
        chex.assert_trees_all_close(got, wanted, atol=near)
        assert all(a.dtype == b.dtype for a, b in zip(got, given, strict=True))
