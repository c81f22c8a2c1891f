"""How many loops a training step takes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from scipy.special import gammaln

from forge_jax.arch.structure import Schedule


def most_loops(schedule: Schedule, train: int) -> int:
    """Loops that a program of the schedule is built with."""
    if schedule.kind == "fixed":
        wanted = max(train, schedule.min or 1)
        return min(wanted, schedule.max or wanted)
    return schedule.max or max(schedule.min or 1, 2 * round(schedule.mean or 1) + 1)


def loop_count(
    schedule: Schedule, loops: int, knobs: dict[str, Any], step: Any, key: Array
) -> Int[Array, ""]:
    r"""Loops of training step `step`, at least `min` (1) and at most `loops`.

    fixed: `loops` of them. poisson_lognormal: $1 + \mathrm{Poisson}(e^\tau)$,
    $\tau \sim N(\ln \bar r - \sigma^2 / 2, \sigma)$ with $\bar r$ the schedule's mean (Geiping et
    al. 2025, section 3.3). A curriculum starts `loops`, or the mean, at `min` and brings it to its
    full value in `warmup_steps`, along a line or a square root.
    """
    least, share = schedule.min or 1, 1.0
    if schedule.curriculum != "none":
        share = jnp.minimum(1.0, (step + 1) / knobs["loop_warmup"])
        share = jnp.sqrt(share) if schedule.curriculum == "sqrt" else share
    if schedule.kind == "fixed":
        return jnp.int32(jnp.round(least + share * (loops - least)))
    mean, sigma = least + share * (knobs["loop_mean"] - least), knobs["loop_sigma"]
    spread, level = jax.random.split(key)
    log_rate = jnp.log(mean) - sigma**2 / 2 + sigma * jax.random.normal(spread)
    # by its distribution function: jax.random.poisson compiles for longer than a small network
    below = poisson_cdf(log_rate, loops)
    drawn = 1 + (jax.random.uniform(level) > below).sum()
    return jnp.clip(drawn, least, loops)


def poisson_cdf(log_rate: Any, count: int) -> Float[Array, " count"]:
    """Probability of at most 0, 1, ..., count - 1."""
    k = np.arange(count)
    return jnp.cumsum(jnp.exp(k * log_rate - jnp.exp(log_rate) - gammaln(k + 1)))
