"""Counted parameters are exact, FLOPs close to the compiler's, bytes those of the cache."""

import jax
import jax.numpy as jnp
import pytest

from forge_jax import arch
from tests.arch.documents import PIPELINE, SMALL_STACK, edited

A = {"kind": "Attention", "heads": 4, "kv_heads": 2}
R, S, C = {"kind": "Retention", "heads": 4}, {"kind": "SSM"}, {"kind": "LongConv"}
F = {**A, "softmax": {"type": "kernel", "kernel": {"features": 32}}}
PLACES = {
    "source": {"kind": "segment", "segment": 8},
    "ops": [
        {"where": "token", "op": "add"},
        {"where": "pre_mixer", "op": "film"},
        {"where": "post_mixer", "op": "scale", "share": "global"},
        {"where": "ln", "op": "film"},
        {"where": "proj_q", "op": "lora", "r": 4},
        {"where": "proj_v", "op": "film", "share": "per_head"},
        {"where": "proj_v", "op": "lora", "r": 3},
    ],
}
WIDE = edited({"arch.d_model": 64, "train.ctx_len": 64, "train.vocab_size": 128})


def unit(mixer):
    return {"arch.mix_unit": {"kind": "single", "mixer": mixer}}


def many(kind, merge, **more):
    return {"arch.mix_unit": {"kind": kind, "choices": [A, R, S, C], "merge": merge, **more}}


DOCUMENTS = [
    {},
    {"arch.norm": "LayerNorm", "arch.ffn.act": "gelu", "arch.pos.kind": "learned"},
    {"arch.norm": "ScaleNorm", "arch.ffn.act": "relu", "arch.pos.kind": "alibi"},
    {"arch.pos.kind": "relbias", "arch.mix_unit.mixer.softmax": {"qk_norm": "rms", "softcap": 9}},
    {"arch.mix_unit.mixer.softmax": {"qk_norm": "layer"}, "arch.mix_unit.mixer.value_glu": True},
    unit({**A, "projection": {"type": "low_rank", "rank": 8}}),
    unit({**A, "projection": {"type": "low_rank", "rank": 4, "shared": True}}),
    unit(R),
    unit(S),
    unit(C),
    unit(F),
    many("par", "WeightedAdd"),
    many("par", "Concat"),
    many("route", "WeightedAdd", router={"topk": 2}),
    many("route", "Concat", router={}),
    {"arch.ffn": {"kind": "moe", "mult": 1, "act": "swiglu", "experts": 3}},
    {"arch.kv_policy": {"cache": "latent", "latent": {"dim": 24, "heads": 1}}},
    {"arch.kv_policy": {"cache": "latent", "latent": {"dim": 24, "update": {"freq": 5}}}},
    {"arch.cond": {**PLACES, "source": {"kind": "pool-mlp", "H": 24}}},
    {**many("route", "Add", router={}), "arch.cond": PLACES},
    {**unit(F), "arch.cond": PLACES},
    {
        "arch.cond": PLACES,
        "arch.kv_policy": {"cache": "latent", "latent": {"dim": 24, "update": {"freq": 5}}},
    },
    {"arch.residual": {"kind": "dual"}},
    {"arch.residual": {"kind": "deepnet"}},
    {"arch.residual": {"kind": "single", "post_ln": True}},
    {"arch.residual": {"kind": "single", "pre_ln": False}},
    {"arch.depth_router": {"kind": "token", "budget": 0.5}},
    {"arch.recurrence": {"prelude": 1, "body": 1, "loops": {"train": 3, "eval": 2}}},
    {
        "arch.recurrence": {"body": 2, "adapter": "concat_linear", "loops": {"train": 2}},
        "arch.residual": {"kind": "dual"},
    },
    {"arch.hierarchy": {"levels": [{"every": 2, "downsample": 0.25}]}},
    {
        "arch.n_layers": 4,
        "arch.residual": {"kind": "dual"},
        "arch.hierarchy": {
            "levels": [
                {"every": 2, "up_proj": True},
                {"every": 3, "downsample": 0.2, "up_proj": True},
            ]
        },
        "arch.kv_policy": {"cache": "window", "window": 20},
    },
    {
        "arch.n_layers": 3,
        "arch.hierarchy": {"levels": [{"every": 1}]},
        "arch.recurrence": {"prelude": 1, "body": 2, "loops": {"train": 3, "eval": 2}},
        "arch.kv_policy": {"cache": "latent", "latent": {"dim": 24, "update": {"freq": 5}}},
    },
]


