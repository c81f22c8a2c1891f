"""Equal networks have equal fingerprints, others have not."""

import itertools

import pytest

from forge_jax import arch
from tests.arch.documents import edited

MIXER = "arch.mix_unit.mixer"
STENCIL = f"{MIXER}.stencil"
FILM, ADD = {"where": "pre_mixer", "op": "film"}, {"where": "token", "op": "add"}
LORA = {"where": "proj_q", "op": "lora", "r": 2}
A, R = {"kind": "Attention", "heads": 4}, {"kind": "Retention", "heads": 2}


def par(*choices, merge="Add"):
    return {"arch.mix_unit": {"kind": "par", "choices": list(choices), "merge": merge}}


def latent(**fields):
    return {"arch.kv_policy": {"cache": "latent", "latent": {"dim": 6, **fields}}}


def depth(**fields):
    return {"arch.depth_router": {"kind": "token", "budget": 0.5, **fields}}


def coarse(*levels):
    """Four layers with levels (every, downsample, and whether changes are mapped)."""
    names = ("every", "downsample", "up_proj")
    rows = [dict(zip(names, level, strict=False)) for level in levels]
    return {"arch.n_layers": 4, "arch.hierarchy": {"levels": rows}}


def looped(**schedule):
    loops = {"train": 3} | ({"schedule": schedule} if schedule else {})
    return {"arch.recurrence": {"body": 2, "loops": loops}}


def drawn(**schedule):
    return looped(kind="poisson_lognormal", mean=2, **schedule)


def cond(*ops, source=None, **more):
    source = source or {"kind": "pool-mlp"}
    return {"arch.cond": {"source": source, "ops": list(ops), **more}}


def segments(length, **more):
    return cond(FILM, source={"kind": "segment", "segment": length}, **more)


def fingerprint(changes):
    return arch.fingerprint(arch.from_dict(edited(changes)))


