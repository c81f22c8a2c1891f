"""Singular value decompositions kept on disk by the content of the checkpoint."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from forge_jax import svf
from interop import formats
from interop.config import Checkpoint

PARTS = ("u", "s", "vt")


def cached_factors(
    checkpoint: Checkpoint,
    select: Callable[[str, Any], bool],
    name: str,
    directory: Path | None = None,
    *,
    max_full: int | None = None,
) -> Any:
    """`svf.decompose(checkpoint.params, select)`'s factors, read from `directory` if there.

    A matrix with more than `max_full` singular values gets a randomized decomposition of so many.
    The file is named by the hash of the weights, the `name` of the selection, `max_full` and the
    version of JAX, so another checkpoint, selection or SVD routine is never taken for it: singular
    vectors are unique only up to sign, and a trained z belongs to one decomposition. Without a
    `directory` nothing is kept.
    """

    def decompose():
        options = {"max_full": max_full, "key": jax.random.key(0)}
        return svf.decompose(checkpoint.params, select, **options)[0]

    if directory is None:
        return decompose()
    content = f"{checkpoint.sha256}/{name}/{max_full}/{jax.__version__}".encode()
    path = directory / f"svd-{hashlib.sha256(content).hexdigest()[:16]}.safetensors"
    if path.is_file():
        stored = formats.read_safetensors(path)
        return svf.restore(checkpoint.params, select, lambda leaf: _parts(stored, leaf))
    factors = decompose()
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{leaf_name}.{part}": np.asarray(getattr(leaf, part))
        for leaf_name, leaf in svf.named_factors(factors)
        for part in PARTS
    }
    formats.write_safetensors(path, tensors)
    return factors


def _parts(stored: dict[str, np.ndarray], name: str) -> tuple[Any, ...]:
    return tuple(jnp.asarray(stored[f"{name}.{part}"]) for part in PARTS)
