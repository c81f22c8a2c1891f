"""A decoder of the Llama, Mistral, Qwen and GPT-2 families in Flax Linen.

Layers are not stacked: each keeps its own parameters and its own cache.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from forge_jax.models.attention import Attention, Cache, find_slots, rotary, within_window
from forge_jax.models.spec import DecoderSpec


def make_norm(spec: DecoderSpec, name: str) -> nn.Module:
    """RMSNorm, or GPT-2's LayerNorm."""
    if spec.is_gpt2:
        # the fast variance, E[x^2] - E[x]^2, cancels where the mean is large
        return nn.LayerNorm(epsilon=spec.rms_norm_eps, use_fast_variance=False, name=name)
    return nn.RMSNorm(epsilon=spec.rms_norm_eps, name=name)


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020, eq. 6), down(silu(gate(x)) * up(x)); GPT-2's down(gelu_new(up(x)))."""

    spec: DecoderSpec

    @nn.compact
    def __call__(self, x):
        spec = self.spec

        def dense(name, width):
            return nn.Dense(width, use_bias=spec.is_gpt2, name=name)

        if spec.is_gpt2:
            inner = nn.gelu(dense("up_proj", spec.intermediate_size)(x), approximate=True)
        else:
            gate = dense("gate_proj", spec.intermediate_size)(x)
            inner = nn.silu(gate) * dense("up_proj", spec.intermediate_size)(x)
        return dense("down_proj", spec.hidden_size)(inner)


class Layer(nn.Module):
    """One pre-norm residual block."""

    spec: DecoderSpec

    @nn.compact
    def __call__(self, x, turn, mask, layer_cache, index):
        spec = self.spec
        y, kv = Attention(spec, name="self_attn")(
            make_norm(spec, "input_layernorm")(x), turn, mask, layer_cache, index
        )
        x = x + y
        y = make_norm(spec, "post_attention_layernorm")(x)
        return x + FeedForward(spec, name="mlp")(y), kv


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


def learned_positions(
    spec: DecoderSpec, positions: Int[Array, "batch time"], slots: int
) -> Float[Array, "batch time hidden"]:
    """GPT-2's position embeddings, a submodule of the module that calls."""
    if slots > spec.max_position_embeddings:
        raise ValueError(
            f"Wanted at most {spec.max_position_embeddings} slots, as many as positions were "
            f"learned (`max_position_embeddings`), got {slots}."
        )
    table = nn.Embed(spec.max_position_embeddings, spec.hidden_size, name="embed_positions")
    return table(positions)


class Decoder(nn.Module):
    """Next-token logits of padded token rows, with or without a key-value cache.

    Parameter names follow Hugging Face's Llama in every family (GPT-2's are renamed: wpe is
    `embed_positions`, c_attn `qkv_proj`, c_fc `up_proj`); kernels are (in, out).
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

        `mask` is False at padding, on either side (`pad_left` turns rows whose last slot is to be
        their last token); default all True. Positions count from the first real token. With a
        `cache` the tokens follow those in it, which they see; the cache must have room for them.
        Logits at padding are finite and mean nothing.

        Raises:
          ValueError: the shapes of mask, cache or images do not fit the tokens, or there are more
            slots than learned positions.
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
        embed = nn.Embed(spec.vocab_size, spec.hidden_size, name="embed_tokens")
        x = embed(tokens)
        if images is not None:
            if spec.image_token_id is None:
                raise ValueError("`images` need a decoder with `image_token_id`, got None.")
            x = place_images(x, tokens == spec.image_token_id, images)
        turn = None
        if spec.is_gpt2:
            x = x + learned_positions(spec, slots.positions, count)
        else:
            args = (spec.head_dim, spec.rope_theta, spec.rope_scaling)
            turn = rotary(slots.positions, count, *args)
        kvs = []
        for i in range(spec.num_hidden_layers):
            layer_cache = None if cache is None else (cache.keys[i], cache.values[i])
            visible = within_window(slots, spec.window_of(i))
            layer = Layer(spec, name=f"layers_{i}")
            x, kv = layer(x, turn, visible, layer_cache, slots.index)
            kvs.append(kv)
        x = make_norm(spec, "norm")(x[:, logits_from:])
        self.sow("intermediates", "hidden", x)  # nothing unless asked for, see `with_hidden`
        if spec.tie_word_embeddings:
            logits = embed.attend(x)
        else:
            logits = nn.Dense(spec.vocab_size, use_bias=False, name="lm_head")(x)
        logits = logits.astype(jnp.float32)
        if cache is None:
            return logits, None
        keys, values = zip(*kvs, strict=True)
        return logits, Cache(keys, values, slots.mask, cache.index + tokens.shape[1])
