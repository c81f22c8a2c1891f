"""Experts moved to another checkpoint of the same shape: does their z mean anything there?

    python -m experiments.nano --out runs/nano1 --seed 1
    python -m experiments.transfer --experts runs/demo --to runs/nano1/phase6.json

The published cross-model experiment (Transformer-Squared, table 5): every expert on its own domain,
its z as it is ("ordered") and with the z of each matrix in another order ("shuffled", several
draws). An ordered z that is not above all of its shuffles carried nothing over but its spread.
Tasks and their settings are those of the experts' run.
"""

import dataclasses
import warnings
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import tyro

from experiments import problem
from experiments import run as runs
from experiments.data.tasks import Task
from experiments.problem import Problem, answers
from experiments.scoring import Mixtures
from forge_jax import adapt
from interop import Phase8, load_phase8


@dataclasses.dataclass(frozen=True)
class Args:
    experts: Path
    """directory of a phase7 run"""
    to: Path
    """checkpoint that takes them: Phase 6 file or JSON, Hugging Face directory or .gguf"""
    out: Path = Path("runs/transfer")
    """run directory to create"""
    draws: int = 5
    """orders of every shuffled z"""
    seed: int = 0
    """of the orders"""
    resume: bool = False
    """go on with a killed run in `out`"""
    replace: bool = False
    """take the place of an earlier run in `out` once this one is whole"""


def load(args: Args) -> tuple[Problem, Phase8]:
    """The target with the tasks of the experts' run, and the experts; another base is a warning.

    Raises:
      ValueError: the experts have another shape than the target.
    """
    found = load_phase8(args.experts)
    settings = problem.run_settings(args.experts)
    test_items = runs.read_json(args.experts / "config.json")["test_items"]
    counts: Any = {"train": 1, "validation": 1, "test": test_items}
    made = problem.set_up(
        args.to,
        domains=tuple(found.experts),
        unplanted=(),
        counts=counts,
        chunk=8,
        **settings,
    )
    z: Any = problem.stacked(found.experts)
    adapt.check_experts(made.weights["factors"], z)
    base, own = str(found.metadata.get("base_sha256")), made.model.checkpoint.sha256
    if base != own:
        warnings.warn(
            f"The experts are of the base {base[:12]}, this one is {own[:12]}: a z says how far "
            "each singular value of its own base is scaled, so that what follows is measured "
            "elsewhere than it was trained.",
            stacklevel=2,
        )
    return made, found


def orders(z: dict[str, np.ndarray], draws: int, rng: np.random.Generator):
    """z as it is, then `draws` times with the values of every matrix in another order."""
    return {
        path: np.stack([x, *(rng.permutation(x) for _ in range(draws))]) for path, x in z.items()
    }


def measure(made: Problem, task: Task, z, draws: int, seed: int) -> dict[str, Any]:
    """Test accuracy of the base, of the ordered z, and of every shuffled one."""
    rng = np.random.default_rng([seed, crc32(task.name.encode())])
    alphas = np.concatenate([np.zeros((1, draws + 1)), np.eye(draws + 1)]).astype(np.float32)
    asked = (task.batches["test"], task, answers(task, "test"))
    mixtures = Mixtures(orders(z, draws, rng), alphas)
    base, ordered, *shuffled = made.scorer(made.weights, mixtures, *asked).correct.mean(axis=1)
    return {
        "base": float(base),
        "ordered": float(ordered),
        "shuffled": [float(x) for x in shuffled],
    }


@runs.clean_errors()
def main(args: Args) -> None:
    """Measure and print."""
    if args.draws < 1:
        raise ValueError(f"`draws` must be at least 1, got {args.draws}.")
    if not (args.resume or args.replace):
        runs.refuse_existing(args.out)
    made, found = load(args)
    given = {"experts_sha256": problem.experts_sha256(args.experts)}
    config = {**runs.plain(args), "base_sha256": made.model.checkpoint.sha256, **given}
    with runs.opened(args.out, config, resume=args.resume, replace=args.replace) as run:
        rows = {}
        for task in made.tasks:
            given = (made, task, found.experts[task.name], args.draws, args.seed)
            rows[task.name] = runs.once(run, task.name, partial(measure, *given))
        runs.write_json(run.path / "transfer.json", rows)
        done = runs.finish(run)
    print("own domain, %     base  ordered  shuffled")
    for name, row in rows.items():
        draws = 100 * np.array(row["shuffled"])
        said = f"{draws.mean():.1f} ({draws.min():.1f} to {draws.max():.1f})"
        print(f"{name:15} {100 * row['base']:6.1f}   {100 * row['ordered']:6.1f}  {said}")
    print(f"written: {done / 'transfer.json'}")


if __name__ == "__main__":
    main(tyro.cli(Args, prog="python -m experiments.transfer", description=__doc__))
