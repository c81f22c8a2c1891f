"""Advantages: how much better a token, or a whole response, did than was to be expected."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float


class Advantage(NamedTuple):
    """What generalized advantage estimation makes of one response; zero at masked steps."""

    advantage_t: Float[Array, " time"]
    return_t: Float[Array, " time"]  # advantage + value: what the value head is fitted to


def gae(
    reward_t: Float[Array, " time"],
    value_t: Float[Array, " time"],
    mask_t: Bool[Array, " time"],
    *,
    discount: float = 1.0,
    lambda_: float = 0.95,
    bootstrap: ArrayLike = 0.0,
) -> Advantage:
    r"""Generalized advantages of one response (Schulman et al. 2016, arXiv 1506.02438, eq. 11-16).

    $$ \delta_t = r_t + \gamma V(s_{t+1}) - V(s_t), \qquad
       A_t = \sum_l (\gamma \lambda)^l \delta_{t+l} $$

    The response ends with its last unmasked token: a stop token leads to a state of value 0. Masked
    steps are no steps: what stands there, NaN included, reaches nothing, and padding in front or
    between counts no discount either.

    Args:
        reward_t: what the token at t earned.
        value_t: the value of the state in which the token at t was chosen.
        mask_t: True up to and with the stop token.
        discount: gamma, in [0, 1]. 1, trl's default, prefers no length.
        lambda_: 0 is the one-step error, 1 the return less the value.
        bootstrap: value of the state after the last token, for a response that was cut off there.

    Raises:
        ValueError: `discount` or `lambda_` is no number in [0, 1].
    """
    if not (0 <= discount <= 1 and 0 <= lambda_ <= 1):
        raise ValueError(f"Wanted {discount=} and {lambda_=} to lie in [0, 1].")
    reward_t, value_t = (jnp.where(mask_t, x, 0.0) for x in (reward_t, value_t))

    def back(later, now):
        value_tp1, advantage_tp1 = later
        reward, value, live = now
        advantage = reward + discount * value_tp1 - value + discount * lambda_ * advantage_tp1
        kept = jnp.where(live, value, value_tp1), jnp.where(live, advantage, advantage_tp1)
        return kept, jnp.where(live, advantage, 0.0)

    end = (jnp.asarray(bootstrap, value_t.dtype), jnp.zeros((), value_t.dtype))
    _, advantage_t = jax.lax.scan(back, end, (reward_t, value_t, mask_t), reverse=True)
    return Advantage(advantage_t, advantage_t + value_t)


def group_advantage(
    reward: Float[Array, "*prompts samples"], *, epsilon: float = 1e-4
) -> Float[Array, "*prompts samples"]:
    r"""Rewards in standard deviations from their prompt's mean (GRPO, arXiv 2402.03300, 4.1.2).

    $$ A_i = (r_i - \mathrm{mean}(r)) / (\mathrm{std}(r) + \epsilon) $$

    The standard deviation is that of the group itself (divided by its size); trl divides by the
    size less one. A group of equal rewards teaches nothing: its advantages are zero.
    """
    centred = reward - reward.mean(axis=-1, keepdims=True)
    return centred / (reward.std(axis=-1, keepdims=True) + epsilon)


def whiten(
    advantage: Float[Array, "batch time"], mask: Bool[Array, "batch time"], *, epsilon: float = 1e-8
) -> Float[Array, "batch time"]:
    """Shift and scale to mean 0 and variance 1 over all unmasked tokens; zero at the others.

    The usual step between `gae` and `ppo_loss`: the size of the update then does not depend on the
    scale of the rewards.
    """
    count = jnp.maximum(mask.sum(), 1)
    centred = jnp.where(mask, advantage - jnp.sum(advantage, where=mask) / count, 0.0)
    return centred * jax.lax.rsqrt(jnp.sum(centred**2) / count + epsilon)
