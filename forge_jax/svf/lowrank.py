"""Dropping small singular values, and keeping a matrix factored where that is cheaper."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from jaxtyping import Array, Float, PyTree

from forge_jax.svf import factors as _factors
from forge_jax.svf.layout import to_leaf


def truncate(
    factors: PyTree[Any], z: Mapping[str, Float[Array, "*batch r"]], rank_fraction: float
) -> PyTree[Any]:
    """Keep the leading ceil(rank_fraction * r) components of every decomposed matrix.

    The scales are folded in. A matrix of rank r' stays factored, a `Factors` with s := s z, where
    r' (m + n) < m n, and becomes an ordinary dense leaf elsewhere; `svf.transform` runs such a tree
    as it is. Components are ranked by the base singular value `s`, not by s z, so that one rank
    means the same components for every mixture. The Frobenius error is the norm of the dropped s z,
    at z = 1 the least that this rank allows (Eckart and Young 1936).

    Below `rank_fraction` = 1 the `rest` of a randomized decomposition is dropped as well.

    Raises:
        ValueError: `rank_fraction` is not in (0, 1], or `z` does not fit `factors`.
    """
    if not 0 < rank_fraction <= 1:
        raise ValueError(f"`rank_fraction` must lie in (0, 1], got {rank_fraction}.")
    s = _factors.scales(factors, z)

    def cut(name, leaf):
        m, n, full = leaf.u.shape[-2], leaf.vt.shape[-1], leaf.s.shape[-1]
        rank = kept_rank(full, rank_fraction)
        small = dataclasses.replace(
            leaf,
            u=leaf.u[..., :rank],
            s=s[name][..., :rank],
            vt=leaf.vt[..., :rank, :],
            rest=leaf.rest if rank == full else None,
        )
        if small.rest is None and rank * (m + n) < m * n:
            return small
        return to_leaf(_factors.product(small, small.s), leaf.layout)

    return _factors.map_factors(cut, factors)


def kept_rank(rank: int, rank_fraction: float) -> int:
    """Return ceil(rank_fraction * rank), at least 1.

    A fraction is known to 5e-7 at best in float32: 0.3 of 10 is 3, in float32 as in float64.
    """
    return max(1, math.ceil((rank_fraction - 5e-7) * rank))
