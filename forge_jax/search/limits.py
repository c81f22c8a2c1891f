"""The deployment limits of the Phase 7 guide, and by how much a candidate misses them."""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

_AT_LEAST = ("throughput_tps", "accuracy")


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a candidate must keep to. A limit of None is not checked."""

    latency_ms: float | None = 100.0  # milliseconds, at most: batch 1, 512 tokens
    vram_gb: float | None = 2.0  # peak memory in gigabytes (1e9 bytes), at most
    throughput_tps: float | None = 50.0  # tokens per second, at least
    accuracy: float | None = 0.85  # fraction right over all domains, at least
    kl: float | None = 1.0  # nats per token from the base model, at most


def violations(
    metrics: Mapping[str, ArrayLike], limits: Limits | None = None
) -> dict[str, Float[Array, "..."]]:
    """Return by how much each limit is missed, as a fraction of the larger of limit and value.

    0 where it holds, at most 1 for values from 0 on: a limit that no candidate can keep, such as
    the latency of a large model on a slow machine, does not drown the others in their sum, which
    is what `NSGA2.tell` takes as `violation`. A NaN stays NaN and an infinite value gives infinity.

    `metrics` holds scalars or one value per candidate under the names of `Limits`, and may leave
    some out.
    """
    checked = dataclasses.asdict(limits or Limits())
    unknown = sorted(set(metrics) - set(checked))
    if unknown:
        raise ValueError(f"`metrics` must be among {sorted(checked)}, got {unknown}.")
    missed = {}
    for name, value in metrics.items():
        if checked[name] is not None:
            value, limit = jnp.asarray(value), checked[name]
            if name in _AT_LEAST:
                missed[name] = jnp.maximum(1 - value / limit, 0)
            else:
                excess = jnp.maximum(value - limit, 0)
                missed[name] = jnp.where(jnp.isinf(excess), excess, excess / (limit + excess))
    return missed
