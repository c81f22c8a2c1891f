"""The thin decomposition against NumPy's in float64, on good and on bad matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from forge_jax.svf.exact import by_gram, thin_svd


def conditioned(shape, condition, seed=0):
    """Float32 matrices of random vectors whose singular values fall to 1 / condition."""
    rng = np.random.default_rng(seed)
    r = min(shape[-2:])
    u = np.linalg.qr(rng.standard_normal((*shape[:-1], r)))[0]
    v = np.linalg.qr(rng.standard_normal((*shape[:-2], shape[-1], r)))[0]
    s = np.geomspace(1, 1 / condition, r)
    return ((u * s) @ np.swapaxes(v, -1, -2)).astype(np.float32)


def check(matrix, found):
    """Values as NumPy's, orthonormal vectors, and the matrix again."""
    u, s, vt = (np.asarray(x, np.float64) for x in found)
    wanted = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    top = wanted[..., :1]
    np.testing.assert_allclose(s / top, wanted / top, atol=1e-6)
    ones = np.eye(s.shape[-1])
    for product in (np.swapaxes(u, -1, -2) @ u, vt @ np.swapaxes(vt, -1, -2)):
        np.testing.assert_allclose(product, np.broadcast_to(ones, product.shape), atol=1e-5)
    np.testing.assert_allclose((u * s[..., None, :]) @ vt, matrix, atol=2e-6)


@pytest.mark.parametrize("shape", [(48, 48), (20, 60), (60, 20), (7, 1)])
@pytest.mark.parametrize("condition", [1.5, 100.0, 5e3])
def test_decomposition_is_numpys(shape, condition):
    matrix = conditioned(shape, condition)
    found = by_gram(matrix)
    assert found is not None
    check(matrix, found)
    np.testing.assert_array_equal(thin_svd(jnp.asarray(matrix))[1], found[1])


def test_what_the_gram_matrix_cannot_tell_apart_goes_to_lapack():
    """A rank of 3, a matrix of zeros, a condition of 1e7, one such matrix of a stack."""
    rng = np.random.default_rng(0)
    low = (rng.standard_normal((30, 3)) @ rng.standard_normal((3, 20))).astype(np.float32)
    steep = conditioned((30, 20), 1e7)
    for matrix in (low, steep, np.zeros((5, 4), np.float32)):
        assert by_gram(matrix) is None
    for matrix in (low / 10, steep, np.stack([steep, conditioned((30, 20), 2)])):
        check(matrix, thin_svd(jnp.asarray(matrix)))


def test_values_that_lie_together_at_the_bottom_have_orthonormal_vectors():
    """Half of 200 values within a per cent of 1 / 9,000."""
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.standard_normal((200, 200)))[0] for _ in range(2))
    s = np.where(np.arange(200) < 100, 1.0, rng.uniform(1, 1.01, 200) / 9000)
    matrix = ((u * s) @ v.T).astype(np.float32)
    assert by_gram(matrix) is not None
    check(matrix, thin_svd(jnp.asarray(matrix)))


def test_what_is_no_number_stays_none():
    for bad in (np.nan, np.inf):
        matrix = np.ones((4, 4), np.float32)
        matrix[1, 2] = bad
        assert not np.isfinite(np.asarray(thin_svd(jnp.asarray(matrix))[1])).any()


def test_a_traced_matrix_is_decomposed_in_the_program():
    matrix = conditioned((12, 8), 10.0)
    check(matrix, jax.jit(thin_svd)(matrix))
