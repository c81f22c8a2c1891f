"""Gated depthwise causal convolution."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from forge_jax.arch.layers import linear
from forge_jax.arch.mixers.frame import Frame, source
from forge_jax.arch.mixing import LongConv
from forge_jax.arch.schema import Arch

TAPS = 16
# Up to so many taps as a sum of shifted tokens: XLA's grouped convolution takes 8 to 30 times as
# long on a CPU, forward and backward.
UNROLLED = 64
State = Float[Array, "batch taps_less_one width"]


def init_state(mixer: LongConv, arch: Arch, batch: int, length: int, dtype: jnp.dtype) -> State:
    """Zeros, which stand before the first token."""
    del length
    return jnp.zeros((batch, (mixer.kernel_len or TAPS) - 1, arch.d_model), dtype)


def filtered(
    past: Float[Array, "batch time+taps-1 width"], kernel: Float[Array, "taps 1 width"]
) -> Float[Array, "batch time width"]:
    """Every feature through its own filter, the first tap on the last token."""
    taps, time = kernel.shape[0], past.shape[1] - kernel.shape[0] + 1
    if taps <= UNROLLED:
        starts = [taps - 1 - s for s in range(taps)]
        shifted = [jax.lax.slice_in_dim(past, at, at + time, axis=1) for at in starts]
        return sum(w * x for w, x in zip(kernel, shifted, strict=True))  # pyright: ignore
    return jax.lax.conv_general_dilated(
        *(past, kernel[::-1], (1,), "VALID"),
        dimension_numbers=("NWC", "WIO", "NWC"),
        feature_group_count=past.shape[2],
    )


class LongConvMixer(nn.Module):
    r"""$y_t = W_o (\mathrm{silu}(W_g x_t) \odot \sum_{s < K} w_s \odot W_v x_{t-s})$.

    The reach is the number of taps K: an explicit filter, not Hyena's implicit one over all of
    the past (Poli et al. 2023).
    """

    mixer: LongConv
    arch: Arch
    dtype: jnp.dtype
    gain: float = 1.0

    @nn.compact
    def __call__(self, x, frame: Frame, state: State | None = None):
        width, taps = self.arch.d_model, self.mixer.kernel_len or TAPS
        v = linear("v", width, self.dtype, self.gain)(source(x, frame, self.dtype))
        gate = nn.silu(linear("gate", width, self.dtype)(x))
        init = nn.initializers.normal(taps**-0.5)
        kernel = self.param("kernel", init, (taps, 1, width)).astype(self.dtype)
        empty = jnp.zeros((x.shape[0], taps - 1, width), v.dtype)
        past = jnp.concatenate([empty if state is None else state.astype(v.dtype), v], axis=1)
        y = linear("out", width, self.dtype, self.gain)(gate * filtered(past, kernel))
        return y, None if state is None else past[:, past.shape[1] - (taps - 1) :]
