"""A learned condition of the layers: where it comes from, what it does, what it costs.

No paper defines `arch.cond`: this is the project's own reading. Its parts are FiLM (Perez et al.
2018), LoRA (Hu et al. 2021) and free bits (Kingma et al. 2016).
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from forge_jax.arch import sizes
from forge_jax.arch.decay import kept_sums
from forge_jax.arch.layers import linear
from forge_jax.arch.mixers.frame import Frame
from forge_jax.arch.mixing import Attention, Mixer, Retention
from forge_jax.arch.schema import Arch
from forge_jax.arch.structure import Cond, CondOp
from forge_jax.arch.text import Finding

WIDTH = 16  # features of the condition where a document does not say
# initial deviation of what an op adds, in that of the condition: near the network without the op,
# but not zero, at which no gradient would reach the source
SMALL = 0.02
PROJECTIONS = ("proj_q", "proj_v")


class Past(NamedTuple):
    """What decoding keeps of the tokens read."""

    total: Float[Array, "batch width"]  # sum of all tokens, or of the segment begun; float32
    mean: Float[Array, "batch width"] | None  # of the last segment that has ended


def init_past(cond: Cond, batch: int, width: int) -> Past:
    """Nothing read."""
    zeros = jnp.zeros((batch, width), jnp.float32)
    return Past(zeros, zeros if segmented(cond) else None)


def segmented(cond: Cond) -> bool:
    """Tell whether the condition is read from segments, not from all of the past."""
    return cond.source is not None and cond.source.kind == "segment"


def width_of(cond: Cond) -> int:
    """Features of the condition, and of the layer before it."""
    return (cond.source.H if cond.source else None) or WIDTH


def ops_at(cond: Cond | None, where: str) -> list[tuple[int, CondOp]]:
    """The ops of one place with their numbers, in the document's order."""
    found = enumerate(cond.ops or () if cond else ())
    return [(i, op) for i, op in found if place_of(op) == where]


def place_of(op: CondOp) -> str:
    """Where an op acts; q and v are short for the projections."""
    return {"q": "proj_q", "v": "proj_v"}.get(op.where, op.where)


def running_sum(
    x: Float[Array, "batch time width"], fresh: Any, before: Float[Array, "batch width"]
) -> Float[Array, "batch time width"]:
    """Sums in float32 that start anew at every `fresh` token; `before` comes before the first."""
    keep = jnp.where(fresh, 0.0, 1.0)[None, :, None]
    return kept_sums(x.astype(jnp.float32), keep, before)


def pooled(
    x: Float[Array, "batch time width"], at: Int[Array, " time"], segment: Any, past: Past
) -> tuple[Float[Array, "batch time width"], Past]:
    """Per token the mean of all tokens up to it, and the state after the last.

    Of segments (`past.mean` is given) the mean of the last one that ended before the token's own,
    zeros in the first.
    """
    if past.mean is None:
        sums = running_sum(x, at == 0, past.total)
        return sums / (at + 1.0)[:, None], Past(sums[:, -1], None)
    sums = running_sum(x, at % segment == 0, past.total)
    # the token to come reads what the state keeps
    to = jnp.append(at, at[-1] + 1)
    ended = to - to % segment - 1 - at[0]  # index in this call of the last token of that segment
    means = sums[:, jnp.maximum(ended, 0)] / segment
    means = jnp.where((ended >= 0)[:, None], means, past.mean[:, None])
    return means[:, :-1], Past(sums[:, -1], means[:, -1])


class Condition(nn.Module):
    r"""$c_t = W_2\,\mathrm{silu}(W_1 m_t)$ with $m_t$ a mean of the stack's input.

    pool-mlp: of all tokens up to t; segment: of the last segment that ended before t's own. Both
    layers have H features and no bias, so that c is zero in the first segment.

    freebits: c is the mean of a normal code of unit variance. In training standard normal noise
    (rng "noise") is added to it and $\mathrm{mean}_t \max(0, |c_t|^2 / 2 - \kappa \ln 2)$, what its
    divergence from N(0, 1) has in nats above kappa bits, is sown into "losses"; in use c is the
    mean itself. Deviation from Kingma et al. 2016 (eq. 15): the bits are free per token, not per
    group of features and batch.
    """

    cond: Cond
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, frame: Frame, past: Past | None = None, train: bool = False):
        before = init_past(self.cond, x.shape[0], x.shape[-1]) if past is None else past
        means, after = pooled(x, frame.positions, frame.knobs.get("segment"), before)
        width, exact = width_of(self.cond), jnp.dtype("float32")
        c = linear("out", width, exact)(nn.silu(linear("in", width, exact)(means)))
        if train and self.cond.reg is not None:
            excess = (c**2).sum(-1) / 2 - frame.knobs["kappa"] * jnp.log(2.0)
            self.sow("losses", "condition", jnp.maximum(excess, 0.0).mean())
            c = c + jax.random.normal(self.make_rng("noise"), c.shape)
        return c.astype(self.dtype), None if past is None else after


