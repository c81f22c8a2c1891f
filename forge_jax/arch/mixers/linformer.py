"""Attention to earlier blocks by one learned summary each: a causal reading of Linformer."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from forge_jax.arch import sizes
from forge_jax.arch.mixers.attention import AttentionMixer, State, averaged
from forge_jax.arch.mixers.frame import Frame


def summaries(
    x: Float[Array, "batch kv_heads time dim"], weights: Float[Array, "kv_heads block"]
) -> Float[Array, "batch kv_heads blocks dim"]:
    """The weighted sum of every block that is whole."""
    block = weights.shape[1]
    whole = x.shape[2] // block
    x = x[:, :, : whole * block].reshape(*x.shape[:2], whole, block, x.shape[3])
    return jnp.einsum("bhcnd,hn->bhcd", x, weights)


def attend_blocks(
    q: Float[Array, "batch heads groups queries dim"],
    own: tuple[Float[Array, "batch kv_heads groups block dim"], ...],
    far: tuple[Float[Array, "batch kv_heads blocks dim"], ...],
    mask: Bool[Array, "groups queries blocks+block"],
    scale: Any,
    softcap: Any,
) -> Float[Array, "batch heads groups queries dim"]:
    """Attention of each group of queries to the summaries and to the tokens of one block.

    `own` and `far` are keys and values, the summaries stand first in the mask. In float32.
    """
    (k, v), (batch, kv_heads, groups, _, size) = own, own[0].shape

    def beside(far, own):
        far = jnp.broadcast_to(far[:, :, None], (batch, kv_heads, groups, *far.shape[2:]))
        both = jnp.concatenate([far, own], axis=3)
        return jnp.moveaxis(both, 2, 1).reshape(batch * groups, kv_heads, -1, size)

    k, v = beside(far[0], k), beside(far[1], v)
    heads, queries = q.shape[1], q.shape[3]
    grouped = jnp.moveaxis(q, 2, 1).reshape(batch * groups, kv_heads, -1, queries, size)
    scores = jnp.einsum("bhgtd,bhsd->bhgts", grouped, k).astype(jnp.float32) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    mask = jnp.tile(mask, (batch, 1, 1))[:, None, None]
    out = averaged(jnp.where(mask, scores, -1e30), v)
    return jnp.moveaxis(out.reshape(batch, groups, heads, queries, size), 1, 2)


class LinformerMixer(AttentionMixer):
    r"""$\bar k_c = \sum_j E_j k_{cn+j}$, $\bar v_c = \sum_j F_j v_{cn+j}$ of blocks of n tokens.

    A query sees the summaries of the blocks that ended before its own began, and the tokens of its
    own up to itself. This project's own causal reading of Linformer (Wang et al. 2020, eq. 7),
    whose E and F are dense over the whole length and so read the future: here the n weights of a
    key-value head serve all of its blocks. Keys are turned at their own positions before they are
    summed. Decoding keeps every key and value, as full attention does, and sums them when it reads.
    """

    def found(self, q, asked, frame: Frame, state: State | None):
        """The same as of attention."""
        projection = self.mixer.projection
        assert projection is not None
        assert projection.block is not None  # canonical form writes it
        k, v, _, _, kept = self.past(asked, frame, state)
        if kept is not None:
            k, v = kept.keys, kept.values  # the token of position i is in slot i
        e = self.weights("E", projection.block)
        f = e if projection.shared else self.weights("F", projection.block)
        far = summaries(k, e), summaries(v, f)
        args = (*(q, k, v, far), frame.positions, projection.block)
        return (self.whole if kept is None else self.some)(*args, frame.knobs), kept

    def weights(self, name: str, block: int) -> Any:
        """Weights of a block's tokens, near those of their mean."""
        heads, _ = sizes.heads_of(self.mixer, self.arch.d_model)

        def init(key, shape):
            return 1 / block + nn.initializers.normal(0.1 / block)(key, shape)

        return self.param(name, init, (self.mixer.kv_heads or heads, block)).astype(self.dtype)  # pyright: ignore

    def whole(self, q, k, v, far, at, block: int, knobs):
        """All tokens of a row, block by block."""
        time = at.shape[0]
        blocks = -(-time // block)

        def cut(x):
            x = jnp.pad(x, [(0, 0), (0, 0), (0, blocks * block - time), (0, 0)])
            return x.reshape(*x.shape[:2], blocks, block, x.shape[3])

        at = jnp.arange(blocks * block).reshape(blocks, block)
        out = self.read(cut(q), (cut(k), cut(v)), far, at, block, knobs)
        return out.reshape(*q.shape[:2], blocks * block, q.shape[3])[:, :, :time]

    def some(self, q, k, v, far, at, block: int, knobs):
        """Tokens at any positions, each with the block that it is in."""
        slots = at[:, None] // block * block + jnp.arange(block)
        # of a block beyond the cache the last slots: they are not seen
        own = tuple(x[:, :, jnp.minimum(slots, x.shape[2] - 1)] for x in (k, v))
        out = self.read(q[:, :, :, None], own, far, at[:, None], block, knobs)
        return out[:, :, :, 0]

    def read(self, q, own, far, at: Int[Array, "groups queries"], block: int, knobs):
        """What the queries at these positions find."""
        near = jnp.arange(block) <= (at % block)[..., None]
        ended = jnp.arange(far[0].shape[2]) < (at // block)[..., None]
        mask = jnp.concatenate([ended, near], axis=-1)
        scale = knobs.get("scale", q.shape[-1] ** -0.5)
        return attend_blocks(q, own, far, mask, scale, knobs.get("softcap"))
