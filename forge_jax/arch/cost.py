"""What a network costs, counted from its document: no tracing, no compilation.

A multiplication and an addition are two FLOPs; exponentials and the like count none, as with the
compiler. Work is counted as it is built: a masked score, an expert or a routed mixer that was not
picked are computed, and counted.
"""

from typing import NamedTuple

from forge_jax.arch import conditioning, quantize, sizes
from forge_jax.arch.canonical import canonical, token_limits
from forge_jax.arch.ffn import GATED
from forge_jax.arch.hierarchy import streams_of
from forge_jax.arch.levels import Level, runs_of
from forge_jax.arch.mixers import longconv, ssm
from forge_jax.arch.mixers.latent import latent_of
from forge_jax.arch.mixing import SSM, Attention, Mixer, Retention, RouteUnit
from forge_jax.arch.pipeline import Step, active
from forge_jax.arch.positions import BUCKETS
from forge_jax.arch.schema import Arch, Spec
from forge_jax.arch.stack import parts_of
from forge_jax.arch.structure import DenseFFN, KVPolicy, Residual


class Cost(NamedTuple):
    """Sizes of one network; FLOPs and bytes are those of one row of `time` tokens."""

    params: int
    flops: float  # of a forward pass
    train_flops: float  # of a training step: the backward pass counts twice the forward one
    kv_bytes: float  # that a token adds to the cache while there is room
    cache_bytes: float  # after `time` tokens, recurrent states included


class _Part(NamedTuple):
    """Parameters, and FLOPs of one row."""

    params: float = 0
    flops: float = 0

    def __add__(self, other):
        return _Part(self.params + other.params, self.flops + other.flops)

    def times(self, n: float) -> "_Part":
        return _Part(self.params * n, self.flops * n)


def cost(spec: Spec, time: int | None = None) -> Cost:
    """Cost of reading `time` tokens, the context by default; training runs the training loops.

    Parameters are exact. FLOPs are within 10 % of the compiler's count where it counts all (scans
    unrolled, one chunk).
    """
    full = canonical(spec)
    arch, vocabulary, context = full.arch, sizes.vocabulary_of(full), full.train.ctx_len
    time, d = time or context, arch.d_model
    ends = _linear(d, vocabulary, time) + _Part(vocabulary * d)
    width = 4 if full.train.dtype == "fp32" else 2
    modules: dict[str, float] = {}  # stages share the parameters of their module
    used, use, train, kv, kept = active(arch, train=False), ends.flops, ends.flops, 0.0, 0.0
    for step in active(arch, train=True):
        params, flops, training = _step(step, context, time)
        modules[step.module] = params
        train += step.repeat * training
        if step in used:
            use += step.repeat * flops
            each, most = _cache(step.arch, time, width) if step.code is None else (0.0, 0.0)
            kv, kept = kv + step.repeat * each, kept + step.repeat * most
    params = int(ends.params + sum(modules.values()))
    stacks = [step.arch.kv_policy for step in used if step.code is None]
    if any(policy and policy.cache == "none" for policy in stacks):
        kv, kept = 0.0, 0.0  # `init_cache` refuses the network
    return Cost(params, use, 3 * train, kv if kept else 0.0, kept)


def _step(step: Step, context: int, time: int) -> tuple[float, float, float]:
    """Parameters of a step, and FLOPs of one row: in use, and forward in training."""
    arch, reads = step.arch, max(0, len(step.read) - 1) * time * step.arch.d_model
    if step.code is None:
        params, flops, training = _stack(arch, context, time, bool(step.mem_from))
        return params, flops + reads, training + reads
    bits, dim, _ = step.code
    out = _linear(dim, arch.d_model, time) if dim != arch.d_model else _Part()
    bitwise = _linear(arch.d_model, bits, time) + _norm(arch, time)
    every = 2 * time * 2**bits * (2 * bits + dim)
    table = 2**bits * dim
    return table + out.params + bitwise.params, out.flops, out.flops + bitwise.flops + every + reads


