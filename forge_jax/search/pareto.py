"""Dominance ranks, crowding distance, hypervolume and its convergence test.

Every objective is minimised. The ranks and the crowding distance are JAX and run inside a
compiled search; the hypervolume is NumPy on the host: it is read once a generation, between
compiled chunks, and float64 keeps it exact where float32 sums of tiny boxes would not.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from numpy.typing import ArrayLike

from forge_jax.search.order import lexsort

_BLOCK = 128  # rows that are ranked together
_ROWS = 32  # of them, compared with a block in one loop


def non_dominated_rank(fitness: Float[Array, "population objectives"]) -> Int[Array, " population"]:
    """Rank rows by non-domination: 0 for the front, k for the front left once 0..k-1 are gone.

    Row a dominates row b where a <= b in every objective and a < b in one (Deb et al. 2002,
    section III-A), so equal rows share a rank. A row that holds a NaN or an infinity ranks one
    below the last finite front. The rank is the longest chain of dominators above a row, found
    in blocks after a lexicographic sort that puts every dominator first: O(n^2 objectives)
    comparisons and O(n) memory whatever the number of fronts.
    """
    if fitness.ndim != 2:
        raise ValueError(f"`fitness` must be (population, objectives), got {fitness.shape}.")
    rows = fitness.shape[0]
    finite = jnp.isfinite(fitness).all(axis=1, keepdims=True)
    values = jnp.where(finite, fitness, jnp.inf)
    order = lexsort(tuple(values.T[::-1]))
    values = values[order]
    is_new = jnp.any(values[1:] != values[:-1], axis=1)
    # One row of each set of equal ones is ranked. Of two different rows the earlier is no larger in
    # the first objective, so it dominates where it is no larger in any other.
    ranked = jnp.concatenate([jnp.ones(1, bool), is_new]) & finite[order, 0]
    size = min(_BLOCK, rows + -rows % _ROWS)
    padding = (0, -rows % size)
    others = jnp.pad(values[:, 1:].T, ((0, 0), padding), constant_values=jnp.inf)
    blocks = others.reshape(len(others), (rows + padding[1]) // size, size).swapaxes(0, 1)
    ranks = _longest_chain(blocks, jnp.pad(ranked, padding).reshape(-1, size)).reshape(-1)[:rows]
    equal = jax.lax.cummax(jnp.where(ranked, jnp.arange(rows), 0))
    ranks = jnp.where(finite[order, 0], ranks[equal], ranks.max() + 1)
    return jnp.zeros(rows, jnp.int32).at[order].set(ranks)


def _longest_chain(
    blocks: Float[Array, "blocks others size"], ranked: Bool[Array, "blocks size"]
) -> Int[Array, "blocks size"]:
    """Return for each ranked row the length of the longest chain that dominates it, else -1."""
    ranks = jnp.full(ranked.shape, -1, jnp.int32)
    return jax.lax.fori_loop(0, len(blocks), _rank_block, (blocks, ranked, ranks))[2]


# The bodies of the outer loops close over nothing: called outside jit, JAX then compiles them once.
def _rank_block(index, carry):
    """Rank one block: below the blocks before it, then among its own rows until none moves."""
    blocks, ranked, ranks = carry
    block, mine, depth = blocks[index], ranked[index], jnp.zeros(ranks.shape[1], jnp.int32)
    *_, depth = jax.lax.fori_loop(0, index, _below_block, (blocks, ranks, block, depth))
    _, _, depth, _ = jax.lax.while_loop(_moved, _settle, (block, mine, depth, jnp.bool_(True)))
    return blocks, ranked, ranks.at[index].set(jnp.where(mine, depth, -1))


def _below_block(index, carry):
    """Deepen the rows of a block by what dominates them in an earlier block."""
    blocks, ranks, block, depth = carry
    places = jnp.full(len(depth), len(depth))  # after all rows of the earlier one
    return blocks, ranks, block, _deepened(depth, block, places, blocks[index], ranks[index])


def _settle(carry):
    """Deepen the rows of a block once by what dominates them inside it."""
    block, mine, depth, _ = carry
    places = jnp.arange(len(depth))
    deeper = _deepened(depth, block, places, block, jnp.where(mine, depth, -1))
    return block, mine, deeper, (deeper != depth).any()


def _moved(carry):
    """Tell whether the last `_settle` changed a row."""
    return carry[3]


def _deepened(
    depth: Int[Array, " columns"],
    columns: Float[Array, "others columns"],
    places: Int[Array, " columns"],
    rows: Float[Array, "others rows"],
    ranks: Int[Array, " rows"],
) -> Int[Array, " columns"]:
    """Raise `depth` to one more than the rank of every row before a column that dominates it."""

    def several(part, depth):
        # Written out row by row: XLA's CPU has no fast reduction over the first of two axes.
        first = part * _ROWS
        some = jax.lax.dynamic_slice_in_dim(rows, first, _ROWS, axis=1)
        rank = jax.lax.dynamic_slice_in_dim(ranks, first, _ROWS)
        for i in range(_ROWS):
            below = first + i < places
            for row, column in zip(some, columns, strict=True):
                below &= row[i] <= column
            depth = jnp.maximum(depth, jnp.where(below, rank[i] + 1, 0))
        return depth

    return jax.lax.fori_loop(0, rows.shape[1] // _ROWS, several, depth)


def crowding_distance(
    fitness: Float[Array, "population objectives"],
    rank: Int[Array, " population"] | None = None,
) -> Float[Array, " population"]:
    """Measure the room around each row among the rows of its rank (all rows if `rank` is None).

    The mean over objectives of (next - previous) / (largest - smallest), inf at the ends of an
    objective that varies and in ranks of one or two rows. Deb et al. 2002 (section III-B) take
    the sum: same order. Rows that are not finite get 0.
    """
    finite = jnp.isfinite(fitness).all(axis=1)
    rank = jnp.zeros(len(fitness), jnp.int32) if rank is None else rank
    # Failed rows are a group of their own, behind every real rank.
    group = jnp.where(finite, rank, jnp.iinfo(jnp.int32).max)
    values = jnp.where(finite[:, None], fitness, 0)
    ordered = jnp.sort(group)
    start = jnp.searchsorted(ordered, ordered)
    end = jnp.searchsorted(ordered, ordered, side="right") - 1

    def gap(value):
        """Return the relative distance between both neighbours of the same group."""
        order = lexsort([value, group])
        value = value[order]
        rows = jnp.arange(len(value))
        inner = (rows > start) & (rows < end)
        extent = value[end] - value[start]
        gap = jnp.where(inner, jnp.roll(value, -1) - jnp.roll(value, 1), jnp.inf)
        gap = jnp.where(extent > 0, gap / jnp.where(extent > 0, extent, 1), 0)
        gap = jnp.where(end - start < 2, jnp.inf, gap)
        return jnp.zeros_like(value).at[order].set(gap)

    distance = jax.vmap(gap, in_axes=1)(values).mean(axis=0)
    return jnp.where(finite, distance, 0)


def hypervolume(front: ArrayLike, reference: ArrayLike) -> float:
    """Return the volume that `front` (rows, objectives) dominates below `reference`, exactly.

    Up to four objectives; rows need not be mutually non-dominated, and rows that are not
    finite or not below `reference` in every objective add nothing. A sweep along the first
    objective keeps, per cell of the grid of the second and third, the least fourth seen so far:
    O(n^3) time in n vectorised steps (a few ms for 100 rows of 4 objectives), O(n^2) memory.
    """
    points, corner = np.asarray(front, np.float64), np.asarray(reference, np.float64)
    if points.ndim != 2 or corner.shape != points.shape[1:] or not 1 <= points.shape[1] <= 4:
        raise ValueError(
            "`front` must be (rows, objectives) with 1 to 4 objectives and `reference` "
            f"(objectives,), got {points.shape} and {corner.shape}."
        )
    points = points[np.isfinite(points).all(axis=1) & (points < corner).all(axis=1)]
    if not len(points):
        return 0.0
    # Objectives that are missing become sides of length one.
    missing = ((0, 0), (4 - len(corner), 0))
    points = np.pad(points, missing)
    corner = np.pad(corner, missing[1], constant_values=1.0)
    points = points[np.argsort(points[:, 0], kind="stable")]
    (second, rows), (third, columns) = (
        np.unique(points[:, axis], return_inverse=True) for axis in (1, 2)
    )
    area = np.outer(np.diff(second, append=corner[1]), np.diff(third, append=corner[2]))
    lowest = np.full(area.shape, corner[3])
    volume = 0.0
    for point, row, column, width in zip(
        points, rows, columns, np.diff(points[:, 0], append=corner[0]), strict=True
    ):
        cells = lowest[row:, column:]
        np.minimum(cells, point[3], out=cells)
        if width > 0:
            volume += width * float(np.vdot(area, corner[3] - lowest))
    return volume


def converged(hypervolumes: Sequence[float], window: int = 10, tolerance: float = 0.01) -> bool:
    """Tell whether the hypervolume moved less than `tolerance` over the last `window` generations.

    The movement is (largest - smallest) / |last| over the last `window` + 1 values; fewer values,
    a value that is not finite, or a front that has not reached the reference (0) is no convergence.
    """
    if window < 1 or tolerance < 0:
        raise ValueError(f"Want `window` >= 1 and `tolerance` >= 0, got {window} and {tolerance}.")
    recent = np.asarray(hypervolumes[-window - 1 :], np.float64)
    if len(recent) <= window or not np.isfinite(recent).all() or recent[-1] == 0:
        return False
    return bool(np.ptp(recent) <= tolerance * abs(recent[-1]))
