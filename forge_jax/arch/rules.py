"""What a well-typed document can still get wrong, as (path, sentence) pairs.

`problems` stand in the way of a build, `notes` tell of fields that have no effect or are cut.
"""

from collections.abc import Callable, Iterable, Iterator

from forge_jax.arch import conditioning, graph, levels, sizes
from forge_jax.arch.mixing import (
    SSM,
    Attention,
    LongConv,
    Mixer,
    Retention,
    RouteUnit,
    SingleUnit,
    Stencil,
    given,
)
from forge_jax.arch.pipeline import module_arch
from forge_jax.arch.schema import Arch, Spec
from forge_jax.arch.structure import MoEFFN, Schedule
from forge_jax.arch.text import Finding, Path

# stencil kind -> (fields it needs, fields it may have)
STENCILS: dict[str, tuple[set[str], set[str]]] = {
    "full": (set(), set()),
    "local": ({"window"}, {"globals"}),
    "sliding": ({"window"}, {"stride", "globals"}),
    "dilated": ({"dilation"}, {"window", "globals"}),
    "block": ({"block"}, {"globals"}),
    "ring": ({"block"}, {"stride", "globals"}),
    "hybrid": ({"window", "dilation"}, {"globals"}),
    "cross": ({"query", "key"}, set()),
}


def placed_mixers(arch: Arch) -> Iterator[tuple[Path, Mixer]]:
    """Every mixer with its path."""
    at: Path = ("arch", "mix_unit")
    if isinstance(arch.mix_unit, SingleUnit):
        yield (*at, "mixer"), arch.mix_unit.mixer
    else:
        yield from (((*at, "choices", i), m) for i, m in enumerate(arch.mix_unit.choices))


def problems(spec: Spec) -> list[Finding]:
    """Why the document cannot be built."""

    def stack(arch: Arch) -> Iterator[Finding]:
        yield from _stack(arch)
        yield from levels.problems(arch, spec.train.ctx_len)

    if spec.arch.pipeline is None:
        return [*stack(spec.arch), *_train(spec)]
    return [*graph.problems(spec), *_each_module(spec.arch, stack), *_train(spec)]


def _each_module(arch: Arch, check: Callable[[Arch], Iterable[Finding]]) -> Iterator[Finding]:
    """A check of stacks on those of a pipeline; what is not a module's own stands in `arch`."""
    for name, module in (arch.modules or {}).items():
        if module.kind != "transformer":
            continue
        for path, sentence in check(module_arch(arch, module)):
            own = getattr(module, str(path[1]), None) is not None
            yield ("arch", "modules", name, *path[1:]) if own else path, sentence


def _stack(arch: Arch) -> Iterator[Finding]:
    yield from _unbuilt(arch)
    for path, mixer in placed_mixers(arch):
        yield from _mixer(path, mixer, arch)
    for check in (_unit, _positions, _cache, _around, conditioning.problems_of):
        yield from check(arch)


def _mixer(path: Path, mixer: Mixer, arch: Arch) -> Iterator[Finding]:
    if isinstance(mixer, Attention):
        yield from _attention(path, mixer, arch)
    elif isinstance(mixer, SSM):
        inner = sizes.inner_of(mixer, arch.d_model)
        if mixer.heads and inner % mixer.heads:
            yield (*path, "heads"), f"must divide the {inner} inner features, got {mixer.heads}"
    elif not isinstance(mixer, LongConv):
        yield from _heads(path, mixer, arch)


def _heads(path: Path, mixer: Attention | Retention, arch: Arch) -> Iterator[Finding]:
    if mixer.heads and not mixer.head_dim and arch.d_model % mixer.heads:
        yield (*path, "heads"), f"must divide d_model {arch.d_model}, got {mixer.heads}"


