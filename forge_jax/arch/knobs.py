"""Scalars that a compiled program takes as arguments, and the key of what is left."""

import json
from typing import Any

from forge_jax.arch import sizes
from forge_jax.arch.canonical import canonical
from forge_jax.arch.mixing import Attention, Mixer, RouteUnit
from forge_jax.arch.pipeline import steps_of
from forge_jax.arch.schema import Arch, Spec

STENCIL = ("window", "stride", "dilation", "globals")


def knobs(spec: Spec) -> dict[str, Any]:
    """The scalars of a network, as `Network` takes them: a pytree of Python numbers."""
    return network_knobs(canonical(spec).arch)


def network_knobs(arch: Arch) -> dict[str, Any]:
    """The same of an architecture that is canonical, by module."""
    steps = [step for step in steps_of(arch) if step.code is None]
    return {step.module: arch_knobs(step.arch) for step in steps}


def arch_knobs(arch: Arch) -> dict[str, Any]:
    """The scalars of one stack."""
    unit, residual, recurrence = arch.mix_unit, arch.residual, arch.recurrence
    out: dict[str, Any] = {"mixers": tuple(_mixer(m, arch) for m in sizes.mixers(unit))}
    if isinstance(unit, RouteUnit):
        out |= {"temp": unit.router.temp, "balance": unit.router.balance}
    if residual is not None and residual.scale is not None:
        out["residual_scale"] = residual.scale
    if recurrence is not None and recurrence.noise_std:
        out["noise"] = recurrence.noise_std
    if arch.depth_router is not None:
        out |= {"depth_budget": arch.depth_router.budget, "depth_tau": arch.depth_router.tau}
    if arch.cond is not None and arch.cond.source is not None and arch.cond.source.segment:
        out["segment"] = arch.cond.source.segment
    if arch.cond is not None and arch.cond.reg is not None:
        out["kappa"] = arch.cond.reg.kappa
    schedule = recurrence.loops.schedule if recurrence and recurrence.loops else None
    if schedule is not None:
        names = {"mean": "loop_mean", "sigma": "loop_sigma", "warmup_steps": "loop_warmup"}
        out |= {new: v for old, new in names.items() if (v := getattr(schedule, old)) is not None}
    if arch.pos.rope is not None:
        out["theta"] = arch.pos.rope.theta
        if arch.pos.rope.scaling is not None:
            out["factor"] = arch.pos.rope.scaling.factor
    return out


def _mixer(mixer: Mixer, arch: Arch) -> dict[str, Any]:
    if not isinstance(mixer, Attention):
        return {}
    stencil, softmax, policy = mixer.stencil, mixer.softmax, arch.kv_policy
    out = {name: getattr(stencil, name) for name in STENCIL} if stencil else {}
    if softmax is not None:
        out |= {"softcap": softmax.softcap, "scale": softmax.qk_scale}
    if policy is not None:
        out["kv_window"] = policy.window
        update = policy.latent.update if policy.latent else None
        out["tau"] = update.tau if update else None
    return {name: value for name, value in out.items() if value is not None}


def compile_key(spec: Spec, length: int = 0) -> str:
    """Equal for networks that run in one compiled program, each with its own knobs.

    `length` is that of the cache for programs that decode: a window below it is a shape.
    """
    full = canonical(spec)
    tree = full.arch.model_dump(mode="json", exclude_none=True)
    stacks = [tree, *(m for m in tree.get("modules", {}).values() if "mix_unit" in m)]
    for stack in stacks:
        _blank_stack(stack, length)
    sizes_ = (full.train.ctx_len, full.train.vocab_size, full.train.dtype)
    return json.dumps([tree, sizes_], sort_keys=True)


def _blank_stack(tree: dict[str, Any], length: int) -> None:
    """Write "traced" over the scalars of a stack."""
    for mixer in tree["mix_unit"].get("choices", [tree["mix_unit"].get("mixer")]):
        _blank(mixer.get("stencil", {}), *STENCIL)
        _blank(mixer.get("softmax", {}), "softcap", "qk_scale")
    _blank(tree["mix_unit"].get("router", {}), "temp", "balance")
    _blank(tree.get("residual", {}), "scale")
    _blank(tree.get("recurrence", {}), "noise_std")
    _blank(tree.get("depth_router", {}), "budget", "tau")
    loops = tree.get("recurrence", {}).get("loops", {})
    _blank(loops.get("schedule", {}), "mean", "warmup_steps")
    if "sigma" in loops.get("schedule", {}):
        loops["schedule"]["sigma"] = "traced"  # an argument at zero too
    cond = tree.get("cond", {})
    _blank(cond.get("source", {}), "segment")
    if "reg" in cond:
        cond["reg"]["kappa"] = "traced"  # at zero too
    _blank(tree["pos"].get("rope", {}), "theta")
    _blank(tree["pos"].get("rope", {}).get("scaling", {}), "factor")
    _blank((tree.get("kv_policy", {}).get("latent") or {}).get("update", {}), "tau")
    policy = tree.get("kv_policy", {})
    if policy.get("window", 0) >= length:
        _blank(policy, "window")


def _blank(tree: dict[str, Any], *names: str) -> None:
    for name in names:
        # zero is another program for what is left out at zero (noise, balance)
        if tree.get(name):
            tree[name] = "traced"
