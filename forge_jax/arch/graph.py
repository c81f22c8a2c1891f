"""What a pipeline can get wrong: names, edges, the order of stages, and who sees the future.

What is wrong within a stack is found by `rules`.
"""

from collections.abc import Iterator

from forge_jax.arch import sizes
from forge_jax.arch.mixing import Attention, given
from forge_jax.arch.pipeline import (
    EMBEDDING,
    OWN,
    SHARED,
    in_use,
    kind_of,
    module_arch,
    stages_in_full,
)
from forge_jax.arch.schema import Arch, Module, ModuleBudget, Spec, Stage
from forge_jax.arch.structure import Cond
from forge_jax.arch.text import Finding, Path

READS = ("inputs", "kv_from", "mem_from")
# Which of its fields act on a module, by its kind.
ACTING = {
    "transformer": (*SHARED, *OWN),
    "latent_sampler": ("norm", "cond"),
    "readout": ("output_dim",),
}
# What a module's `params` may hold, by its kind.
PARAMS = {
    "transformer": {"causal": (bool, "true or false")},
    "latent_sampler": {"latent_dim": (int, "a whole number of features")},
    "embedding": {"vocab_size": (int, "a whole number of tokens")},
}


def problems(spec: Spec) -> list[Finding]:
    """Why the stages cannot be built."""
    found = [*_modules(spec), *_names(spec.arch), *_kinds(spec.arch)]
    found = found or [*_edges(spec.arch), *_sharing(spec.arch), *_ends(spec.arch)]
    return found or [*_reach(spec.arch)]


def _modules(spec: Spec) -> Iterator[Finding]:
    arch, vocabulary = spec.arch, sizes.vocabulary_of(spec)
    for field in OWN:
        if getattr(arch, field) is not None:
            yield ("arch", field), "stands in the modules where there is a pipeline"
    for name, module in (arch.modules or {}).items():
        path: Path = ("arch", "modules", name)
        if not name:
            yield path, "needs a name"
        if module.kind == "custom":
            yield (*path, "kind"), "custom is not supported"
        if module.latent is not None:
            yield (*path, "latent"), "is not supported: bits are cond.source.H, width latent_dim"
        if module.d_model not in (None, arch.d_model):
            yield (*path, "d_model"), f"must be arch.d_model {arch.d_model}, got {module.d_model}"
        params = module.params or {}
        for key, value in params.items():
            kind, wanted = PARAMS.get(module.kind, {}).get(key, (None, ""))
            if kind is None:
                yield (*path, "params", key), f"is no parameter of a module of kind {module.kind}"
            elif type(value) is not kind or (type(value) is int and value < 1):
                yield (*path, "params", key), f"must be {wanted}, got {value!r}"
        sized = {("params", "vocab_size"): params.get("vocab_size")}
        sized |= {("output_dim",): module.output_dim}
        for at, size in sized.items():
            if size not in (None, vocabulary):
                yield (*path, *at), f"must be the vocabulary's {vocabulary}, got {size}"
        if module.kind == "latent_sampler":
            yield from _latent(path, module)
        budget = module.budget or ModuleBudget()
        if budget.latency_ms is not None:
            yield (*path, "budget", "latency_ms"), "is not supported: it depends on the machine"
        if budget.flops_per_token is not None and module.kind != "embedding":
            reason = "is not supported: train.budget.flops_per_step limits the whole network"
            yield (*path, "budget", "flops_per_token"), reason
        elif budget.flops_per_token:
            yield (*path, "budget", "flops_per_token"), "must be 0, what an embedding costs"


def _latent(path: Path, module: Module) -> Iterator[Finding]:
    cond = module.cond
    if cond and cond.source and cond.source.kind != "pool-mlp":
        yield (*path, "cond", "source", "kind"), "a latent is inferred token by token: pool-mlp"
    if cond and cond.source and (cond.source.H or 1) > 20:
        yield (*path, "cond", "source", "H"), f"must be at most 20 bits, got {cond.source.H}"
    if cond and cond.reg and cond.reg.kind == "freebits" and cond.reg.kappa is None:
        yield (*path, "cond", "reg", "kappa"), "is needed by freebits"


def _names(arch: Arch) -> Iterator[Finding]:
    seen: set[str] = set()
    for i, stage in enumerate(arch.pipeline or ()):
        path: Path = ("arch", "pipeline", i)
        if stage.name in seen:
            yield (*path, "name"), f"two stages are called {stage.name}"
        elif stage.name == EMBEDDING and i:
            yield (*path, "name"), f"{EMBEDDING} is what the first stage may be called"
        if stage.module is not None and stage.module not in (arch.modules or {}):
            yield (*path, "module"), f"there is no module {stage.module}"
        for field in READS:
            names = getattr(stage, field) or ()
            if len(set(names)) < len(names):
                yield (*path, field), f"names a stage twice, got {', '.join(names)}"
            for name in names:
                if name not in seen:
                    yield (*path, field), f"{name} is no earlier stage"
        seen.add(stage.name)


def _kinds(arch: Arch) -> Iterator[Finding]:
    modules = arch.modules or {}
    for i, stage in enumerate(arch.pipeline or ()):
        path: Path = ("arch", "pipeline", i)
        kind = kind_of(stage, modules)
        if kind == "custom":
            yield (*path, "kind"), "custom is not supported"
        elif kind == "transformer" and stage.module is None:
            yield (*path, "module"), "is needed by a stage of no kind of its own"
        elif stage.kind not in (None, "module", kind):
            yield (*path, "kind"), f"the module is of kind {kind}, got {stage.kind}"
        if stage.mode in ("prefill", "decode", "inference") or stage.prefill_only:
            reason = "a network that is not trained as it is used is not supported"
            yield (*path, "prefill_only" if stage.prefill_only else "mode"), reason
        if stage.params is not None:
            yield (*path, "params"), "is not supported: a module has params"
        if stage.budget is not None:
            yield (*path, "budget"), "is not supported: write it in train.budget"
        if kind != "transformer":
            given = [field for field in ("kv_from", "mem_from") if getattr(stage, field)]
            given += ["repeat"] if stage.repeat > 1 else []
            for field in given:
                yield (*path, field), f"is for stacks, not for a stage of kind {kind}"


