"""Attention by positive random features (Performer, Choromanski et al. 2021)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from forge_jax.arch import positions, sizes
from forge_jax.arch.conditioning import modulated
from forge_jax.arch.decay import State, decayed
from forge_jax.arch.layers import linear
from forge_jax.arch.mixers.frame import Frame, source
from forge_jax.arch.mixing import Attention, Kernel
from forge_jax.arch.schema import Arch
from forge_jax.models.attention import join_heads, split_heads


def init_state(mixer: Attention, arch: Arch, batch: int, length: int, dtype: jnp.dtype) -> State:
    """Sums over no tokens."""
    del length, dtype
    heads, size = sizes.heads_of(mixer, arch.d_model)
    return jnp.zeros((batch, heads, sizes.features_of(mixer) or 0, size + 1), jnp.float32)


def draw(kernel: Kernel, size: int, step) -> Float[Array, "features size"]:
    """Normal rows; orthogonal within blocks of `size` if asked for (section 2.4).

    The draw depends on the step alone, so that it is the same in training and decoding; the paper
    draws per layer, here the layers share one.
    """
    features = kernel.features or 1
    key = jax.random.fold_in(jax.random.key(0), step // kernel.redraw if kernel.redraw else 0)
    rows_key, length_key = jax.random.split(key)
    if not kernel.orthogonal:
        return jax.random.normal(rows_key, (features, size))
    blocks = -(-features // size)
    q, r = jnp.linalg.qr(jax.random.normal(rows_key, (blocks, size, size)))
    # LAPACK's first column always points into the same half space: R's signs make Q uniform
    q = q * jnp.sign(jnp.diagonal(r, axis1=1, axis2=2))[:, None]
    rows = q.swapaxes(1, 2).reshape(-1, size)[:features]
    lengths = jnp.linalg.norm(jax.random.normal(length_key, (features, size)), axis=-1)
    return rows * lengths[:, None]


def feature_map(x, rows, stabilise: bool):
    r"""$\exp(w x - |x|^2 / 2) / \sqrt{m}$ (eq. 5).

    A query may be divided by its largest feature, which cancels in the quotient; a key may not.
    """
    power = x @ rows.T - (x**2).sum(-1, keepdims=True) / 2
    if stabilise:
        power = power - jax.lax.stop_gradient(power.max(-1, keepdims=True))
    return jnp.exp(power) * rows.shape[0] ** -0.5


class PerformerMixer(nn.Module):
    """$o_t = \\phi(q_t) \\sum_{s \\le t} \\phi(k_s)^\\top v_s / \\phi(q_t) \\sum \\phi(k_s)$."""

    mixer: Attention
    arch: Arch
    dtype: jnp.dtype
    gain: float = 1.0

    @nn.compact
    def __call__(self, x, frame: Frame, state: State | None = None):
        mixer, softmax = self.mixer, self.mixer.softmax
        assert softmax is not None
        assert softmax.kernel is not None
        heads, size = sizes.heads_of(mixer, self.arch.d_model)
        kv_heads = mixer.kv_heads or heads
        cond, asked = self.arch.cond, source(x, frame, self.dtype)
        q = linear("q", heads * size, self.dtype)(x)
        q = split_heads(modulated(cond, "proj_q", q, frame, read=x, heads=heads), heads)
        k = split_heads(linear("k", kv_heads * size, self.dtype)(asked), kv_heads)
        v = linear("v", kv_heads * size, self.dtype, self.gain)(asked)
        v = modulated(cond, "proj_v", v, frame, read=asked, heads=kv_heads)
        v = split_heads(v, kv_heads)
        if softmax.qk_norm != "none":
            make = nn.RMSNorm if softmax.qk_norm == "rms" else nn.LayerNorm
            q = make(epsilon=1e-6, dtype=self.dtype, name="q_norm")(q)
            k = make(epsilon=1e-6, dtype=self.dtype, name="k_norm")(k)
        if frame.turn is not None:
            q, k = positions.rotate(q, frame.turn[0]), positions.rotate(k, frame.turn[1])
        k, v = (jnp.repeat(t, heads // kv_heads, axis=1) for t in (k, v))
        rows = draw(softmax.kernel, size, frame.step)
        # the softmax of q k / sqrt(d) is that of vectors divided by the fourth root of d
        scale = jnp.sqrt(frame.knobs.get("scale", size**-0.5))
        q, k = (t.astype(jnp.float32) * scale for t in (q, k))
        v = jnp.concatenate([v, jnp.ones((*v.shape[:-1], 1), v.dtype)], axis=-1)
        sums, state = decayed(
            feature_map(q, rows, True),
            feature_map(k, rows, False),
            v.astype(jnp.float32),
            jnp.zeros((1, 1, x.shape[1])),
            state,
        )
        out = (sums[..., :-1] / (sums[..., -1:] + 1e-9)).astype(self.dtype)
        y = linear("out", self.arch.d_model, self.dtype, self.gain)(join_heads(out))
        if mixer.value_glu:
            y = y * nn.sigmoid(linear("glu", self.arch.d_model, self.dtype)(x))
        return y, state
