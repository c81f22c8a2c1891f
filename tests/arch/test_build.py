"""Whole networks: decoding token by token is the full pass, and no token sees a later one."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from forge_jax import arch
from forge_jax.arch.block import Block
from forge_jax.arch.knobs import arch_knobs
from forge_jax.arch.loops import loop_count
from forge_jax.arch.mixers.frame import Frame
from forge_jax.arch.structure import Schedule
from tests.arch.documents import BASE, edited
from tests.arch.programs import jitted, random_like, random_network, random_tokens

A = {"kind": "Attention", "heads": 4, "kv_heads": 2}
F = {**A, "softmax": {"type": "kernel", "kernel": {"features": 8}}}
R, S = {"kind": "Retention", "heads": 2, "chunk": 5}, {"kind": "SSM", "heads": 2, "d_state": 4}
C = {"kind": "LongConv", "kernel_len": 3}
LOCAL = {**A, "stencil": {"kind": "local", "window": 3, "globals": 1}}
MOE = {"kind": "moe", "mult": 1, "act": "geglu", "experts": 3, "topk": 2, "capacity": 0.7}
LOOPS = {"prelude": 1, "body": 1, "coda": 1, "loops": {"train": 3, "eval": 2}}


POOLED = {
    "source": {"kind": "pool-mlp", "H": 6},
    "ops": [
        {"where": "pre_mixer", "op": "film"},
        {"where": "q", "op": "lora", "r": 2},
        {"where": "token", "op": "add"},
        {"where": "v", "op": "scale", "share": "per_head"},
    ],
}
SEGMENTS = {
    "source": {"kind": "segment", "segment": 3},
    "ops": [{"where": "ln", "op": "scale"}, {"where": "proj_v", "op": "lora", "r": 2}],
}


def unit(kind, *choices, **more):
    return {"arch.mix_unit": {"kind": kind, "choices": list(choices), **more}}


def latents(quant="none", **latent):
    return {"cache": "latent", "quant": quant, "latent": {"dim": 6, **latent}}


DOCUMENTS = {
    "attention and Performer": unit("par", A, F, merge="Concat"),
    "Retention, state space, convolution": unit("par", R, S, C, merge="WeightedAdd"),
    "routed, with experts of limited capacity": {
        **unit("route", LOCAL, C, router={"topk": 1, "temp": 0.5, "balance": 0.1}),
        "arch.ffn": MOE,
    },
    "alibi through a small quantised ring": {
        "arch.pos.kind": "alibi",
        "arch.kv_policy": {"cache": "ring", "window": 4, "quant": "int8"},
    },
    "looped ResiDual with learned positions": {
        "arch.n_layers": 3,
        "arch.pos.kind": "learned",
        "arch.residual": {"kind": "dual"},
        "arch.recurrence": {**LOOPS, "adapter": "concat_linear"},
    },
    "latents that follow three tokens": {
        "arch.pos.kind": "xpos",
        "arch.mix_unit.mixer.softmax": {"qk_norm": "rms"},
        "arch.kv_policy": latents(quant="int8", update={"freq": 3}),
    },
    "a moving latent of every second token": {
        "arch.pos.kind": "alibi",
        "arch.kv_policy": latents(heads=1, update={"kind": "ema", "freq": 2, "tau": 0.4}),
    },
    "Retention and attention on condition": {
        **unit("par", A, R, merge="Add"),
        "arch.cond": POOLED,
    },
    "latents on the condition of a segment": {
        "arch.cond": SEGMENTS,
        "arch.kv_policy": latents(update={"freq": 2}),
    },
    "summaries of blocks, and a gate": {
        "arch.pos.kind": "xpos",
        "arch.mix_unit.mixer.softmax": {"softcap": 3.0, "qk_norm": "rms"},
        "arch.mix_unit.mixer.projection": {"type": "low_rank", "rank": 6},
        "arch.mix_unit.mixer.value_glu": True,
    },
    "DeepNet with xPos": {"arch.pos.kind": "xpos", "arch.residual": {"kind": "deepnet"}},
    "ResiDual whose tokens pass layers by": {
        "arch.residual": {"kind": "dual"},
        "arch.depth_router": {"kind": "token", "budget": 0.5, "min_layers": 1},
    },
    "coarse layers with alibi and Retention": {
        **unit("par", A, R, merge="WeightedAdd"),
        "arch.pos.kind": "alibi",
        "arch.hierarchy": {"levels": [{"every": 2, "downsample": 1 / 3}]},
    },
    "coarse layers in loops, with experts": {
        "arch.n_layers": 3,
        "arch.ffn": MOE,
        "arch.recurrence": LOOPS,
        "arch.hierarchy": {"levels": [{"every": 2}]},
    },
    "two levels of ResiDual": {
        "arch.n_layers": 4,
        "arch.residual": {"kind": "dual"},
        "arch.hierarchy": {
            "levels": [{"every": 2, "up_proj": True}, {"every": 4, "downsample": 0.25}]
        },
    },
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_decoding_is_the_full_pass_and_looks_back_only(name):
    spec, network, params = random_network(edited(DOCUMENTS[name]))
    tokens = random_tokens(12)

    @jitted
    def both(params, tokens):
        cache = arch.init_cache(spec, 2, 12)

        def one(cache, token):
            logits, cache = network.apply(params, token[:, None], cache)
            return cache, logits[:, 0]

        last, one_by_one = jax.lax.scan(one, cache, tokens.T)
        return network.apply(params, tokens)[0], one_by_one.swapaxes(0, 1), last.index  # pyright: ignore

    full, one_by_one, index = both(params, tokens)
    assert full.shape == (2, 12, 11)
    assert full.dtype == jnp.float32
    assert index == 12
    np.testing.assert_allclose(one_by_one, full, atol=2e-4)
    for at in range(1, 12):
        changed, _, _ = both(params, tokens.at[:, at].add(1) % 11)
        np.testing.assert_array_equal(changed[:, :at], full[:, :at])
        assert not np.array_equal(changed[:, at], full[:, at])


@pytest.mark.parametrize(
    "changes",
    [
        {"arch.kv_policy": {"cache": "ring", "window": 3}},
        {"arch.kv_policy": latents(update={"freq": 4})},
        {"arch.cond": {**SEGMENTS, "source": {"kind": "segment", "segment": 4}}},
    ],
)
def test_a_prompt_may_come_in_parts(changes):
    """A ring is overrun by the first part, a block of latents or a segment is cut by it."""
    spec, network, params = random_network(edited(changes))
    tokens = random_tokens(12)
    full = jitted(network.apply)(params, tokens)[0]
    cache = arch.init_cache(spec, 2, 12)
    read = jitted(network.apply)
    first, cache = read(params, tokens[:, :6], cache)
    second, cache = read(params, tokens[:, 6:], cache)
    np.testing.assert_allclose(jnp.concatenate([first, second], 1), full, atol=2e-4)


SCALARS = [
    {"kind": "local", "window": 2},
    {"kind": "local", "window": 7},
    {"kind": "ring", "block": 3},
    {"kind": "block", "block": 5},
    {"kind": "sliding", "window": 4, "stride": 3},
]


def test_scalars_share_one_program():
    """Windows, strides, theta and caps are arguments: five networks, one trace."""
    documents = [
        edited(
            {
                "arch.mix_unit.mixer.stencil": stencil,
                "arch.mix_unit.mixer.softmax.softcap": 2.0 + i,
                "arch.pos.rope.theta": 100.0 + i,
            }
        )
        for i, stencil in enumerate(SCALARS)
    ]
    specs = [arch.from_dict(document) for document in documents]
    assert len({arch.compile_key(spec) for spec in specs}) == 1
    assert arch.compile_key(specs[0]) != arch.compile_key(arch.from_dict(BASE))
    _, network, params = random_network(documents[0])
    tokens = random_tokens(12)
    shared = jitted(
        chex.assert_max_traces(lambda k: network.apply(params, tokens, knobs=k)[0], n=1)
    )
    with jax.disable_jit():  # NumPy's constants in place of traced scalars
        own = [arch.build(spec).apply(params, tokens)[0] for spec in specs]
    for spec, wanted in zip(specs, own, strict=True):
        np.testing.assert_allclose(shared(arch.knobs(spec)), wanted, atol=1e-4)
    assert not np.allclose(own[0], own[1])


def test_training_loops_noise_and_balance():
    document = edited(
        {
            **unit("route", C, {**C, "kernel_len": 4}, router={"balance": 0.5}),
            "arch.n_layers": 1,
            "arch.pos.kind": "learned",
            "arch.recurrence": {"body": 1, "noise_std": 0.3, "loops": {"train": 2, "eval": 1}},
        }
    )
    _, network, params = random_network(document)
    tokens = random_tokens(6)

    def losses(params, key):
        rngs = {"noise": key}
        out = network.apply(params, tokens, train=True, rngs=rngs, mutable=["losses"])
        (logits, _), sown = out
        return sum(jnp.sum(x) for x in jax.tree.leaves(sown)), logits

    f = jitted(jax.value_and_grad(losses, has_aux=True))
    (loss, one), gradient = f(params, jax.random.key(0))
    (_, two), _ = f(params, jax.random.key(1))
    assert not np.allclose(one, two)
    assert float(loss) >= 2 * 0.5  # two loops of one layer, each at least the weight
    assert np.abs(gradient["params"]["stack"]["body"]["mix"]["router"]["kernel"]).max() > 0


def loops_up_to(count):
    """A body of two layers that loops once at first, `count` times in the end."""
    ramp = {"curriculum": "linear", "warmup_steps": 9}
    return {"body": 2, "loops": {"train": count, "eval": 2, "schedule": ramp}}


LOOPED = {"prelude": 0, "body": 1, "coda": 1, "adapter": "residual"}


def test_a_schedule_decides_how_many_loops_are_taken_and_how_many_have_a_gradient():
    """A ramp from one loop to three; with two loops cut the first state has no gradient."""
    tokens, key = random_tokens(6), jax.random.key(0)

    def network(train, schedule):
        loops = {"train": train, "eval": 2} | ({"schedule": schedule} if schedule else {})
        _, built, params = random_network(edited({"arch.recurrence": {**LOOPED, "loops": loops}}))

        def out(params, step=0):
            rngs = {"noise": key}
            return built.apply(params, tokens, train=True, rngs=rngs, step=step)[0]

        return jitted(out), params

    ramp, params = network(3, {"curriculum": "linear", "warmup_steps": 9})
    for step, loops in ((0, 1), (4, 2)):
        np.testing.assert_allclose(ramp(params, step), network(loops, None)[0](params), atol=1e-5)

    identity = {"arch.recurrence": {"body": 1, "coda": 1, "loops": {"train": 3}}}

    def gradient(backprop, step=0, **ramp):
        schedule = {"arch.recurrence.loops.schedule": {"backprop": backprop, **ramp}}
        _, built, params = random_network(edited(identity | schedule))

        def out(p):
            rngs = {"noise": key}
            return built.apply(p, tokens, train=True, rngs=rngs, step=step)[0][..., 0].sum()

        found = jitted(jax.grad(out))(params)["params"]
        body = found["stack"]["body"]["mix"]["mixer_0"]["v"]["kernel"]
        return np.abs(found["embed"]["embedding"]).max(), np.asarray(body)

    (two, both), (three, every) = gradient(2), gradient(3)
    assert two == 0 < three
    assert not np.allclose(both, every)
    # of three loops two are taken: the second and last alone, or both, have a gradient
    ramp = {"curriculum": "linear", "warmup_steps": 4, "step": 1}
    (cut, _), (whole, _) = gradient(1, **ramp), gradient(2, **ramp)
    assert cut == 0 < whole


def test_loops_that_are_not_taken_add_no_losses():
    """One of three loops: the losses beside are those of a network with one."""
    _, taken, params = random_network(edited({"arch.ffn": MOE, "arch.recurrence": loops_up_to(3)}))
    _, single, _ = random_network(edited({"arch.ffn": MOE, "arch.recurrence": loops_up_to(1)}))

    def sown(network, step):
        rngs = {"noise": jax.random.key(0)}
        given = {"train": True, "rngs": rngs, "step": step, "mutable": ["losses"]}
        _, found = network.apply(params, random_tokens(6), **given)
        return sum(float(jnp.sum(x)) for x in jax.tree.leaves(found))

    assert sown(taken, 0) == pytest.approx(sown(single, 0), rel=1e-5)
    assert sown(taken, 99) > 2 * sown(single, 0)


def test_drawn_loops_follow_their_distribution():
    schedule = Schedule(kind="poisson_lognormal", mean=2.5, sigma=0.6, min=2, max=6)
    knobs = {"loop_mean": 2.5, "loop_sigma": 0.6}
    keys = jax.random.split(jax.random.key(0), 20_000)
    got = jitted(jax.vmap(lambda key: loop_count(schedule, 6, knobs, 0, key)))(keys)
    rng = np.random.default_rng(0)
    rates = np.exp(rng.normal(np.log(2.5) - 0.18, 0.6, 20_000))
    wanted = np.clip(1 + rng.poisson(rates), 2, 6)
    for n in range(1, 8):
        assert np.mean(got == n) == pytest.approx(np.mean(wanted == n), abs=0.015)
    # a third of the way from 2 to 6 loops, and the mean on its way from 2 to 2.5
    grown = Schedule(kind="fixed", min=2, curriculum="linear")
    count = loop_count(grown, 6, {"loop_warmup": 3}, 0, keys[0])
    assert int(count) == 3
    half = schedule.model_copy(update={"curriculum": "linear", "min": 1})
    given = knobs | {"loop_warmup": 4, "loop_sigma": 0.0}
    got = jitted(jax.vmap(lambda key: loop_count(half, 50, given, 1, key)))(keys)
    assert np.mean(got) == pytest.approx(1 + 1 + 0.5 * 1.5, abs=0.03)


def test_a_depth_router_lets_tokens_pass_and_is_taught_its_budget():
    """The layer without a router is the oracle; the gate and its loss are NumPy's."""
    router = {"kind": "token", "budget": 0.3, "tau": 0.7}
    plain, routed = (
        arch.canonical(arch.from_dict(edited({"arch.depth_router": r}))) for r in (None, router)
    )
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.standard_normal((2, 9, 16)), jnp.float32)
    at = jnp.arange(9)
    frame = Frame(at, None, arch_knobs(routed.arch) | {"mixers": ({},)}, 0)
    block = Block(routed.arch, jnp.dtype("float32"))
    params = random_like(jax.eval_shape(block.init, jax.random.key(0), (x,), frame, None)["params"])
    ((y,), _), sown = block.apply({"params": params}, (x,), frame, None, mutable=["losses"])
    rest = {name: value for name, value in params.items() if name != "depth"}
    without = Block(plain.arch, jnp.dtype("float32"))
    (full,), _ = without.apply({"params": rest}, (x,), frame, None)
    logits = np.asarray(x @ params["depth"]["kernel"])[..., 0] / 0.7
    gate = np.where(logits >= 0, 1 / (1 + np.exp(-logits)), 0)[..., None]
    assert 0 < (gate == 0).mean() < 1
    np.testing.assert_allclose(y, x + gate * (full - x), atol=1e-5)
    wanted = logits >= np.sort(logits)[:, [-3]]  # ceil(0.3 x 9) of nine
    losses = np.log1p(np.exp(-np.where(wanted, logits, -logits)))
    assert float(sown["losses"]["passing"][0]) == pytest.approx(0.01 * losses.mean(), rel=1e-4)
    ((y,), _) = block.apply({"params": params}, (x,), frame, None, True)
    np.testing.assert_allclose(y, full, atol=1e-5)


def test_what_does_not_fit_is_refused():
    spec, network, params = random_network(BASE)
    with pytest.raises(ValueError, match=r"at most train\.ctx_len 32 tokens, got 33"):
        network.apply(params, random_tokens(33))
    with pytest.raises(ValueError, match=r"must be at most train\.ctx_len 32, got 40"):
        arch.init_cache(spec, 1, 40)
    none = arch.from_dict(edited({"arch.kv_policy.cache": "none"}))
    with pytest.raises(ValueError, match="keeps no cache"):
        arch.init_cache(none, 1, 8)
