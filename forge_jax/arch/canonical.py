"""One form, and one fingerprint, for all documents that mean the same network."""

import functools
import hashlib
import json
from typing import Any

from forge_jax.arch import sizes
from forge_jax.arch.conditioning import canonical_cond
from forge_jax.arch.levels import canonical_hierarchy
from forge_jax.arch.loops import most_loops
from forge_jax.arch.mixing import Attention, LongConv, Mixer, Retention, RouteUnit
from forge_jax.arch.parse import from_dict
from forge_jax.arch.pipeline import EMBEDDING, Step, last_of, steps_of
from forge_jax.arch.schema import Arch, ModuleBudget, Spec, StepBudget
from forge_jax.arch.structure import DepthRouter, LatentUpdate, Loops, Residual, Schedule

Tree = dict[str, Any]


def canonical(spec: Spec) -> Spec:
    """The document with every default filled, what has no effect dropped, choices sorted.

    Two documents of the same network (same function family, same cost) have the same canonical
    `arch`; `train` keeps what concerns training. Canonical documents are their own canonical form.
    Stages of a pipeline keep their order: of two that do not read each other either may be first,
    and those are two forms.
    """
    return _canonical(spec)  # pyright: ignore[reportArgumentType] frozen nodes hash


# a search asks for the same documents again and again; documents are immutable
@functools.lru_cache(maxsize=4096)
def _canonical(spec: Spec) -> Spec:
    tree = _network(spec.arch, spec.train.ctx_len)
    train = spec.train.model_dump(mode="json", exclude_none=True)
    if limits := token_limits(spec):
        train["budget"] = train.get("budget", {}) | {"tokens_per_step": min(limits.values())}
    train["vocab_size"] = sizes.vocabulary_of(spec)
    train["dtype"] = "bf16" if spec.train.dtype == "fp16" else spec.train.dtype
    budget = spec.budget.model_dump(mode="json", exclude_none=True) if spec.budget else None
    return from_dict({"arch": tree, "train": train} | ({"budget": budget} if budget else {}))


def token_limits(spec: Spec) -> dict[str, int]:
    """Path -> tokens of a step: of the training, and of modules, for all tokens pass all stages."""
    budgets: dict[str, StepBudget | ModuleBudget | None] = {"train": spec.train.budget}
    for stage in spec.arch.pipeline or ():
        if stage.module:
            budgets[f"arch.modules.{stage.module}"] = (spec.arch.modules or {})[stage.module].budget
    limits = {path: budget.tokens_per_step for path, budget in budgets.items() if budget}
    return {f"{path}.budget.tokens_per_step": limit for path, limit in limits.items() if limit}


def _stack(arch: Arch, context: int) -> Tree:
    out: Tree = {
        "d_model": arch.d_model,
        "n_layers": arch.n_layers,
        "mix_unit": _unit(arch, context),
        "ffn": arch.ffn.model_dump(mode="json", exclude_none=True),
        "norm": arch.norm,
        "pos": _positions(arch),
        "cond": canonical_cond(arch, context),
        "kv_policy": _policy(arch, context),
        "residual": _residual(arch.residual, arch.n_layers),
        "recurrence": _recurrence(arch),
        "depth_router": _depth(arch.depth_router, arch.n_layers),
        "hierarchy": canonical_hierarchy(arch),
    }
    out["ffn"]["mult"] = sizes.hidden_of(arch.ffn, arch.d_model) / arch.d_model
    return {k: v for k, v in out.items() if v is not None}


NEEDED = ("d_model", "n_layers", "mix_unit", "ffn", "norm", "pos")


def _network(arch: Arch, context: int) -> Tree:
    """One stack, or a pipeline with names in its order: names mean nothing."""
    steps, plain = steps_of(arch), Step("", "", arch)
    alone = len(steps) == 1 and last_of(arch) == (steps[0].name,)
    if alone and steps[0]._replace(name="", module="", arch=arch) == plain:
        return _stack(steps[0].arch, context)
    modules, names, stages = {}, {EMBEDDING: EMBEDDING}, []
    known: dict[str, str] = {}  # module of the document -> its new name
    for i, step in enumerate(steps):
        name = known.setdefault(step.module, f"module_{len(known)}")
        names[step.name] = f"stage_{i}"
        modules[name] = _module(step, context)
        stage: Tree = {"name": names[step.name], "module": name}
        for field in ("inputs", "kv_from", "mem_from"):
            if read := getattr(step, field):
                stage[field] = sorted(names[other] for other in read)
        stages.append(stage | ({"repeat": step.repeat} if step.repeat > 1 else {}))
    first = next(modules[s["module"]] for s in stages if "mix_unit" in modules[s["module"]])
    ends = [names[name] for name in last_of(arch)]
    readout: Tree = {"name": "readout", "kind": "readout", "inputs": sorted(ends)}
    return {
        **{name: first[name] for name in NEEDED},
        "modules": modules,
        "pipeline": [{"name": EMBEDDING, "kind": EMBEDDING}, *stages, readout],
    }


