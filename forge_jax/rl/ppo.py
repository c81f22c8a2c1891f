"""Proximal policy optimization: several updates on the same responses, none of them far."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int

Weight = Bool[Array, "batch time"] | Float[Array, "batch time"]
"""how much each token counts: a mask, or `equal_responses` of one"""


class Values(NamedTuple):
    """What the clipped value loss needs."""

    value: Float[Array, "batch time"]
    value_old: Float[Array, "batch time"]  # of the value head that the advantages came from
    returns: Float[Array, "batch time"]


def equal_responses(mask: Bool[Array, "batch time"]) -> Float[Array, "batch time"]:
    """Weights with which every response counts the same, whatever its length.

    As in GRPO (arXiv 2402.03300, eq. 3). With the mask itself every token counts the same.
    """
    return mask / jnp.maximum(mask.sum(axis=-1, keepdims=True), 1)


def weighted_mean(x: Float[Array, "batch time"], weight: Weight) -> Float[Array, ""]:
    """Mean of what has a weight; what has none may be NaN. Zero if nothing has."""
    total = jnp.sum(weight)
    kept = jnp.where(weight > 0, x, 0.0)
    return jnp.sum(weight * kept) / jnp.where(total > 0, total, 1)


def ppo_loss(
    logp: Float[Array, "batch time"],
    logp_old: Float[Array, "batch time"],
    advantage: Float[Array, "batch time"],
    mask: Weight,
    *,
    clip: float = 0.2,
    values: Values | None = None,
    value_clip: float = 0.2,
    value_coefficient: float = 0.1,
    entropy: Float[Array, "batch time"] | None = None,
    entropy_coefficient: float = 0.0,
    kl: Float[Array, "batch time"] | None = None,
    kl_coefficient: ArrayLike = 0.0,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    r"""PPO's loss (Schulman et al. 2017, arXiv 1707.06347, eq. 9), to be minimised.

    $$ L = -\mathrm{mean}\, \min(\rho_t A_t, \mathrm{clip}(\rho_t, 1 - \epsilon, 1 + \epsilon) A_t)
           + c_v L^{VF} - c_s S + c_{kl} KL, \qquad
       \rho_t = \pi(a_t) / \pi_{old}(a_t) $$

    `logp_old`, `advantage` and the old values and returns are data: no gradient flows through them.
    Log probabilities, entropy and KL are in nats. Means are over what `mask` weighs: its True
    tokens, or responses with `equal_responses`, GRPO's loss. Without `values`, `entropy` or `kl`
    that term is absent.

    Args:
        logp: of the tokens that were drawn, under the policy that is trained.
        logp_old: the same under the policy that drew them.
        advantage: of every token, from `gae`, or of its response, from `group_advantage`.
        mask: weight of every token.
        clip: how far the ratio may leave 1 and still earn more.
        values: for the value loss, see `value_loss`.
        value_clip: how far a value may leave the old one and still earn less loss.
        value_coefficient: weight of the value loss; trl's default.
        entropy: of every next-token distribution.
        entropy_coefficient: weight of the entropy, which is rewarded.
        kl: to the reference, of every next-token distribution.
        kl_coefficient: its weight; a number or an array.

    Returns:
        The loss, and scalars: policy_loss, clip_fraction (weight of tokens whose ratio is outside),
        ratio, and value_loss, entropy, kl where they were given.

    Raises:
        ValueError: `clip` or `value_clip` is not positive.
    """
    if not (clip > 0 and value_clip > 0):
        raise ValueError(f"Wanted {clip=} and {value_clip=} to be positive.")
    advantage, logp_old = map(jax.lax.stop_gradient, (advantage, logp_old))
    # a masked token's difference may be inf - inf, whose gradient would be NaN behind any mask
    ratio = jnp.exp(jnp.where(mask > 0, logp - logp_old, 0.0))
    clipped = jnp.clip(ratio, 1 - clip, 1 + clip)
    loss = weighted_mean(-jnp.minimum(ratio * advantage, clipped * advantage), mask)
    metrics = {
        "policy_loss": loss,
        "clip_fraction": weighted_mean((jnp.abs(ratio - 1) > clip).astype(ratio.dtype), mask),
        "ratio": weighted_mean(ratio, mask),
    }
    if values is not None:
        metrics["value_loss"] = value_loss(*values, mask, clip=value_clip)
        loss = loss + value_coefficient * metrics["value_loss"]
    if entropy is not None:
        metrics["entropy"] = weighted_mean(entropy, mask)
        loss = loss - entropy_coefficient * metrics["entropy"]
    if kl is not None:
        metrics["kl"] = weighted_mean(kl, mask)
        loss = loss + kl_coefficient * metrics["kl"]
    return loss, metrics


def value_loss(
    value: Float[Array, "batch time"],
    value_old: Float[Array, "batch time"],
    returns: Float[Array, "batch time"],
    mask: Weight,
    *,
    clip: float = 0.2,
) -> Float[Array, ""]:
    r"""Half the squared error of the value, or of the clipped value where that is larger.

    $$ \tfrac12 \mathrm{mean} \max((V - R)^2, (V' - R)^2), \qquad
       V' = V_{old} + \mathrm{clip}(V - V_{old}, -\epsilon, \epsilon) $$

    The clipping is not in the paper; it is that of its authors' code, and of trl.
    """
    value_old, returns = map(jax.lax.stop_gradient, (value_old, returns))
    value, value_old = (jnp.where(mask > 0, v, 0.0) for v in (value, value_old))
    near = value_old + jnp.clip(value - value_old, -clip, clip)
    return 0.5 * weighted_mean(jnp.maximum((value - returns) ** 2, (near - returns) ** 2), mask)


def entropy(logits: Float[Array, "*rows time vocab"]) -> Float[Array, "*rows time"]:
    """Entropy of every next-token distribution, in nats."""
    logp = jax.nn.log_softmax(logits, axis=-1)
    p = jnp.exp(logp)
    return -jnp.sum(jnp.where(p > 0, p * logp, 0.0), axis=-1)


def minibatches(
    key: Array, rows: int, *, epochs: int, parts: int
) -> Int[Array, "updates rows_in_a_part"]:
    """Indices of the rows of each update: every row once an epoch, in an order of its own.

    Scan over them: `jax.lax.scan(update, state, minibatches(...))`.

    Raises:
        ValueError: the rows do not divide into so many parts, or a count is below 1.
    """
    if epochs < 1 or parts < 1 or rows < 1 or rows % parts:
        raise ValueError(f"Wanted {rows=} to be a multiple of {parts=}, and {epochs=} at least 1.")
    orders = jax.vmap(lambda k: jax.random.permutation(k, rows))(jax.random.split(key, epochs))
    return orders.reshape(epochs * parts, rows // parts)
