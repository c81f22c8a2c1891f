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
DIGEST = "sha256"
ROUTINE = "gram"
"""how matrices are decomposed; another routine has other singular vectors"""


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
    The file is named by the hash of the weights, the `name` of the selection, `max_full`, the
    routine and the version of JAX, so another checkpoint, selection or routine is never taken for
    it: singular vectors are unique only up to sign, and a trained z belongs to one decomposition.
    A damaged file is written again. Without a `directory` nothing is kept.
    """

    def decompose():
        options = {"max_full": max_full, "key": jax.random.key(0)}
        return svf.decompose(checkpoint.params, select, **options)[0]

    if directory is None:
        return decompose()
    content = f"{checkpoint.sha256}/{name}/{max_full}/{ROUTINE}/{jax.__version__}".encode()
    path = directory / f"svd-{hashlib.sha256(content).hexdigest()[:16]}.safetensors"
    stored = _read(path)
    if stored:
        return svf.restore(checkpoint.params, select, lambda leaf: _parts(stored, leaf))
    factors = decompose()
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{leaf_name}.{part}": np.asarray(getattr(leaf, part))
        for leaf_name, leaf in svf.named_factors(factors)
        for part in PARTS
    }
    formats.write_safetensors(path, {**tensors, DIGEST: _digest(tensors)})
    return factors


def _read(path: Path) -> dict[str, np.ndarray] | None:
    """The tensors of a file that is there and whole."""
    if not path.is_file():
        return None
    try:
        stored = formats.read_safetensors(path)
    except ValueError:
        return None
    digest = stored.pop(DIGEST, None)
    return stored if digest is not None and np.array_equal(digest, _digest(stored)) else None


def _digest(tensors: dict[str, np.ndarray]) -> np.ndarray:
    """SHA-256 of names and values: safetensors has no checksum."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode())
        found.update(np.ascontiguousarray(tensors[name]).data)
    return np.frombuffer(found.digest(), np.uint8)


def _parts(stored: dict[str, np.ndarray], name: str) -> tuple[Any, ...]:
    return tuple(jnp.asarray(stored[f"{name}.{part}"]) for part in PARTS)
