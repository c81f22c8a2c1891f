"""A function of each candidate of a population, shared out among the groups of a mesh."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import PyTree

from forge_jax.parallel.placement import CANDIDATES, REPLICATED


def map_candidates(
    function: Callable[[Any, Any], PyTree],
    candidates: PyTree,
    shared: PyTree,
    *,
    mesh: Mesh | None = None,
    chunk: int | None = None,
) -> PyTree:
    """Return `function(candidate, shared)` of every candidate, `chunk` of them at once.

    As `jax.lax.map`; with a mesh each group along its axis `population` maps a share of its own.
    A plain `lax.map` would run over an axis that is split, and every device do every step. The
    axes `data` and `model` are left to the compiler, by the shardings of `shared`. A number of
    candidates that is no multiple of the groups is filled up and cut again. To be called under
    `jax.jit`.

    Args:
        function: its arrays come as arguments; none may be captured.
        candidates: every leaf has a leading axis of the candidates.
        shared: what all candidates see.
        mesh: from `make_mesh`; None is one device.
        chunk: None is one after another.
    """

    def own(candidates, shared):
        return jax.lax.map(lambda c: function(c, shared), candidates, batch_size=chunk)

    groups = 1 if mesh is None else mesh.shape["population"]
    if groups == 1:
        return own(candidates, shared)
    count = jax.tree.leaves(candidates)[0].shape[0]
    filled = jax.tree.map(
        lambda x: jnp.concatenate([x, jnp.repeat(x[-1:], -count % groups, axis=0)]), candidates
    )
    # unchecked: a decoding loop's carry starts as a constant, the same for all, and does not end so
    mapped = jax.shard_map(
        own,
        mesh=mesh,
        in_specs=(CANDIDATES, REPLICATED),
        out_specs=CANDIDATES,
        axis_names={"population"},
        check_vma=False,
    )
    return jax.tree.map(lambda x: x[:count], mapped(filled, shared))
