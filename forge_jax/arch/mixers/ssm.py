"""Selective state space with one decay per head (Mamba-2, Dao & Gu 2024, arXiv 2405.21060)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from forge_jax.arch import sizes
from forge_jax.arch.decay import State, decayed
from forge_jax.arch.layers import linear
from forge_jax.arch.mixers.frame import Frame, source
from forge_jax.arch.mixing import SSM
from forge_jax.arch.schema import Arch
from forge_jax.models.attention import join_heads, split_heads

STATES = 16


def init_state(mixer: SSM, arch: Arch, batch: int, length: int, dtype: jnp.dtype) -> State:
    """A state of zeros."""
    del length, dtype
    heads, size = sizes.heads_of(mixer, arch.d_model)
    return jnp.zeros((batch, heads, mixer.d_state or STATES, size), jnp.float32)


def start_decay(key, shape):
    """log A with A between 1 and 16, uniformly, as in the paper's code."""
    return jnp.log(jax.random.uniform(key, shape, minval=1.0, maxval=16.0))


def start_step(key, shape):
    """The inverse softplus of steps between 0.001 and 0.1, uniformly in their logarithm."""
    low, high = jnp.log(1e-3), jnp.log(1e-1)
    step = jnp.exp(jax.random.uniform(key, shape, minval=low, maxval=high))
    return step + jnp.log(-jnp.expm1(-step))


class SSMMixer(nn.Module):
    r"""$h_t = e^{-\Delta_t A} h_{t-1} + \Delta_t B_t x_t$, $y_t = C_t h_t + D x_t$.

    $\Delta_t = \mathrm{softplus}(W x_t + b)$ per head; B and C depend on the token and are shared
    by the heads. y is normed, gated by silu(z) and mapped back. Deviation: no short convolution
    before the recurrence.
    """

    mixer: SSM
    arch: Arch
    dtype: jnp.dtype
    gain: float = 1.0

    @nn.compact
    def __call__(self, x, frame: Frame, state: State | None = None):
        heads, size = sizes.heads_of(self.mixer, self.arch.d_model)
        inner, n = heads * size, self.mixer.d_state or STATES
        asked = source(x, frame, self.dtype)
        u = split_heads(linear("u", inner, self.dtype, self.gain)(asked), heads)
        gate = nn.silu(linear("gate", inner, self.dtype)(x))
        b, c = linear("b", n, self.dtype)(asked)[:, None], linear("c", n, self.dtype)(x)[:, None]
        delta = linear("step", heads, self.dtype)(asked).astype(jnp.float32)
        delta = nn.softplus(delta + self.param("step_bias", start_step, (heads,))).swapaxes(1, 2)
        decay = -jnp.exp(self.param("log_decay", start_decay, (heads,)))
        chunk = 1 if self.mixer.mode == "recurrent" else self.mixer.chunk
        fed = u.astype(jnp.float32) * delta[..., None]
        y, state = decayed(c, b, fed, delta * decay[:, None], state, chunk)
        skip = self.param("skip", nn.initializers.ones, (heads,))
        y = join_heads(y + skip[:, None, None] * u)
        y = nn.RMSNorm(epsilon=1e-6, dtype=self.dtype, name="norm")(y * gate)
        return linear("out", self.arch.d_model, self.dtype, self.gain)(y), state
