"""The condition against its formulas in NumPy: source, ops, free bits, gradients, rules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from forge_jax import arch
from forge_jax.arch.conditioning import Condition, Past, pooled
from forge_jax.arch.knobs import arch_knobs
from forge_jax.arch.mixers.frame import Frame
from forge_jax.arch.stack import Stack
from forge_jax.arch.structure import Cond
from tests.arch.documents import edited
from tests.arch.programs import jitted, random_like, random_network, random_tokens
from tests.arch.test_mixers import flatten, heads_of, sigmoid

TIME, WIDTH = 11, 16
POOL = {"kind": "pool-mlp", "H": 5}
SEGMENT = {"kind": "segment", "H": 5, "segment": 3}


def mean_of(x, t, segment=None):
    """What the condition of token t is read from."""
    if segment is None:
        return x[: t + 1].mean(0)
    end = t // segment * segment
    return x[end - segment : end].mean(0) if end else np.zeros_like(x[0])


def condition(x, p, segment=None):
    """c of every token of a row."""
    m = np.stack([mean_of(x, t, segment) for t in range(len(x))])
    inner = m @ p["condition/in/kernel"]
    return (inner * sigmoid(inner)) @ p["condition/out/kernel"]


def film(y, c, kernel, repeat=1):
    g, b = np.split(c @ kernel, 2, axis=-1)
    return y * (1 + np.repeat(g, repeat, 1)) + np.repeat(b, repeat, 1)


def lora(y, x, c, p, name):
    return y + ((x @ p[f"{name}_a/kernel"]) * (c @ p[f"{name}_s/kernel"])) @ p[f"{name}_b/kernel"]


def normed(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale


def run(ops, source=SEGMENT, changes=None):
    """Input, parameters by path and output of a stack of one layer."""
    base = {"arch.n_layers": 1, "arch.mix_unit.mixer.pos": "none", "arch.ffn.act": "relu"}
    document = edited({**base, "arch.cond": {"source": source, "ops": ops}, **(changes or {})})
    full = arch.canonical(arch.from_dict(document)).arch
    stack, at, knobs = Stack(full, 32, jnp.dtype("float32")), jnp.arange(TIME), arch_knobs(full)
    x = np.random.default_rng(0).standard_normal((1, TIME, WIDTH)).astype(np.float32)
    params = random_like(jax.eval_shape(stack.init, jax.random.key(0), x, at, knobs))
    y, _ = jitted(lambda p, x: stack.apply(p, x, at, knobs))(params, x)
    flat = {"/".join(k): v for k, v in flatten(params["params"])}
    return x[0].astype(np.float64), flat, np.asarray(y[0])


def layer(x, c, p, ops):
    """The layer and the norm after it: causal attention of 4 heads on 2, then a ReLU network.

    `ops` holds a function per place, of what is there and of what a projection has read.
    """

    def at(where, y, read=None):
        return ops[where](y, read) if where in ops else y

    p = {k.removeprefix("body/"): v[0] if k.startswith("body/") else v for k, v in p.items()}
    x = at("token", x)
    h = at("pre_mixer", at("ln_mix", normed(x, p["mix_pre/scale"])))
    w = {k.removeprefix("mix/mixer_0/"): v for k, v in p.items()}
    q = at("proj_q", h @ w["q/kernel"], h).reshape(TIME, 4, 4)
    v = at("proj_v", h @ w["v/kernel"], h).reshape(TIME, 2, 4)
    k, out = heads_of(h, w["k/kernel"], 2), np.zeros((TIME, 4, 4))
    for head in range(4):
        weights = np.exp(q[:, head] @ k[head // 2].T / 2) * np.tri(TIME)
        out[:, head] = weights / weights.sum(-1, keepdims=True) @ v[:, head // 2]
    x = x + at("post_mixer", out.reshape(TIME, -1) @ w["out/kernel"])
    h = at("ln_ffn", normed(x, p["ffn_pre/scale"]))
    x = x + np.maximum(h @ p["ffn/up/kernel"], 0) @ p["ffn/down/kernel"]
    return normed(x, p["norm/scale"])


def test_film_and_lora_at_the_projections():
    """Two ops on one place act in the document's order."""
    x, p, y = run(
        [
            {"where": "v", "op": "lora", "r": 3},
            {"where": "v", "op": "film", "share": "per_head"},
            {"where": "q", "op": "lora", "r": 2},
        ]
    )
    c, at = condition(x, p, 3), "body/mix/mixer_0/cond_proj"
    w = {k.removeprefix(at): v[0] for k, v in p.items() if k.startswith(at)}

    def values(v, h):
        return film(lora(v, h, c, w, "_v_1"), c, w["_v_2/kernel"], 4)

    ops = {"proj_q": lambda q, h: lora(q, h, c, w, "_q_0"), "proj_v": values}
    np.testing.assert_allclose(y, layer(x, c, p, ops), atol=5e-5)


