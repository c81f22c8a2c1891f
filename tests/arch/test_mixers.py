"""Each mixer against its equation in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from forge_jax import arch
from forge_jax.arch import decay, sizes
from forge_jax.arch.block import make_mixer
from forge_jax.arch.knobs import arch_knobs
from forge_jax.arch.mixers import longconv, performer, ssm
from forge_jax.arch.mixers.frame import Frame
from forge_jax.arch.mixing import Attention, Kernel
from forge_jax.arch.positions import turns
from tests.arch.documents import edited, mixer
from tests.arch.programs import jitted, random_like

TIME, WIDTH = 9, 16


def run(document, seed=0):
    """Input, parameters and output of the single mixer of a document."""
    full = arch.canonical(arch.from_dict(document))
    (one,), knobs = sizes.mixers(full.arch.mix_unit), arch_knobs(full.arch)
    module = make_mixer(one, full.arch, jnp.float32, 1.0, "m")
    x = np.random.default_rng(seed).standard_normal((1, TIME, WIDTH)).astype(np.float32)
    at, turn = jnp.arange(TIME), None
    if full.arch.pos.rope is not None and isinstance(one, Attention) and one.pos != "none":
        turn = turns(full.arch.pos, at, sizes.turned(one, full.arch), knobs, 32)
    frame = Frame(at, turn, knobs["mixers"][0], 0)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x, frame)
    params = random_like(shapes)
    y, _ = jitted(lambda p, x: module.apply(p, x, frame))(params, x)
    flat = {"/".join(k): v for k, v in flatten(params["params"])}
    return x[0], flat, np.asarray(y[0])


def flatten(tree, path=()):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, (*path, key))
        else:
            yield (*path, key), np.asarray(value, np.float64)


def heads_of(x, weight, heads):
    """(heads, time, dim) of x times a weight."""
    return (x @ weight).reshape(len(x), heads, -1).swapaxes(0, 1)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def turned(x, dims, theta=10000.0, amplitude=lambda n, i: 1.0):
    """Rotation of one head by complex numbers, features i and i + dims / 2 being one of them."""
    out = x.astype(np.complex128).real.copy()
    half = dims // 2
    for n in range(len(x)):
        for i in range(half):
            z = complex(x[n, i], x[n, i + half]) * np.exp(1j * n * theta ** (-2 * i / dims))
            z *= amplitude(n, i)
            out[n, i], out[n, i + half] = z.real, z.imag
    return out


def attention(x, p, heads, kv_heads, *, allowed=lambda i, j: True, place=None, norm=None,
              score=lambda s, h, i, j: s, glu=False):  # fmt: skip
    """Attention one query at a time; place(which, x) moves queries and keys."""
    q = heads_of(x, p["q/kernel"], heads)
    k, v = (heads_of(x, p[f"{n}/kernel"], kv_heads) for n in "kv")
    if norm:
        q, k = norm("q", q), norm("k", k)
    out = np.zeros_like(q)
    for h in range(heads):
        keys, values = k[h // (heads // kv_heads)], v[h // (heads // kv_heads)]
        query = q[h]
        if place:
            query, keys = place("q", query), place("k", keys)
        for i in range(len(x)):
            seen = [j for j in range(i + 1) if allowed(i, j)]
            s = np.array([score(query[i] @ keys[j] / query.shape[1] ** 0.5, h, i, j) for j in seen])
            w = np.exp(s - s.max())
            out[h, i] = (w / w.sum()) @ values[seen]
    y = out.swapaxes(0, 1).reshape(len(x), -1) @ p["out/kernel"]
    return y * sigmoid(x @ p["glu/kernel"]) if glu else y


def attending(changes=None, **fields):
    fields = {"kind": "Attention", "heads": 4, "kv_heads": 2} | fields
    return edited(changes or {}, mixer(**fields))


NONE = {"pos": "none"}


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_with_grouped_queries_and_rotation(kv_heads):
    x, p, y = run(attending(kv_heads=kv_heads))
    wanted = attention(x, p, 4, kv_heads, place=lambda _, t: turned(t, 4))
    np.testing.assert_allclose(y, wanted, atol=2e-5)


def test_attention_with_fewer_turned_features_and_another_theta():
    rope = {"arch.pos.rope": {"theta": 50.0, "dims": 2}}
    x, p, y = run(attending(rope))
    wanted = attention(x, p, 4, 2, place=lambda _, t: turned(t, 2, 50.0))
    np.testing.assert_allclose(y, wanted, atol=2e-5)


def test_attention_with_xpos():
    x, p, y = run(attending({"arch.pos.kind": "xpos"}))

    def place(which, t):
        sign = 1 if which == "q" else -1
        return turned(t, 4, amplitude=lambda n, i: ((i / 2 + 0.4) / 1.4) ** (sign * n / 512))

    np.testing.assert_allclose(y, attention(x, p, 4, 2, place=place), atol=2e-5)


def test_attention_with_alibi_softcap_scale_and_gate():
    softmax = {"softcap": 2.0, "type": "scaled", "qk_scale": 0.7}
    x, p, y = run(attending({"arch.pos.kind": "alibi"}, softmax=softmax, value_glu=True))

    def score(s, h, i, j):
        return 2 * np.tanh(s * 2 * 0.7 / 2) - 2.0 ** (-2 * (h + 1)) * (i - j)

    np.testing.assert_allclose(y, attention(x, p, 4, 2, score=score, glu=True), atol=2e-5)


def test_attention_with_relative_bias():
    x, p, y = run(attending({"arch.pos.kind": "relbias"}))
    table = p["relbias"]
    wanted = attention(x, p, 4, 2, score=lambda s, h, i, j: s + table[i - j, h])
    np.testing.assert_allclose(y, wanted, atol=2e-5)


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_attention_with_normed_heads(kind):
    x, p, y = run(attending(softmax={"qk_norm": kind}, **NONE))

    def norm(which, t):
        t = t - t.mean(-1, keepdims=True) if kind == "layer" else t
        t = t / np.sqrt((t**2).mean(-1, keepdims=True) + 1e-6) * p[f"{which}_norm/scale"]
        return t + p.get(f"{which}_norm/bias", 0)

    np.testing.assert_allclose(y, attention(x, p, 4, 2, norm=norm), atol=3e-5)


def test_attention_through_a_window_and_a_policy():
    stencil, policy = {"kind": "local", "window": 5, "globals": 1}, {"cache": "ring", "window": 4}
    x, p, y = run(attending({"arch.kv_policy": policy}, stencil=stencil, **NONE))
    wanted = attention(x, p, 4, 2, allowed=lambda i, j: (i - j < 5 or j < 1) and i - j < 4)
    np.testing.assert_allclose(y, wanted, atol=2e-5)


@pytest.mark.parametrize(
    ("update", "stands_for"),
    [
        ({}, lambda t: {t: 1.0}),
        ({"freq": 3}, lambda t: {s: 1 / (t % 3 + 1) for s in range(t - t % 3, t + 1)}),
        (
            {"kind": "ema", "freq": 2, "tau": 0.3},
            lambda t: {s: 0.7 ** (t - s) * (0.3 if s else 1.0) for s in range(t + 1)},
        ),
    ],
)
def test_latent_attention(update, stands_for):
    """Keys and values of the ended blocks' latents, and of the token's own, turned when read."""
    policy = {"cache": "latent", "latent": {"dim": 6, "heads": 2, "update": update}}
    x, p, y = run(attending({"arch.kv_policy": policy}))
    c = x @ p["latent/kernel"]
    r = np.stack([sum(w * c[s] for s, w in stands_for(t).items()) for t in range(TIME)])
    q = heads_of(x, p["q/kernel"], 4)
    k, v = (heads_of(r, p[f"{n}/kernel"], 2) for n in "kv")
    out, freq = np.zeros_like(q), update.get("freq", 1)
    for h in range(4):
        query, keys = turned(q[h], 4), turned(k[h // 2], 4)
        for i in range(TIME):
            seen = [j for j in range(i + 1) if j % freq == freq - 1 or j == i]
            w = np.exp(keys[seen] @ query[i] / 2)
            out[h, i] = w / w.sum() @ v[h // 2][seen]
    wanted = out.swapaxes(0, 1).reshape(TIME, -1) @ p["out/kernel"]
    np.testing.assert_allclose(y, wanted, atol=2e-5)


def test_performer():
    softmax = {"type": "kernel", "kernel": {"features": 8}}
    x, p, y = run(attending(softmax=softmax, **NONE))
    kernel = Kernel(features=8)
    rows = np.asarray(performer.draw(kernel, 4, 0), np.float64)
    q, k, v = (heads_of(x, p[f"{n}/kernel"], h) for n, h in (("q", 4), ("k", 2), ("v", 2)))

    def phi(t):
        t = t / 4**0.25
        return np.exp(t @ rows.T - (t**2).sum(-1, keepdims=True) / 2)

    out = np.zeros_like(q)
    for h in range(4):
        a = phi(q[h]) @ phi(k[h // 2]).T * np.tri(TIME)
        out[h] = a @ v[h // 2] / a.sum(-1, keepdims=True)
    wanted = out.swapaxes(0, 1).reshape(TIME, -1) @ p["out/kernel"]
    np.testing.assert_allclose(y, wanted, atol=1e-4)


def test_random_features_estimate_the_softmax():
    kernel = Kernel(features=4096, redraw=3)
    rows = performer.draw(kernel, 4, 0)
    q, k = 0.2 * np.random.default_rng(0).standard_normal((2, 6, 4))
    product = performer.feature_map(q, rows, False) @ performer.feature_map(k, rows, False).T
    np.testing.assert_allclose(product, np.exp(q @ k.T), rtol=0.04)
    assert np.abs(rows.mean(0)).max() < 0.08  # no half space is preferred
    block = rows[:4] @ rows[:4].T
    np.testing.assert_allclose(block, np.diag(np.diag(block)), atol=1e-4)
    assert np.array_equal(rows, performer.draw(kernel, 4, 2))
    assert not np.array_equal(rows, performer.draw(kernel, 4, 3))


def test_retention():
    x, p, y = run(mixer(kind="Retention", heads=2))
    q, k, v = (heads_of(x, p[f"{n}/kernel"], 2) for n in "qkv")
    out = np.zeros_like(v)
    for h in range(2):
        state = np.zeros((8, 8))
        for t in range(TIME):
            state = (1 - 2.0 ** (-5 - h)) * state + np.outer(k[h, t] / 8**0.5, v[h, t])
            out[h, t] = q[h, t] @ state
    out = out / np.sqrt((out**2).mean(-1, keepdims=True) + 1e-6)
    gate = x @ p["gate/kernel"]
    gate = gate * sigmoid(gate)
    wanted = (gate * out.swapaxes(0, 1).reshape(TIME, -1)) @ p["out/kernel"]
    np.testing.assert_allclose(y, wanted, atol=2e-5)


def test_state_space():
    x, p, y = run(mixer(kind="SSM", heads=2, d_state=3, expand=1.5))
    u = heads_of(x, p["u/kernel"], 2)
    b, c = x @ p["b/kernel"], x @ p["c/kernel"]
    delta = np.log1p(np.exp(x @ p["step/kernel"] + p["step_bias"]))
    out = np.zeros_like(u)
    for h in range(2):
        state = np.zeros((3, 12))
        for t in range(TIME):
            a = np.exp(-delta[t, h] * np.exp(p["log_decay"][h]))
            state = a * state + delta[t, h] * np.outer(b[t], u[h, t])
            out[h, t] = c[t] @ state + p["skip"][h] * u[h, t]
    gate = x @ p["gate/kernel"]
    inner = out.swapaxes(0, 1).reshape(TIME, -1) * gate * sigmoid(gate)
    inner = inner / np.sqrt((inner**2).mean(-1, keepdims=True) + 1e-6) * p["norm/scale"]
    np.testing.assert_allclose(y, inner @ p["out/kernel"], atol=2e-5)


def test_state_space_starts_with_the_papers_steps():
    step = jax.nn.softplus(ssm.start_step(jax.random.key(0), (500,)))
    assert (step > 0.99e-3).all()
    assert (step < 0.101).all()
    assert 0.005 < np.median(step) < 0.02


@pytest.mark.parametrize("taps", [4, longconv.UNROLLED + 1])
def test_long_convolution(taps):
    x, p, y = run(mixer(kind="LongConv", kernel_len=taps))
    v, gate = x @ p["v/kernel"], x @ p["gate/kernel"]
    out = np.zeros_like(v)
    for t in range(TIME):
        for s in range(min(taps, t + 1)):
            out[t] += p["kernel"][s, 0] * v[t - s]
    np.testing.assert_allclose(y, (gate * sigmoid(gate) * out) @ p["out/kernel"], atol=2e-5)


@pytest.mark.parametrize("chunk", [None, 1, 4, 50])
def test_every_chunking_is_the_recurrence(chunk):
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 1, 1, 11, 3))
    v, log_decay = rng.standard_normal((1, 2, 11, 5)), -rng.exponential(size=(1, 2, 11))
    state = rng.standard_normal((1, 2, 3, 5))
    f = jitted(decay.decayed, static_argnums=5)
    out, last = f(*(jnp.asarray(t) for t in (q, k, v, log_decay, state)), chunk)
    for h in range(2):
        s = state[0, h]
        for t in range(11):
            s = np.exp(log_decay[0, h, t]) * s + np.outer(k[0, 0, t], v[0, h, t])
            np.testing.assert_allclose(out[0, h, t], q[0, 0, t] @ s, atol=1e-5)
        np.testing.assert_allclose(last[0, h], s, atol=1e-5)
