"""Linear attention with decay: one recurrence behind Retention, the state space and Performer."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

State = Float[Array, "batch heads n m"]


def decayed(
    q: Float[Array, "batch #heads time n"],
    k: Float[Array, "batch #heads time n"],
    v: Float[Array, "batch heads time m"],
    log_decay: Float[Array, "#batch #heads time"],
    state: State | None = None,
    chunk: int | None = None,
) -> tuple[Float[Array, "batch heads time m"], State]:
    r"""$o_t = q_t S_t$ with $S_t = a_t S_{t-1} + k_t^\top v_t$, $\log a_t \le 0$.

    In chunks: within one, $o = (q k^\top \odot e^{c_i - c_j}) v$ with c the running sum of
    `log_decay`; between them the state is carried (Sun et al. 2023, eqs. 5-7; Dao & Gu 2024,
    section 6). One chunk (None) is the parallel form, chunks of one token the recurrent one: the
    results are equal. Sums and state are float32.
    """
    batch, heads, time, m = v.shape
    n, dtype = q.shape[-1], v.dtype
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    log_decay = jnp.broadcast_to(log_decay.astype(jnp.float32), (*v.shape[:2], time))
    before = jnp.zeros((batch, heads, n, m), jnp.float32) if state is None else state
    size = min(chunk or time, time)
    parts = -(-time // size)

    def chunks(x):
        # zeros to the end of the last chunk: a key of zero and a decay of one leave the state
        x = jnp.pad(x, [(0, 0), (0, 0), (0, parts * size - time)] + [(0, 0)] * (x.ndim - 3))
        return jnp.moveaxis(x.reshape(*x.shape[:2], parts, size, *x.shape[3:]), 2, 0)

    pieces = (chunks(q), chunks(k), chunks(v), chunks(log_decay))
    if parts == 1:
        last, out = _chunk(before, jax.tree.map(lambda x: x[0], pieces))
        return out.astype(dtype), last
    last, out = jax.lax.scan(_chunk, before, pieces)
    out = jnp.moveaxis(out, 0, 2).reshape(batch, heads, parts * size, m)
    return out[:, :, :time].astype(dtype), last


def kept_sums(
    x: Float[Array, "batch time width"],
    keep: Float[Array, "#batch time #width"],
    before: Float[Array, "batch width"] | None,
) -> Float[Array, "batch time width"]:
    """$r_t = a_t r_{t-1} + x_t$ with a_t what is kept, from `before` (zero)."""

    def joined(one, two):
        return one[0] * two[0], two[0] * one[1] + two[1]

    keep, out = jax.lax.associative_scan(joined, (keep, x), axis=1)
    return out if before is None else out + keep * before[:, None]


def _chunk(state, piece):
    q, k, v, log_decay = piece
    c = jnp.cumsum(log_decay, axis=-1)
    causal = jnp.tril(jnp.ones((c.shape[-1],) * 2, bool))
    # masked before the exponential: above the diagonal it could overflow
    weight = jnp.exp(jnp.where(causal, c[..., :, None] - c[..., None, :], -jnp.inf))
    inside = (q @ k.swapaxes(-1, -2) * weight) @ v
    before = (q * jnp.exp(c)[..., None]) @ state
    kept = (k * jnp.exp(c[..., -1:] - c)[..., None]).swapaxes(-1, -2) @ v
    return jnp.exp(c[..., -1])[..., None, None] * state + kept, inside + before