def test_film_add_and_scale_around_the_mixers():
    """The source reads the stream as it enters, before the ops on it."""
    x, p, y = run(
        [
            {"where": "token", "op": "add"},
            {"where": "pre_mixer", "op": "film"},
            {"where": "post_mixer", "op": "scale", "share": "global"},
            {"where": "ln", "op": "film", "share": "global"},
        ],
        POOL,
    )
    c = condition(x, p)
    # canonical order: ln, post_mixer, pre_mixer, token
    ops = {
        "token": lambda y, _: y + c @ p["cond_token_3/kernel"],
        "pre_mixer": lambda y, _: film(y, c, p["body/cond_pre_mixer_2/kernel"][0]),
        "post_mixer": lambda y, _: y * (1 + c @ p["body/cond_post_mixer_1/kernel"][0]),
        "ln_mix": lambda y, _: film(y, c, p["body/mix_cond_ln_0/kernel"][0]),
        "ln_ffn": lambda y, _: film(y, c, p["body/ffn_cond_ln_0/kernel"][0]),
    }
    np.testing.assert_allclose(y, layer(x, c, p, ops), atol=5e-5)


@pytest.fixture(scope="module")
def read():
    """One program for all segments, and for the parts of a length."""
    return jitted(pooled)


@pytest.mark.parametrize("segment", [None, 1, 3, 4, 20])
@pytest.mark.parametrize("cuts", [[], [1], [3], [4, 5, 8], [3, 9], [*range(1, TIME)]])
def test_means_are_those_of_their_definition_in_any_parts(read, segment, cuts):
    x = np.random.default_rng(0).standard_normal((2, TIME, 4)).astype(np.float32)
    zeros = jnp.zeros((2, 4))
    past, out = Past(zeros, None if segment is None else zeros), []
    for at in np.split(np.arange(TIME), cuts):
        means, past = read(jnp.asarray(x[:, at]), jnp.asarray(at), segment, past)
        out.append(means)
    wanted = [[mean_of(row, t, segment) for t in range(TIME)] for row in x]
    np.testing.assert_allclose(np.concatenate(out, 1), wanted, atol=1e-6)


def test_free_bits():
    """The loss is NumPy's, noise comes in training only, and a knob sets the bits."""
    cond = Cond.model_validate_json('{"source": {"kind": "pool-mlp"}, "reg": {"kind": "freebits"}}')
    module, x = Condition(cond, jnp.dtype("float32")), random_like(jnp.zeros((3, TIME, WIDTH)))

    def frame(kappa):
        return Frame(jnp.arange(TIME), None, {"kappa": kappa}, 0)

    shapes = jax.eval_shape(module.init, jax.random.key(0), x, frame(0.0))
    params = random_like(shapes, seed=4)
    params = jax.tree.map(lambda w: 2 * w, params)
    c, _ = module.apply(params, x, frame(0.5))
    flat = {"condition/" + "/".join(k): v for k, v in flatten(params["params"])}
    wanted = np.stack([condition(np.asarray(row, np.float64), flat) for row in x])
    np.testing.assert_allclose(c, wanted, atol=1e-5)
    for kappa in (0.0, 0.5, 7.0):
        rngs = {"noise": jax.random.key(1)}
        (noisy, _), sown = module.apply(
            params, x, frame(kappa), None, True, rngs=rngs, mutable=["losses"]
        )
        nats = (wanted**2).sum(-1) / 2
        loss = np.maximum(0, nats - kappa * np.log(2)).mean()
        assert float(sown["losses"]["condition"][0]) == pytest.approx(loss, rel=1e-4)
        assert np.std(noisy - c) == pytest.approx(1, abs=0.1)
    assert 0 < (nats < 7 * np.log(2)).mean() < 1  # some are free, some are not
    document = {"source": POOL, "ops": [{"where": "token", "op": "add"}]}
    one, two = (
        arch.from_dict(edited({"arch.cond": {**document, "reg": {"kind": "freebits", "kappa": k}}}))
        for k in (0.0, 2.0)
    )
    assert arch.compile_key(one) == arch.compile_key(two)
    assert arch.knobs(two)["stack"]["kappa"] == 2.0


