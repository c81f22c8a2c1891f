"""Sliding-window attention over a short cache, for the backbone and for the recursion.

Except with compat="reference", no attention here sees more than `window` tokens, so the cache of a
stream keeps the last `window - 1` keys in order, whatever the length of the stream.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from forge_jax.models.attention import attend, join_heads, rotary, rotate, split_heads
from forge_jax.models.cognate.config import CognateConfig
from forge_jax.models.dense import matmul

KeysValues = tuple[
    Float[Array, "batch heads slots head_dim"], Float[Array, "batch heads slots head_dim"]
]
EVERYTHING = 2**30  # a reach beyond any sequence
EMPTY = -1  # the document of a slot that holds no token


class Place(NamedTuple):
    """Where the current tokens stand in their documents."""

    positions: Int[Array, "batch time"]  # from the start of the document
    is_first: Bool[Array, "batch time"]  # of its document
    segments: Int[Array, "batch time"]  # the document
    key_segments: Int[Array, "batch slots"]  # of the cached tokens and of the current ones


def find_place(
    segments: Int[Array, "batch time"],
    cached: Int[Array, "batch slots"],
    last: Int[Array, " batch"],
    next_position: Int[Array, " batch"],
) -> Place:
    """Positions and first tokens, given the document and the position that went before."""
    before = jnp.concatenate([last[:, None], segments[:, :-1]], axis=1)
    is_first = segments != before
    index = jnp.arange(segments.shape[1])
    start = jax.lax.cummax(jnp.where(is_first, index, -1), axis=1)
    positions = jnp.where(start >= 0, index - start, next_position[:, None] + index)
    return Place(positions, is_first, segments, jnp.concatenate([cached, segments], axis=1))


def window_attention(
    q: Float[Array, "batch heads time head_dim"],
    keys: Float[Array, "batch heads slots head_dim"],
    values: Float[Array, "batch heads slots head_dim"],
    place: Place,
    reach: tuple[int, int],
) -> Float[Array, "batch heads time head_dim"]:
    """Softmax attention to the `reach[0]` tokens before and the `reach[1]` after of the document.

    The last `time` slots are the current tokens. A causal sequence of more than twice the window
    is cut into blocks of one window, each of which sees itself and the block before: the cost is
    then 2 time window, not time^2.
    """
    time, slots = q.shape[2], keys.shape[2]
    width = reach[0] + 1
    if reach[1] == 0 and slots == time and time > 2 * width:
        return _in_blocks(q, keys, values, place.segments, width)
    rows = slots - time + jnp.arange(time)
    documents = place.segments, place.key_segments
    return attend(q, keys, values, _visible(rows, jnp.arange(slots), *documents, reach))


def _visible(rows, columns, segments, key_segments, reach: tuple[int, int]):
    """Which slots are near enough and of the same document."""
    back = rows[:, None] - columns
    near = (back <= reach[0]) & (-back <= reach[1])
    return near & (segments[:, :, None] == key_segments[:, None, :])


def _in_blocks(q, keys, values, segments, width: int):
    """Causal attention within `width` tokens, block by block."""
    batch, heads, time, head_dim = q.shape
    count = -(-time // width)

    def padded(x, before, fill=0):
        """`before` slots in front, and at the end what a whole block lacks."""
        pads = ((0, 0), (0, 0), (before, count * width - time), (0, 0))
        return jnp.pad(x, pads, constant_values=fill)

    def split(x):
        """(batch, heads, count * width, d) -> (batch * count, heads, width, d)"""
        x = x.reshape(batch, x.shape[1], count, width, -1).swapaxes(1, 2)
        return x.reshape(batch * count, x.shape[2], width, -1)

    def with_previous(x, fill=0):
        """Each block behind the one before it, the first behind padding."""
        x = padded(x, width, fill)
        return jnp.concatenate([split(x[:, :, : count * width]), split(x[:, :, width:])], axis=2)

    documents = segments[:, None, :, None]
    mask = _visible(
        width + jnp.arange(width),
        jnp.arange(2 * width),
        split(padded(documents, 0, EMPTY))[:, 0, :, 0],
        with_previous(documents, EMPTY)[:, 0, :, 0],
        (width - 1, 0),
    )
    out = attend(split(padded(q, 0)), with_previous(keys), with_previous(values), mask)
    out = out.reshape(batch, count, heads, width, head_dim).swapaxes(1, 2)
    return out.reshape(batch, heads, count * width, head_dim)[:, :, :time]


def turn_of(config: CognateConfig, heads: int, positions: Int[Array, "batch time"]):
    """Rotation of every token's heads; None where positions are learned."""
    if config.positions == "learned":
        return None
    head_dim = config.d_model // heads
    return rotary(positions, config.max_positions, head_dim, config.rope_theta)


