"""Experts moved to another checkpoint of the same shape: does their z mean anything there?

    python -m experiments.nano --out runs/nano1 --seed 1
    python -m experiments.transfer --experts runs/demo --to runs/nano1/phase6.json

The published cross-model experiment (Transformer-Squared, table 5): every expert on its own domain,
its z as it is ("ordered") and with the z of each matrix in another order ("shuffled", several
draws). If ordered is no better than shuffled, nothing was carried over but the spread of z.
Differences to the target base come with paired 95 % intervals over questions.
"""

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from experiments import problem
from experiments import run as runs
from experiments.exams import compared
from experiments.problem import Problem, answers
from experiments.scoring import Mixtures
from forge_jax import adapt
from interop import Phase8, load_phase8

ROWS = ("base", "ordered", "shuffled")


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
    items: int = 300
    """test questions of each domain"""
    seed: int = 0
    """of the orders"""
    stop_token: bool = True
    """an answer must end with the end-of-text token"""
    replace: bool = False
    """take the place of an earlier run in `out` once this one is whole"""


def load(args: Args) -> tuple[Problem, Phase8]:
    """The target with its tasks, and the experts; another base is a warning.

    Raises:
      ValueError: the experts have another shape than the target.
    """
    found = load_phase8(args.experts)
    counts: Any = {"train": 1, "validation": 1, "test": args.items}
    made = problem.set_up(
        args.to,
        select="both",
        domains=tuple(found.experts),
        unplanted=(),
        source="procedural",
        data=None,
        stop_token=args.stop_token,
        counts=counts,
        free_tokens=128,
        chunk=8,
    )
    z = {path: np.stack([e[path] for e in found.experts.values()]) for path in paths(found)}
    adapt.check_experts(made.weights["factors"], z)
    theirs, ours = str(found.metadata.get("base_sha256")), made.model.checkpoint.sha256
    if theirs != ours:
        warnings.warn(
            f"The experts are of the base {theirs[:12]}, this one is {ours[:12]}: a z says how far "
            "each singular value of its own base is scaled.",
            stacklevel=2,
        )
    return made, found


def paths(found: Phase8) -> list[str]:
    """Those of the matrices that have a z."""
    return list(next(iter(found.experts.values())))


def orders(z: dict[str, np.ndarray], draws: int, rng: np.random.Generator):
    """z as it is, then `draws` times with the values of every matrix in another order."""
    return {
        path: np.stack([x, *(rng.permutation(x) for _ in range(draws))]) for path, x in z.items()
    }


def measure(made: Problem, found: Phase8, draws: int, seed: int) -> dict[str, Any]:
    """Domain -> row -> accuracy, and the difference to the base with its interval.

    A question's mark under "shuffled" is the mean over the draws.
    """
    rng = np.random.default_rng(seed)
    out: dict[str, Any] = {}
    for task in made.tasks:
        candidates = orders(found.experts[task.name], draws, rng)
        alphas = np.concatenate([np.zeros((1, draws + 1)), np.eye(draws + 1)]).astype(np.float32)
        asked = (task.batches["test"], task, answers(task, "test"))
        correct = made.scorer(made.weights, Mixtures(candidates, alphas), *asked).correct
        marks = dict(zip(ROWS, (correct[0], correct[1], correct[2:].mean(axis=0)), strict=True))
        out[task.name] = {row: compared(mark, marks["base"]) for row, mark in marks.items()}
        out[task.name]["ordered less shuffled"] = compared(marks["ordered"], marks["shuffled"])
    return out


@runs.clean_errors()
def main(args: Args) -> None:
    """Measure and print."""
    if args.draws < 1 or args.items < 2:
        raise ValueError("`draws` must be at least 1 and `items` at least 2.")
    if not args.replace:
        runs.refuse_existing(args.out)
    made, found = load(args)
    config = {**runs.plain(args), "base_sha256": made.model.checkpoint.sha256}
    with runs.opened(args.out, config, replace=args.replace) as run:
        rows = measure(made, found, args.draws, args.seed)
        runs.write_json(run.path / "transfer.json", rows)
        done = runs.finish(run)
    print("own domain, %" + "".join(f"{row:>10}" for row in ROWS) + "  ordered less shuffled")
    for name, row in rows.items():
        less = row["ordered less shuffled"]
        said = "".join(f"{100 * row[r]['accuracy']:10.1f}" for r in ROWS)
        low, high = 100 * less["low"], 100 * less["high"]
        print(f"{name:13}{said}  {100 * less['difference']:+.1f} ({low:+.1f} to {high:+.1f})")
    print(f"written: {done / 'transfer.json'}")


if __name__ == "__main__":
    main(tyro.cli(Args, prog="python -m experiments.transfer", description=__doc__))