def _edges(arch: Arch) -> Iterator[Finding]:
    full = stages_in_full(arch)
    modules = arch.modules or {}
    unread = {stage.name: i for i, (stage, _, _) in enumerate(full[:-1])}
    seeing = {}  # stages that see later tokens
    for i, (stage, kind, inputs) in enumerate(full):
        module = modules.get(stage.module or "")
        if module and kind == "transformer" and (module.params or {}).get("causal") is False:
            seeing[stage.name] = i
            yield from _sees_ahead(stage, arch, module)
        for field in READS:
            for name in inputs if field == "inputs" else getattr(stage, field) or ():
                unread.pop(name, None)
                if name in seeing and kind != "latent_sampler":
                    sentence = f"{name} sees later tokens: only a latent sampler may read it"
                    yield ("arch", "pipeline", i, field), sentence
    for name, i in unread.items():
        yield ("arch", "pipeline", i), f"no stage reads {name}"


def _sees_ahead(stage: Stage, arch: Arch, module: Module) -> Iterator[Finding]:
    """What a stack that is not causal may be: one plain attention."""
    own = module_arch(arch, module)
    mixer = getattr(own.mix_unit, "mixer", None)
    plain = isinstance(mixer, Attention) and not (
        (mixer.stencil and mixer.stencil.kind != "full")
        or (mixer.projection and mixer.projection.type != "none")
        or sizes.features_of(mixer)
    )
    others = (own.kv_policy, own.depth_router, own.cond, own.hierarchy)
    if not plain or own.pos.kind in ("alibi", "relbias", "xpos") or any(others):
        sentence = "false is for one full softmax attention with rope or learned positions, and "
        sentence += "without kv_policy, cond, hierarchy and depth_router"
        yield ("arch", "modules", stage.module or "", "params", "causal"), sentence


def _sharing(arch: Arch) -> Iterator[Finding]:
    first: dict[str, bool] = {}
    for i, (stage, kind, _) in enumerate(stages_in_full(arch)):
        memory = bool(stage.mem_from)
        if kind == "transformer" and first.setdefault(stage.module or "", memory) != memory:
            sentence = f"all stages of {stage.module} must have it, or none: they share weights"
            yield ("arch", "pipeline", i, "mem_from"), sentence


def _ends(arch: Arch) -> Iterator[Finding]:
    kinds = [kind for _, kind, _ in stages_in_full(arch)]
    last = len(kinds) - 1
    for i, kind in enumerate(kinds):
        if (kind == "embedding") != (i == 0):
            sentence = "the first stage, and no other, must be an embedding"
            yield ("arch", "pipeline", i), sentence
        if (kind == "readout") != (i == last):
            yield ("arch", "pipeline", i), "the last stage, and no other, must be a readout"
    if "transformer" not in kinds:
        yield ("arch", "pipeline"), "has no stack"


def _reach(arch: Arch) -> Iterator[Finding]:
    """Tokens have to come by a way without latents, and stages run when they say."""
    full, used = stages_in_full(arch), in_use(arch)
    if full[0][0].name not in used:
        yield ("arch", "pipeline"), "leads no token to the readout but through latents"
    for i, (stage, _, _) in enumerate(full):
        path: Path = ("arch", "pipeline", i)
        if stage.train_only and stage.mode not in (None, "train"):
            yield (*path, "mode"), f"must be train beside train_only, got {stage.mode}"
        elif (stage.train_only or stage.mode == "train") and stage.name in used:
            field = "train_only" if stage.train_only else "mode"
            yield (*path, field), "is for what only latents need: the readout needs this stage"
        elif stage.mode == "all" and stage.name not in used:
            yield (*path, "mode"), "must be train: only latents need this stage"


def notes(arch: Arch) -> Iterator[Finding]:
    """What is said without effect."""
    if arch.pipeline is None:
        if arch.modules is not None:
            yield ("arch", "modules"), "has no effect without a pipeline"
        return
    named = {stage.module for stage in arch.pipeline}
    for name, module in (arch.modules or {}).items():
        path: Path = ("arch", "modules", name)
        if name not in named:
            yield path, "has no effect: no stage is of this module"
        idle = {*SHARED, *OWN, "output_dim"} - {"d_model", *ACTING.get(module.kind, ())}
        for field in sorted(given(module) & idle):
            yield (*path, field), f"has no effect on a module of kind {module.kind}"
        if module.kind == "latent_sampler" and module.cond:
            yield from _idle_latent((*path, "cond"), module.cond)
    used = in_use(arch)
    for i, stage in enumerate(arch.pipeline):
        if stage.mode == "train_prefill":
            meant = "all: the readout needs" if stage.name in used else "train: only latents need"
            yield ("arch", "pipeline", i, "mode"), f"read as {meant} this stage"


def _idle_latent(path: Path, cond: Cond) -> Iterator[Finding]:
    if cond.ops:
        yield (*path, "ops"), "has no effect on a latent: stages read it by mem_from"
    if cond.source and cond.source.segment:
        yield (*path, "source", "segment"), "has no effect on a latent"
    if cond.reg and cond.reg.kind == "none" and cond.reg.kappa is not None:
        yield (*path, "reg", "kappa"), "has no effect while its kind is none"
