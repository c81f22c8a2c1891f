"""Multi-scale retention (RetNet, Sun et al. 2023, arXiv 2307.08621)."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from forge_jax.arch import sizes
from forge_jax.arch.conditioning import modulated
from forge_jax.arch.decay import State, decayed
from forge_jax.arch.layers import linear
from forge_jax.arch.mixers.frame import Frame, source
from forge_jax.arch.mixing import Retention
from forge_jax.arch.schema import Arch
from forge_jax.models.attention import join_heads, split_heads


def init_state(mixer: Retention, arch: Arch, batch: int, length: int, dtype: jnp.dtype) -> State:
    """Sums over no tokens."""
    del length, dtype
    heads, size = sizes.heads_of(mixer, arch.d_model)
    return jnp.zeros((batch, heads, size, size), jnp.float32)


class RetentionMixer(nn.Module):
    r"""$S_t = \gamma_h S_{t-1} + k_t^\top v_t$, $o_t = q_t S_t$, $\gamma_h = 1 - 2^{-5-h}$ (eq. 8).

    Each head's output is divided by its root mean square, gated by swish(W x) and mapped back.
    Deviations: values are as wide as keys (the paper doubles them), and nothing is rotated: the
    decay alone carries positions.
    """

    mixer: Retention
    arch: Arch
    dtype: jnp.dtype
    gain: float = 1.0

    @nn.compact
    def __call__(self, x, frame: Frame, state: State | None = None):
        heads, size = sizes.heads_of(self.mixer, self.arch.d_model)
        width, cond = heads * size, self.arch.cond
        q = linear("q", width, self.dtype)(x)
        q = split_heads(modulated(cond, "proj_q", q, frame, read=x, heads=heads), heads)
        asked = source(x, frame, self.dtype)
        k = split_heads(linear("k", width, self.dtype)(asked), heads) * size**-0.5
        v = linear("v", width, self.dtype, self.gain)(asked)
        v = split_heads(modulated(cond, "proj_v", v, frame, read=asked, heads=heads), heads)
        decay = np.log1p(-(2.0 ** (-5 - np.arange(heads)))).astype(np.float32)
        log_decay = jnp.broadcast_to(decay[:, None], (1, heads, x.shape[1]))
        chunk = 1 if self.mixer.mode == "recurrent" else self.mixer.chunk
        out, state = decayed(q, k, v, log_decay, state, chunk)
        out = nn.RMSNorm(epsilon=1e-6, use_scale=False, dtype=self.dtype)(out)
        gate = nn.silu(linear("gate", width, self.dtype)(x))
        out = linear("out", self.arch.d_model, self.dtype, self.gain)(gate * join_heads(out))
        return out, state
