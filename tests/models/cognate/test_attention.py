"""Windowed attention against a loop, in one piece and in blocks."""

import jax.numpy as jnp
import numpy as np
import pytest

from forge_jax.models.cognate.attention import find_place, window_attention


def draw(time, seed=0):
    return np.random.default_rng(seed).standard_normal((3, 2, 2, time, 4)).astype(np.float32)


def place_of(segments):
    batch = len(segments)
    empty = jnp.zeros((batch, 0), jnp.int32)
    return find_place(jnp.array(segments), empty, jnp.full(batch, -1), jnp.zeros(batch, jnp.int32))


def loop(q, k, v, segments, back, ahead):
    """One query after the other."""
    out = np.zeros_like(q)
    for b, h, i in np.ndindex(q.shape[:3]):
        seen = [
            j
            for j in range(q.shape[2])
            if i - back <= j <= i + ahead and segments[b][i] == segments[b][j]
        ]
        scores = np.array([q[b, h, i] @ k[b, h, j] / 2 for j in seen])
        weights = np.exp(scores - scores.max())
        out[b, h, i] = (weights / weights.sum()) @ v[b, h, seen]
    return out


@pytest.mark.parametrize(
    ("time", "reach"), [(5, (7, 0)), (11, (2, 0)), (9, (2, 0)), (8, (0, 0)), (8, (3, 3))]
)
def test_matches_the_loop(time, reach):
    """The second to fourth are cut into blocks, the last looks both ways."""
    q, k, v = draw(time)
    segments = np.array([[0] * time, [4] * (time // 2) + [5] * (time - time // 2)])
    got = window_attention(q, k, v, place_of(segments), reach)
    np.testing.assert_allclose(got, loop(q, k, v, segments, *reach), atol=1e-5)


def test_a_cache_stands_before():
    q, k, v = draw(7)
    segments = np.array([[0] * 7, [2] * 3 + [3] * 4])
    whole = window_attention(q, k, v, place_of(segments), (2, 0))
    last = jnp.array(segments[:, 4])
    place = find_place(jnp.array(segments[:, 5:]), jnp.array(segments[:, 3:5]), last, last * 0 + 5)
    got = window_attention(q[:, :, 5:], k[:, :, 3:], v[:, :, 3:], place, (2, 0))
    np.testing.assert_allclose(got, whole[:, :, 5:], atol=1e-6)


def test_positions_count_from_the_documents_start():
    place = place_of(np.array([[0, 0, 0, 1, 1], [3, 4, 4, 4, 9]]))
    np.testing.assert_array_equal(place.positions, [[0, 1, 2, 0, 1], [0, 0, 1, 2, 0]])
    np.testing.assert_array_equal(place.is_first, [[1, 0, 0, 1, 0], [1, 1, 0, 0, 1]])
    more = find_place(
        jnp.array([[1, 1, 2], [5, 5, 5]]),
        jnp.zeros((2, 0), jnp.int32),
        jnp.array([1, 9]),
        jnp.array([2, 1]),
    )
    np.testing.assert_array_equal(more.positions, [[2, 3, 0], [0, 1, 2]])