def _module(step: Step, context: int) -> Tree:
    if step.code is None:
        tree = _stack(step.arch, context)
        return tree if step.causal else tree | {"params": {"causal": False}}
    bits, dim, kappa = step.code
    cond: Tree = {"source": {"kind": "pool-mlp", "H": bits}}
    if kappa:
        cond["reg"] = {"kind": "freebits", "kappa": kappa}
    wide = {} if dim == step.arch.d_model else {"params": {"latent_dim": dim}}
    return {"kind": "latent_sampler", "norm": step.arch.norm, "cond": cond} | wide


def fingerprint(spec: Spec) -> str:
    """Sixteen hexadecimal digits that two documents share where they mean the same network.

    How the network is trained and budgeted is no part of it, except the context where it shapes
    the network (learned positions, YaRN's ramp).
    """
    full = canonical(spec)
    payload: Tree = {
        "arch": full.arch.model_dump(mode="json", exclude_none=True),
        "vocab_size": full.train.vocab_size,
        "dtype": full.train.dtype,
    }
    if any(_reads_context(step.arch) for step in steps_of(full.arch) if step.code is None):
        payload["ctx_len"] = full.train.ctx_len
    return hashlib.sha256(_json(payload).encode()).hexdigest()[:16]


def _reads_context(arch: Arch) -> bool:
    scaling = arch.pos.rope.scaling if arch.pos.rope else None
    return arch.pos.kind == "learned" or bool(scaling and scaling.type == "yarn")


