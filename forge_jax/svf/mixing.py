"""Mixtures of experts: of their vectors `z`, or of the dense differences that they make."""

import dataclasses
import functools
import operator
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from forge_jax.svf import factors as _factors
from forge_jax.svf.layout import to_leaf

Alpha = Float[Array, " experts"] | Mapping[str, Float[Array, " experts"]]


def mix(
    experts: Mapping[str, Float[Array, "experts *batch r"]],
    alpha: Alpha,
    mode: Literal["delta", "sum"] = "delta",
) -> dict[str, Float[Array, "*batch r"]]:
    """Mix the z of K experts with the coefficients `alpha`.

    delta: z = 1 + sum_k alpha_k (z_k - 1). Zero is the base model, a unit vector is that expert.
    sum:   z = sum_k alpha_k z_k, equal where sum_k alpha_k = 1; elsewhere it rescales every matrix.

    Args:
        experts: for each path the z of all experts, stacked on the first axis.
        alpha: K coefficients, or for each path its own K. For a population of mixtures, `jax.vmap`.

    Raises:
        ValueError: `alpha` does not have one coefficient per expert, or the paths differ.
    """
    if mode not in ("delta", "sum"):
        raise ValueError(f"`mode` must be 'delta' or 'sum', got {mode!r}.")
    base = 1.0 if mode == "delta" else 0.0
    coefficients = _per_path(alpha, experts)
    return {name: base + _weighted(coefficients[name], z - base) for name, z in experts.items()}


def pad_experts(
    experts: Mapping[str, Float[Array, "experts *batch r"]], count: int
) -> dict[str, Float[Array, "count *batch r"]]:
    """Fill up with experts that are the base model, z = 1, to `count` places.

    Programs that take all places are compiled once; a further expert is put into a free one,
    `{name: v.at[place].set(z[name]) for name, v in padded.items()}`.

    Raises:
        ValueError: there are more experts than places.
    """
    given = max((len(z) for z in experts.values()), default=0)
    if given > count:
        raise ValueError(f"`count` must be at least {given}, the number of experts, got {count}.")

    def padded(z):
        return jnp.concatenate([z, jnp.ones((count - len(z), *z.shape[1:]), z.dtype)])

    return {name: padded(jnp.asarray(z)) for name, z in experts.items()}


def deltas(
    factors: PyTree[Any], experts: Mapping[str, Float[Array, "experts *batch r"]]
) -> dict[str, Float[Array, "experts ..."]]:
    """Return what each expert adds to each matrix: D_k = U diag(s (z_k - 1)) Vt, float32.

    Every entry has shape (K, *shape of the leaf). K dense copies of the selected matrices: worth
    their memory where many mixtures run on long sequences.

    Raises:
        ValueError: the paths or shapes of `experts` are not those of `factors`.
    """
    found = check_stacked(factors, experts)

    def one(leaf, z):
        change = _factors.product(dataclasses.replace(leaf, rest=None), leaf.s * (z - 1.0))
        return to_leaf(change, leaf.layout, jnp.float32)

    return {name: jax.vmap(one, (None, 0))(leaf, experts[name]) for name, leaf in found.items()}


def check_stacked(
    factors: PyTree[Any], experts: Mapping[str, Array]
) -> dict[str, _factors.Factors]:
    """The factors by path; a ValueError where `experts` are not z of these, stacked first."""
    found = dict(_factors.named_factors(factors))
    _factors.check_paths("experts", experts, found)
    for name, leaf in found.items():
        if experts[name].shape[1:] != leaf.s.shape or not len(experts[name]):
            raise ValueError(
                f"experts[{name!r}] must be (experts, *{leaf.s.shape}), got {experts[name].shape}."
            )
    return found


def mix_weights(
    params: PyTree[Array], deltas: Mapping[str, Float[Array, "experts ..."]], alpha: Alpha
) -> PyTree[Array]:
    """Return the dense parameters W + sum_k alpha_k D_k, in the dtypes of `params`.

    Equals `materialize(factors, mix(experts, alpha))` without building any U diag(s z) Vt.

    Raises:
        ValueError: `alpha` has the wrong length, or a path of `deltas` is not in `params`.
    """
    coefficients = _per_path(alpha, deltas)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    names = [_factors.path_name(path) for path, _ in leaves]
    unknown = sorted(set(deltas) - set(names))
    if unknown:
        raise ValueError(f"`deltas` has paths that `params` lacks: {unknown}.")
    out = []
    for name, (_, leaf) in zip(names, leaves, strict=True):
        if name in deltas:
            # One pass over memory. XLA's CPU backend takes 2.6 times as long for the product of a
            # row and a matrix, and far longer for a sum over the first axis.
            terms = [a * d for a, d in zip(coefficients[name], deltas[name], strict=True)]
            change = functools.reduce(operator.add, terms)
            # The sum is taken in float32: a half-precision weight would swallow a small change.
            leaf = (leaf.astype(jnp.float32) + change).astype(leaf.dtype)
        out.append(leaf)
    return jax.tree_util.tree_unflatten(treedef, out)


def _weighted(
    alpha: Float[Array, " experts"], x: Float[Array, "experts ..."]
) -> Float[Array, "..."]:
    return jnp.tensordot(alpha, x, axes=1, precision=jax.lax.Precision.HIGHEST)


def _per_path(alpha: Alpha, experts: Mapping[str, Array]) -> dict[str, Float[Array, " experts"]]:
    """Give every path its coefficients and check that there is one for each expert."""
    if isinstance(alpha, Mapping):
        _factors.check_paths("alpha", alpha, experts)
        by_path = {name: jnp.asarray(alpha[name]) for name in experts}
    else:
        by_path = dict.fromkeys(experts, jnp.asarray(alpha))
    for name, z in experts.items():
        if by_path[name].shape != z.shape[:1]:
            raise ValueError(
                f"`alpha` must have shape {z.shape[:1]}, one number per expert of {name}, "
                f"got {by_path[name].shape}."
            )
    return by_path
