"""Muon: momentum with its singular values set to one (Jordan et al. 2024)."""

import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from forge_jax.optim.layout import Layout, flax_layout, from_matrices, name, to_matrices
from forge_jax.optim.newton_schulz import Coefficients, orthogonalize_and_count, schedule

UpdateScale = Literal["none", "width", "rms"]


class ScaleByMuonState(NamedTuple):
    """Momentum, and what the last iteration took."""

    mu: optax.Updates  # same structure and shapes as the params, float32
    iterations: jax.Array  # int32 scalar, the most steps that a leaf took


def scale_by_muon(
    momentum: float = 0.95,
    steps: int = 5,
    coeffs: Coefficients = "jordan",
    *,
    tol: float | None = None,
    nesterov: bool = False,
    layout: Layout = flax_layout,
) -> optax.GradientTransformationExtraArgs:
    r"""Orthogonalise the running mean of the gradient, matrix by matrix.

    $$ m_t = \beta m_{t-1} + (1-\beta) g_t, \qquad u_t = \mathrm{orthogonalize}(m_t) $$

    With `nesterov` it is $\beta m_t + (1-\beta) g_t$ that is orthogonalised, as in
    `torch.optim.Muon`. The mean is not corrected for its start at zero: orthogonalising does not
    see its length. Axes that the layout does not name are a batch of independent matrices.

    Args:
        momentum: $\beta$, in [0, 1).
        steps: see `orthogonalize`.
        coeffs: see `orthogonalize`.
        tol: see `orthogonalize`.
        nesterov: look one step ahead.
        layout: which axes are inputs and outputs.

    Raises:
        ValueError: an argument is out of its range; in `init`, a leaf has fewer than two axes.
    """
    if not 0 <= momentum < 1:
        raise ValueError(f"`momentum` must lie in [0, 1), got {momentum}.")
    schedule(coeffs, steps)

    def init_fn(params):
        vectors = [
            f"{name(path)} {jnp.shape(leaf)}"
            for path, leaf in jax.tree_util.tree_leaves_with_path(params)
            if jnp.ndim(leaf) < 2
        ]
        if vectors:
            raise ValueError(f"Only matrices can be orthogonalised, not {', '.join(vectors)}.")
        mu = jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), params)
        return ScaleByMuonState(mu, jnp.zeros((), jnp.int32))

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args

        def mean(m, g):
            return momentum * m + (1 - momentum) * g.astype(jnp.float32)

        mu = jax.tree.map(mean, state.mu, updates)
        ahead = jax.tree.map(mean, mu, updates) if nesterov else mu
        taken = [jnp.zeros((), jnp.int32)]

        def orthogonal(path, m, g):
            dims = layout(name(path), m)
            matrices = to_matrices(m, dims)
            matrices, count = orthogonalize_and_count(matrices, steps, coeffs, tol)
            taken.append(count.astype(jnp.int32))
            return from_matrices(matrices, m.shape, dims).astype(g.dtype)

        updates = jax.tree_util.tree_map_with_path(orthogonal, ahead, updates)
        return updates, ScaleByMuonState(mu, jnp.stack(taken).max())

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def scale_by_fan(
    update_scale: UpdateScale = "none", layout: Layout = flax_layout
) -> optax.GradientTransformationExtraArgs:
    r"""Multiply each update by a factor of its matrix's shape.

    "none" is 1, the rule of the guide: entries have size $1/\sqrt{\max(in, out)}$. "width" is
    $\sqrt{\max(1, out/in)}$, so that one learning rate suits every width. "rms" is
    $0.2 \sqrt{\max(in, out)}$ (arXiv 2502.16982): entries of size 0.2, about those of AdamW.

    Raises:
        ValueError: `update_scale` is none of the three.
    """
    if update_scale not in ("none", "width", "rms"):
        raise ValueError(f"`update_scale` must be 'none', 'width' or 'rms', got {update_scale!r}.")

    def factor(path, u):
        shape = jax.eval_shape(lambda: to_matrices(u, layout(name(path), u))).shape
        inputs, outputs = shape[-2:]
        if update_scale == "width":
            return math.sqrt(max(1, outputs / inputs))
        return 0.2 * math.sqrt(max(inputs, outputs)) if update_scale == "rms" else 1.0

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        scaled = jax.tree_util.tree_map_with_path(lambda p, u: factor(p, u) * u, updates)
        return scaled, state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update_fn)
