"""Between a leaf of any shape and the (batch, m, n) matrices that it holds."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class Axes:
    """Which axes of a leaf are stacked matrices, which are summed over, which are produced."""

    batch: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the leaf looked before it was decomposed."""

    shape: tuple[int, ...]
    dtype: str
    batch: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


AxesRule = Mapping[str, Axes] | Callable[[str, Any], Axes | None]


def axes_of(name: str, leaf: Any, axes: AxesRule | None) -> Axes:
    """Find the declared axes of a leaf; a matrix without a declaration is (inputs, outputs)."""
    declared = None
    if axes is not None:
        declared = axes(name, leaf) if callable(axes) else axes.get(name)
    if declared is None and leaf.ndim == 2:
        return Axes((), (0,), (1,))
    if declared is None:
        kind = "is no matrix" if leaf.ndim < 2 else "needs its batch, inputs and outputs in `axes`"
        raise ValueError(f"{name} has shape {leaf.shape}: it {kind}.")
    every = (*declared.batch, *declared.inputs, *declared.outputs)
    full = sorted(axis % leaf.ndim if -leaf.ndim <= axis < leaf.ndim else -1 for axis in every)
    if full != list(range(leaf.ndim)) or not declared.inputs or not declared.outputs:
        raise ValueError(
            f"{declared} of {name} must name each axis of {leaf.shape} once and have inputs and "
            "outputs."
        )
    parts = (declared.batch, declared.inputs, declared.outputs)
    return Axes(*(tuple(axis % leaf.ndim for axis in part) for part in parts))


def as_matrix(name: str, leaf: Any, axes: Axes) -> tuple[Float[Array, "*batch m n"], Layout]:
    """Bring a leaf to float32 (batch, m, n): XLA has no half-precision SVD."""
    if not isinstance(leaf, jax.Array | np.ndarray):
        raise ValueError(f"{name} must be an array of JAX or NumPy, got {type(leaf).__name__}.")
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise ValueError(f"{name} must have a floating-point dtype to decompose, got {leaf.dtype}.")
    layout = Layout(tuple(leaf.shape), str(leaf.dtype), axes.batch, axes.inputs, axes.outputs)
    ordered = jnp.asarray(leaf, jnp.float32).transpose(*axes.batch, *axes.inputs, *axes.outputs)
    sizes = [math.prod(leaf.shape[axis] for axis in part) for part in (axes.inputs, axes.outputs)]
    return ordered.reshape(*ordered.shape[: len(axes.batch)], *sizes), layout


def to_leaf(matrix: Float[Array, "*batch m n"], layout: Layout, dtype: Any = None) -> Array:
    """Give a (batch, m, n) matrix the shape, the order of axes and the dtype of its leaf."""
    order = (*layout.batch, *layout.inputs, *layout.outputs)
    matrix = matrix.reshape([layout.shape[axis] for axis in order])
    back = [order.index(axis) for axis in range(len(order))]
    return matrix.transpose(back).astype(layout.dtype if dtype is None else dtype)