def modulated(
    cond: Cond | None,
    where: str,
    y: Float[Array, "batch time features"],
    frame: Frame,
    *,
    read: Float[Array, "batch time width"] | None = None,
    heads: int = 1,
    name: str = "cond",
) -> Float[Array, "batch time features"]:
    r"""`y` after the ops of one place, in the document's order.

    film: $y (1 + g) + b$, add: $y + b$, scale: $y (1 + g)$, where g and b are linear maps of the
    token's condition: one number (global), one per feature, or one per head. lora:
    $y + B ((A x) \odot S c)$, x being what the projection has `read`. Called inside a compact
    module: each layer, and each mixer, has its own maps.
    """
    for i, op in ops_at(cond, where):
        at = f"{name}_{where}_{i}"
        if op.op == "lora":
            assert op.r is not None
            assert read is not None
            inner = linear(f"{at}_a", op.r, y.dtype)(read)
            inner = inner * linear(f"{at}_s", op.r, y.dtype)(frame.condition)
            y = y + linear(f"{at}_b", y.shape[-1], y.dtype, SMALL)(inner)
            continue
        numbers, parts = numbers_of(op, y.shape[-1], heads), 2 if op.op == "film" else 1
        maps = linear(at, parts * numbers, y.dtype, SMALL)(frame.condition)
        if op.share == "per_head":
            maps = jnp.repeat(maps, y.shape[-1] // heads, axis=-1)
        first, *rest = jnp.split(maps, parts, axis=-1)
        y = y + first if op.op == "add" else y * (1 + first)
        y = y + rest[0] if rest else y
    return y


def numbers_of(op: CondOp, width: int, heads: int) -> int:
    """Of a factor or of a shift."""
    return {"global": 1, "per_head": heads}.get(op.share or "", width)


def canonical_cond(arch: Arch, context: int) -> dict[str, Any] | None:
    """The node with its defaults filled; None where it does nothing.

    Ops are sorted by their places: their order matters within a place only.
    """
    cond = arch.cond
    if cond is None or not cond.ops or cond.source is None or unended(cond, context):
        return None
    source: dict[str, Any] = {"kind": cond.source.kind, "H": width_of(cond)}
    if segmented(cond):
        source["segment"] = cond.source.segment
    out: dict[str, Any] = {"source": source, "ops": []}
    if cond.reg and cond.reg.kind == "freebits":
        out["reg"] = {"kind": "freebits", "kappa": cond.reg.kappa}
    for op in sorted(cond.ops, key=place_of):
        rest = {"r": op.r} if op.op == "lora" else {"share": op.share or "per_channel"}
        out["ops"].append({"where": place_of(op), "op": op.op} | rest)
    return out


def unended(cond: Cond, context: int) -> bool:
    """Tell whether no segment ends before the context does, so that the condition stays zero."""
    return segmented(cond) and ((cond.source and cond.source.segment) or 0) >= context


def conditioned(mixer: Mixer) -> bool:
    """Tell whether a mixer has the projections that ops may act on."""
    return isinstance(mixer, Attention | Retention)


def problems_of(arch: Arch) -> Iterator[Finding]:
    """Why the condition cannot be built, as in `rules`."""
    cond, path = arch.cond, ("arch", "cond")
    if cond is None:
        return
    if not cond.ops:
        yield (*path, "ops"), "is needed"
    if cond.source is None:
        yield (*path, "source"), "is needed"
    elif cond.source.kind == "segment" and cond.source.segment is None:
        yield (*path, "source", "segment"), "is needed by a segment source"
    if cond.reg and cond.reg.kind == "freebits" and cond.reg.kappa is None:
        yield (*path, "reg", "kappa"), "is needed by freebits"
    for i, op in enumerate(cond.ops or ()):
        for field, sentence in _op_problems(op, arch):
            yield (*path, "ops", i, field), sentence


def _op_problems(op: CondOp, arch: Arch) -> Iterator[tuple[str, str]]:
    where, residual = place_of(op), arch.residual
    inside = where in PROJECTIONS
    if op.op == "lora" and not inside:
        yield "where", f"must be proj_q or proj_v for lora, got {op.where}"
    if op.op == "lora" and op.r is None:
        yield "r", "is needed by lora"
    if op.op != "lora" and op.share == "per_head" and not inside:
        yield "share", f"per_head goes with proj_q and proj_v, got {op.where}"
    if inside and not any(conditioned(m) for m in sizes.mixers(arch.mix_unit)):
        yield "where", f"{op.where} needs an Attention or Retention mixer to act on"
    normed = residual is None or (residual.kind == "single" and residual.pre_ln is not False)
    if where == "ln" and not normed:
        yield "where", "ln needs a residual that norms what a sublayer reads"


def notes_of(arch: Arch, context: int) -> Iterator[Finding]:
    """Fields of the condition that have no effect, as in `rules`."""
    cond, path = arch.cond, ("arch", "cond")
    if cond is None or cond.source is None:
        return
    if cond.source.kind == "pool-mlp" and cond.source.segment:
        yield (*path, "source", "segment"), "has no effect on a pool-mlp source"
    elif unended(cond, context):
        yield path, f"has no effect: no segment ends within train.ctx_len {context}"
    if cond.reg and cond.reg.kind == "none" and cond.reg.kappa is not None:
        yield (*path, "reg", "kappa"), "has no effect while its kind is none"
    for i, op in enumerate(cond.ops or ()):
        field = "share" if op.op == "lora" else "r"
        if getattr(op, field) is not None:
            yield (*path, "ops", i, field), f"has no effect on {op.op}"


def source_cost(cond: Cond, width: int, time: int) -> tuple[int, int]:
    """Parameters of the source, and FLOPs of one row."""
    features = width_of(cond)
    params = (width + features) * features
    return params, 2 * time * params + time * (5 * width + 2 * features)


def ops_cost(
    cond: Cond | None, where: str, time: int, width: int, read: int = 0, heads: int = 1
) -> tuple[int, int]:
    """The same of the ops of one place, on `width` features of a projection of `read`."""
    params = flops = 0
    for _, op in ops_at(cond, where):
        assert cond is not None
        if op.op == "lora":
            r = op.r or 0
            maps, each = (read + width_of(cond) + width) * r, r + width
        else:
            parts = 2 if op.op == "film" else 1
            maps = width_of(cond) * numbers_of(op, width, heads) * parts
            each = width * (1 if op.op == "add" else parts + 1)
        params, flops = params + maps, flops + 2 * time * maps + time * each
    return params, flops
