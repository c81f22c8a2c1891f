"""Numbers measured inside an update and kept in the optimizer's state."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from forge_jax.optim.layout import Layout, name, to_matrices

Measure = Callable[[Any, Any, Any], dict[str, Array]]
"""updates before, updates after, state after -> scalars by name"""


class MeasuredState(NamedTuple):
    """A transformation's state, and what its last update was measured to be."""

    inner: Any
    metrics: dict[str, Array]  # float32 scalars


def measured(
    tx: optax.GradientTransformation, measure: Measure
) -> optax.GradientTransformationExtraArgs:
    """Keep what `measure` finds in each update; zeros before the first."""
    tx = optax.with_extra_args_support(tx)

    def metrics(before, after, state):
        found = measure(before, after, state)
        return {key: jnp.asarray(value, jnp.float32) for key, value in found.items()}

    def init_fn(params):
        state = tx.init(params)
        shapes = jax.eval_shape(metrics, params, params, state)
        return MeasuredState(state, jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes))

    def update_fn(updates, state, params=None, **extra_args):
        after, inner = tx.update(updates, state.inner, params, **extra_args)
        return after, MeasuredState(inner, metrics(updates, after, inner))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def diagnostics(opt_state: Any) -> dict[str, Array]:
    """Return what the last update of `mugrok(..., diagnostics=True)` measured.

    - `gradient/norm`, `update/norm`: of all leaves together, before and after the whole chain
    - `grokfast/ema_norm`: of the running mean; `grokfast/filter_ratio`: what the filter adds,
      as a fraction of the gradient's norm
    - `muon/ortho_error`: mean over the matrices of ||X Xt - I||_F / sqrt(shorter side), before
      the learning rate; `muon/ns_iterations`: most steps that a leaf took, polishing included
    - `qk_clip/num_clipped`: heads; `qk_clip/max_norm`: largest norm of a head before clipping

    A part that is switched off has no entry.

    Raises:
        ValueError: the optimizer was built without `diagnostics=True`.
    """
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, MeasuredState))
    found = [node for node in nodes if isinstance(node, MeasuredState)]
    if not found:
        raise ValueError("`opt_state` has no diagnostics: build it with `diagnostics=True`.")
    return {key: value for node in found for key, value in node.metrics.items()}


def norm_of(key: str) -> Measure:
    """Return the measure that is the norm of the updates, under this name."""
    return lambda before, after, state: {key: optax.tree.norm(after)}


def filter_metrics(lamb: float) -> Measure:
    """Return the measure of `grokfast_ema`."""

    def measure(before, after, state):
        ema, gradient = optax.tree.norm(state.ema), optax.tree.norm(before)
        ratio = jnp.where(gradient > 0, lamb * ema / jnp.where(gradient > 0, gradient, 1), 0)
        return {"grokfast/ema_norm": ema, "grokfast/filter_ratio": ratio}

    return measure


def muon_metrics(layout: Layout) -> Measure:
    """Return the measure of `scale_by_muon`."""

    def measure(before, after, state):
        leaves = jax.tree_util.tree_leaves_with_path(after)
        errors = [ortho_error(to_matrices(x, layout(name(path), x))).ravel() for path, x in leaves]
        mean = jnp.concatenate(errors).mean() if errors else 0.0
        return {"muon/ortho_error": mean, "muon/ns_iterations": state.iterations}

    return measure


def clip_metrics(before: Any, after: Any, state: Any) -> dict[str, Array]:
    """Return the measure of `qk_clip`."""
    del before, after
    return {"qk_clip/num_clipped": state.num_clipped, "qk_clip/max_norm": state.max_norm}


def ortho_error(x: Float[Array, "*batch m n"]) -> Float[Array, "*batch"]:
    """Return ||X Xt - I||_F / sqrt(m), m the shorter side; 1 for a matrix of zeros."""
    x = (x if x.shape[-2] <= x.shape[-1] else x.mT).astype(jnp.float32)
    with jax.default_matmul_precision("highest"):
        gram = x @ x.mT
    difference = gram - jnp.eye(gram.shape[-1])
    return jnp.linalg.norm(difference, axis=(-2, -1)) / gram.shape[-1] ** 0.5
