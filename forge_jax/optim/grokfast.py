"""Grokfast: amplify the slow components of the gradient (Lee et al., arXiv 2405.20233)."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax


class GrokfastEmaState(NamedTuple):
    """Running mean of the gradient."""

    first: jax.Array  # bool scalar, no gradient seen yet
    ema: optax.Updates  # same structure and shapes as the params, float32


def grokfast_ema(
    alpha: float = 0.98, lamb: float = 0.05, init: Literal["zeros", "first_gradient"] = "zeros"
) -> optax.GradientTransformationExtraArgs:
    r"""Add `lamb` times an exponential moving average of the gradient to it.

    $$ h_t = \alpha h_{t-1} + (1-\alpha) g_t, \qquad u_t = g_t + \lambda h_t $$

    A constant gradient ends up multiplied by 1 + lamb, one that alternates in sign hardly at all.

    Args:
        alpha: decay of the average, in [0, 1); its time constant is 1 / (1 - alpha) steps.
        lamb: weight of the average, at least 0; 0 leaves the gradient alone.
        init: "zeros" starts at $h_0 = 0$; "first_gradient" at $h_1 = g_1$, as the paper's released
            code does. The two differ for about 1 / (1 - alpha) steps.

    Raises:
        ValueError: an argument is out of its range.
    """
    if not 0 <= alpha < 1:
        raise ValueError(f"`alpha` must lie in [0, 1), got {alpha}.")
    if not lamb >= 0:
        raise ValueError(f"`lamb` must be at least 0, got {lamb}.")
    if init not in ("zeros", "first_gradient"):
        raise ValueError(f"`init` must be 'zeros' or 'first_gradient', got {init!r}.")

    def init_fn(params):
        ema = jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), params)
        return GrokfastEmaState(jnp.ones((), bool), ema)

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        decay = jnp.where(state.first, 0.0, alpha) if init == "first_gradient" else alpha
        ema = jax.tree.map(
            lambda h, g: decay * h + (1 - decay) * g.astype(jnp.float32), state.ema, updates
        )
        updates = jax.tree.map(lambda g, h: (g + lamb * h).astype(g.dtype), updates, ema)
        return updates, GrokfastEmaState(jnp.zeros((), bool), ema)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
