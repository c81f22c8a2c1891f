"""The two bounded operators of real-coded NSGA-II: pure functions of arrays and a key."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float


def simulated_binary_crossover(
    key: Array,
    first: Float[Array, "pairs genes"],
    second: Float[Array, "pairs genes"],
    lower: Float[Array, " genes"],
    upper: Float[Array, " genes"],
    *,
    eta: ArrayLike,
    rate: ArrayLike,
) -> tuple[Float[Array, "pairs genes"], Float[Array, "pairs genes"]]:
    r"""Cross pairs with SBX bounded to [lower, upper] (Deb and Agrawal 1995; Deb 2000).

    With y_1 < y_2 the parents' genes, d = y_2 - y_1 and u uniform on [0, 1),

    $$ c_{1,2} = (y_1 + y_2 \mp \beta_q d) / 2, \quad \beta_q = (u a)^{1/(\eta+1)}
       \text{ if } u a \le 1, \text{ else } (2 - u a)^{-1/(\eta+1)}, $$

    a = 2 - b^{-(eta+1)} and b = 1 + 2 * (room to the nearer side's bound) / d. A pair is crossed
    with probability `rate`; then each gene with probability one half, and the two values go to
    either child with even odds.
    """
    # One draw of everything compiles four times faster than four.
    pair, gene, u, swap = jax.random.uniform(key, (4, *first.shape), first.dtype)
    crossed = (pair[:, :1] < rate) & (gene < 0.5)
    low, high = jnp.minimum(first, second), jnp.maximum(first, second)
    distance = high - low
    crossed &= distance > 0

    def spread(room):
        b = 1 + 2 * room / jnp.where(distance > 0, distance, 1)
        ua = u * (2 - b ** -(eta + 1.0))
        contract = ua <= 1
        # Each branch sees only the values it is meant for: no overflow, no division by zero.
        base = jnp.where(contract, ua, 1 / (2 - jnp.where(contract, 1, ua)))
        return base ** (1 / (eta + 1.0))

    below = (low + high - spread(low - lower) * distance) / 2
    above = (low + high + spread(upper - high) * distance) / 2
    below, above = jnp.clip(below, lower, upper), jnp.clip(above, lower, upper)
    swap = swap < 0.5
    return (
        jnp.where(crossed, jnp.where(swap, above, below), first),
        jnp.where(crossed, jnp.where(swap, below, above), second),
    )


def polynomial_mutation(
    key: Array,
    genes: Float[Array, "population genes"],
    lower: Float[Array, " genes"],
    upper: Float[Array, " genes"],
    *,
    eta: ArrayLike,
    rate: ArrayLike,
    force: Bool[Array, " population"] | None = None,
) -> Float[Array, "population genes"]:
    r"""Mutate genes within [lower, upper] by the bounded polynomial distribution (Deb 2001).

    With x scaled to [0, 1] by the bounds and u uniform on [0, 1), the step is

    $$ (2u + (1-2u)(1-x)^{\eta+1})^{1/(\eta+1)} - 1 \text{ for } u \le 1/2, \quad
       1 - (2(1-u) + (2u-1) x^{\eta+1})^{1/(\eta+1)} \text{ for } u > 1/2. $$

    Each gene mutates with probability `rate`. Rows named in `force` mutate at least one.
    """
    chance, u = jax.random.uniform(key, (2, *genes.shape), genes.dtype)
    mutated = chance < rate
    if force is not None:
        mutated |= force[:, None] & (chance == chance.min(axis=1, keepdims=True))
    extent = upper - lower
    x = jnp.clip((genes - lower) / jnp.where(extent > 0, extent, 1), 0, 1)
    down = (2 * u + (1 - 2 * u) * (1 - x) ** (eta + 1.0)) ** (1 / (eta + 1.0)) - 1
    up = 1 - (2 * (1 - u) + (2 * u - 1) * x ** (eta + 1.0)) ** (1 / (eta + 1.0))
    moved = genes + jnp.where(u <= 0.5, down, up) * extent
    return jnp.clip(jnp.where(mutated, moved, genes), lower, upper)
