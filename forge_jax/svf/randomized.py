"""Randomized singular value decomposition (Halko, Martinsson and Tropp, arXiv 0909.4061)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def randomized_svd(
    matrix: Float[Array, "*batch m n"],
    rank: int,
    key: Array,
    *,
    oversampling: int = 10,
    power_iterations: int = 2,
) -> tuple[Float[Array, "*batch m r"], Float[Array, "*batch r"], Float[Array, "*batch r n"]]:
    """Approximate the `rank` largest singular values and their vectors.

    Algorithms 4.4 and 5.1: Q spans the range of (A At)^q A G for Gaussian G of rank + oversampling
    columns, with a QR between the products to keep small directions apart in float32; then the
    small matrix Qt A is decomposed exactly. The error falls with the ratio s[rank] / s[rank - 1] to
    the power 2q + 1: on a flat spectrum the last components are not to be trusted.

    Raises:
        ValueError: `rank` is not in [1, min(m, n)].
    """
    m, n = matrix.shape[-2:]
    if not 1 <= rank <= min(m, n):
        raise ValueError(f"`rank` must lie in [1, {min(m, n)}] for {matrix.shape=}, got {rank}.")
    columns = min(rank + oversampling, m, n)
    q = _orthonormal(_matmul(matrix, jax.random.normal(key, (n, columns), matrix.dtype)))
    for _ in range(power_iterations):
        q = _orthonormal(_matmul(matrix, _orthonormal(_matmul(_transposed(matrix), q))))
    u, s, vt = jnp.linalg.svd(_matmul(_transposed(q), matrix), full_matrices=False)
    return _matmul(q, u)[..., :rank], s[..., :rank], vt[..., :rank, :]


def _orthonormal(x: Float[Array, "*batch m r"]) -> Float[Array, "*batch m r"]:
    return jnp.linalg.qr(x)[0]


def _transposed(x: Float[Array, "*batch m r"]) -> Float[Array, "*batch r m"]:
    return jnp.swapaxes(x, -1, -2)


def _matmul(x: Float[Array, "*batch m k"], y: Float[Array, "*batch k n"]) -> Array:
    # TF32, the default of a GPU, would lose the orthogonality of q after three digits.
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)
