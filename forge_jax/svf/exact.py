"""The thin singular value decomposition of a whole matrix."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Thin = tuple[Float[Array, "*batch m r"], Float[Array, "*batch r"], Float[Array, "*batch r n"]]

WORST, MILD = 1e5, 16.0
"""condition numbers: above the one LAPACK's own SVD is taken, below the other float32 is enough"""


def thin_svd(matrix: Float[Array, "*batch m n"]) -> Thin:
    """U, s (falling) and Vt of float32 matrices, r = min(m, n).

    On a CPU by the eigenvectors V of the smaller Gram matrix, AtA or AAt, in float64, then U = A V
    / s (Golub and Van Loan, section 8.6.3): half the time of LAPACK's gesdd. Its known weakness,
    that AtA squares the condition number, is below float32's resolution up to a condition of
    `WORST`; matrices beyond it, matrices that are not finite, what is traced, and other devices
    take `jnp.linalg.svd`.
    """
    if jax.default_backend() == "cpu" and not isinstance(matrix, jax.core.Tracer):
        found = by_gram(np.asarray(matrix))
        if found is not None:
            u, s, vt = map(jnp.asarray, found)
            return u, s, vt
    u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
    return u, s, vt


def by_gram(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """The same in NumPy; None where the condition is too bad for it."""
    is_wide = matrix.shape[-2] < matrix.shape[-1]
    tall = np.swapaxes(matrix, -1, -2) if is_wide else matrix
    wide = tall.astype(np.float64)
    gram = np.swapaxes(wide, -1, -2) @ wide
    if not np.isfinite(gram).all():
        return None
    values, v = np.linalg.eigh(gram)
    s, v = np.sqrt(np.maximum(values[..., ::-1], 0)), v[..., ::-1]
    if not (s[..., :1] < WORST * s[..., -1:]).all():
        return None
    vt = np.swapaxes(v, -1, -2).astype(np.float32)
    exact = (s[..., :1] > MILD * s[..., -1:]).any()
    u = wide @ v if exact else tall @ np.swapaxes(vt, -1, -2)
    u, s = (u / s[..., None, :]).astype(np.float32), s.astype(np.float32)
    return (np.swapaxes(vt, -1, -2), s, np.swapaxes(u, -1, -2)) if is_wide else (u, s, vt)
