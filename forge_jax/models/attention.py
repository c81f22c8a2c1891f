"""Causal attention over a key-value cache: grouped queries, rotary positions, sliding window.

Each layer has its own cache, in batch, head, slot, feature order, which decodes faster on a CPU
than one stack of all layers.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from forge_jax.models.spec import DecoderSpec, RopeScaling


class Cache(NamedTuple):
    """Keys and values of the slots written so far."""

    keys: tuple[Float[Array, "batch kv_heads slots head_dim"], ...]  # one per layer
    values: tuple[Float[Array, "batch kv_heads slots head_dim"], ...]
    mask: Bool[Array, "batch slots"]  # slots that hold a real token
    index: Int[Array, ""]  # the next slot to write


def split_heads(x: Float[Array, "batch time width"], heads: int) -> Float[Array, "batch h time d"]:
    """Features of each head apart."""
    return x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)


def join_heads(x: Float[Array, "batch h time d"]) -> Float[Array, "batch time width"]:
    """The inverse of `split_heads`."""
    x = x.swapaxes(1, 2)
    return x.reshape(*x.shape[:2], -1)


def init_cache(spec: DecoderSpec, batch: int, length: int, dtype=jnp.float32) -> Cache:
    """An empty cache with room for `length` tokens in each of `batch` rows."""
    shape = (batch, spec.num_key_value_heads, length, spec.head_dim)
    empty = tuple(jnp.zeros(shape, dtype) for _ in range(spec.num_hidden_layers))
    return Cache(empty, empty, jnp.zeros((batch, length), bool), jnp.int32(0))


def repeat_cache(cache: Cache, times: int) -> Cache:
    """Every row of `cache` `times` times in succession, so that samples share a prompt."""
    keys, values, mask = jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), cache[:3])
    return Cache(keys, values, mask, cache.index)


class Slots(NamedTuple):
    """Where the current tokens stand among those before them."""

    positions: Int[Array, "batch time"]  # padding not counted
    visible: Bool[Array, "batch time slots"]  # what each token attends to
    mask: Bool[Array, "batch slots"]  # slots that hold a real token, the current ones among them
    index: Int[Array, ""] | int  # slot of the first current token


def find_slots(mask: Bool[Array, "batch time"], cache: Cache | None) -> Slots:
    """Positions and visibility of tokens that follow those in the cache.

    Raises:
      ValueError: the cache has another number of rows, or fewer slots than there are tokens. How
        many slots are still free is known only at run time: the caller counts.
    """
    batch, time = mask.shape
    if cache is None:
        seen, index, slots_mask = 0, 0, mask
    elif cache.mask.shape[0] != batch or cache.mask.shape[1] < time:
        raise ValueError(
            f"`cache` must have {batch} rows and room for {time} tokens, got {cache.mask.shape}."
        )
    else:
        seen, index = cache.mask.sum(axis=1, keepdims=True), cache.index
        slots_mask = jax.lax.dynamic_update_slice_in_dim(cache.mask, mask, index, axis=1)
    positions = jnp.maximum(seen + jnp.cumsum(mask, axis=1) - 1, 0)
    rows, slots = index + jnp.arange(time), jnp.arange(slots_mask.shape[1])
    visible = (slots <= rows[:, None]) & slots_mask[:, None, :]
    return Slots(positions, visible, slots_mask, index)


def within_window(slots: Slots, window: int | None) -> Bool[Array, "batch time slots"]:
    """What each token attends to when it sees `window` tokens, itself among them (Mistral).

    Distance is counted in slots, as transformers does: the same as in positions, since the real
    tokens of a row follow one another.
    """
    if window is None:
        return slots.visible
    time, count = slots.visible.shape[1:]
    rows = slots.index + jnp.arange(time)
    return slots.visible & (jnp.arange(count) > rows[:, None] - window)


def rotary_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> np.ndarray:
    """Radians per position of each pair of features, float32, (head_dim / 2,).

    With `scaling` as in Llama 3 (Dubey et al. 2024, arXiv 2407.21783; the rule is that of the
    released model code): a frequency that turns less than `low_freq_factor` times within the
    first context is divided by `factor`, one that turns more than `high_freq_factor` times is
    kept, and between them the two are blended linearly in the number of turns.
    """
    half = head_dim // 2
    frequencies = np.float32(theta) ** (-np.arange(half, dtype=np.float32) / half)
    if scaling is None:
        return frequencies
    turns = scaling.original_max_position_embeddings * frequencies / (2 * np.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return ((kept + (1 - kept) / scaling.factor) * frequencies).astype(np.float32)


def rotary(
    positions: Int[Array, "batch time"],
    slots: int,
    head_dim: int,
    theta: float,
    scaling: RopeScaling | None = None,
) -> Float[Array, "2 batch 1 time half"]:
    """Cosine and sine of every position below `slots` and frequency (Su et al. 2021, eq. 34).

    Read from a table made while tracing: computed inside a decoding loop, they send XLA's CPU
    compiler (jaxlib 0.10.2) into minutes of vectorizer analysis at some shapes.
    """
    frequencies = rotary_frequencies(head_dim, theta, scaling)
    angles = np.arange(slots, dtype=np.float32)[:, None] * frequencies
    table = jnp.asarray(np.stack([np.cos(angles), np.sin(angles)]))
    return table[:, positions][:, :, None]


def rotate(
    x: Float[Array, "batch heads time head_dim"], turn: Float[Array, "2 batch 1 time half"]
) -> Float[Array, "batch heads time head_dim"]:
    """Turn feature i and feature i + head_dim / 2 by their angle.

    The pairing is that of Hugging Face's Llama; the paper pairs neighbours.
    """
    half = x.shape[-1] // 2
    cos, sin = turn.astype(x.dtype)
    x1, x2 = x[..., :half], x[..., half:]
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)


def attend(
    q: Float[Array, "batch heads time head_dim"],
    k: Float[Array, "batch kv_heads slots head_dim"],
    v: Float[Array, "batch kv_heads slots head_dim"],
    mask: Bool[Array, "batch time slots"],
) -> Float[Array, "batch heads time head_dim"]:
    """Softmax attention, query heads in groups of heads / kv_heads; softmax in float32."""
    batch, heads, time, head_dim = q.shape
    groups = heads // k.shape[1]
    # the query heads of a group are so many more query rows of one product
    q = q.reshape(batch, k.shape[1], groups * time, head_dim)
    scores = jnp.einsum("bhqd,bhsd->bhqs", q, k).astype(jnp.float32) * head_dim**-0.5
    # not -inf: the rows of left padding see no slot at all and must stay finite
    scores = jnp.where(jnp.tile(mask, (1, groups, 1))[:, None], scores, -1e30)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bhqs,bhsd->bhqd", weights, v).reshape(batch, heads, time, head_dim)


class Attention(nn.Module):
    """Causal grouped-query self-attention over the cached and the current tokens.

    `turn` is None where positions are learned.
    """

    spec: DecoderSpec

    @nn.compact
    def __call__(self, x, turn, mask, layer_cache, index):
        spec = self.spec
        biased = spec.qkv_bias or spec.is_gpt2

        def dense(name, count):
            return nn.Dense(count * spec.head_dim, use_bias=biased, name=name)(x)

        def heads(y):
            return y.reshape(*x.shape[:2], -1, spec.head_dim).swapaxes(1, 2)

        def norm(name, y):
            if not spec.qk_norm:
                return y
            return nn.RMSNorm(epsilon=spec.rms_norm_eps, name=name)(y)

        counts = (spec.num_attention_heads, spec.num_key_value_heads, spec.num_key_value_heads)
        if spec.fused_qkv:
            ends = np.cumsum(counts)[:2] * spec.head_dim
            q, k, v = map(heads, jnp.split(dense("qkv_proj", sum(counts)), ends, axis=-1))
        else:
            names = ("q_proj", "k_proj", "v_proj")
            q, k, v = (heads(dense(n, count)) for n, count in zip(names, counts, strict=True))
        q, k = norm("q_norm", q), norm("k_norm", k)
        if turn is not None:
            q, k = rotate(q, turn), rotate(k, turn)
        if layer_cache is not None:
            k, v = (
                jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), index, axis=2)
                for old, new in zip(layer_cache, (k, v), strict=True)
            )
        y = attend(q, k, v, mask).swapaxes(1, 2).reshape(*x.shape[:2], -1)
        return nn.Dense(spec.hidden_size, use_bias=spec.is_gpt2, name="o_proj")(y), (k, v)
