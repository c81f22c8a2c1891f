"""Latency and memory of a decoder whose matrices run factored at a rank fraction.

A matrix y = x W, W (m, n), that keeps `rank` singular components runs as y = ((x U) * s) Vt
where that is cheaper, as W otherwise. Work and traffic are counted from the shapes; three
coefficients turn them into seconds and are fitted to runs measured at a few rank fractions.
Functions of `rank_fraction` take a Python number or a NumPy array (float64, exact) or a JAX
array (float32, traceable): one value or one per candidate.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import nnls

from forge_jax import svf

Shapes = Iterable[tuple[int, int]]  # (inputs, outputs) of each matrix, repeats included


class Counts(NamedTuple):
    """Work of one run."""

    flops: Any  # floating-point operations, a multiply-add is two
    bytes: Any  # read and written: weights once a step, activations in and out of each matrix


class LatencyModel(NamedTuple):
    """Seconds = overhead + per_flop * flops + per_byte * bytes, no coefficient below zero."""

    overhead: float  # seconds
    per_flop: float  # seconds
    per_byte: float  # seconds


def deployed_rank(rows: int, columns: int, rank_fraction):
    """Return the rank that a matrix keeps, see `svf.kept_rank`."""
    return svf.kept_rank(min(rows, columns), rank_fraction)


def runs_factored(rows: int, columns: int, rank):
    """Tell whether two thin factors hold fewer elements than the matrix."""
    return rank * (rows + columns) < rows * columns


def stored_elements(rows: int, columns: int, rank_fraction):
    """Count the elements of a deployed matrix: U, s and Vt, or W."""
    rank = deployed_rank(rows, columns, rank_fraction)
    factored = rank * (rows + columns + 1)
    return _namespace(rank).where(runs_factored(rows, columns, rank), factored, rows * columns)


def counts(
    matrix_shapes: Shapes,
    rank_fraction,
    tokens: int,
    *,
    itemsize: int = 4,
) -> Counts:
    """Count the work of a forward pass of `tokens` rows."""
    xp = _namespace(rank_fraction)
    flops, moved = xp.zeros_like(rank_fraction, float), xp.zeros_like(rank_fraction, float)
    for rows, columns in matrix_shapes:
        rank = deployed_rank(rows, columns, rank_fraction)
        factored = runs_factored(rows, columns, rank)
        elements = 1.0 * stored_elements(rows, columns, rank_fraction)
        # A multiply-add an element, and for s one multiply.
        flops = flops + tokens * (2 * elements - xp.where(factored, rank, 0))
        between = xp.where(factored, 2 * rank, 0)
        moved = moved + elements + tokens * (rows + columns + between)
    return Counts(flops, itemsize * moved)


def calibrate(runs: ArrayLike, seconds: ArrayLike) -> LatencyModel:
    """Fit the coefficients to measured runs (a list of `Counts`) by non-negative least squares.

    At a fixed number of tokens the work and the traffic of different ranks rise almost together:
    the split between them is then arbitrary, the prediction between the measured ranks is not.
    """
    work, times = np.asarray(runs, np.float64), np.asarray(seconds, np.float64)
    if work.ndim != 2 or work.shape != (times.size, 2) or times.size < 2:
        raise ValueError(
            "`runs` must be two or more Counts of one run and `seconds` as many numbers, "
            f"got {work.shape} and {times.shape}."
        )
    if not (np.isfinite(work).all() and np.isfinite(times).all() and (times > 0).all()):
        raise ValueError(f"`runs` must be finite and `seconds` positive, got {times.tolist()}.")
    design = np.column_stack([np.ones(len(times)), work])
    # Flops and bytes differ from 1 by nine orders of magnitude: columns of the same size.
    scale = np.maximum(design.max(axis=0), 1.0)
    coefficients, _ = nnls(design / scale, times)
    return LatencyModel(*(coefficients / scale).tolist())


def predict(model: LatencyModel, work: Counts):
    """Return the seconds of a run."""
    return model.overhead + model.per_flop * work.flops + model.per_byte * work.bytes


def exceeds_noise(slower: ArrayLike, faster: ArrayLike) -> bool:
    """Tell whether repeated timings of two settings differ by more than they scatter.

    The medians must differ by more than twice the sum of the median absolute deviations. If the
    full rank is not slower than a low rank by this test, latency is no objective.
    """
    slow, fast = np.asarray(slower, np.float64), np.asarray(faster, np.float64)
    scatter = sum(np.median(np.abs(x - np.median(x))) for x in (slow, fast))
    return bool(np.median(slow) - np.median(fast) > 2 * scatter)


def memory(
    matrix_shapes: Shapes,
    rank_fraction,
    temporaries: float,
    *,
    itemsize: int = 4,
):
    """Return the bytes a run holds: deployed parameters plus measured `temporaries` (bytes).

    `temporaries` is `compiled.memory_analysis().temp_size_in_bytes`, or a measured peak less the
    parameters of that run.
    """
    elements = 0.0
    for rows, columns in matrix_shapes:
        elements = elements + stored_elements(rows, columns, rank_fraction)
    return itemsize * elements + temporaries


def _namespace(value) -> Any:
    """Return jax.numpy for a JAX value and numpy for any other."""
    return jnp if isinstance(value, jax.Array) else np