def reach_of(config: CognateConfig, is_backbone: bool) -> tuple[int, int]:
    """Tokens seen before and after; in the reference both ways, the recursion everywhere."""
    if not config.is_reference:
        return config.window - 1, 0
    half = config.window // 2 if is_backbone else EVERYTHING
    return half, half


def behind(cache: KeysValues, new: KeysValues) -> KeysValues:
    """The cached keys and values with those of the current tokens behind them."""
    keys, values = (
        jnp.concatenate([old.astype(x.dtype), x], axis=2) for old, x in zip(cache, new, strict=True)
    )
    return keys, values


class WindowAttention(nn.Module):
    """The backbone's self-attention; no biases."""

    config: CognateConfig

    @nn.compact
    def __call__(self, x, place: Place, turn, cache: KeysValues):
        config = self.config
        init = nn.initializers.normal(0.02)

        def dense(name):
            return nn.Dense(config.d_model, use_bias=False, kernel_init=init, name=name)

        q, k, v = (split_heads(dense(n)(x), config.heads) for n in ("w_q", "w_k", "w_v"))
        if turn is not None:
            q, k = rotate(q, turn), rotate(k, turn)
        keys, values = behind(cache, (k, v))
        y = window_attention(q, keys, values, place, reach_of(config, is_backbone=True))
        return dense("w_o")(join_heads(y)), (keys[:, :, x.shape[1] :], values[:, :, x.shape[1] :])


class Fused(nn.Module):
    """Query, key and value projections side by side in one matrix, as torch keeps them."""

    width: int

    def setup(self):
        shape = (self.width, 3 * self.width)
        self.kernel = self.param("kernel", nn.initializers.xavier_uniform(), shape)
        self.bias = self.param("bias", nn.initializers.zeros, shape[1:])

    def query(self, x):
        return matmul(x, self.kernel[:, : self.width]) + self.bias[: self.width]

    def keys_values(self, x):
        y = matmul(x, self.kernel[:, self.width :]) + self.bias[self.width :]
        return jnp.split(y, 2, axis=-1)


class CrossAttention(nn.Module):
    """The recursion's attention: queries of the latent state, keys of another sequence."""

    config: CognateConfig

    def setup(self):
        self.in_proj = Fused(self.config.d_model)
        self.out_proj = nn.Dense(
            self.config.d_model, kernel_init=torch_uniform(self.config.d_model)
        )

    def keys_values(self, x: Float[Array, "batch time d"], turn) -> KeysValues:
        """Keys and values of `x`, heads split, keys turned."""
        keys, values = (
            split_heads(y, self.config.answer_heads) for y in self.in_proj.keys_values(x)
        )
        return (keys if turn is None else rotate(keys, turn)), values

    def __call__(self, x, seen: KeysValues, place: Place, turn):
        q = split_heads(self.in_proj.query(x), self.config.answer_heads)
        q = q if turn is None else rotate(q, turn)
        y = window_attention(q, *seen, place, reach_of(self.config, is_backbone=False))
        return self.out_proj(join_heads(y))


def torch_uniform(fan_in: int):
    """torch's start of a linear layer, weight and bias alike: uniform within 1 / sqrt(fan_in)."""
    bound = fan_in**-0.5

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init
