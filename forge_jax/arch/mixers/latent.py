"""Attention whose cache holds one short vector in place of keys and values."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from forge_jax.arch import quantize, sizes
from forge_jax.arch.conditioning import modulated, ops_at, width_of
from forge_jax.arch.decay import kept_sums
from forge_jax.arch.layers import linear
from forge_jax.arch.mixers.attention import NOWHERE, AttentionMixer
from forge_jax.arch.mixers.frame import Frame
from forge_jax.arch.mixing import Attention
from forge_jax.arch.schema import Arch
from forge_jax.arch.structure import LatentCache, LatentUpdate
from forge_jax.models.attention import split_heads


class State(NamedTuple):
    """Latents of earlier tokens, one slot for `freq` of them."""

    latents: Any  # (batch, slots, dim), or quantize.Packed
    positions: Int[Array, " slots"]  # of the last token in each
    running: Float[Array, "batch dim"] | None  # of the last token, as it was before quantisation
    # of the same tokens, where values are conditioned
    conditions: Float[Array, "batch slots features"] | None = None


def latent_of(arch: Arch) -> LatentCache | None:
    """The latent cache of an architecture, if it has one."""
    return arch.kv_policy.latent if arch.kv_policy else None


def init_state(mixer: Attention, arch: Arch, batch: int, length: int, dtype: jnp.dtype) -> State:
    """Empty slots for `length` tokens."""
    latent, policy = latent_of(arch), arch.kv_policy
    assert latent is not None
    assert policy is not None
    slots = -(-length // (latent.update.freq if latent.update else 1))
    empty = jnp.zeros((batch, slots, latent.dim), dtype)
    running = jnp.zeros((batch, latent.dim)) if latent.update else None
    places = jnp.full(slots, NOWHERE, jnp.int32)
    conditions = None
    if arch.cond is not None and ops_at(arch.cond, "proj_v"):
        conditions = jnp.zeros((batch, slots, width_of(arch.cond)), dtype)
    return State(quantize.encode(empty, policy.quant), places, running, conditions)


def followed(
    x: Float[Array, "batch time dim"],
    at: Int[Array, " time"],
    update: LatentUpdate,
    tau: Any,
    before: Float[Array, "batch dim"] | None,
) -> Float[Array, "batch time dim"]:
    r"""What a latent is at each token: $r_t = a_t r_{t-1} + (1 - a_t) x_t$.

    linear: the mean of the tokens of its block so far, $a_t = n / (n + 1)$ at the n-th token of
    `freq`. ema: $a_t = 1 - \tau$, and $r_0 = x_0$. Sums are float32.
    """
    if update.kind == "ema":
        keep = jnp.where(at == 0, 0.0, 1.0 - tau)
    else:
        keep = (at % update.freq) / (at % update.freq + 1.0)
    keep = keep[None, :, None].astype(jnp.float32)
    return kept_sums((1 - keep) * x.astype(jnp.float32), keep, before)


def written(
    state: State, latents: Any, running: Any, conditions: Any, at: Int[Array, " time"], freq: int
) -> State:
    """The latent of the last token of each block that these tokens reach."""
    slots = jnp.arange(state.positions.shape[0])
    last = jnp.minimum(slots * freq + freq - 1, at[-1])
    reached = (last >= at[0]) & (slots * freq <= at[-1])
    index = jnp.clip(last - at[0], 0, at.shape[0] - 1)

    def put(old, new):
        here = reached.reshape(-1, *(1,) * (old.ndim - 2))
        return jnp.where(here, new[:, index], old)

    return State(
        jax.tree.map(put, state.latents, latents),
        jnp.where(reached, last, state.positions),
        None if running is None else running[:, -1],
        None if state.conditions is None else put(state.conditions, conditions),
    )


class LatentMixer(AttentionMixer):
    """Multi-head latent attention: keys and values are linear maps of one cached latent.

    DeepSeek-V2 (2024, eqs. 9-11), without its separate rotary key: keys are made from the latents,
    and turned, whenever they are read. With `freq` f a latent is kept of every f-th token, which
    `followed` makes stand for its block; a token sees the blocks that have ended, and its own
    latent so far.
    """

    def past(self, x, frame: Frame, state):
        """Keys and values of all latents, their positions, who sees them, the new state."""
        policy, latent = self.arch.kv_policy, latent_of(self.arch)
        assert policy is not None
        assert latent is not None
        heads, size = sizes.heads_of(self.mixer, self.arch.d_model)
        heads, at, update = self.mixer.kv_heads or heads, frame.positions, latent.update
        c, running, slots = linear("latent", latent.dim, self.dtype)(x), None, frame.positions
        if update is not None:
            before = None if state is None else state.running
            running = followed(c, at, update, frame.knobs.get("tau"), before)
            c = running.astype(self.dtype)
        if state is None:
            c = quantize.through(c, policy.quant)
        else:
            packed = quantize.encode(c, policy.quant)
            parts = (state.latents, packed)
            unpacked = [quantize.decode(p, latent.dim, policy.quant, self.dtype) for p in parts]
            c, slots = jnp.concatenate(unpacked, axis=1), jnp.concatenate([state.positions, at])
            own, kept = frame.condition, state.conditions
            if kept is not None:
                frame = frame._replace(condition=jnp.concatenate([kept, own], axis=1))
            state = written(state, packed, running, own, at, update.freq if update else 1)
        k = split_heads(linear("k", heads * size, self.dtype)(c), heads)
        v = linear("v", heads * size, self.dtype, self.gain)(c)
        v = split_heads(modulated(self.arch.cond, "proj_v", v, frame, read=c, heads=heads), heads)
        seen = None
        if update is not None:
            seen = (slots % update.freq == update.freq - 1) | (slots == at[:, None])
        return self.placed("k", k, self.turns(frame, slots)[1]), v, slots, seen, state

    def turns(self, frame: Frame, at):
        """The same of any positions."""
        return (None, None) if frame.turn is None else frame.turn[:, :, at]
