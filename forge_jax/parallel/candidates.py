"""A function of each candidate of a population, shared out among the groups of a mesh."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree


def map_candidates(
    function: Callable[[Any, Any], PyTree],
    candidates: PyTree,
    shared: PyTree,
    *,
    mesh: Mesh | None = None,
    chunk: int | None = None,
) -> PyTree:
    """Return `function(candidate, shared)` of every candidate, `chunk` of them at once.

    As `jax.lax.map`, but that a last step with fewer candidates is filled up and cut again, where
    that would compile the function once more. With a mesh each group along its axis `population`
    has `chunk` candidates of its own in each step; a plain `lax.map` would run over an axis that is
    split, and every device do every step. How `data` and `model` are used follows from where
    `shared` lies. To be called under `jax.jit`.

    Args:
        function: of one candidate.
        candidates: every leaf has a leading axis of the candidates.
        shared: what all candidates see.
        mesh: from `make_mesh`; None is one device.
        chunk: None is one after another.
    """

    def one(candidate):
        return function(candidate, shared)

    groups = 1 if mesh is None else mesh.shape["population"]
    if groups == 1 and chunk is None:
        return jax.lax.map(one, candidates)
    count = jax.tree.leaves(candidates)[0].shape[0]
    at_once = groups * min(chunk or 1, max(1, -(-count // groups)))

    def dealt(x):
        filled = jnp.concatenate([x, jnp.repeat(x[-1:], -count % at_once, axis=0)])
        steps = filled.reshape(-1, at_once, *x.shape[1:])
        if mesh is None or groups == 1:
            return steps
        # not shard_map: XLA (jaxlib 0.10.2) aborts on an embedding split over an axis left to it
        split = NamedSharding(mesh, PartitionSpec(None, "population"))
        return jax.lax.with_sharding_constraint(steps, split)

    axis = None if groups == 1 else "population"
    out = jax.lax.map(jax.vmap(one, spmd_axis_name=axis), jax.tree.map(dealt, candidates))
    return jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:])[:count], out)