def _stack(arch: Arch, context: int, time: int, memory: bool) -> tuple[float, float, float]:
    """The same of a stack."""
    d, residual = arch.d_model, arch.residual or Residual()
    ends, adapter = _Part(), _Part()
    if residual.kind != "deepnet":
        ends += _norm(arch, time)
    if arch.pos.kind == "learned":
        ends += _Part(context * d)
    if arch.cond is not None:
        ends += _Part(*conditioning.source_cost(arch.cond, d, time))
        ends += _ops(arch, "token", time, d)
    if arch.recurrence and arch.recurrence.adapter == "concat_linear":
        adapter = _linear(2 * d, d, time).times(2 if residual.kind == "dual" else 1)
        ends += _Part(2 * d**2)
    flops = []
    for train in (False, True):
        parts = parts_of(arch, train)
        again = sum(part.loops - 1 for part in parts)
        levels = _levels(arch, train)
        layers = sum(n * _layer(arch, level, time, memory).flops for n, level in levels)
        flops.append(ends.flops + layers + adapter.flops * again)
    params = ends.params
    for run in runs_of(arch, 0, arch.n_layers):
        params += run.layers * _layer(arch, run.level, time, memory).params
    return params, *flops


def _cache(arch: Arch, time: int, width: int) -> tuple[float, float]:
    """Bytes that a token adds to a stack's cache, and that it holds after `time` tokens."""
    held = [(n, *_held(arch, level, time, width)) for n, level in _levels(arch, train=False)]
    kv, kept = sum(n * each for n, each, _ in held), sum(n * whole for n, _, whole in held)
    if arch.cond is not None:
        kept += 4 * arch.d_model * (2 if conditioning.segmented(arch.cond) else 1)
    return kv, kept


def over_budget(
    spec: Spec, found: Cost, references: dict[str, Cost] | None = None, *, rows: int = 1
) -> tuple[str, ...]:
    """Which of the document's budgets are exceeded, one sentence each.

    `found` and `references` are costs of one row; a training step is of `rows` of them.

    Raises:
      ValueError: `flops_target` matches a network that is not among the `references`.
    """
    limits = spec.budget
    out = []
    if limits and limits.params_target and found.params > limits.params_target:
        out.append(
            f"budget.params_target: {found.params:,} parameters, over {limits.params_target:,.0f}."
        )
    if limits and limits.flops_target:
        target = limits.flops_target
        if isinstance(target, str):
            name = target.removeprefix("match:")
            if name not in (references or {}):
                raise ValueError(
                    f"`references` must have {name!r}, which budget.flops_target names."
                )
            target = (references or {})[name].train_flops
        if found.train_flops > target:
            out.append(f"budget.flops_target: {found.train_flops:.4g} FLOPs, over {target:.4g}.")
    tokens, flops = rows * spec.train.ctx_len, rows * found.train_flops
    for path, limit in token_limits(spec).items():
        if tokens > limit:
            out.append(f"{path}: {tokens:,} tokens in a step, over {limit:,}.")
    step = spec.train.budget
    if step and step.flops_per_step is not None and flops > step.flops_per_step:
        sentence = f"{flops:,.0f} FLOPs in a step, over {step.flops_per_step:,.0f}."
        out.append(f"train.budget.flops_per_step: {sentence}")
    return tuple(out)


def _levels(arch: Arch, train: bool) -> list[tuple[int, Level | None]]:
    """How many layers are computed on each level."""
    out, first = [], 0
    for _, layers, loops in parts_of(arch, train):
        runs = runs_of(arch, first, layers)
        out += [(run.layers * loops, run.level) for run in runs]
        first += layers
    return out


def _layer(arch: Arch, level: Level | None, time: int, memory: bool) -> _Part:
    """One layer; a coarse one works on complete blocks, and hands back what it changed there."""
    if level is None:
        return _block(arch, time, memory)
    blocks, d, streams = time // level.tokens, arch.d_model, streams_of(arch)
    block = _block(arch, blocks, memory) if blocks else _Part(_block(arch, 1, memory).params)
    around = _Part(0, streams * d * (2 * time + 2 * blocks))
    if not level.up_proj:
        return block + around
    return block + around + _Part(d**2, streams * 2 * blocks * d**2)


