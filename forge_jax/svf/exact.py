"""The thin singular value decomposition of a whole matrix."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

Thin = tuple[Float[Array, "*batch m r"], Float[Array, "*batch r"], Float[Array, "*batch r n"]]

WORST, MILD = 1e4, 16.0
"""condition numbers: above the one LAPACK's own SVD is taken, below the other float32 is enough"""


def thin_svd(matrix: Float[Array, "*batch m n"]) -> Thin:
    """U, s (falling) and Vt of float32 matrices, r = min(m, n).

    On a CPU by the eigenvectors V of the smaller Gram matrix, AtA or AAt, in float64, then U = A V
    / s (Golub and Van Loan, section 8.6.3): half the time of LAPACK's gesdd on GPT-2's shapes
    (docs/performance.md). Its known weakness, that AtA squares the condition number, is below
    float32's resolution up to a condition of `WORST`; matrices beyond it, matrices that are not
    finite, what is traced, and other devices take `jnp.linalg.svd`.
    """
    if jax.default_backend() != "cpu" or isinstance(matrix, Tracer):
        return lapack(matrix)
    whole = np.asarray(matrix)
    stack = whole.reshape(-1, *whole.shape[-2:])
    parts = zip(*(by_gram(one) or lapack(one) for one in stack), strict=True)
    u, s, vt = (np.stack(part).reshape(*whole.shape[:-2], *part[0].shape) for part in parts)
    return jnp.asarray(u), jnp.asarray(s), jnp.asarray(vt)


def lapack(matrix: Float[Array, "*batch m n"]) -> Thin:
    """The same as JAX has it."""
    u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
    return u, s, vt


def by_gram(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """One matrix in NumPy; None where its condition is too bad for it."""
    if not np.isfinite(matrix).all():
        return None
    tall = matrix.T if matrix.shape[0] < matrix.shape[1] else matrix
    wide = tall.astype(np.float64)
    values, v = np.linalg.eigh(wide.T @ wide)
    s, v = np.sqrt(np.maximum(values[::-1], 0)), v[:, ::-1]
    if not s[0] < WORST * s[-1]:
        return None
    vt = v.T.astype(np.float32)
    u = wide @ v if s[0] > MILD * s[-1] else tall @ vt.T
    u, s = (u / s).astype(np.float32), s.astype(np.float32)
    return (vt.T, s, u.T) if tall is not matrix else (u, s, vt)
