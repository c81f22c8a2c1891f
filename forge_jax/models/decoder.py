"""A Llama-shaped decoder in Flax Linen: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Layers are not stacked: each keeps its own parameters and its own cache, in batch, head,
slot, feature order, which decodes faster on a CPU than one scanned stack.
"""

import dataclasses
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


@dataclasses.dataclass(frozen=True)
class DecoderSpec:
    """The shape of a decoder; fields carry the names of Hugging Face's LlamaConfig."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = True
    image_token_id: int | None = None
    """token whose embeddings are replaced by image embeddings, in order"""

    def __post_init__(self):
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                "`num_attention_heads` must be a multiple of `num_key_value_heads`, got "
                f"{self.num_attention_heads} and {self.num_key_value_heads}."
            )
        if self.head_dim % 2:
            raise ValueError(f"Rotary positions need an even `head_dim`, got {self.head_dim}.")


class Cache(NamedTuple):
    """Keys and values of the slots written so far."""

    keys: tuple[Float[Array, "batch kv_heads slots head_dim"], ...]  # one per layer
    values: tuple[Float[Array, "batch kv_heads slots head_dim"], ...]
    mask: Bool[Array, "batch slots"]  # slots that hold a real token
    index: Int[Array, ""]  # the next slot to write


def init_cache(spec: DecoderSpec, batch: int, length: int, dtype=jnp.float32) -> Cache:
    """An empty cache with room for `length` tokens in each of `batch` rows."""
    shape = (batch, spec.num_key_value_heads, length, spec.head_dim)
    empty = tuple(jnp.zeros(shape, dtype) for _ in range(spec.num_hidden_layers))
    return Cache(empty, empty, jnp.zeros((batch, length), bool), jnp.int32(0))


def repeat_cache(cache: Cache, times: int) -> Cache:
    """Every row of `cache` `times` times in succession, so that samples share a prompt."""
    keys, values, mask = jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), cache[:3])
    return Cache(keys, values, mask, cache.index)


def rotary(
    positions: Int[Array, "batch time"], slots: int, head_dim: int, theta: float
) -> Float[Array, "2 batch 1 time half"]:
    """Cosine and sine of every position below `slots` and frequency (Su et al. 2021, eq. 34).

    Read from a table made while tracing: computed inside a decoding loop, they send XLA's CPU
    compiler (jaxlib 0.10.2) into minutes of vectorizer analysis at some shapes.
    """
    half = head_dim // 2
    frequencies = np.float32(theta) ** (-np.arange(half, dtype=np.float32) / half)
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
    """Causal grouped-query self-attention over the cached and the current tokens."""

    spec: DecoderSpec

    @nn.compact
    def __call__(self, x, turn, mask, layer_cache, index):
        spec = self.spec

        def heads(name, count):
            y = nn.Dense(count * spec.head_dim, use_bias=False, name=name)(x)
            return y.reshape(*x.shape[:2], count, spec.head_dim).swapaxes(1, 2)

        q = rotate(heads("q_proj", spec.num_attention_heads), turn)
        k = rotate(heads("k_proj", spec.num_key_value_heads), turn)
        v = heads("v_proj", spec.num_key_value_heads)
        if layer_cache is not None:
            k, v = (
                jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), index, axis=2)
                for old, new in zip(layer_cache, (k, v), strict=True)
            )
        y = attend(q, k, v, mask).swapaxes(1, 2).reshape(*x.shape[:2], -1)
        return nn.Dense(spec.hidden_size, use_bias=False, name="o_proj")(y), (k, v)


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020, eq. 6): down(silu(gate(x)) * up(x))."""

    spec: DecoderSpec

    @nn.compact
    def __call__(self, x):
        gate = nn.Dense(self.spec.intermediate_size, use_bias=False, name="gate_proj")(x)
        up = nn.Dense(self.spec.intermediate_size, use_bias=False, name="up_proj")(x)
        return nn.Dense(self.spec.hidden_size, use_bias=False, name="down_proj")(nn.silu(gate) * up)