def _attention(path: Path, mixer: Attention, arch: Arch) -> Iterator[Finding]:
    heads, _ = sizes.heads_of(mixer, arch.d_model)
    yield from _heads(path, mixer, arch)
    if mixer.kv_heads and heads % mixer.kv_heads:
        yield (*path, "kv_heads"), f"must divide the {heads} heads, got {mixer.kv_heads}"
    if mixer.pos not in (None, "none", arch.pos.kind):
        yield (*path, "pos"), f'must be "none" or the kind of arch.pos, got {mixer.pos}'
    if mixer.stencil:
        yield from _stencil((*path, "stencil"), mixer.stencil)
    yield from _softmax((*path, "softmax"), mixer, arch)
    if mixer.projection and mixer.projection.type == "low_rank":
        yield from _projection((*path, "projection"), mixer, arch)


def _stencil(path: Path, stencil: Stencil) -> Iterator[Finding]:
    for field in sorted(STENCILS[stencil.kind][0]):
        if getattr(stencil, field) is None:
            yield (*path, field), f"is needed by a {stencil.kind} stencil"


def _softmax(path: Path, mixer: Attention, arch: Arch) -> Iterator[Finding]:
    softmax = mixer.softmax
    if softmax is None:
        return
    if softmax.type == "scaled" and softmax.qk_scale is None:
        yield (*path, "qk_scale"), "is needed by a scaled softmax"
    if softmax.type != "kernel":
        return
    if softmax.kernel is None or softmax.kernel.features is None:
        yield (*path, "kernel", "features"), "is needed by a kernel softmax"
    if softmax.softcap is not None:
        yield (*path, "softcap"), "has no scores to cap in a kernel softmax"
    if mixer.stencil and mixer.stencil.kind != "full":
        yield (*path, "type"), f"a kernel sees all the past, not a {mixer.stencil.kind} stencil"
    if arch.pos.kind in ("alibi", "relbias", "xpos") and mixer.pos != "none":
        yield (*path, "type"), f"a kernel softmax takes no {arch.pos.kind} positions"
    if arch.kv_policy and (arch.kv_policy.cache != "full" or arch.kv_policy.quant != "none"):
        yield (*path, "type"), "a kernel softmax keeps sums, not keys: kv_policy must be full"


def _projection(path: Path, mixer: Attention, arch: Arch) -> Iterator[Finding]:
    projection, policy, at = mixer.projection, arch.kv_policy, (*path, "type")
    if projection and (projection.rank is None) == (projection.block is None):
        yield (*path, "rank"), "or `block`, one of the two, is needed by a low_rank projection"
    if mixer.stencil and mixer.stencil.kind != "full":
        yield at, f"low_rank sees all the past, not a {mixer.stencil.kind} stencil"
    if mixer.softmax and mixer.softmax.type == "kernel":
        yield at, "low_rank takes no kernel softmax, which has no scores to sum"
    if arch.pos.kind in ("alibi", "relbias") and mixer.pos != "none":
        yield at, f"low_rank takes no {arch.pos.kind} positions: a block has no one distance"
    if policy and (policy.cache not in ("full", "none") or policy.quant != "none"):
        yield at, "low_rank keeps every key as it is: kv_policy must be full or none"


def _unit(arch: Arch) -> Iterator[Finding]:
    unit = arch.mix_unit
    if isinstance(unit, RouteUnit) and (unit.router.topk or 1) > len(unit.choices):
        sentence = f"must be at most {len(unit.choices)}, the choices, got {unit.router.topk}"
        yield ("arch", "mix_unit", "router", "topk"), sentence
    if isinstance(arch.ffn, MoEFFN) and arch.ffn.topk > arch.ffn.experts:
        sentence = f"must be at most {arch.ffn.experts}, the experts, got {arch.ffn.topk}"
        yield ("arch", "ffn", "topk"), sentence


def _positions(arch: Arch) -> Iterator[Finding]:
    path, pos = ("arch", "pos"), arch.pos
    used = any(sizes.positioned(m, arch) for m in sizes.mixers(arch.mix_unit))
    if pos.kind in ("alibi", "relbias") and not used:
        yield (*path, "kind"), f"{pos.kind} needs an Attention mixer to act on"
    scaling = pos.rope.scaling if pos.rope else None
    if scaling is None:
        return
    if (scaling.type == "longrope") != (scaling.longrope is not None):
        yield (*path, "rope", "scaling", "longrope"), "goes with type longrope, and only with it"
    narrow = [m for m in sizes.attentions(arch) if sizes.turned(m, arch) < 4]
    if scaling.type == "ntk" and narrow:
        yield (*path, "rope", "scaling"), "ntk needs at least 4 turned features per head"


