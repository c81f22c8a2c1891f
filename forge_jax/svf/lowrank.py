"""Dropping small singular values, and keeping a matrix factored where that is cheaper."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from forge_jax.svf import factors as _factors
from forge_jax.svf.layout import to_leaf


def truncate(
    factors: PyTree[Any], z: Mapping[str, Float[Array, "*batch r"]], rank_fraction: float
) -> PyTree[Any]:
    """Keep the leading ceil(rank_fraction * r) components of every decomposed matrix.

    z is folded in. A matrix of rank r' stays factored, a `Factors` with s := s z, where
    r' (m + n) < m n, and becomes an ordinary dense leaf elsewhere; `svf.transform` runs such a tree
    as it is. Components are ranked by the base singular value `s`, not by s z, so that one rank
    means the same components for every mixture. The Frobenius error is the norm of the dropped s z,
    at z = 1 the least that this rank allows (Eckart and Young 1936).

    Where components are dropped, the `rest` of a randomized decomposition is dropped with them.

    Raises:
        ValueError: `rank_fraction` is not in (0, 1], or `z` does not fit `factors`.
    """
    if not 0 < rank_fraction <= 1:
        raise ValueError(f"`rank_fraction` must lie in (0, 1], got {rank_fraction}.")
    s = _factors.scales(factors, z)

    def cut(name, leaf):
        m, n, full = leaf.u.shape[-2], leaf.vt.shape[-1], leaf.s.shape[-1]
        rank = int(kept_rank(full, rank_fraction))
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


def kept_rank(rank: int, rank_fraction):
    """Return ceil(rank_fraction * rank), at least 1: of a number, or of an array of fractions.

    A fraction is known to 5e-7 at best in float32: 0.3 of 10 is 3, in float32 as in float64.
    """
    xp: Any = jnp if isinstance(rank_fraction, jax.Array) else np
    return xp.clip(xp.ceil((rank_fraction - 5e-7) * rank), 1, rank).astype(int)


def mask_rank(
    s: Mapping[str, Float[Array, "*batch r"]], rank_fraction
) -> dict[str, Float[Array, "*batch r"]]:
    """Set the singular values that `truncate` would drop to zero; the shapes stay.

    One program then serves every fraction, a traced number included. The `rest` of a randomized
    decomposition is not touched.
    """
    return {
        name: jnp.where(jnp.arange(v.shape[-1]) < kept_rank(v.shape[-1], rank_fraction), v, 0)
        for name, v in s.items()
    }