class Layer(nn.Module):
    """One pre-norm residual block."""

    spec: DecoderSpec

    @nn.compact
    def __call__(self, x, turn, mask, layer_cache, index):
        def norm(name, y):
            return nn.RMSNorm(epsilon=self.spec.rms_norm_eps, name=name)(y)

        y, kv = Attention(self.spec, name="self_attn")(
            norm("input_layernorm", x), turn, mask, layer_cache, index
        )
        x = x + y
        return x + FeedForward(self.spec, name="mlp")(norm("post_attention_layernorm", x)), kv


def place_images(
    x: Float[Array, "batch time hidden"],
    is_image: Bool[Array, "batch time"],
    images: Float[Array, "batch patches hidden"],
) -> Float[Array, "batch time hidden"]:
    """Replace the embedding of each row's i-th image token by its i-th patch embedding.

    Image tokens beyond the last patch get the last patch.
    """
    if images.ndim != 3 or images.shape[::2] != x.shape[::2] or not images.shape[1]:
        wanted = (x.shape[0], "patches", x.shape[2])
        raise ValueError(f"`images` must have shape {wanted}, got {images.shape}.")
    nth = jnp.clip(jnp.cumsum(is_image, axis=1) - 1, 0, images.shape[1] - 1)
    patches = jnp.take_along_axis(images, nth[..., None], axis=1)
    return jnp.where(is_image[..., None], patches.astype(x.dtype), x)


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


class Decoder(nn.Module):
    """Next-token logits of left-padded token rows, with or without a key-value cache.

    Parameter names follow Hugging Face's Llama, kernels are (in, out).
    """

    spec: DecoderSpec

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "batch time"],
        mask: Bool[Array, "batch time"] | None = None,
        cache: Cache | None = None,
        images: Float[Array, "batch patches hidden"] | None = None,
        logits_from: int = 0,
    ) -> tuple[Float[Array, "batch kept vocab"], Cache | None]:
        """Logits of the tokens from `logits_from` on (negative counts from the end), and the cache.

        `mask` is False at padding (which stands on the left); default all True. With a `cache`
        the tokens follow those in it, which they see; the cache must have room for them. Logits
        at padding are finite and mean nothing.

        Raises:
          ValueError: the shapes of mask, cache or images do not fit the tokens.
        """
        spec = self.spec
        if mask is None:
            mask = jnp.ones(tokens.shape, bool)
        if mask.shape != tokens.shape:
            raise ValueError(
                f"`mask` must have the tokens' shape {tokens.shape}, got {mask.shape}."
            )
        slots = find_slots(mask.astype(bool), cache)
        count = slots.mask.shape[1]  # a position is never larger than its slot
        turn = rotary(slots.positions, count, spec.head_dim, spec.rope_theta)
        embed = nn.Embed(spec.vocab_size, spec.hidden_size, name="embed_tokens")
        x = embed(tokens)
        if images is not None:
            if spec.image_token_id is None:
                raise ValueError("`images` need a decoder with `image_token_id`, got None.")
            x = place_images(x, tokens == spec.image_token_id, images)
        kvs = []
        for i in range(spec.num_hidden_layers):
            layer_cache = None if cache is None else (cache.keys[i], cache.values[i])
            layer = Layer(spec, name=f"layers_{i}")
            x, kv = layer(x, turn, slots.visible, layer_cache, slots.index)
            kvs.append(kv)
        x = nn.RMSNorm(epsilon=spec.rms_norm_eps, name="norm")(x[:, logits_from:])
        if spec.tie_word_embeddings:
            logits = embed.attend(x)
        else:
            logits = nn.Dense(spec.vocab_size, use_bias=False, name="lm_head")(x)
        logits = logits.astype(jnp.float32)
        if cache is None:
            return logits, None
        keys, values = zip(*kvs, strict=True)
        return logits, Cache(keys, values, slots.mask, cache.index + tokens.shape[1])