SAME = [
    ({}, {f"{MIXER}.head_dim": 4}),
    ({}, {f"{MIXER}.kv_heads": None, f"{MIXER}.groups": 2}),
    ({}, {"arch.pos.rope": {"theta": 10000}}),
    ({}, {"arch.pos.rope.dims": 64}),
    ({}, {"arch.pos.rope.scaling": {"type": "yarn", "factor": 1}}),
    ({}, {"arch.ffn.mult": 2.01}),
    ({}, {STENCIL: {"kind": "full", "window": 3}}),
    ({}, {STENCIL: {"kind": "local", "window": 32}}),
    ({}, {STENCIL: {"kind": "dilated", "dilation": 1}}),
    ({}, {f"{MIXER}.softmax": {"type": "scaled", "qk_scale": "sqrt_d"}}),
    ({}, {f"{MIXER}.softmax": {"qk_scale": 0.5}}),
    ({}, {"arch.kv_policy": {"cache": "window", "window": 40}}),
    ({}, {"arch.residual": {"kind": "single", "pre_ln": True}}),
    ({}, {"arch.depth_router": {"kind": "none"}}),
    ({}, {"arch.recurrence": {"body": 2, "adapter": "concat_linear"}}),
    ({}, {"train.lr": 0.1, "train.ctx_len": 64}),
    ({}, par({**A, "kv_heads": 2})),
    ({"train.dtype": "fp16"}, {"train.dtype": "bf16"}),
    ({"train.vocab_size": None}, {"train.vocab_size": 256}),
    (par(A, R), par(R, A)),
    ({STENCIL: {"kind": "local", "window": 5}}, {STENCIL: {"kind": "sliding", "window": 5}}),
    (
        {STENCIL: {"kind": "ring", "block": 4}},
        {STENCIL: {"kind": "sliding", "window": 5, "stride": 4}},
    ),
    (
        {"arch.kv_policy": {"cache": "window", "window": 4}},
        {"arch.kv_policy": {"cache": "ring", "window": 4}},
    ),
    (latent(), latent(update={"freq": 1})),
    (latent(), latent(update={"kind": "ema", "tau": 1.0})),
    (latent(update={"freq": 32}), latent(update={"freq": 99})),
    (latent(heads=1), {**latent(), f"{MIXER}.kv_heads": 1}),
    ({}, {"arch.depth_router": {"kind": "token", "budget": 0.5, "min_layers": 2}}),
    (depth(), depth(tau=1.0)),
    (looped(), looped(kind="fixed", min=2)),
    (looped(), looped(backprop=3)),
    (looped(backprop=1), looped(backprop=1, min=2)),
    ({"arch.recurrence": {"body": 2, "loops": {"train": 5, "eval": 3}}}, looped(min=5)),
    (drawn(max=5), drawn(max=5, sigma=0.0, min=1)),
    (cond(FILM), cond({**FILM, "share": "per_channel"}, source={"kind": "pool-mlp", "H": 16})),
    (cond(FILM), cond({**FILM, "r": 4}, reg={"kind": "none", "kappa": 1})),
    (cond(LORA), cond({**LORA, "where": "q", "share": "global"})),
    (cond(FILM, ADD), cond(ADD, FILM)),
    ({}, segments(32, reg={"kind": "freebits", "kappa": 1})),
    ({"arch.n_layers": 4}, coarse((2, 1.0), (5, 0.5))),
    (coarse((2,)), coarse((2, 0.5, False), (4, 0.5))),
    (coarse((2, 0.5), (4, 0.25)), coarse((4, 0.25), (2,), (3, 0.9999999))),
    (coarse((3, 1 / 3)), coarse((3, 0.33333333))),
]
APART = [
    {},
    latent(),
    latent(dim=7),
    latent(update={"freq": 2}),
    latent(update={"freq": 2, "kind": "ema", "tau": 0.5}),
    depth(),
    depth(budget=0.4),
    looped(),
    looped(backprop=2),
    looped(curriculum="linear", warmup_steps=5),
    looped(curriculum="linear", warmup_steps=5, min=2),
    drawn(max=5),
    drawn(max=6),
    cond(FILM),
    cond(FILM, FILM),
    cond(FILM, {**FILM, "op": "add"}),
    cond({**FILM, "op": "add"}, FILM),
    cond(FILM, source={"kind": "pool-mlp", "H": 8}),
    cond(FILM, reg={"kind": "freebits", "kappa": 0}),
    cond(FILM, reg={"kind": "freebits", "kappa": 1}),
    cond(LORA),
    cond({**LORA, "where": "proj_v"}),
    cond({**LORA, "r": 3}),
    segments(3),
    segments(4),
    {"arch.n_layers": 4},
    coarse((2,)),
    coarse((2, 0.25)),
    coarse((2, 0.5, True)),
    coarse((2,), (4, 0.25)),
    coarse((1,)),
    {"arch.d_model": 32},
    {"arch.n_layers": 3},
    {f"{MIXER}.kv_heads": 1},
    {f"{MIXER}.value_glu": True},
    {f"{MIXER}.pos": "none"},
    {STENCIL: {"kind": "local", "window": 5}},
    {STENCIL: {"kind": "local", "window": 6}},
    {STENCIL: {"kind": "sliding", "window": 5, "stride": 2}},
    {STENCIL: {"kind": "local", "window": 5, "globals": 1}},
    {STENCIL: {"kind": "dilated", "dilation": 2}},
    {STENCIL: {"kind": "hybrid", "dilation": 2, "window": 5}},
    {STENCIL: {"kind": "block", "block": 5}},
    {f"{MIXER}.softmax.softcap": 5},
    {f"{MIXER}.softmax.qk_norm": "rms"},
    {"arch.pos.rope.theta": 5000},
    {"arch.pos": {"kind": "learned"}},
    {"arch.pos": {"kind": "learned"}, "train.ctx_len": 64},
    {"arch.ffn.mult": 3},
    {"arch.ffn.act": "geglu"},
    {"arch.norm": "ScaleNorm"},
    {"arch.residual": {"kind": "dual"}},
    {"arch.residual": {"kind": "deepnet"}},
    {"arch.kv_policy.quant": "int8"},
    {"arch.recurrence": {"body": 2, "loops": {"train": 2}}},
    {"train.vocab_size": 12},
    {"train.dtype": "bf16"},
    par(A, R),
    par(A, A),
    par(A, R, merge="Concat"),
]


def key(changes):
    return arch.compile_key(arch.from_dict(edited(changes)))


def test_scalars_of_routers_schedules_and_latents_are_no_part_of_the_key():
    ema = {"kind": "ema", "tau": 0.5}
    assert key(latent(update=ema)) == key(latent(update=ema | {"tau": 0.2}))
    assert key(depth(tau=0.5)) == key(depth(budget=0.1, tau=2.0))
    assert key(drawn(max=5)) == key({**looped(kind="poisson_lognormal", mean=3, sigma=1, max=5)})
    ramp = {"curriculum": "sqrt", "warmup_steps": 5}
    assert key(looped(**ramp)) == key(looped(**ramp | {"warmup_steps": 7}))
    assert len({key(x) for x in (latent(), depth(), drawn(max=5), looped(**ramp), {})}) == 5


@pytest.mark.parametrize(("one", "other"), SAME)
def test_equal_networks_share_a_fingerprint(one, other):
    assert fingerprint(one) == fingerprint(other)


def test_different_networks_do_not():
    prints = [fingerprint(changes) for changes in APART]
    clashes = [
        (a, b) for a, b in itertools.combinations(range(len(prints)), 2) if prints[a] == prints[b]
    ]
    assert clashes == []


@pytest.mark.parametrize("changes", [*APART, *(pair[1] for pair in SAME)])
def test_the_canonical_form_is_its_own(changes):
    once = arch.canonical(arch.from_dict(edited(changes)))
    assert arch.canonical(once) == once
    assert arch.parse(arch.emit(once)) == once
    assert arch.notes(once) == ()
