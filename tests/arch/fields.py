"""What shows that a field of the language acts: one entry for every field of the schema."""

from tests.arch.documents import PIPELINE

M = "arch.mix_unit.mixer"
KERNEL = {"type": "kernel", "kernel": {"features": 8}}
ROUTE = {
    "kind": "route",
    "choices": [{"kind": "Attention", "heads": 2}, {"kind": "LongConv"}],
    "router": {"topk": 1},
}
PAR = {"kind": "par", "choices": ROUTE["choices"], "merge": "Add"}
MOE = {"kind": "moe", "mult": 1, "act": "relu", "experts": 3, "topk": 2, "capacity": 0.5}
LOOP = {"prelude": 0, "body": 2, "loops": {"train": 3, "eval": 2}}
DRAWN = {"kind": "poisson_lognormal", "mean": 1.5, "max": 5}
RAMP = {"curriculum": "linear", "warmup_steps": 40}
YARN = {"type": "yarn", "factor": 4}
LONG = {"type": "longrope", "factor": 4, "longrope": {"alpha": 1, "beta": 1}}
LATENT = {"cache": "latent", "latent": {"dim": 4}}
COARSE = {"levels": [{"every": 2}]}
LOW = {"type": "low_rank", "rank": 10}  # blocks of four tokens
DEEP = {"kind": "token", "budget": 0.5}
COND = {"source": {"kind": "pool-mlp", "H": 6}, "ops": [{"where": "pre_mixer", "op": "film"}]}
SEGMENTS = {**COND, "source": {"kind": "segment", "segment": 3}}
FREE = {**COND, "reg": {"kind": "freebits", "kappa": 1}}
LORA = {**COND, "ops": [{"where": "proj_q", "op": "lora", "r": 2}]}
SSM = {"kind": "SSM", "heads": 2, "d_state": 4, "chunk": 4}
RETENTION = {"kind": "Retention", "heads": 2, "chunk": 4}
REFUSED = "refused"
PIPED = {f"arch.{name}": PIPELINE["arch"][name] for name in ("modules", "pipeline")}
LOWER, STAGE = "arch.modules.lower", "arch.pipeline.4"
RATES = "rates"  # read by who trains (`training.rates_of`, `steps_of`); the network is the same

