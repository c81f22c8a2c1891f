"""When to stop recursing: three losses that teach it, and the rule that stops.

A halting logit belongs to every token and every supervised answer n = 0..N, the first answer
among them. The steps axis comes first everywhere.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from forge_jax.models.cognate.attention import torch_uniform


class ActHead(nn.Module):
    """The halting logit of latent states (..., d), float32."""

    width: int

    @nn.compact
    def __call__(self, z):
        start = torch_uniform(self.width)
        logits = nn.Dense(1, kernel_init=start, bias_init=start, name="w_halt")(z)
        return logits[..., 0].astype(jnp.float32)


def bce_loss(
    logits: Float[Array, "answers *tokens"], correct: Bool[Array, "answers *tokens"]
) -> Float[Array, "*tokens"]:
    """Cross-entropy of "this answer is right", averaged over answers, nats (TRM, section 4.1).

    `correct` is data.
    """
    target = correct.astype(jnp.float32)
    nll = -(target * jax.nn.log_sigmoid(logits) + (1 - target) * jax.nn.log_sigmoid(-logits))
    return nll.mean(axis=0)


def halting_logp(logits: Float[Array, "answers *tokens"]) -> Float[Array, "answers *tokens"]:
    r"""Log of $p_n = \lambda_n \prod_{j<n} (1 - \lambda_j)$; the last answer takes the remainder.

    PonderNet (Banino et al. 2021, arXiv 2107.05407, eq. 3), with $\lambda$ the sigmoid of the
    logits. The last logit has no say, and so no gradient.
    """
    stay = jnp.cumsum(jax.nn.log_sigmoid(-logits[:-1]), axis=0)
    reached = jnp.concatenate([jnp.zeros_like(logits[:1]), stay])
    return reached + jnp.concatenate([jax.nn.log_sigmoid(logits[:-1]), jnp.zeros_like(logits[:1])])


def geometric_logp(answers: int, prior: Float[Array, ""] | float) -> Float[Array, " answers"]:
    r"""Log of the geometric distribution with rate `prior` in (0, 1), cut after `answers`."""
    logp = jnp.arange(answers) * jnp.log1p(-jnp.asarray(prior, jnp.float32))
    return logp - jax.nn.logsumexp(logp)


def ponder_divergence(
    logits: Float[Array, "answers *tokens"], prior: Float[Array, ""] | float
) -> Float[Array, "*tokens"]:
    """KL of the halting distribution to the geometric prior, nats (PonderNet, eq. 5)."""
    logp = halting_logp(logits)
    logq = geometric_logp(len(logits), prior).reshape(-1, *(1,) * (logits.ndim - 1))
    return (jnp.exp(logp) * (logp - logq)).sum(axis=0)


def act_weights(
    logits: Float[Array, "answers *tokens"], epsilon: float = 0.01
) -> tuple[Float[Array, "answers *tokens"], Float[Array, "*tokens"]]:
    r"""Weights of the answers and ponder cost N + R of adaptive computation time.

    Graves 2016 (arXiv 1603.08983), eqs. 5-9: N is the first answer (from 1) at which the halting
    probabilities sum to 1 - `epsilon`, or the last; its weight is the remainder R, those before
    have their own probability, those after none. N has no gradient, R has.
    """
    h = jax.nn.sigmoid(logits)
    total = jnp.cumsum(h, axis=0)
    earlier = jnp.concatenate([jnp.zeros_like(h[:1]), total[:-1]])
    last = jnp.arange(len(h)).reshape(-1, *(1,) * (h.ndim - 1)) == len(h) - 1
    reached = earlier < 1 - epsilon
    stops = reached & ((total >= 1 - epsilon) | last)
    weights = jnp.where(stops, 1 - earlier, jnp.where(reached, h, 0.0))
    remainder = jnp.where(stops, 1 - earlier, 0.0).sum(axis=0)
    return weights, reached.sum(axis=0) + remainder


def realised_steps(
    logits: Float[Array, "answers *tokens"], threshold: Float[Array, ""] | float
) -> Int[Array, "*tokens"]:
    """Answers made, from 1, until the halting probability is above `threshold`; all if never."""
    halts = (jax.nn.sigmoid(logits) > threshold).at[-1].set(True)
    return jnp.argmax(halts, axis=0) + 1
