"""Which axes of a leaf are a matrix, and the names of leaves."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from optax.contrib import MuonDimensionNumbers

Select = Callable[[str, Any], bool]
"""path and leaf -> yes or no; a path is the names down to the leaf, joined with `/`"""
Layout = Callable[[str, Any], MuonDimensionNumbers]
"""path and leaf -> the input (reduction) and output axes; the other axes are a batch"""

# Whole components of a path; `head` alone is the classifier of many models.
_EMBEDDINGS = {
    *("embedding", "embeddings", "embed", "embed_tokens", "embed_in", "embed_out"),
    *("tok_emb", "token_emb", "token_embedding", "pos_emb", "position_embedding"),
    *("wte", "wpe", "lm_head", "head", "output_head"),
}


def name(path) -> str:
    """Return a key path of jax as one string, its components joined with `/`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def components(path: str) -> list[str]:
    """Split a path where either jax (`/`) or torch (`.`) joins it."""
    return path.replace(".", "/").split("/")


def flax_layout(path: str, leaf: Any) -> MuonDimensionNumbers:
    """Read the last two axes as (inputs, outputs), leaves of `nn.scan` as batches of them."""
    del path, leaf
    return MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)


def torch_layout(path: str, leaf: Any) -> MuonDimensionNumbers:
    """Read the last two axes as (outputs, inputs), as `torch.nn.Linear` stores its weight."""
    del path, leaf
    return MuonDimensionNumbers(reduction_axis=-1, output_axis=-2)


def flax_attention_layout(path: str, leaf: Any) -> MuonDimensionNumbers:
    """Read the kernels of `flax`'s MultiHeadDotProductAttention; all others as `flax_layout` does.

    Those of `query`, `key` and `value` are (inputs, heads, width), of `out` (heads, width, inputs);
    a layer axis of `nn.scan` comes before them. Biases (heads, width) look like matrices: send them
    to the fallback by name.
    """
    part = next((p for p in components(path) if p in ("query", "key", "value", "out")), None)
    if part is None or components(path)[-1] == "bias" or jnp.ndim(leaf) < 3:
        return flax_layout(path, leaf)
    if part == "out":
        return MuonDimensionNumbers(reduction_axis=(-3, -2), output_axis=-1)
    return MuonDimensionNumbers(reduction_axis=-3, output_axis=(-2, -1))


def is_embedding(path: str, leaf: Any) -> bool:
    """Return whether a component of the path is the usual name of an embedding or a head."""
    del leaf
    return not _EMBEDDINGS.isdisjoint(components(path))


def to_matrices(x: Array, dims: MuonDimensionNumbers) -> Float[Array, "*batch inputs outputs"]:
    """Bring a leaf to [batch, inputs, outputs]; `from_matrices` is the inverse."""
    order, shape = _order(x.shape, dims)
    return jnp.transpose(x, order).reshape(shape)


def from_matrices(
    matrices: Float[Array, "*batch inputs outputs"], shape: tuple[int, ...], dims
) -> Array:
    """Bring matrices back to a leaf of this shape."""
    order, _ = _order(shape, dims)
    back = sorted(range(len(order)), key=lambda i: order[i])
    return jnp.transpose(matrices.reshape([shape[axis] for axis in order]), back)


def _order(shape: tuple[int, ...], dims: MuonDimensionNumbers) -> tuple[list[int], list[int]]:
    """Return the axes as batch, inputs, outputs, and the shape of the matrices."""
    inputs, outputs = _axes(dims.reduction_axis, shape), _axes(dims.output_axis, shape)
    if set(inputs) & set(outputs):
        raise ValueError(f"A layout must have two kinds of axes, got {dims} for shape {shape}.")
    batch = [axis for axis in range(len(shape)) if axis not in (*inputs, *outputs)]
    sizes = [math.prod(shape[axis] for axis in axes) for axes in (inputs, outputs)]
    return [*batch, *inputs, *outputs], [*(shape[axis] for axis in batch), *sizes]


def _axes(axes: int | Sequence[int], shape: tuple[int, ...]) -> list[int]:
    return [axis % len(shape) for axis in ([axes] if isinstance(axes, int) else axes)]
