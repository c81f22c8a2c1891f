"""Ways to adapt a model: what is trained, zero at the base, and how the model runs with it."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.model import Model, Weights, policy
from forge_jax import svf

Delta = Any
"""what the optimizer holds of K experts: a pytree of arrays (K, ...)"""


class Form(NamedTuple):
    """One way to adapt."""

    start: Callable[[Weights, int, jax.Array], Delta]  # (weights, K, key), the base model
    policy: Callable[[Model, Weights, Delta], Callable[..., Any]]  # all zeros is the base model


def z_of(delta: Delta) -> Delta:
    """z from what the optimizer holds, z - 1: weight decay then pulls to the base."""
    return jax.tree.map(lambda d: 1 + d, delta)


def svf_start(weights: Weights, experts: int, key) -> Delta:
    """z - 1 = 0 for every singular value, {path: (K, r)}."""
    del key
    z = svf.identity(weights["factors"])
    return {k: jnp.zeros((experts, *v.shape)) for k, v in z.items()}


def svf_policy(model: Model, weights: Weights, delta: Delta):
    """All experts in one batch of equal shares, see `svf.apply_rows`."""
    return policy(model, weights, svf.scales(weights["factors"], z_of(delta)))


def z_statistics(delta: Delta, expert: int) -> dict[str, float]:
    """Mean, standard deviation, extremes of one expert's z: of all matrices, and of each.

    "z_mean", and "z_mean/<path>".
    """
    z = {path: 1 + np.ravel(d[expert]) for path, d in delta.items()}
    out = statistics(np.concatenate([*z.values()]))
    for path, own in z.items():
        out |= {f"{name}/{path}": value for name, value in statistics(own).items()}
    return out


def statistics(z: np.ndarray) -> dict[str, float]:
    """The guide's four numbers of a z."""
    return {
        "z_mean": float(z.mean()),
        "z_std": float(z.std()),
        "z_min": float(z.min()),
        "z_max": float(z.max()),
    }


SVF = Form(svf_start, svf_policy)


def full_params(weights: Weights, delta: Delta):
    """W + delta for every parameter; `delta` has one expert."""
    return jax.tree.map(lambda w, d: w + d[0], weights["params"], delta)


def full_start(weights: Weights, experts: int, key) -> Delta:
    """A change of zero for every parameter of the decoder."""
    del key
    return jax.tree.map(lambda w: jnp.zeros((experts, *w.shape)), weights["params"])


LORA_RANK = 16


def lora_start(weights: Weights, experts: int, key) -> Delta:
    """{path: {a: (K, m, 16), b: (K, 16, n)}}: a Gaussian of variance 1/m, b zero (Hu et al. 2021).

    The matrices are those of attention and MLP, as for SVF.
    """
    out = {}
    for path, w in named_matrices(weights["params"]):
        key, own = jax.random.split(key)
        a = jax.random.normal(own, (experts, w.shape[0], LORA_RANK)) / np.sqrt(w.shape[0])
        out[path] = {"a": a, "b": jnp.zeros((experts, LORA_RANK, w.shape[1]))}
    return out


def named_matrices(params) -> list[tuple[str, jax.Array]]:
    """The matrices of attention and MLP blocks by path."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    named = [(svf.path_name(path), leaf) for path, leaf in leaves]
    return [(name, leaf) for name, leaf in named if svf.is_attention_or_mlp(name, leaf)]


def lora_params(weights: Weights, delta: Delta):
    """W + 2 a b: the scale alpha / r of LoRA at the usual alpha = 2 r."""

    def merged(path, w):
        pair = delta.get(svf.path_name(path))
        return w if pair is None else w + 2 * pair["a"][0] @ pair["b"][0]

    return jax.tree_util.tree_map_with_path(merged, weights["params"])


def dense_policy(merge, model: Model, weights: Weights, delta: Delta):
    """The decoder on the merged parameters."""
    return partial(model.decoder.apply, {"params": merge(weights, delta)})


FULL = Form(full_start, partial(dense_policy, full_params))
LORA = Form(lora_start, partial(dense_policy, lora_params))
