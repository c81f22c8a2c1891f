"""The files of a Phase 7 run: Phase 8 directories, measured as files, and the report's arrays."""

import io
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments import measure, mixture, results
from experiments import run as runs
from experiments.problem import Problem, answers
from forge_jax import search, svf
from interop import load_low_rank, load_phase6, write_phase8

FIRST = "phase7.json"
"""moved last when a seed's artifacts are lifted: while it is below, the rest may be too"""


def measure_file(problem: Problem, path: Path) -> dict[str, float]:
    """The guide's four figures of the model in a file, on test items."""
    load = load_low_rank if path.suffix == ".safetensors" else load_phase6
    checkpoint = load(path)
    params = jax.tree.map(jnp.asarray, checkpoint.params)
    projector = checkpoint.projector if problem.weights["projector"] is not None else None
    score = [
        problem.params_scorer(
            params, projector, task.batches["test"], task, answers(task, "test")
        ).mean()
        for task in problem.tasks
    ]
    figures = measure.metrics(measure.measure(problem.model, params))
    return {**figures, "accuracy": float(np.mean(score))}


def write(
    run: runs.Run,
    problem: Problem,
    experts,
    chosen: results.Chosen,
    index: dict[str, int],
    kl: dict[str, float],
    limits: search.Limits,
    seed: int,
) -> Path:
    """Write one seed's Phase 8 directory unless it is there already; where it lies.

    `kl` holds the nats to the base of the rows "best" and "twin".
    """
    directory = run.path / f"seed{seed}"
    if is_lifted(run, seed):
        return run.path
    if directory.exists():
        return directory
    names = [t.name for t in problem.tasks]
    factors = problem.weights["factors"]
    z = results.mixed_z(chosen.alpha, index, experts)

    def succeeded(metrics: dict[str, float], path: Path) -> bool:
        own = kl["twin" if path.suffix == ".safetensors" else "best"]
        missed = search.violations({**metrics, "kl": own}, limits)
        return all(float(v) == 0 for v in missed.values())

    per_layer = len(chosen.alpha) > 1
    twin = svf.truncate(factors, z, chosen.twin_rank) if chosen.twin_rank < 1 else None
    return write_phase8(
        directory,
        problem.model.checkpoint,
        {name: {k: v[i] for k, v in experts.items()} for i, name in enumerate(names)},
        chosen.alpha.mean(axis=0).tolist(),
        adapted_params=jax.device_get(svf.materialize(factors, z)),
        measure=lambda path: runs.once(
            run, f"seed{seed}-{path.name}", lambda: measure_file(problem, path)
        ),
        succeeded=succeeded,
        alpha_by_path=mixture.by_path(chosen.alpha, index) if per_layer else None,
        low_rank_params=twin,
        rank_fraction=chosen.twin_rank,
        extra_metadata={
            "seed": seed,
            "mixture_kl_to_base_nats": kl["best"],
            "low_rank_mixture_kl_to_base_nats": kl["twin"],
        },
    )


def is_lifted(run: runs.Run, seed: int) -> bool:
    """Whether this seed's artifacts are those at the top of the run."""
    side_car = run.path / "svf_adapted_model.json"
    if not (run.path / FIRST).is_file() or not side_car.is_file():
        return False
    return runs.read_json(side_car)["metadata"].get("seed") == seed


def lift(run: runs.Run, directory: Path) -> None:
    """Move a seed's artifacts to the top of the run, by renames; a killed lift is called again."""
    if not directory.exists() or directory == run.path:
        return
    for path in sorted(directory.iterdir(), key=lambda p: p.name == FIRST):
        target = run.path / path.name
        if target.is_dir():
            shutil.rmtree(target)
        path.replace(target)
    directory.rmdir()


def write_arrays(run: runs.Run, name: str, arrays: dict[str, np.ndarray]) -> None:
    """Write `<name>.npz` whole or not at all."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # pyright: ignore[reportArgumentType]
    runs.write_atomic(run.path / f"{name}.npz", buffer.getvalue())


def search_arrays(found: mixture.Found) -> dict[str, np.ndarray]:
    """The last population for the report's Pareto plot."""
    fitness = found.fitness
    kept = np.where(found.violation[:, None] == 0, fitness, np.inf)
    rank = np.asarray(search.non_dominated_rank(jnp.asarray(kept)))
    return {
        "accuracy": 1 - fitness[:, 0],
        "latency_ms": fitness[:, 1],
        "memory_gb": fitness[:, 2],
        "front": (rank == 0) & (found.violation == 0),
        "hypervolume": np.array(found.hypervolume),
        "alpha": found.genomes["alpha"],
        "rank": found.genomes["rank"],
    }