def test_segments_share_one_program():
    """Of two lengths of a segment the knob decides."""
    ops = [{"where": "token", "op": "add"}]
    specs = [
        arch.from_dict(edited({"arch.cond": {"source": {**SEGMENT, "segment": n}, "ops": ops}}))
        for n in (3, 4)
    ]
    assert len({arch.compile_key(spec) for spec in specs}) == 1
    _, network, params = random_network(arch.to_dict(specs[0]))
    tokens = random_tokens(9)
    shared = jitted(lambda knobs: network.apply(params, tokens, knobs=knobs)[0])
    own = jitted(lambda: arch.build(specs[1]).apply(params, tokens)[0])()
    np.testing.assert_allclose(shared(arch.knobs(specs[1])), own, atol=1e-5)
    assert not np.allclose(shared(arch.knobs(specs[0])), own)


@pytest.mark.parametrize("source", [POOL, SEGMENT])
def test_a_fresh_network_is_near_the_plain_one_and_every_tensor_has_a_gradient(source):
    ops = [
        {"where": "token", "op": "add", "share": "global"},
        {"where": "pre_mixer", "op": "film"},
        {"where": "post_mixer", "op": "scale"},
        {"where": "ln", "op": "film", "share": "global"},
        {"where": "proj_q", "op": "lora", "r": 2},
        {"where": "proj_v", "op": "film", "share": "per_head"},
        {"where": "proj_v", "op": "lora", "r": 2},
    ]
    retention = {"kind": "Retention", "heads": 2}
    choices = [{"kind": "Attention", "heads": 4, "kv_heads": 2}, retention]
    unit = {"kind": "par", "choices": choices, "merge": "Add"}
    reg = {"kind": "freebits", "kappa": 0.5}
    cond = {"source": source, "reg": reg, "ops": ops}
    network = arch.build(arch.from_dict(edited({"arch.mix_unit": unit, "arch.cond": cond})))
    tokens, key = random_tokens(TIME), jax.random.key(0)
    params = jitted(network.init)(key, tokens)["params"]

    def loss(params):
        rngs = {"noise": key}
        return jnp.sum(network.apply({"params": params}, tokens, train=True, rngs=rngs)[0] ** 2)

    for path, g in jax.tree_util.tree_leaves_with_path(jitted(jax.grad(loss))(params)):
        assert np.abs(g).max() > 0, jax.tree_util.keystr(path)
    plain = arch.build(arch.from_dict(edited({"arch.mix_unit": unit})))
    one, two = (
        jitted(lambda p, n=n: n.apply({"params": p}, tokens)[0])(params) for n in (network, plain)
    )
    difference = np.sqrt(np.mean((one - two) ** 2) / np.mean(two**2))
    assert 0 < difference < 0.05


def test_a_condition_of_bf16_computes_in_it():
    ops = [{"where": "pre_mixer", "op": "film"}, {"where": "proj_v", "op": "lora", "r": 2}]
    document = edited({"arch.cond": {"source": SEGMENT, "ops": ops}, "train.dtype": "bf16"})
    spec, network, params = random_network(document)
    logits, cache = jax.eval_shape(
        lambda: network.apply(params, random_tokens(9), arch.init_cache(spec, 2, 9))
    )
    assert logits.dtype == jnp.float32
    same = jax.tree.map(
        lambda a, b: a.dtype == b.dtype and a.shape == b.shape, cache, arch.init_cache(spec, 2, 9)
    )
    assert jax.tree.all(same)


def test_a_public_document_builds():
    """A router over three kinds of mixers, of which one has no projection to act on."""
    local = {"kind": "Attention", "heads": 2, "stencil": {"kind": "local", "window": 8}}
    choices = [local, {"kind": "Retention", "heads": 2}, {"kind": "SSM", "d_state": 4}]
    unit = {"kind": "route", "choices": choices, "router": {"topk": 2}}
    ops = [
        {"where": "pre_mixer", "op": "film", "share": "per_channel"},
        {"where": "proj_q", "op": "lora", "r": 4},
    ]
    source, reg = {"kind": "pool-mlp", "H": 16}, {"kind": "freebits", "kappa": 0.5}
    cond = {"source": source, "reg": reg, "ops": ops}
    document = edited({"arch.mix_unit": unit, "arch.cond": cond})
    spec = arch.from_dict(document, strict=True)
    tokens = jnp.zeros((1, 8), jnp.int32)
    params = jax.eval_shape(arch.build(spec).init, jax.random.key(0), tokens)["params"]
    body = params["stack"]["body"]
    assert body["cond_pre_mixer_0"]["kernel"].shape == (2, 16, 32)
    assert body["mix"]["mixer_1"]["cond_proj_q_1_a"]["kernel"].shape == (2, 16, 4)
    assert not [name for name in body["mix"]["mixer_0"] if "cond" in name]  # the state space
    assert sum(x.size for x in jax.tree.leaves(params)) == arch.cost(spec).params
