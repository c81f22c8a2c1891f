"""Linear maps and norms that every block is made of."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from forge_jax.arch.schema import NormKind
from forge_jax.models.dense import matmul


class Linear(nn.Module):
    """x W, without bias; trained through `matmul`, which takes reverse mode only."""

    width: int
    dtype: jnp.dtype
    gain: float = 1.0  # of the usual (LeCun) initial deviation

    @nn.compact
    def __call__(self, x: Float[Array, "... features"]) -> Float[Array, "... width"]:
        init = nn.initializers.variance_scaling(self.gain**2, "fan_in", "truncated_normal")
        kernel: Any = self.param("kernel", init, (x.shape[-1], self.width))
        return matmul(x.astype(self.dtype), kernel.astype(self.dtype))


def linear(name: str, width: int, dtype: jnp.dtype, gain: float = 1.0) -> Linear:
    """A linear map without bias; `gain` multiplies the usual (LeCun) initial deviation."""
    return Linear(width, dtype, gain, name=name)


class ScaleNorm(nn.Module):
    """g x / |x| with one learned g, at first sqrt(features) (Nguyen & Salazar 2019, eq. 5)."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "... features"]) -> Float[Array, "... features"]:
        gain = self.param("scale", nn.initializers.constant(x.shape[-1] ** 0.5), ())
        wide = x.astype(jnp.float32)
        length = jnp.sqrt((wide**2).sum(-1, keepdims=True) + 1e-6)
        return (gain * wide / length).astype(self.dtype)


def make_norm(kind: NormKind, name: str, dtype: jnp.dtype) -> nn.Module:
    """LayerNorm, RMSNorm or ScaleNorm."""
    if kind == "LayerNorm":
        # the fast variance, E[x^2] - E[x]^2, cancels where the mean is large
        return nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, dtype=dtype, name=name)
    if kind == "RMSNorm":
        return nn.RMSNorm(epsilon=1e-6, dtype=dtype, name=name)
    return ScaleNorm(dtype, name=name)
