"""Equal networks have equal fingerprints, others have not."""

import itertools

import pytest

from forge_jax import arch
from tests.arch.documents import edited

MIXER = "arch.mix_unit.mixer"
STENCIL = f"{MIXER}.stencil"
A, R = {"kind": "Attention", "heads": 4}, {"kind": "Retention", "heads": 2}


def par(*choices, merge="Add"):
    return {"arch.mix_unit": {"kind": "par", "choices": list(choices), "merge": merge}}


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
]
APART = [
    {},
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