def _held(arch: Arch, level: Level | None, time: int, width: int) -> tuple[float, float]:
    """Bytes of one layer: that a token adds, and after `time` of them."""
    mixers, each = sizes.mixers(arch.mix_unit), level.tokens if level else 1
    kv = sum(_kv(m, arch, width) for m in mixers)
    state = sum(_state(m, arch, width) for m in mixers)
    if level:
        state += streams_of(arch) * arch.d_model * (4 + width)
    policy, slots = arch.kv_policy or KVPolicy(), -(-time // each)
    if policy.latent and policy.latent.update:
        freq = policy.latent.update.freq
        slots = -(-slots // freq) * freq
    return kv / each, kv * min(slots, policy.window or slots) + state


def _linear(rows: int, columns: int, time: int) -> _Part:
    return _Part(rows * columns, 2 * time * rows * columns)


def _ops(arch: Arch, where: str, time: int, width: int, read: int = 0, heads: int = 1) -> _Part:
    """What the condition does in one place."""
    return _Part(*conditioning.ops_cost(arch.cond, where, time, width, read, heads))


def _norm(arch: Arch, time: int) -> _Part:
    params = {"LayerNorm": 2 * arch.d_model, "RMSNorm": arch.d_model, "ScaleNorm": 1}[arch.norm]
    return _Part(params, (7 if arch.norm == "LayerNorm" else 4) * time * arch.d_model)


def _block(arch: Arch, time: int, memory: bool) -> _Part:
    residual = arch.residual or Residual()
    both = residual.kind == "single" and residual.pre_ln is not False and residual.post_ln
    neither = residual.kind == "single" and residual.pre_ln is False and not residual.post_ln
    norms = 4 if both else 0 if neither else 2
    adds = _Part(0, 2 * time * arch.d_model)
    if memory:
        each = _linear(arch.d_model, arch.d_model, time) + _Part(0, time * arch.d_model)
        adds += each.times(len(sizes.mixers(arch.mix_unit)))
    if arch.depth_router:
        adds += _linear(arch.d_model, 1, time) + _Part(0, 3 * time * arch.d_model)
    for place in ("pre_mixer", "post_mixer", "ln", "ln"):
        adds += _ops(arch, place, time, arch.d_model)
    return _unit(arch, time) + _ffn(arch, time) + _norm(arch, time).times(norms) + adds


def _unit(arch: Arch, time: int) -> _Part:
    unit, d = arch.mix_unit, arch.d_model
    mixers = sizes.mixers(unit)
    out = sum((_mixer(m, arch, time) for m in mixers), _Part())
    if unit.kind == "single":
        return out
    n = len(mixers)
    if isinstance(unit, RouteUnit):
        out += _linear(d, n, time) + _Part(0, time * n * d)
    elif unit.merge == "WeightedAdd":
        out += _Part(n, time * n * d)
    if unit.merge == "Concat":
        return out + _linear(n * d, d, time)
    return out + _Part(0, time * (n - 1) * d)


def _mixer(mixer: Mixer, arch: Arch, time: int) -> _Part:
    d = arch.d_model
    if isinstance(mixer, Attention):
        return _attention(mixer, arch, time)
    if isinstance(mixer, Retention):
        heads, size = sizes.heads_of(mixer, d)
        maps = _linear(d, heads * size, time).times(5)
        for place in conditioning.PROJECTIONS:
            maps += _ops(arch, place, time, heads * size, d, heads)
        gate = _Part(0, 5 * time * heads * size)
        return maps + _decayed(mixer, time, heads, heads, size, size) + gate
    if isinstance(mixer, SSM):
        heads, size = sizes.heads_of(mixer, d)
        inner, n = heads * size, mixer.d_state or ssm.STATES
        maps = _linear(d, inner, time).times(3) + _linear(d, 2 * n + heads, time)
        rest = _Part(3 * heads + inner, 9 * time * inner)
        return maps + _decayed(mixer, time, 1, heads, n, size) + rest
    taps = mixer.kernel_len or longconv.TAPS
    return _linear(d, d, time).times(3) + _Part(taps * d, 2 * time * (taps + 1) * d)


def _decayed(mixer: Retention | SSM, time: int, shared: int, heads: int, n: int, m: int) -> _Part:
    """FLOPs of `decay.decayed`: products within a chunk, and with the state."""
    chunk = 1 if mixer.mode == "recurrent" else min(mixer.chunk or time, time)
    within = 2 * shared * n + heads * (2 * m + 3)
    across = heads * (4 * m * n + 3 * n)
    chunks = -(-time // chunk)
    return _Part(0, chunks * (chunk**2 * within + chunk * across + 2 * heads * n * m))


def _attention(mixer: Attention, arch: Arch, time: int) -> _Part:
    d = arch.d_model
    heads, size = sizes.heads_of(mixer, d)
    kv_heads = mixer.kv_heads or heads
    out, read, latent = _linear(d, heads * size, time).times(2), d, latent_of(arch)
    if latent:
        read = latent.dim
        out += _linear(d, latent.dim, time)
        out += _Part(0, 3 * time * latent.dim if latent.update else 0)
    out += _linear(read, kv_heads * size, time).times(2)
    out += _ops(arch, "proj_q", time, heads * size, d, heads)
    out += _ops(arch, "proj_v", time, kv_heads * size, read, kv_heads)
    softmax = mixer.softmax
    if softmax and softmax.qk_norm != "none":
        each = 1 if softmax.qk_norm == "rms" else 2
        out += _Part(2 * each * size, 4 * each * time * (heads + kv_heads) * size)
    if sizes.positioned(mixer, arch):
        if arch.pos.kind in ("rope", "xpos"):
            out += _Part(0, 3 * time * (heads + kv_heads) * sizes.turned(mixer, arch))
        elif arch.pos.kind == "relbias":
            out += _Part(BUCKETS * heads, time**2 * heads)
        else:
            out += _Part(0, 2 * time**2 * heads)
    if mixer.value_glu:
        out += _linear(d, d, time) + _Part(0, 2 * time * d)
    features = sizes.features_of(mixer)
    if features:
        maps = _Part(0, 2 * heads * time * features * (2 * size + 3))
        sums = 2 * features + 2 * (size + 1) + 3
        state = heads * time * features * (4 * (size + 1) + 3)
        return out + maps + _Part(0, heads * time**2 * sums + state)
    scores = 4 * size + 6 + (2 if softmax and softmax.softcap else 0)
    if mixer.projection and mixer.projection.block:
        block, kinds = mixer.projection.block, 1 if mixer.projection.shared else 2
        out += _Part(kinds * kv_heads * block, 4 * (time // block * block) * kv_heads * size)
        rows = -(-time // block) * block
        return out + _Part(0, heads * rows * (time // block + block) * scores)
    return out + _Part(0, heads * time**2 * scores)


def _ffn(arch: Arch, time: int) -> _Part:
    ffn, d = arch.ffn, arch.d_model
    hidden = sizes.hidden_of(ffn, d)
    gated = ffn.act in GATED
    maps = _linear(d, hidden, time).times(3 if gated else 2)
    maps += _Part(0, time * hidden * (5 if ffn.act in ("gelu", "geglu") else 2))
    if isinstance(ffn, DenseFFN):
        return maps
    combined = _Part(0, time * ffn.experts * hidden)
    return maps.times(ffn.experts) + _linear(d, ffn.experts, time) + combined


def _kv(mixer: Mixer, arch: Arch, width: int) -> float:
    """Bytes that a token adds in one layer."""
    if not isinstance(mixer, Attention) or sizes.features_of(mixer):
        return 0.0
    heads, size = sizes.heads_of(mixer, arch.d_model)
    quant, latent = arch.kv_policy.quant if arch.kv_policy else "none", latent_of(arch)
    if latent:
        each = latent.update.freq if latent.update else 1
        kept = quantize.bytes_of(latent.dim, quant, width)
        if arch.cond is not None and conditioning.ops_at(arch.cond, "proj_v"):
            kept += width * conditioning.width_of(arch.cond)
        return kept / each
    return 2 * (mixer.kv_heads or heads) * quantize.bytes_of(size, quant, width)


def _state(mixer: Mixer, arch: Arch, width: int) -> float:
    """Bytes of what one layer keeps whatever the length."""
    if isinstance(mixer, Attention):
        if latent := latent_of(arch):
            return 4 * latent.dim if latent.update else 0
        heads, size = sizes.heads_of(mixer, arch.d_model)
        return 4 * heads * (sizes.features_of(mixer) or 0) * (size + 1)
    if isinstance(mixer, Retention | SSM):
        heads, size = sizes.heads_of(mixer, arch.d_model)
        rows = size if isinstance(mixer, Retention) else mixer.d_state or ssm.STATES
        return 4 * heads * rows * size
    return width * ((mixer.kernel_len or longconv.TAPS) - 1) * arch.d_model
