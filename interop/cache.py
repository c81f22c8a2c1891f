"""Singular value decompositions kept on disk by the content of the matrices."""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from forge_jax import svf
from interop import formats

PARTS = ("u", "s", "vt")
DIGEST = "sha256"
ROUTINE = "gram"
"""how matrices are decomposed; another routine has other singular vectors"""


def cached_factors(
    params: Any,
    select: Callable[[str, Any], bool],
    directory: Path | None = None,
    *,
    max_full: int | None = None,
) -> Any:
    """`svf.decompose(params, select)`'s factors, read from `directory` if there.

    A matrix with more than `max_full` singular values gets a randomized decomposition of so many.
    The file is named by the selected matrices and their paths, `max_full`, the routine, the kind of
    device and the versions of JAX and NumPy, so that of another checkpoint, selection or routine is
    never taken for it: a trained z belongs to one decomposition. A damaged file is written again.
    Without a `directory` nothing is kept.
    """

    def decompose():
        return svf.decompose(params, select, max_full=max_full, key=jax.random.key(0))[0]

    if directory is None:
        return decompose()
    leaves = ((svf.path_name(path), leaf) for path, leaf in jax.tree.leaves_with_path(params))
    chosen = {name: leaf for name, leaf in leaves if select(name, leaf)}
    device = jax.default_backend()
    how = f"{max_full}/{ROUTINE}/{device}/{jax.__version__}/{np.__version__}".encode()
    found = hashlib.sha256(_digest(chosen).tobytes() + how).hexdigest()
    path = directory / f"svd-{found[:16]}.safetensors"
    stored = _read(path)
    if stored:
        return svf.restore(params, select, lambda leaf: _parts(stored, leaf))
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


def _digest(tensors: Mapping[str, Any]) -> np.ndarray:
    """SHA-256 of names, shapes, dtypes and values: safetensors has no checksum."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name])
        found.update(f"{name} {array.shape} {array.dtype} ".encode())
        found.update(array.reshape(-1).view(np.uint8).data)
    return np.frombuffer(found.digest(), np.uint8)


def _parts(stored: dict[str, np.ndarray], name: str) -> tuple[Any, ...]:
    return tuple(jnp.asarray(stored[f"{name}.{part}"]) for part in PARTS)
