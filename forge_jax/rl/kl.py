"""The divergence from the reference policy: as reward, estimated from samples, held at a target."""

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float


def kl_estimate(
    logp: Float[Array, "*rows time"], logp_reference: Float[Array, "*rows time"]
) -> Float[Array, "*rows time"]:
    r"""Estimate KL(policy || reference), nats, from drawn tokens (GRPO, arXiv 2402.03300, eq. 4).

    $$ \pi_0 / \pi - \log(\pi_0 / \pi) - 1 \ge 0 $$

    Unbiased. `kl_to_reference` is exact where the logits are at hand; its gradient is the KL's,
    the gradient of this estimate is not (it lacks the part through the sampling).
    """
    log_ratio = logp_reference - logp
    return jnp.expm1(log_ratio) - log_ratio


def kl_reward(
    reward: Float[Array, ""],
    logp_t: Float[Array, " time"],
    logp_reference_t: Float[Array, " time"],
    mask_t: Bool[Array, " time"],
    *,
    coefficient: ArrayLike,
) -> Float[Array, " time"]:
    r"""Every token's reward with the KL in it (Ziegler et al. 2019, arXiv 1909.08593, eq. 2).

    $$ r_t = -c (\log \pi(a_t) - \log \pi_0(a_t)) + [t = T] R $$

    The response's own reward R comes with its last unmasked token; masked tokens get zero.
    """
    time = jnp.arange(mask_t.shape[0])
    last = jnp.max(jnp.where(mask_t, time, -1))
    penalty = jnp.where(mask_t, -jnp.asarray(coefficient) * (logp_t - logp_reference_t), 0.0)
    return penalty + jnp.where(time == last, reward, 0.0)


def adapt_kl(
    coefficient: Float[Array, "*experts"],
    kl: Float[Array, "*experts"],
    *,
    target: float,
    rate: float = 0.1,
) -> Float[Array, "*experts"]:
    r"""The next coefficient of the KL, that holds it near `target` (arXiv 1909.08593, section 2.2).

    $$ e = \mathrm{clip}(KL / target - 1, -0.2, 0.2), \qquad c \leftarrow c (1 + rate \cdot e) $$

    A measured KL that is not finite leaves the coefficient as it is. A coefficient of 0 stays 0.

    Raises:
        ValueError: `target` or `rate` is not positive.
    """
    if not (target > 0 and rate > 0):
        raise ValueError(f"Wanted {target=} and {rate=} to be positive.")
    error = jnp.clip(kl / target - 1.0, -0.2, 0.2)
    return jnp.where(jnp.isfinite(kl), coefficient * (1.0 + rate * error), coefficient)
