"""Race the decomposition of GPT-2's matrices against torch's, one thread each.

    python -m experiments.bench.decompose runs/bench

Threads can only be set before the libraries start: the race runs in a process of its own, held to
one core where the system allows that. The weights are random; a run is the four matrices of one
layer, of which GPT-2 has twelve.
"""

import dataclasses
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import torch
import tyro

from experiments.bench import decoders, race
from experiments.bench.race import OURS
from forge_jax import svf

PEER = "torch.linalg.svd"


@dataclasses.dataclass(frozen=True)
class Args(race.Args):
    alone: bool = False
    """this process has one thread already"""


@dataclasses.dataclass(frozen=True)
class Shape:
    """Width of the model, 768 for GPT-2."""

    width: int = 768

    def matrices(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of every matrix of a layer."""
        d = self.width
        return {"c_attn": (d, 3 * d), "attn": (d, d), "c_fc": (d, 4 * d), "mlp": (4 * d, d)}


# ours is to take at most 0.6 of torch's time
FULL = (Shape(), {PEER: 1 / 0.6}, 3e-6)


def flops(shape: tuple[int, int]) -> float:
    """Of the thin decomposition by R-SVD, 6 m n^2 + 20 n^3 (Golub and Van Loan, table 8.6.1)."""
    n, m = sorted(shape)
    return 6.0 * m * n**2 + 20.0 * n**3


def error(layer: dict[str, np.ndarray], parts: dict[str, Any]) -> float:
    """The largest |U diag(s) Vt - W| / |W| of the layer, Frobenius norms in float64."""
    worst = 0.0
    for name, weight in layer.items():
        u, s, vt = (np.asarray(x, np.float64) for x in parts[name])
        worst = max(worst, float(np.linalg.norm((u * s) @ vt - weight) / np.linalg.norm(weight)))
    return worst


def ours(layer: dict[str, np.ndarray]) -> dict[str, Any]:
    """What `svf.decompose` makes of a layer."""
    factors, _ = svf.decompose(layer, lambda path, leaf: True)
    return jax.block_until_ready({name: (f.u, f.s, f.vt) for name, f in factors.items()})


def theirs(layer: dict[str, np.ndarray]) -> dict[str, Any]:
    """The same by torch."""
    tensors = {name: torch.from_numpy(w).to(decoders.DEVICE) for name, w in layer.items()}
    parts = {n: torch.linalg.svd(w, full_matrices=False) for n, w in tensors.items()}
    return {name: tuple(p.cpu() for p in usv) for name, usv in parts.items()}


def make(shape: Shape, floors: dict[str, float], most: float) -> race.Race:
    """The race of one layer's matrices, another layer in every run."""
    rng, shapes = np.random.default_rng(0), shape.matrices()
    layers = [
        {n: np.float32(0.02) * rng.standard_normal(s, np.float32) for n, s in shapes.items()}
        for _ in range(3)
    ]

    def contender(decompose, compile_s=None):
        turn = itertools.cycle(layers)
        return race.Contender(
            lambda: decompose(next(turn)),
            compile_s,
            answer=lambda: {name: usv[1] for name, usv in decompose(layers[0]).items()},
        )

    started = time.perf_counter()
    parts = ours(layers[0])
    once = time.perf_counter() - started
    again = race.best(lambda: ours(layers[0]), repeats=1)
    return race.Race(
        name=f"decompose_{shape.width}",
        title="the four matrices of one layer of GPT-2, one thread each",
        settings={**dataclasses.asdict(shape), "matrices": shapes},
        entries={OURS: contender(ours, max(once - again, 0.0)), PEER: contender(theirs)},
        difference=race.relative,
        tolerance=1e-5,
        floors=floors,
        bounds={"relative error of U diag(s) Vt": (error(layers[0], parts), most)},
        work=race.Work(sum(map(flops, shapes.values())), 0.0),
        unit="layer",
        summary=lambda: {"relative error of torch": error(layers[0], theirs(layers[0]))},
    )


def races(dtype: str) -> Iterator[race.Race]:
    """Every race of this module at full size; there is no SVD in bfloat16."""
    del dtype
    yield make(*FULL)


def environment() -> dict[str, str]:
    """This process's environment with every library that has threads held to one."""
    flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    return {**os.environ, "XLA_FLAGS": flags, **dict.fromkeys(names, "1")}


def command(args: race.Args) -> None:
    """Run the race in a process of one thread."""
    given = [str(args.out), "--rounds", str(args.rounds), "--dtype", args.dtype, "--alone"]
    child = [sys.executable, "-m", "experiments.bench.decompose", *given]
    if code := subprocess.run(child, env=environment(), check=False).returncode:
        raise SystemExit(code)  # it has said why


if __name__ == "__main__":
    chosen = tyro.cli(Args, prog="python -m experiments.bench.decompose", description=__doc__)
    if not chosen.alone:
        command(chosen)
    else:
        if hasattr(os, "sched_setaffinity"):  # before JAX counts the cores
            os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        race.command(chosen, races, threads=1)