# Node and field -> (what the base document needs, or REFUSED or RATES; the change).
CASES = {
    ("Spec", "arch"): ({}, {"arch.d_model": 32}),
    ("Spec", "train"): ({}, {"train.vocab_size": 12}),
    ("Spec", "budget"): ({}, {"budget.params_target": 1}),
    ("Budget", "params_target"): ({}, {"budget.params_target": 1}),
    ("Budget", "flops_target"): ({}, {"budget.flops_target": 1}),
    ("Train", "ctx_len"): ({"arch.pos": {"kind": "learned"}}, {"train.ctx_len": 64}),
    ("Train", "vocab_size"): ({}, {"train.vocab_size": 12}),
    ("Train", "dtype"): ({}, {"train.dtype": "bf16"}),
    ("Train", "budget"): ({}, {"train.budget.flops_per_step": 1}),
    ("StepBudget", "flops_per_step"): ({}, {"train.budget.flops_per_step": 1}),
    **{
        ("Train", name): (RATES, {f"train.{name}": value})
        for name, value in {"lr": 0.5, "wd": 0.5, "betas": [0.5, 0.5], "clip": 0.5}.items()
    },
    ("StepBudget", "tokens_per_step"): ({}, {"train.budget.tokens_per_step": 1}),
    ("StepBudget", "max_steps"): (RATES, {"train.budget.max_steps": 2}),
    ("Arch", "d_model"): ({}, {"arch.d_model": 32}),
    ("Arch", "n_layers"): ({}, {"arch.n_layers": 3}),
    ("Arch", "mix_unit"): ({}, {"arch.mix_unit": PAR}),
    ("Arch", "ffn"): ({}, {"arch.ffn": MOE}),
    ("Arch", "norm"): ({}, {"arch.norm": "ScaleNorm"}),
    ("Arch", "pos"): ({}, {"arch.pos": {"kind": "alibi"}}),
    ("Arch", "kv_policy"): ({}, {"arch.kv_policy": {"quant": "int8"}}),
    ("Arch", "residual"): ({}, {"arch.residual": {"kind": "dual"}}),
    ("Arch", "recurrence"): ({}, {"arch.recurrence": LOOP}),
    ("Arch", "cond"): ({}, {"arch.cond": COND}),
    ("Cond", "source"): ({"arch.cond": COND}, {"arch.cond.source": {"kind": "pool-mlp"}}),
    ("Cond", "reg"): ({"arch.cond": COND}, {"arch.cond.reg": FREE["reg"]}),
    ("Cond", "ops"): ({"arch.cond": COND}, {"arch.cond.ops": COND["ops"] * 2}),
    ("CondSource", "kind"): (
        {"arch.cond": SEGMENTS},
        {"arch.cond.source.kind": "pool-mlp"},
    ),
    ("CondSource", "H"): ({"arch.cond": COND}, {"arch.cond.source.H": 7}),
    ("CondSource", "segment"): ({"arch.cond": SEGMENTS}, {"arch.cond.source.segment": 4}),
    ("CondReg", "kind"): ({"arch.cond": FREE}, {"arch.cond.reg.kind": "none"}),
    ("CondReg", "kappa"): ({"arch.cond": FREE}, {"arch.cond.reg.kappa": 0}),
    ("CondOp", "where"): ({"arch.cond": COND}, {"arch.cond.ops.0.where": "token"}),
    ("CondOp", "op"): ({"arch.cond": COND}, {"arch.cond.ops.0.op": "scale"}),
    ("CondOp", "share"): ({"arch.cond": COND}, {"arch.cond.ops.0.share": "global"}),
    ("CondOp", "r"): ({"arch.cond": LORA}, {"arch.cond.ops.0.r": 3}),
    ("Arch", "hierarchy"): ({}, {"arch.hierarchy": COARSE}),
    ("Hierarchy", "levels"): ({}, {"arch.hierarchy": COARSE}),
    **{
        ("HierarchyLevel", name): (
            {"arch.hierarchy": COARSE},
            {f"arch.hierarchy.levels.0.{name}": value},
        )
        for name, value in {"every": 1, "downsample": 0.25, "up_proj": True}.items()
    },
    ("Arch", "depth_router"): ({}, {"arch.depth_router": DEEP}),
    ("DepthRouter", "kind"): ({"arch.depth_router": DEEP}, {"arch.depth_router.kind": "none"}),
    **{
        ("DepthRouter", name): (
            {"arch.depth_router": DEEP},
            {f"arch.depth_router.{name}": value},
        )
        for name, value in {"budget": 0.2, "tau": 0.3, "min_layers": 1}.items()
    },
    ("Arch", "modules"): (PIPED, {f"{LOWER}.n_layers": 2}),
    ("Arch", "pipeline"): ({}, PIPED),
    ("Module", "kind"): (
        PIPED | {"arch.modules.encoder.params": None},
        {"arch.modules.bits": PIPED["arch.modules"]["lower"]},
    ),
    ("Module", "d_model"): (REFUSED, PIPED | {f"{LOWER}.d_model": 8}),
    **{
        ("Module", name): (PIPED, {f"{LOWER}.{name}": value})
        for name, value in {
            "n_layers": 2,
            "mix_unit": PAR,
            "ffn": MOE,
            "norm": "LayerNorm",
            "pos": {"kind": "alibi"},
            "kv_policy": {"quant": "int8"},
            "residual": {"kind": "dual"},
            "depth_router": DEEP,
            "recurrence": {"body": 1, "loops": {"train": 2}},
        }.items()
    },
    ("Module", "cond"): (PIPED, {f"{LOWER}.cond": COND}),
    ("Module", "hierarchy"): (PIPED, {f"{LOWER}.hierarchy": {"levels": [{"every": 1}]}}),
    ("Module", "latent"): (REFUSED, PIPED | {"arch.modules.bits.latent": {"bits": 4}}),
    ("Module", "output_dim"): (REFUSED, PIPED | {"arch.modules.logits.output_dim": 12}),
    ("Module", "params"): (PIPED, {"arch.modules.encoder.params": None}),
    ("Module", "budget"): (PIPED, {f"{LOWER}.budget": {"tokens_per_step": 1}}),
    ("ModuleBudget", "tokens_per_step"): (PIPED, {f"{LOWER}.budget.tokens_per_step": 1}),
    **{
        ("ModuleBudget", name): (REFUSED, PIPED | {f"{LOWER}.budget": {name: 1}})
        for name in ("flops_per_token", "latency_ms")
    },
    ("Stage", "name"): (REFUSED, PIPED | {f"{STAGE}.name": "bits"}),
    ("Stage", "module"): (PIPED, {f"{STAGE}.module": "lower"}),
    ("Stage", "kind"): (REFUSED, PIPED | {f"{STAGE}.kind": "custom"}),
    ("Stage", "repeat"): (PIPED, {f"{STAGE}.repeat": 2}),
    ("Stage", "inputs"): (PIPED, {f"{STAGE}.inputs": ["tokens"]}),
    ("Stage", "kv_from"): (PIPED, {f"{STAGE}.kv_from": ["tokens"]}),
    ("Stage", "mem_from"): (PIPED, {f"{STAGE}.mem_from": ["bits"]}),
    ("Stage", "mode"): (REFUSED, PIPED | {f"{STAGE}.mode": "train"}),
    ("Stage", "train_only"): (REFUSED, PIPED | {f"{STAGE}.train_only": True}),
    ("Stage", "prefill_only"): (REFUSED, PIPED | {f"{STAGE}.prefill_only": True}),
    ("Stage", "params"): (REFUSED, PIPED | {f"{STAGE}.params": {"a": 1}}),
    ("Stage", "budget"): (REFUSED, PIPED | {f"{STAGE}.budget": {"tokens_multiplier": 2}}),
    ("SingleUnit", "kind"): ({}, {"arch.mix_unit": PAR}),
    ("SingleUnit", "mixer"): ({}, {M: RETENTION}),
    ("ParUnit", "kind"): ({"arch.mix_unit": PAR}, {"arch.mix_unit": ROUTE}),
    ("ParUnit", "choices"): (
        {"arch.mix_unit": PAR},
        {"arch.mix_unit.choices": PAR["choices"] * 2},
    ),
    ("ParUnit", "merge"): ({"arch.mix_unit": PAR}, {"arch.mix_unit.merge": "Concat"}),
    ("RouteUnit", "kind"): ({"arch.mix_unit": ROUTE}, {"arch.mix_unit": PAR}),
    ("RouteUnit", "choices"): (
        {"arch.mix_unit": ROUTE},
        {"arch.mix_unit.choices": PAR["choices"] * 2},
    ),
    ("RouteUnit", "merge"): ({"arch.mix_unit": ROUTE}, {"arch.mix_unit.merge": "Concat"}),
    ("RouteUnit", "router"): ({"arch.mix_unit": ROUTE}, {"arch.mix_unit.router": {}}),
    ("Router", "topk"): ({"arch.mix_unit": ROUTE}, {"arch.mix_unit.router.topk": 2}),
    ("Router", "temp"): (
        {"arch.mix_unit": {**ROUTE, "router": {}}},
        {"arch.mix_unit.router.temp": 0.3},
    ),
    ("Router", "balance"): ({"arch.mix_unit": ROUTE}, {"arch.mix_unit.router.balance": 0.5}),
    ("Attention", "kind"): ({}, {M: RETENTION}),
    ("Attention", "heads"): ({}, {f"{M}.heads": 8}),
    ("Attention", "kv_heads"): ({}, {f"{M}.kv_heads": 4}),
    ("Attention", "head_dim"): ({}, {f"{M}.head_dim": 8}),
    ("Attention", "stencil"): ({}, {f"{M}.stencil": {"kind": "local", "window": 3}}),
    ("Attention", "softmax"): ({}, {f"{M}.softmax": {"qk_norm": "rms"}}),
    ("Attention", "projection"): ({}, {f"{M}.projection": LOW}),
    ("Attention", "pos"): ({}, {f"{M}.pos": "none"}),
    ("Attention", "mode"): (REFUSED, {f"{M}.mode": "recurrent"}),
    ("Attention", "value_glu"): ({}, {f"{M}.value_glu": True}),
    ("Stencil", "kind"): ({}, {f"{M}.stencil": {"kind": "block", "block": 3}}),
    ("Stencil", "window"): (
        {f"{M}.stencil": {"kind": "local", "window": 3}},
        {f"{M}.stencil.window": 4},
    ),
    ("Stencil", "dilation"): (
        {f"{M}.stencil": {"kind": "dilated", "dilation": 2}},
        {f"{M}.stencil.dilation": 3},
    ),
    ("Stencil", "block"): (
        {f"{M}.stencil": {"kind": "ring", "block": 3}},
        {f"{M}.stencil.block": 4},
    ),
    ("Stencil", "stride"): (
        {f"{M}.stencil": {"kind": "sliding", "window": 3}},
        {f"{M}.stencil.stride": 3},
    ),
    ("Stencil", "globals"): (
        {f"{M}.stencil": {"kind": "local", "window": 3}},
        {f"{M}.stencil.globals": 2},
    ),
    **{
        ("Stencil", name): (REFUSED, {f"{M}.stencil": {"kind": "cross", "query": "a", "key": "b"}})
        for name in ("query", "key")
    },
    ("Softmax", "type"): ({f"{M}.softmax": {"kernel": {"features": 8}}}, {f"{M}.softmax": KERNEL}),
    ("Softmax", "qk_scale"): ({}, {f"{M}.softmax.qk_scale": 0.2}),
    ("Softmax", "qk_norm"): ({}, {f"{M}.softmax.qk_norm": "layer"}),
    ("Softmax", "softcap"): ({}, {f"{M}.softmax.softcap": 0.7}),
    ("Softmax", "kernel"): ({f"{M}.softmax": KERNEL}, {f"{M}.softmax.kernel.features": 9}),
    ("Kernel", "name"): (REFUSED, {f"{M}.softmax": KERNEL, f"{M}.softmax.kernel.name": "laplace"}),
    ("Kernel", "features"): ({f"{M}.softmax": KERNEL}, {f"{M}.softmax.kernel.features": 9}),
    ("Kernel", "redraw"): ({f"{M}.softmax": KERNEL}, {f"{M}.softmax.kernel.redraw": 2}),
    ("Kernel", "orthogonal"): ({f"{M}.softmax": KERNEL}, {f"{M}.softmax.kernel.orthogonal": False}),
    ("Projection", "type"): ({f"{M}.projection": LOW}, {f"{M}.projection.type": "none"}),
    ("Projection", "rank"): ({f"{M}.projection": LOW}, {f"{M}.projection.rank": 16}),
    ("Projection", "block"): (
        {f"{M}.projection": {"type": "low_rank", "block": 4}},
        {f"{M}.projection.block": 3},
    ),
    ("Projection", "shared"): ({f"{M}.projection": LOW}, {f"{M}.projection.shared": True}),
    ("Retention", "kind"): ({M: RETENTION}, {M: SSM}),
    ("Retention", "heads"): ({M: RETENTION}, {f"{M}.heads": 4}),
    ("Retention", "head_dim"): ({M: RETENTION}, {f"{M}.head_dim": 4}),
    ("Retention", "chunk"): ({M: RETENTION}, {f"{M}.chunk": 8}),
    ("Retention", "mode"): ({M: RETENTION}, {f"{M}.mode": "recurrent"}),
    ("SSM", "kind"): ({M: SSM}, {M: RETENTION}),
    ("SSM", "d_state"): ({M: SSM}, {f"{M}.d_state": 8}),
    ("SSM", "expand"): ({M: SSM}, {f"{M}.expand": 1.0}),
    ("SSM", "heads"): ({M: SSM}, {f"{M}.heads": 4}),
    ("SSM", "chunk"): ({M: SSM}, {f"{M}.chunk": 8}),
    ("SSM", "mode"): ({M: SSM}, {f"{M}.mode": "recurrent"}),
    ("LongConv", "kind"): ({M: {"kind": "LongConv"}}, {M: RETENTION}),
    ("LongConv", "kernel_len"): ({M: {"kind": "LongConv"}}, {f"{M}.kernel_len": 3}),
    ("DenseFFN", "kind"): ({}, {"arch.ffn": MOE}),
    ("DenseFFN", "mult"): ({}, {"arch.ffn.mult": 3}),
    ("DenseFFN", "act"): ({}, {"arch.ffn.act": "geglu"}),
    ("MoEFFN", "kind"): ({"arch.ffn": MOE}, {"arch.ffn": {**MOE, "experts": 4}}),
    ("MoEFFN", "mult"): ({"arch.ffn": MOE}, {"arch.ffn.mult": 2}),
    ("MoEFFN", "act"): ({"arch.ffn": MOE}, {"arch.ffn.act": "silu"}),
    ("MoEFFN", "experts"): ({"arch.ffn": MOE}, {"arch.ffn.experts": 4}),
    ("MoEFFN", "topk"): ({"arch.ffn": MOE}, {"arch.ffn.topk": 1}),
    ("MoEFFN", "capacity"): ({"arch.ffn": MOE}, {"arch.ffn.capacity": 3}),
    ("Pos", "kind"): ({}, {"arch.pos.kind": "xpos"}),
    ("Pos", "rope"): ({}, {"arch.pos.rope.theta": 10}),
    ("Rope", "theta"): ({}, {"arch.pos.rope.theta": 10}),
    ("Rope", "dims"): ({}, {"arch.pos.rope.dims": 2}),
    ("Rope", "scaling"): ({}, {"arch.pos.rope.scaling": {"type": "linear", "factor": 3}}),
    ("Scaling", "type"): (
        {"arch.pos.rope.scaling": YARN},
        {"arch.pos.rope.scaling.type": "linear"},
    ),
    ("Scaling", "factor"): ({"arch.pos.rope.scaling": YARN}, {"arch.pos.rope.scaling.factor": 2}),
    ("Scaling", "longrope"): (
        {"arch.pos.rope.scaling": LONG},
        {"arch.pos.rope.scaling.longrope.alpha": 2},
    ),
    **{
        ("LongRope", name): (
            {"arch.pos.rope.scaling": LONG},
            {f"arch.pos.rope.scaling.longrope.{name}": 2},
        )
        for name in ("alpha", "beta")
    },
    ("KVPolicy", "cache"): ({}, {"arch.kv_policy.cache": "none"}),
    ("KVPolicy", "window"): (
        {"arch.kv_policy": {"cache": "ring", "window": 4}},
        {"arch.kv_policy.window": 3},
    ),
    ("KVPolicy", "quant"): ({}, {"arch.kv_policy.quant": "nf4"}),
    ("KVPolicy", "evict"): (REFUSED, {"arch.kv_policy.evict": "lru"}),
    ("KVPolicy", "latent"): ({"arch.kv_policy": LATENT}, {"arch.kv_policy.latent.dim": 6}),
    ("LatentCache", "dim"): ({"arch.kv_policy": LATENT}, {"arch.kv_policy.latent.dim": 6}),
    ("LatentCache", "heads"): ({"arch.kv_policy": LATENT}, {"arch.kv_policy.latent.heads": 4}),
    ("LatentCache", "update"): (
        {"arch.kv_policy": LATENT},
        {"arch.kv_policy.latent.update": {"freq": 3}},
    ),
    ("LatentUpdate", "kind"): (
        {"arch.kv_policy": LATENT, "arch.kv_policy.latent.update": {"freq": 3, "tau": 0.5}},
        {"arch.kv_policy.latent.update.kind": "ema"},
    ),
    ("LatentUpdate", "freq"): (
        {"arch.kv_policy": LATENT, "arch.kv_policy.latent.update": {"freq": 3}},
        {"arch.kv_policy.latent.update.freq": 4},
    ),
    ("LatentUpdate", "tau"): (
        {"arch.kv_policy": LATENT, "arch.kv_policy.latent.update": {"kind": "ema", "tau": 0.5}},
        {"arch.kv_policy.latent.update.tau": 0.2},
    ),
    ("Residual", "kind"): ({}, {"arch.residual.kind": "deepnet"}),
    ("Residual", "pre_ln"): ({}, {"arch.residual.pre_ln": False}),
    ("Residual", "post_ln"): ({}, {"arch.residual.post_ln": True}),
    ("Residual", "scale"): ({}, {"arch.residual.scale": 0.3}),
    ("Recurrence", "prelude"): (
        {"arch.recurrence": LOOP},
        {"arch.recurrence.prelude": 1, "arch.recurrence.body": 1},
    ),
    ("Recurrence", "body"): (
        {"arch.recurrence": LOOP},
        {"arch.recurrence.coda": 1, "arch.recurrence.body": 1},
    ),
    ("Recurrence", "coda"): (
        {"arch.recurrence": LOOP},
        {"arch.recurrence.coda": 1, "arch.recurrence.body": 1},
    ),
    ("Recurrence", "adapter"): ({"arch.recurrence": LOOP}, {"arch.recurrence.adapter": "residual"}),
    ("Recurrence", "noise_std"): ({"arch.recurrence": LOOP}, {"arch.recurrence.noise_std": 0.5}),
    ("Recurrence", "loops"): ({"arch.recurrence": LOOP}, {"arch.recurrence.loops": {"train": 4}}),
    ("Loops", "train"): ({"arch.recurrence": LOOP}, {"arch.recurrence.loops.train": 4}),
    ("Loops", "eval"): ({"arch.recurrence": LOOP}, {"arch.recurrence.loops.eval": 1}),
    ("Loops", "schedule"): ({"arch.recurrence": LOOP}, {"arch.recurrence.loops.schedule": DRAWN}),
    ("Schedule", "kind"): (
        {"arch.recurrence": LOOP, "arch.recurrence.loops.schedule": {"mean": 2}},
        {"arch.recurrence.loops.schedule.kind": "poisson_lognormal"},
    ),
    **{
        ("Schedule", name): (
            {"arch.recurrence": LOOP, "arch.recurrence.loops.schedule": DRAWN},
            {f"arch.recurrence.loops.schedule.{name}": value},
        )
        for name, value in {"mean": 9, "sigma": 5, "min": 5, "max": 2}.items()
    },
    **{
        ("Schedule", name): (
            {"arch.recurrence": LOOP, "arch.recurrence.loops.schedule": RAMP},
            {f"arch.recurrence.loops.schedule.{name}": value},
        )
        for name, value in {"curriculum": "sqrt", "warmup_steps": 8}.items()
    },
    ("Schedule", "backprop"): (
        {"arch.recurrence": LOOP},
        {"arch.recurrence.loops.schedule": {"backprop": 1}},
    ),
}
