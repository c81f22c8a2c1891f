"""Singular value factors of the matrices in a pytree, and the vectors `z` that scale their values.

A matrix is W = U diag(s) Vt. Singular value fine-tuning (Transformer-Squared, arXiv 2501.06252)
keeps U, s and Vt frozen and learns one number per singular value:

    W' = U diag(s * z) Vt

`z = 1` is the base model. The published code starts from a sigmoid mask near 0.525 and rescales;
here `z` multiplies `s` directly and `renormalize=True` gives the published rescaling. What an
optimizer should hold is `z - 1`: weight decay then pulls to the base model, and a zero gradient
leaves `z = 1` alone.

Every matrix is known by its path, "layers_0/self_attn/q_proj/kernel". `z` and whatever is shaped
like it is a flat dictionary from path to array.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from forge_jax.svf.exact import thin_svd
from forge_jax.svf.layout import AxesRule, Layout, as_matrix, axes_of, to_leaf
from forge_jax.svf.randomized import randomized_svd


@flax.struct.dataclass
class Factors:
    """The frozen factors of one leaf, float32, in place of that leaf.

    `rest` is what the kept components leave out: None after a full decomposition, W - U diag(s) Vt
    after a randomized one, so that `z = 1` is the base model in both.
    """

    u: Float[Array, "*batch m r"]
    s: Float[Array, "*batch r"]
    vt: Float[Array, "*batch r n"]
    layout: Layout = flax.struct.field(pytree_node=False)
    rest: Float[Array, "*batch m n"] | None = None


def decompose(
    params: PyTree[Array],
    select: Callable[[str, Any], bool],
    axes: AxesRule | None = None,
    *,
    max_full: int | None = None,
    rank: int | None = None,
    key: Array | None = None,
) -> tuple[PyTree[Any], dict[str, Float[Array, "*batch r"]]]:
    """Split `params` into frozen factors and the vectors `z`, all ones.

    Singular vectors are determined only up to sign and, where values tie, rotation: a trained `z`
    belongs to the factors it was trained with.

    Args:
        params: any pytree of arrays. The arithmetic is float32 whatever the dtype of a leaf.
        select: `select(path, leaf)` says which leaves to decompose.
        axes: the axes of each selected leaf, by path or by `axes(path, leaf)`; needed only for
            leaves of more than two axes. A plain matrix is (inputs, outputs), the layout of a Flax
            kernel.
        max_full: above this many singular values a matrix gets a randomized decomposition. None:
            never.
        rank: components that a randomized decomposition keeps; `max_full` unless given.
        key: random key of the randomized decompositions.

    Returns:
        `params` with a `Factors` for every selected leaf, and `z`, path to ones.

    Raises:
        ValueError: nothing is selected, or a selected leaf is not a floating-point matrix, or its
            axes are not declared, or a randomized decomposition lacks its key.
    """
    if rank is not None and max_full is None:
        raise ValueError(f"`rank` is for randomized decompositions: {rank=} needs a `max_full`.")
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    out, selected = [], 0
    for path, leaf in leaves:
        name = path_name(path)
        if not select(name, leaf):
            out.append(leaf)
            continue
        matrix, layout = as_matrix(name, leaf, axes_of(name, leaf, axes))
        if max_full is None or min(matrix.shape[-2:]) <= max_full:
            out.append(Factors(*thin_svd(matrix), layout))
        elif key is None:
            raise ValueError(f"{name} has {matrix.shape=}, over {max_full=}, and needs a `key`.")
        else:
            kept = max_full if rank is None else rank
            out.append(_leading(matrix, layout, kept, jax.random.fold_in(key, selected)))
        selected += 1
    if not selected:
        first = f", {path_name(leaves[0][0])} the first" if leaves else ""
        raise ValueError(f"`select` matched none of the {len(leaves)} leaves of `params`{first}.")
    factors = jax.tree_util.tree_unflatten(treedef, out)
    return factors, identity(factors)


def restore(
    params: PyTree[Array],
    select: Callable[[str, Any], bool],
    parts: Callable[[str], tuple[Array, Array, Array]],
) -> PyTree[Any]:
    """Put factors computed before, `parts(path) -> (u, s, vt)`, where `decompose` would put them.

    Only for plain matrices; with fewer components than the matrix has, the rest is what they leave.
    Raises ValueError where the shapes are not those of the leaf.
    """

    def put(path, leaf):
        name = path_name(path)
        if not select(name, leaf):
            return leaf
        u, s, vt = parts(name)
        if (u.shape[0], vt.shape[1]) != leaf.shape or u.shape[1:] != s.shape:
            raise ValueError(f"{name} has shape {leaf.shape}, its factors {u.shape}, {vt.shape}.")
        matrix, layout = as_matrix(name, leaf, axes_of(name, leaf, None))
        found = Factors(u, s, vt, layout)
        if len(s) == min(matrix.shape):
            return found
        return dataclasses.replace(found, rest=matrix - product(found, s))

    return jax.tree_util.tree_map_with_path(put, params)


def identity(factors: PyTree[Any]) -> dict[str, Float[Array, "*batch r"]]:
    """Return the `z` of the base model: ones for every `Factors` in the tree."""
    return {name: jnp.ones_like(leaf.s) for name, leaf in named_factors(factors)}


def materialize(
    factors: PyTree[Any], z: Mapping[str, Float[Array, "*batch r"]], renormalize: bool = False
) -> PyTree[Array]:
    """Build the ordinary parameters U diag(s z) Vt, each in its first shape and dtype.

    Raises:
        ValueError: the paths or shapes of `z` are not those of `factors`.
    """
    for name, leaf in named_factors(factors):
        if name in z and z[name].shape != leaf.s.shape:
            raise ValueError(f"z[{name!r}] must have shape {leaf.s.shape}, got {z[name].shape}.")
    s = scales(factors, z, renormalize)
    return map_factors(lambda name, leaf: to_leaf(product(leaf, s[name]), leaf.layout), factors)


def scales(
    factors: PyTree[Any], z: Mapping[str, Float[Array, "*extra r"]], renormalize: bool = False
) -> dict[str, Float[Array, "*extra r"]]:
    """Return the singular values s z that stand between U and Vt.

    `z` may have extra leading axes (a population, or the rows of a batch). With `renormalize` every
    matrix keeps the sum of its singular values, s z sum(s) / sum(s z), as the published code of
    Transformer-Squared does; then `z` and `c z` are the same, and sum(s z) = 0 gives infinities.
    """
    found = dict(named_factors(factors))
    check_paths("z", z, found)
    out = {}
    for name, leaf in found.items():
        if z[name].shape[-leaf.s.ndim :] != leaf.s.shape:
            raise ValueError(f"z[{name!r}] must end in {leaf.s.shape}, got {z[name].shape}.")
        s = leaf.s * z[name]
        if renormalize:
            s = s * (leaf.s.sum(-1, keepdims=True) / s.sum(-1, keepdims=True))
        out[name] = s
    return out


def product(leaf: Factors, s: Float[Array, "*batch r"]) -> Float[Array, "*batch m n"]:
    """Multiply the factors out with the singular values `s` in place of their own."""
    # By default a GPU multiplies float32 in TF32, and z = 1 would be the base to three digits only.
    matrix = jnp.matmul(leaf.u * s[..., None, :], leaf.vt, precision=jax.lax.Precision.HIGHEST)
    return matrix if leaf.rest is None else matrix + leaf.rest


def path_name(path: tuple[Any, ...]) -> str:
    """Return the name of a leaf, "layers_0/mlp/up_proj/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def is_factors(x: Any) -> bool:
    """Say whether `x` stands for a decomposed leaf."""
    return isinstance(x, Factors)


