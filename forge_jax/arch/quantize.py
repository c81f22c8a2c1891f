"""Keys and values in fewer bits: int8, fp8 and NF4, each with its scale."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

# Quantiles of the normal distribution, scaled to [-1, 1] (Dettmers et al. 2023, appendix E).
NF4 = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)
BLOCK = 64  # features that share a scale under NF4
LARGEST = {"int8": 127.0, "fp8": 448.0, "nf4": 1.0}


class Packed(NamedTuple):
    """Codes and what to multiply them by."""

    codes: Array  # (..., dim), or (..., dim / 2) bytes of two NF4 codes
    scale: Float[Array, "... blocks 1"]


def block_of(dim: int, quant: str) -> int:
    """Features that share a scale: the head, or under NF4 its largest divisor up to 64."""
    if quant != "nf4":
        return dim
    return max(n for n in range(1, min(dim, BLOCK) + 1) if dim % n == 0)


def encode(x: Float[Array, "... dim"], quant: str) -> Array | Packed:
    """Quantise the last axis; "none" returns x."""
    if quant == "none":
        return x
    blocks = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, block_of(x.shape[-1], quant))
    scale = jnp.maximum(jnp.abs(blocks).max(-1, keepdims=True), 1e-12) / LARGEST[quant]
    unit = (blocks / scale).reshape(x.shape)
    if quant == "int8":
        return Packed(jnp.round(unit).astype(jnp.int8), scale)
    if quant == "fp8":
        return Packed(unit.astype(jnp.float8_e4m3fn), scale)
    codes = jnp.searchsorted((NF4[1:] + NF4[:-1]) / 2, unit).astype(jnp.uint8)
    if x.shape[-1] % 2 == 0:
        codes = codes[..., ::2] * 16 + codes[..., 1::2]
    return Packed(codes, scale)


def decode(
    packed: Array | Packed, dim: int, quant: str, dtype: jnp.dtype
) -> Float[Array, "... dim"]:
    """The values that `encode` kept."""
    if not isinstance(packed, Packed):
        return packed.astype(dtype)
    codes = packed.codes
    if quant == "nf4":
        if dim % 2 == 0:
            codes = jnp.stack([codes // 16, codes % 16], axis=-1).reshape(*codes.shape[:-1], dim)
        values = jnp.asarray(NF4)[codes]
    else:
        values = codes.astype(jnp.float32)
    blocks = values.reshape(*values.shape[:-1], -1, block_of(dim, quant))
    return (blocks * packed.scale).reshape(values.shape).astype(dtype)


def through(x: Float[Array, "... dim"], quant: str) -> Float[Array, "... dim"]:
    """Values as the cache returns them; the gradient passes as if nothing had happened."""
    if quant == "none":
        return x
    kept = decode(encode(x, quant), x.shape[-1], quant, x.dtype)
    return x + jax.lax.stop_gradient(kept - x)


def bytes_of(dim: int, quant: str, width: int) -> float:
    """Bytes of one head's vector; `width` bytes a number where nothing is quantised."""
    if quant == "none":
        return dim * width
    codes = dim / 2 if quant == "nf4" and dim % 2 == 0 else dim
    return codes + 4 * dim / block_of(dim, quant)
