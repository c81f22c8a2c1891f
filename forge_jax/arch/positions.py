"""Where a token stands: rotary angles with their scalings, xPos, ALiBi, relative buckets."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from forge_jax.arch.structure import Pos, Scaling

BUCKETS, FAR = 32, 128  # T5's relative buckets and the distance at which they end


def _numpy_or_jax(*values: Any) -> Any:
    # Angles of plain numbers become constants: cosines inside a decoding loop send XLA's CPU
    # compiler into minutes of analysis (docs/decisions.md, 11).
    return np if all(isinstance(v, int | float | np.ndarray) for v in values) else jnp


def frequencies(
    dims: int, theta: Any, scaling: Scaling | None, factor: Any, context: int
) -> Float[Array, " half"]:
    r"""Radians per position, $\theta^{-2i/d}$, of the d / 2 turned pairs, scaled by `factor` s.

    linear: divided by s (Chen et al. 2023). ntk: $\theta s^{d/(d-2)}$ in place of theta. yarn:
    a pair that turns more than 32 times in `context` tokens is kept, one that turns less than once
    is divided by s, between them a ramp (Peng et al. 2023, eqs. 17-18). longrope: divided by
    $1 + (s^\alpha - 1)(2i/d)^\beta$, this project's own closed form of LongRoPE's searched factors.
    """
    xp = _numpy_or_jax(theta, factor)
    i = np.arange(dims // 2, dtype=np.float32)
    if scaling is not None and scaling.type == "ntk":
        theta = theta * factor ** (dims / (dims - 2))
    base = xp.asarray(theta, np.float32) ** (-2 * i / dims)
    if scaling is None or scaling.type == "ntk":
        return base
    if scaling.type == "linear":
        return base / factor
    if scaling.type == "yarn":
        turns = context * base / (2 * np.pi)
        kept = xp.clip((turns - 1) / (32 - 1), 0, 1)
        return kept * base + (1 - kept) * base / factor
    shape = scaling.longrope
    assert shape is not None  # rules.problems asks for it
    return base / (1 + (factor**shape.alpha - 1) * (2 * i / dims) ** shape.beta)


def turns(
    pos: Pos, positions: Int[Array, " time"], dims: int, knobs: dict[str, Any], context: int
) -> Float[Array, "2 2 time half"]:
    r"""Cosine and sine for queries, then for keys, amplitudes included.

    YaRN multiplies both by sqrt of its temperature, $0.1 \ln s + 1$ (Peng et al. 2023, eq. 22).
    xPos multiplies the query of pair i at position n by $\zeta_i^{n/512}$ and the key by its
    inverse, $\zeta_i = (2i/d + 0.4) / 1.4$ (Sun et al. 2022, section 3.2).
    """
    scaling = pos.rope.scaling if pos.rope else None
    theta, factor = knobs.get("theta", 10000.0), knobs.get("factor", 1.0)
    xp = _numpy_or_jax(theta, factor)
    # a table of all positions, read by gather: see `_numpy_or_jax`
    index = np.arange(context, dtype=np.float32)[:, None]
    angles = index * frequencies(dims, theta, scaling, factor, context)
    gain = 1.0
    if scaling is not None and scaling.type == "yarn":
        gain = 0.1 * xp.log(xp.asarray(factor, np.float32)) + 1
    table = xp.stack([xp.cos(angles), xp.sin(angles)]) * gain
    if pos.kind == "xpos":
        zeta = (np.arange(dims // 2, dtype=np.float32) * 2 / dims + 0.4) / 1.4
        power = zeta ** (index / 512)
        table = xp.stack([table * power, table / power])
    else:
        table = xp.stack([table, table])
    return jnp.asarray(table, jnp.float32)[:, :, positions]


def rotate(
    x: Float[Array, "batch heads time dim"], turn: Float[Array, "2 time half"]
) -> Float[Array, "batch heads time dim"]:
    """Turn feature i with feature i + half, the others stay (Su et al. 2021, eq. 34).

    The paper pairs neighbours; the pairing here is that of the Llama code.
    """
    half = turn.shape[-1]
    cos, sin = turn.astype(x.dtype)
    x1, x2, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest], axis=-1)


def alibi_slopes(heads: int) -> Float[np.ndarray, " heads"]:
    """Slopes 2^(-8h/H) for H a power of two (Press et al. 2022, section 3).

    For other H those of the power below, then every second slope of the power above, as in the
    paper's code.
    """

    def of_power(n: int) -> list[float]:
        return [2.0 ** (-8 * (h + 1) / n) for h in range(n)]

    power = 2 ** int(np.log2(heads))
    return np.array(of_power(power) + of_power(2 * power)[::2][: heads - power], np.float32)


def buckets(distance: Int[Array, "queries keys"]) -> Int[Array, "queries keys"]:
    """T5's causal buckets: one per distance below 16, then logarithmic up to 128 (Raffel 2020)."""
    exact = BUCKETS // 2
    distance = jnp.maximum(distance, 0)
    scale = (BUCKETS - exact) / np.log(FAR / exact)
    far = exact + (jnp.log(jnp.maximum(distance, 1) / exact) * scale).astype(jnp.int32)
    return jnp.where(distance < exact, distance, jnp.minimum(far, BUCKETS - 1))
