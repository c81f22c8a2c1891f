"""Policy-gradient losses of one sampled response; the caller vmaps over responses."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def log_probability(
    logits: Float[Array, "*rows time vocab"], tokens: Int[Array, "*rows time"]
) -> Float[Array, "*rows time"]:
    """Log probability of each token, in nats."""
    logp = jax.nn.log_softmax(logits, axis=-1)
    return jnp.take_along_axis(logp, tokens[..., None], axis=-1)[..., 0]


def kl_to_reference(
    logits: Float[Array, "*rows time vocab"], reference: Float[Array, "*rows time vocab"]
) -> Float[Array, "*rows time"]:
    r"""KL(policy || reference) of every next-token distribution, in nats.

    $$ \sum_v \pi(v) (\log \pi(v) - \log \pi_0(v)) $$

    Exact, over the whole vocabulary; gradients flow into both arguments. The guide leaves the
    direction open; the published code computes KL(reference || policy).
    """
    logp, logq = jax.nn.log_softmax(logits, axis=-1), jax.nn.log_softmax(reference, axis=-1)
    return jnp.sum(jnp.exp(logp) * (logp - logq), axis=-1)


def leave_one_out(reward: Float[Array, "*prompts samples"]) -> Float[Array, "*prompts samples"]:
    """Each reward less the mean of the prompt's other samples (RLOO, Kool et al. 2019).

    Unbiased, since a sample is no part of its own baseline. One sample has no others: its reward.
    """
    samples = reward.shape[-1]
    if samples == 1:
        return reward
    others = (reward.sum(axis=-1, keepdims=True) - reward) / (samples - 1)
    return reward - others


def reinforce_loss(
    logp_t: Float[Array, " time"],
    kl_t: Float[Array, " time"],
    mask_t: Bool[Array, " time"],
    advantage: Float[Array, ""],
    *,
    kl_coefficient: float,
) -> Float[Array, ""]:
    r"""The guide's loss of one response: $-r \sum_t \log \pi(a_t) + c \sum_t KL_t$, in nats.

    Sums over the response's tokens, as in Transformer-Squared (arXiv 2501.06252, eq. 3): long
    responses weigh more. `advantage` is data: no gradient flows through it.
    """
    policy = -jax.lax.stop_gradient(advantage) * jnp.sum(logp_t, where=mask_t)
    return policy + kl_coefficient * jnp.sum(kl_t, where=mask_t)