def _cache(arch: Arch) -> Iterator[Finding]:
    policy = arch.kv_policy
    if policy is None:
        return
    if policy.cache in ("window", "ring") and policy.window is None:
        yield ("arch", "kv_policy", "window"), f"is needed by a {policy.cache} cache"
    latent, path = policy.latent, ("arch", "kv_policy", "latent")
    if (policy.cache == "latent") != (latent is not None):
        yield path, "goes with a latent cache, and only with it"
    if latent is None:
        return
    if latent.update and latent.update.kind == "ema" and latent.update.tau is None:
        yield (*path, "update", "tau"), "is needed by an ema update"
    for mixer in sizes.attentions(arch):
        heads, _ = sizes.heads_of(mixer, arch.d_model)
        if latent.heads and heads % latent.heads:
            yield (*path, "heads"), f"must divide the {heads} heads, got {latent.heads}"


def _around(arch: Arch) -> Iterator[Finding]:
    residual, recurrence, router = arch.residual, arch.recurrence, arch.depth_router
    if router and router.kind != "none" and router.budget is None:
        yield ("arch", "depth_router", "budget"), f"is needed by a {router.kind} router"
    if residual and residual.kind == "dual" and False in (residual.pre_ln, residual.post_ln):
        yield ("arch", "residual"), "dual has both norms, pre_ln and post_ln"
    if recurrence:
        parts = (recurrence.prelude, recurrence.body, recurrence.coda)
        if sum(parts) != arch.n_layers:
            sentence = f"prelude + body + coda must be n_layers {arch.n_layers}, got {sum(parts)}"
            yield ("arch", "recurrence"), sentence
        if recurrence.loops and recurrence.loops.schedule:
            yield from _schedule(recurrence.loops.schedule)


def _schedule(schedule: Schedule) -> Iterator[Finding]:
    path = ("arch", "recurrence", "loops", "schedule")
    if schedule.kind != "fixed" and schedule.mean is None:
        yield (*path, "mean"), f"is needed by a {schedule.kind} schedule"
    if schedule.curriculum != "none" and schedule.warmup_steps is None:
        yield (*path, "warmup_steps"), f"is needed by a {schedule.curriculum} curriculum"
    if schedule.max is not None and schedule.max < (schedule.min or 1):
        yield (*path, "max"), f"must be at least min {schedule.min}, got {schedule.max}"


def _train(spec: Spec) -> Iterator[Finding]:
    for i, beta in enumerate(spec.train.betas or ()):
        if not 0 <= beta < 1:
            yield ("train", "betas", i), f"must lie in [0, 1), got {beta}"


def _unbuilt(arch: Arch) -> Iterator[Finding]:
    """Fields of the language that no code builds: refused, never passed over."""
    never = "is not supported"
    if arch.depth_router and arch.depth_router.kind == "layer":
        reason = f"layer {never}: what a whole sequence passes by hangs on tokens to come"
        yield ("arch", "depth_router", "kind"), reason
    if arch.kv_policy and arch.kv_policy.evict is not None:
        yield ("arch", "kv_policy", "evict"), never
    for path, mixer in placed_mixers(arch):
        if not isinstance(mixer, Attention):
            continue
        if mixer.stencil and mixer.stencil.kind == "cross":
            yield (*path, "stencil", "kind"), f"cross {never}: write kv_from in a stage"
        kernel = mixer.softmax.kernel if mixer.softmax else None
        if kernel and kernel.name != "favor":
            yield (*path, "softmax", "kernel", "name"), f"{kernel.name} {never}"


def notes(spec: Spec) -> list[Finding]:
    """What the document says without effect, or beyond a limit to which it is cut."""

    def idle(arch: Arch) -> Iterator[Finding]:
        yield from _idle(arch)
        yield from _idle_projection(arch, spec.train.ctx_len)
        yield from levels.notes(arch)
        yield from conditioning.notes_of(arch, spec.train.ctx_len)

    found = list(graph.notes(spec.arch))
    if spec.arch.pipeline is None:
        return [*found, *idle(spec.arch)]
    return [*found, *_each_module(spec.arch, idle)]


