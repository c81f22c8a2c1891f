"""Softmax attention: grouped queries, stencils, positions, and a cache that may be quantised."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from forge_jax.arch import positions, quantize, sizes
from forge_jax.arch.conditioning import modulated
from forge_jax.arch.layers import linear
from forge_jax.arch.mixers.frame import Frame, source
from forge_jax.arch.mixing import Attention
from forge_jax.arch.schema import Arch
from forge_jax.arch.stencils import visible
from forge_jax.arch.structure import KVPolicy
from forge_jax.models.attention import join_heads, split_heads

NOWHERE = 2**30  # the position of an empty slot: after every query


class State(NamedTuple):
    """Keys and values of earlier tokens, in slots that are used in turn."""

    keys: Any  # (batch, kv_heads, slots, head_dim), or quantize.Packed
    values: Any
    positions: Int[Array, " slots"]


def init_state(mixer: Attention, arch: Arch, batch: int, length: int, dtype: jnp.dtype) -> State:
    """Empty slots: `length` of them, or the window of the cache where that is smaller."""
    policy = arch.kv_policy or KVPolicy()
    heads, size = sizes.heads_of(mixer, arch.d_model)
    slots = min(length, policy.window) if policy.window else length
    empty = jnp.zeros((batch, mixer.kv_heads or heads, slots, size), dtype)
    packed = quantize.encode(empty, policy.quant)
    return State(packed, packed, jnp.full(slots, NOWHERE, jnp.int32))


def remember(state: State, keys: Any, values: Any, at: Int[Array, " time"]) -> State:
    """Write the tokens at positions `at` over the oldest slots."""
    slots = state.positions.shape[0]
    kept = max(0, at.shape[0] - slots)  # of more tokens than slots only the last find room
    where = at[kept:] % slots

    def put(old, new):
        return old.at[:, :, where].set(new[:, :, kept:])

    return State(
        jax.tree.map(put, state.keys, keys),
        jax.tree.map(put, state.values, values),
        state.positions.at[where].set(at[kept:]),
    )


def attend(
    q: Float[Array, "batch heads time dim"],
    k: Float[Array, "batch kv_heads slots dim"],
    v: Float[Array, "batch kv_heads slots dim"],
    mask: Bool[Array, "time slots"],
    *,
    scale: Any,
    softcap: Any = None,
    bias: Float[Array, "heads time slots"] | None = None,
) -> Float[Array, "batch heads time dim"]:
    """softmax(cap(q k scale) + bias) v, query heads in groups of heads / kv_heads, in float32."""
    batch, heads, time, dim = q.shape
    q = q.reshape(batch, k.shape[1], -1, time, dim)
    scores = jnp.einsum("bhgtd,bhsd->bhgts", q, k).astype(jnp.float32) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.reshape(scores.shape[1:])
    return averaged(jnp.where(mask, scores, -1e30), v).reshape(batch, heads, time, dim)


@jax.custom_vjp
def averaged(
    scores: Float[Array, "batch kv_heads group time slots"],
    v: Float[Array, "batch kv_heads slots dim"],
) -> Float[Array, "batch kv_heads group time dim"]:
    """softmax(scores) v. Reverse mode only.

    Few passes over the scores: not they but the output is divided by the softmax's sum, and the
    gradient's sum is one over features, sum_s p_s dp_s = o do (Dao et al. 2022, appendix B.2).
    """
    return _averaged_fwd(scores, v)[0]


def _averaged_fwd(scores, v):
    weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    share = 1 / weights.sum(axis=-1, keepdims=True)
    weights = weights.astype(v.dtype)
    out = (share * jnp.einsum("bhgts,bhsd->bhgtd", weights, v)).astype(v.dtype)
    return out, (weights, share, v, out)


def _averaged_bwd(residual, back):
    weights, share, v, out = residual
    back = share * back
    inner = (back * out).sum(axis=-1, keepdims=True)
    back = back.astype(v.dtype)
    change = jnp.einsum("bhgtd,bhsd->bhgts", back, v) - inner
    return weights * change, jnp.einsum("bhgts,bhgtd->bhsd", weights, back)


averaged.defvjp(_averaged_fwd, _averaged_bwd)


class AttentionMixer(nn.Module):
    """Vaswani et al. 2017, eq. 1, with what `mixing.Attention` adds; no biases.

    A window of the KV policy bounds attention in the full pass too, and quantised keys and values
    are used there as the cache would return them: decoding and training see one function.
    """

    mixer: Attention
    arch: Arch
    dtype: jnp.dtype
    gain: float = 1.0

    @nn.compact
    def __call__(self, x, frame: Frame, state: State | None = None):
        mixer, at = self.mixer, frame.positions
        heads, size = sizes.heads_of(mixer, self.arch.d_model)
        q = linear("q", heads * size, self.dtype)(x)
        q = split_heads(modulated(self.arch.cond, "proj_q", q, frame, read=x, heads=heads), heads)
        q = self.placed("q", q, self.turns(frame, at)[0])
        out, state = self.found(q, source(x, frame, self.dtype), frame, state)
        y = linear("out", self.arch.d_model, self.dtype, self.gain)(join_heads(out))
        if mixer.value_glu:
            y = y * nn.sigmoid(linear("glu", self.arch.d_model, self.dtype)(x))
        return y, state

    def found(self, q, asked, frame: Frame, state):
        """What the queries find among keys and values of what is asked and the state, and it."""
        at, knobs = frame.positions, frame.knobs
        k, v, slots, seen, state = self.past(asked, frame, state)
        mask = visible(self.mixer.stencil, at, slots, knobs)
        if frame.ahead is not None:
            mask = mask | frame.ahead
        if seen is not None:
            mask = mask & seen
        scale, softcap = knobs.get("scale", q.shape[-1] ** -0.5), knobs.get("softcap")
        bias = self.bias(q.shape[1], at[:, None] - slots)
        return attend(q, k, v, mask, scale=scale, softcap=softcap, bias=bias), state

    def past(self, x, frame: Frame, state):
        """Keys and values, their positions, who else may not see them, the state with them."""
        policy = self.arch.kv_policy or KVPolicy()
        heads, size = sizes.heads_of(self.mixer, self.arch.d_model)
        heads, at, slots = self.mixer.kv_heads or heads, frame.positions, frame.positions
        k = split_heads(linear("k", heads * size, self.dtype)(x), heads)
        v = linear("v", heads * size, self.dtype, self.gain)(x)
        v = split_heads(modulated(self.arch.cond, "proj_v", v, frame, read=x, heads=heads), heads)
        k = self.placed("k", k, self.turns(frame, at)[1])
        if state is None:
            k, v = quantize.through(k, policy.quant), quantize.through(v, policy.quant)
        else:
            packed = quantize.encode(k, policy.quant), quantize.encode(v, policy.quant)
            # the tokens of this call see the slots as they were: some are written over
            slots = jnp.concatenate([state.positions, at])
            k, v = (
                jnp.concatenate(
                    [quantize.decode(x, size, policy.quant, self.dtype) for x in pair], axis=2
                )
                for pair in zip((state.keys, state.values), packed, strict=True)
            )
            state = remember(state, *packed, at)
        seen = slots > at[:, None] - frame.knobs["kv_window"] if policy.window else None
        return k, v, slots, seen, state

    def placed(self, name: str, x, turn):
        """The heads of queries ("q") or keys ("k"), normed and turned."""
        softmax = self.mixer.softmax
        if softmax is not None and softmax.qk_norm != "none":
            make = nn.RMSNorm if softmax.qk_norm == "rms" else nn.LayerNorm
            x = make(epsilon=1e-6, dtype=self.dtype, name=f"{name}_norm")(x)
        return x if turn is None else positions.rotate(x, turn)

    def turns(self, frame: Frame, at):
        """The rotations of queries and of keys at these positions, which are the frame's."""
        del at
        return (None, None) if frame.turn is None else frame.turn

    def bias(self, heads: int, distance):
        """ALiBi's slopes, or a learned bias per bucket of distance."""
        kind = self.arch.pos.kind
        if self.mixer.pos == "none" or kind not in ("alibi", "relbias"):
            return None
        if kind == "alibi":
            slopes = jnp.asarray(positions.alibi_slopes(heads))[:, None, None]
            return -slopes * jnp.maximum(distance, 0)
        shape = (positions.BUCKETS, heads)
        table = self.param("relbias", nn.initializers.normal(0.02), shape)
        return jnp.moveaxis(table[positions.buckets(distance)], -1, 0)
