"""Linear recurrences along the first axis, in logarithmic depth."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def linear_recurrence(
    keep: Float[Array, "time ..."], add: Float[Array, "time ..."], start: Float[Array, "..."]
) -> Float[Array, "time ..."]:
    r"""All states $x_t = k_t x_{t-1} + a_t$ with $x_{-1}$ = `start`; shapes broadcast."""
    add = add.at[0].add(keep[0] * start)

    def combine(left, right):
        return left[0] * right[0], right[0] * left[1] + right[1]

    keep = jnp.broadcast_to(keep, add.shape)
    return jax.lax.associative_scan(combine, (keep, add))[1]


def before(
    states: Float[Array, "time ..."], start: Float[Array, "..."]
) -> Float[Array, "time ..."]:
    """The state that each step found: `start`, then all but the last of `states`."""
    return jnp.concatenate([jnp.broadcast_to(start, states.shape[1:])[None], states[:-1]])