def _idle_projection(arch: Arch, context: int) -> Iterator[Finding]:
    for path, mixer in placed_mixers(arch):
        if isinstance(mixer, Attention) and mixer.projection:
            low_rank = mixer.projection.type == "low_rank"
            if low_rank and sizes.block_of(mixer, context) is None:
                yield (*path, "projection"), "has no effect with blocks of one token, or of all"


def _idle(arch: Arch) -> Iterator[Finding]:
    attention = sizes.attentions(arch)
    for path, mixer in placed_mixers(arch):
        if isinstance(mixer, Attention):
            yield from _idle_attention(path, mixer, arch)
        elif not isinstance(mixer, LongConv) and mixer.mode == "recurrent" and mixer.chunk:
            yield (*path, "chunk"), "has no effect on the recurrent form"
    rope = arch.pos.rope
    if rope and arch.pos.kind not in ("rope", "xpos"):
        yield ("arch", "pos", "rope"), f"has no effect on {arch.pos.kind} positions"
    elif rope and rope.dims and attention:
        most = max(sizes.heads_of(m, arch.d_model)[1] for m in attention) // 2 * 2
        if rope.dims > most:
            yield ("arch", "pos", "rope", "dims"), f"cut to the head's {most}, got {rope.dims}"
    policy = arch.kv_policy
    if policy and not attention and policy.cache != "none":
        yield ("arch", "kv_policy"), "has no effect without an Attention mixer"
    elif policy and policy.window and policy.cache not in ("window", "ring"):
        yield ("arch", "kv_policy", "window"), f"has no effect on a {policy.cache} cache"
    update = policy.latent.update if policy and policy.latent else None
    if update and update.kind == "linear" and update.tau:
        yield ("arch", "kv_policy", "latent", "update", "tau"), "has no effect on a linear update"
    residual = arch.residual
    if residual and residual.kind == "deepnet" and (residual.pre_ln or residual.post_ln):
        yield ("arch", "residual"), "pre_ln and post_ln have no effect on deepnet"
    router = arch.depth_router
    if router and router.kind == "none" and len(given(router)) > 1:
        yield ("arch", "depth_router"), "has no effect while its kind is none"
    elif router and router.min_layers >= arch.n_layers:
        yield ("arch", "depth_router"), "has no effect where min_layers are all"
    loops = arch.recurrence.loops if arch.recurrence else None
    if loops and loops.schedule:
        yield from _idle_schedule(loops.schedule)


def _idle_schedule(schedule: Schedule) -> Iterator[Finding]:
    path = ("arch", "recurrence", "loops", "schedule")
    if schedule.kind == "fixed":
        for field in sorted(given(schedule) & {"mean", "sigma"}):
            yield (*path, field), "has no effect on a fixed schedule"
    if schedule.curriculum == "none" and schedule.warmup_steps:
        yield (*path, "warmup_steps"), "has no effect without a curriculum"


def _idle_attention(path: Path, mixer: Attention, arch: Arch) -> Iterator[Finding]:
    if mixer.pos == "none" and arch.pos.kind == "learned":
        yield (*path, "pos"), "has no effect on learned positions, which are added to the tokens"
    latent = arch.kv_policy.latent if arch.kv_policy else None
    if mixer.kv_heads and latent and latent.heads:
        yield (*path, "kv_heads"), "has no effect beside arch.kv_policy.latent.heads"
    stencil, softmax = mixer.stencil, mixer.softmax
    if stencil:
        for field in given(stencil) - set.union(*STENCILS[stencil.kind]) - {"kind"}:
            yield (*path, "stencil", field), f"has no effect on a {stencil.kind} stencil"
    if mixer.projection and mixer.projection.type == "none" and len(given(mixer.projection)) > 1:
        yield (*path, "projection"), "has no effect while its type is none"
    if softmax and softmax.kernel and softmax.type != "kernel":
        yield (*path, "softmax", "kernel"), f"has no effect on a {softmax.type} softmax"