def named_factors(factors: PyTree[Any]) -> list[tuple[str, Factors]]:
    """List the decomposed leaves of a tree with their paths."""
    leaves = jax.tree_util.tree_leaves_with_path(factors, is_leaf=is_factors)
    return [(path_name(path), leaf) for path, leaf in leaves if is_factors(leaf)]


def map_factors(fn: Callable[[str, Factors], Any], factors: PyTree[Any]) -> PyTree[Any]:
    """Replace every decomposed leaf by `fn(path, leaf)` and keep the others."""

    def visit(path, leaf):
        return fn(path_name(path), leaf) if is_factors(leaf) else leaf

    return jax.tree_util.tree_map_with_path(visit, factors, is_leaf=is_factors)


def check_paths(what: str, got: Iterable[str], wanted: Iterable[str]) -> None:
    """Raise a ValueError that lists the paths missing from `got` and those too many."""
    missing, unknown = sorted(set(wanted) - set(got)), sorted(set(got) - set(wanted))
    if missing or unknown:
        raise ValueError(f"`{what}` does not fit the factors: {missing=}, {unknown=}.")


def _leading(matrix: Float[Array, "*batch m n"], layout: Layout, rank: int, key: Array) -> Factors:
    """Decompose the leading components and keep what they leave out."""
    leaf = Factors(*randomized_svd(matrix, rank, key), layout)
    return dataclasses.replace(leaf, rest=matrix - product(leaf, leaf.s))