STAGES = {
    **{"arch.d_model": 64, "train.ctx_len": 64, "train.vocab_size": 128},
    **{"arch.modules.tokens.params.vocab_size": 128, "arch.modules.logits.output_dim": 128},
}


@pytest.mark.parametrize(
    "document", [*(edited(changes, WIDE) for changes in DOCUMENTS), edited(STAGES, PIPELINE)]
)
def test_counts_agree_with_the_program(document):
    spec = arch.from_dict(document)
    found = arch.cost(spec)
    network = arch.build(spec, unroll=True)
    tokens = jnp.zeros((1, 64), jnp.int32)
    variables = jax.eval_shape(network.init, jax.random.key(0), tokens)
    assert found.params == sum(x.size for x in jax.tree.leaves(variables["params"]))
    params = {"params": variables["params"]}
    counted = jax.jit(lambda p, t: network.apply(p, t)[0]).lower(params, tokens).cost_analysis()
    assert counted is not None
    assert found.flops == pytest.approx(counted["flops"], rel=0.1)
    cache = jax.eval_shape(lambda: arch.init_cache(spec, 1, 64))
    held = [x for x in jax.tree.leaves(cache) if x.dtype != jnp.int32]
    assert found.cache_bytes == sum(x.size * x.dtype.itemsize for x in held)


@pytest.mark.parametrize("quant", ["none", "int8", "fp8", "nf4"])
@pytest.mark.parametrize("window", [None, 8])
def test_bytes_are_those_of_the_cache(quant, window):
    policy = {"cache": "window" if window else "full", "quant": quant, "window": window}
    spec = arch.from_dict(edited({"arch.kv_policy": policy}, WIDE))
    held = jax.tree.leaves(jax.eval_shape(lambda: arch.init_cache(spec, 1, 64)).stages)
    total = sum(x.size * x.dtype.itemsize for x in held if x.dtype != jnp.int32)
    found = arch.cost(spec)
    assert found.cache_bytes == total == found.kv_bytes * (window or 64)


def test_training_runs_the_training_loops():
    loops = {"arch.recurrence": {"body": 2, "loops": {"train": 3, "eval": 1}}}
    plain, looped = (arch.cost(arch.from_dict(edited(c, WIDE))) for c in ({}, loops))
    assert looped.flops == plain.flops
    assert 2.5 * plain.train_flops < looped.train_flops < 3 * plain.train_flops
    assert looped.params == plain.params


def test_a_budget_is_compared():
    budget = {"budget": {"params_target": 10, "flops_target": "match:small"}}
    spec = arch.from_dict(edited(budget | {"train.budget.flops_per_step": 5}, WIDE))
    found = arch.cost(spec)
    small = found._replace(train_flops=found.train_flops / 2)
    assert len(arch.over_budget(spec, found, {"small": small})) == 3
    assert arch.over_budget(arch.from_dict(WIDE), found) == ()
    fits = arch.from_dict(edited({"train.budget.flops_per_step": found.train_flops}, WIDE))
    assert [len(arch.over_budget(fits, found, rows=n)) for n in (1, 2)] == [0, 1]
    with pytest.raises(ValueError, match="must have 'small'"):
        arch.over_budget(spec, found)


def test_the_smallest_token_budget_counts():
    """All tokens of a step pass every module; one that no stage has limits nothing."""
    budgets = {"train.budget.tokens_per_step": 90, "arch.modules.tokens.budget.tokens_per_step": 70}
    budgets |= {"arch.modules.upper.budget.tokens_per_step": 64}
    spare = {"arch.modules.spare": {**SMALL_STACK, "budget": {"tokens_per_step": 1}}}
    spec = arch.from_dict(edited(budgets | spare, PIPELINE))
    free = {"arch.modules.tokens.budget": {"flops_per_token": 0}}
    assert arch.over_budget(arch.from_dict(edited(free, PIPELINE)), arch.cost(spec)) == ()
    assert arch.over_budget(spec, arch.cost(spec), rows=2) == ()
    full, where = arch.canonical(spec), ("train", "arch.modules.tokens", "arch.modules.upper")
    over, found = (arch.over_budget(s, arch.cost(s), rows=3) for s in (spec, full))
    assert [s.partition(".budget.")[0] for s in over] == list(where)
    assert found == ("train.budget.tokens_per_step: 96 tokens in a step, over 64.",)
    assert arch.fingerprint(spec) == arch.fingerprint(arch.from_dict(PIPELINE))
