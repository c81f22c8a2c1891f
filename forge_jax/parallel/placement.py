"""Putting arrays on a mesh."""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

REPLICATED = PartitionSpec()
"""whole on every device: mixtures, and z where `fitting` says so"""
ROWS = PartitionSpec("data")
"""rows of a batch that every candidate runs on"""
CANDIDATES = PartitionSpec("population")
"""candidates, and z and optimizer state of K experts: the leading axis of every leaf"""
EXPERT_ROWS = PartitionSpec(("population", "data"))
"""rows of a batch that K experts share out (`svf.apply_rows`): each group has those of its own"""


def shard(mesh: Mesh | None, tree: PyTree[Any], specs: PyTree[PartitionSpec]) -> PyTree[Any]:
    """Put the leaves of `tree` on the mesh as `specs` says; `None` for a mesh gives `tree` back.

    Works for host arrays and for arrays that lie elsewhere, another mesh included. With several
    processes each must hold the same host arrays.

    Args:
        mesh: from `make_mesh`.
        tree: a pytree of arrays.
        specs: for every leaf its spec, or a prefix of such a tree, or one spec for all.

    Raises:
        ValueError: axes of the mesh do not divide the dimensions that they are to split; all such
            leaves are listed.
    """
    if mesh is None or not jax.tree.leaves(tree):
        return tree
    specs = jax.tree.broadcast(specs, tree, is_leaf=is_spec)
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    wrong = []
    for (path, leaf), spec in zip(leaves, jax.tree.leaves(specs, is_leaf=is_spec), strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/") or "the array"
        wrong += indivisible(mesh, name, np.shape(leaf), spec)
    if wrong:
        raise ValueError(f"The mesh does not fit: {'; '.join(wrong)}.")
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=is_spec)
    return jax.device_put(tree, shardings)


def fitting(mesh: Mesh | None, spec: PartitionSpec, size: int) -> PartitionSpec:
    """Return `spec` where its axes divide a leading axis of `size`, else `REPLICATED`.

    For what may as well be whole everywhere: few experts, the last items of a split.
    """
    return REPLICATED if mesh is None or indivisible(mesh, "", (size,), spec) else spec


def indivisible(mesh: Mesh, name: str, shape: tuple[int, ...], spec: PartitionSpec) -> list[str]:
    """Say in words which dimensions of an array the mesh cannot split evenly."""
    if len(spec) > len(shape):
        return [f"{name} has shape {shape}, too few axes for {tuple(spec)}"]
    out = []
    for axis, (size, names) in enumerate(zip(shape, spec, strict=False)):
        names = (names,) if isinstance(names, str) else tuple(names or ())
        parts = math.prod(mesh.shape[n] for n in names)
        if size % parts:
            over = " x ".join(f"{n}={mesh.shape[n]}" for n in names)
            out.append(f"axis {axis} of {name}, {size}, is no multiple of {over}")
    return out


def is_spec(x: Any) -> bool:
    """Say whether `x` is a leaf of a tree of specs."""
    return isinstance(x, PartitionSpec)