def _json(tree: Any) -> str:
    return json.dumps(tree, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _unit(arch: Arch, context: int) -> Tree:
    unit = arch.mix_unit
    mixers = [_mixer(m, arch, context) for m in sizes.mixers(unit)]
    if unit.kind == "single" or (unit.kind == "par" and unit.merge == "Add" and len(mixers) == 1):
        return {"kind": "single", "mixer": mixers[0]}
    out: Tree = {"kind": unit.kind, "choices": sorted(mixers, key=_json), "merge": unit.merge}
    if isinstance(unit, RouteUnit):
        out["router"] = unit.router.model_dump(mode="json", exclude_none=True)
        if unit.router.topk == len(mixers):
            del out["router"]["topk"]
    return out


def _mixer(mixer: Mixer, arch: Arch, context: int) -> Tree:
    if isinstance(mixer, LongConv):
        return {"kind": "LongConv", "kernel_len": mixer.kernel_len or 16}
    heads, size = sizes.heads_of(mixer, arch.d_model)
    if isinstance(mixer, Attention):
        return _attention(mixer, arch, context)
    out: Tree = {"kind": mixer.kind, "heads": heads, "mode": mixer.mode or "parallel"}
    if mixer.chunk and out["mode"] == "parallel":
        out["chunk"] = mixer.chunk
    if isinstance(mixer, Retention):
        return out | {"head_dim": size}
    inner = sizes.inner_of(mixer, arch.d_model)
    return out | {"d_state": mixer.d_state or 16, "expand": inner / arch.d_model}


def _attention(mixer: Attention, arch: Arch, context: int) -> Tree:
    heads, size = sizes.heads_of(mixer, arch.d_model)
    latent = arch.kv_policy.latent if arch.kv_policy else None
    out: Tree = {
        "kind": "Attention",
        "heads": heads,
        "kv_heads": (latent.heads if latent else None) or mixer.kv_heads or heads,
        "head_dim": size,
        "stencil": _stencil(mixer, context),
        "softmax": _softmax(mixer, size),
        "projection": _projection(mixer, context),
        "value_glu": mixer.value_glu or None,
        "pos": "none" if mixer.pos == "none" and arch.pos.kind != "learned" else None,
    }
    return {k: v for k, v in out.items() if v is not None}


def _stencil(mixer: Attention, context: int) -> Tree | None:
    """None where all of the context is seen; every moving window is written as sliding."""
    s = mixer.stencil
    if s is None or s.kind == "full":
        return None
    tree: Tree = {"kind": "sliding", "globals": s.globals or None}
    if s.kind == "dilated":
        tree |= {"kind": "dilated", "dilation": s.dilation, "window": s.window}
        if s.dilation == 1:
            if s.window is None:
                return None
            tree |= {"kind": "sliding", "dilation": None, "stride": 1}
    elif s.kind == "hybrid":
        if s.dilation == 1:
            return None
        tree |= {"kind": "hybrid", "window": s.window, "dilation": s.dilation}
    elif s.kind == "block":
        tree |= {"window": 1, "stride": s.block}
    elif s.kind == "ring":
        tree |= {"window": (s.block or 0) + 1, "stride": s.stride or s.block}
    else:
        tree |= {"window": s.window, "stride": s.stride or 1}
    # the last token's view starts at the last multiple of the stride, less the window
    if (
        tree["kind"] == "sliding"
        and tree["window"] > (context - 1) // tree["stride"] * tree["stride"]
    ):
        return None
    return {k: v for k, v in tree.items() if v is not None}


def _projection(mixer: Attention, context: int) -> Tree | None:
    """Blocks, whose length is all that the context and the rank decide."""
    block = sizes.block_of(mixer, context)
    if mixer.projection is None or block is None:
        return None
    return {"type": "low_rank", "block": block, "shared": mixer.projection.shared}


def _softmax(mixer: Attention, size: int) -> Tree | None:
    s = mixer.softmax
    if s is None:
        return None
    tree: Tree = {"type": "kernel"} if s.type == "kernel" else {}
    if s.qk_scale not in (None, "sqrt_d", size**-0.5):
        tree["qk_scale"] = s.qk_scale
    if s.qk_norm != "none":
        tree["qk_norm"] = s.qk_norm
    if s.softcap is not None:
        tree["softcap"] = s.softcap
    if s.type == "kernel" and s.kernel:
        tree["kernel"] = s.kernel.model_dump(mode="json", exclude_none=True)
        if not tree["kernel"].get("redraw"):
            tree["kernel"].pop("redraw", None)
    return tree or None


def _positions(arch: Arch) -> Tree:
    pos = arch.pos
    acting = [m for m in sizes.attentions(arch) if sizes.positioned(m, arch)]
    if pos.kind == "learned":
        return {"kind": "learned"}
    if not acting:
        return {"kind": "rope"}  # nothing turns
    if pos.kind not in ("rope", "xpos"):
        return {"kind": pos.kind}
    rope: Tree = {
        "theta": pos.rope.theta if pos.rope else 10000.0,
        "dims": max(sizes.turned(m, arch) for m in acting),
    }
    if pos.rope and pos.rope.scaling and pos.rope.scaling.factor != 1:
        rope["scaling"] = pos.rope.scaling.model_dump(mode="json", exclude_none=True)
    return {"kind": pos.kind, "rope": rope}


def _policy(arch: Arch, context: int) -> Tree | None:
    policy = arch.kv_policy
    if policy is None or (not sizes.attentions(arch) and policy.cache != "none"):
        return None
    tree: Tree = {"cache": policy.cache, "quant": policy.quant}
    if policy.cache in ("window", "ring"):
        # a ring is how a window is kept, not another network
        tree |= {"cache": "window", "window": policy.window}
        if (policy.window or 0) >= context:
            tree = {"cache": "full", "quant": policy.quant}
    if policy.latent:
        tree["latent"] = {"dim": policy.latent.dim} | _update(policy.latent.update, context)
    return None if tree == {"cache": "full", "quant": "none"} else tree


def _update(update: LatentUpdate | None, context: int) -> Tree:
    """Nothing where every token has its own latent."""
    if update is None:
        return {}
    averaged = update.kind == "ema" and update.tau != 1
    if update.freq == 1 and not averaged:
        return {}
    tree = {"kind": update.kind, "freq": min(update.freq, context)}
    return {"update": tree | ({"tau": update.tau} if update.kind == "ema" else {})}


def _residual(residual: Residual | None, layers: int) -> Tree | None:
    if residual is None:
        return None
    if residual.kind == "dual":
        return {"kind": "dual", "scale": residual.scale or 1.0}
    if residual.kind == "deepnet":
        return {"kind": "deepnet", "scale": residual.scale or (2 * layers) ** 0.25}
    pre = residual.pre_ln is not False
    tree: Tree = {
        "kind": "single",
        "pre_ln": pre,
        "post_ln": bool(residual.post_ln),
        "scale": residual.scale or 1.0,
    }
    plain = {"kind": "single", "pre_ln": True, "post_ln": False, "scale": 1.0}
    return None if tree == plain else tree


def _depth(router: DepthRouter | None, layers: int) -> Tree | None:
    if router is None or router.kind == "none" or router.min_layers >= layers:
        return None
    fields = {"kind": router.kind, "budget": router.budget, "tau": router.tau or 1.0}
    return fields | {"min_layers": router.min_layers}


def _recurrence(arch: Arch) -> Tree | None:
    r = arch.recurrence
    if r is None:
        return None
    loops = r.loops or Loops()
    evaluate, train, schedule = loops.eval or loops.train, loops.train, loops.schedule
    if schedule is not None:
        train = most_loops(schedule, train)
    again = max(train, evaluate) > 1
    if not again and not r.noise_std:
        return None
    return {
        "prelude": r.prelude,
        "body": r.body,
        "coda": r.coda,
        "adapter": r.adapter if again else "identity",
        "noise_std": r.noise_std,
        "loops": {"train": train, "eval": evaluate} | _schedule(schedule, train),
    }


def _schedule(schedule: Schedule | None, train: int) -> Tree:
    """Nothing where every step takes all loops, with a gradient through each."""
    if schedule is None or train == 1:
        return {}
    tree: Tree = {"kind": schedule.kind}
    if schedule.kind != "fixed":
        tree |= {"mean": schedule.mean, "sigma": schedule.sigma or 0.0, "max": train}
    if schedule.kind != "fixed" or schedule.curriculum != "none":
        tree["min"] = min(schedule.min or 1, train)
    if schedule.curriculum != "none":
        tree |= {"curriculum": schedule.curriculum, "warmup_steps": schedule.warmup_steps}
    if schedule.backprop and schedule.backprop < train:
        tree["backprop"] = schedule.backprop
    return {} if tree == {"kind": "fixed"} else {"schedule": tree}
