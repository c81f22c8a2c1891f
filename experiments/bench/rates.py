"""Validation accuracy at several learning rates, of z and of the ceilings; no test item is read.

    python -m experiments.bench.rates --out runs/rates.json

Prints and writes {what: {rate: {domain: best validation accuracy}}} for one seed of the demo's
settings on the nano checkpoint.
"""

import dataclasses
from pathlib import Path
from threading import Event

import jax
import numpy as np
import tyro

from experiments import ceilings, phase7
from experiments.experts import Settings, fitted, init_state, make_step, make_tx, validate
from experiments.files import write_json
from experiments.forms import SVF
from experiments.problem import Problem
from experiments.run import clean_errors


@dataclasses.dataclass(frozen=True)
class Args:
    out: Path
    """JSON file to write"""
    seed: int = 100
    """none of the demo's"""
    z_rates: tuple[float, ...] = (2e-3, 5e-3, 1e-2, 2e-2)
    ceiling_rates: tuple[float, ...] = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
    domains: tuple[str, ...] = ("math", "vision")
    """those on which the ceilings are compared"""


def z_accuracy(problem: Problem, settings: Settings, seed: int) -> dict[str, float]:
    """Best validation accuracy of every SVF expert on its own domain."""
    tx = make_tx(settings)
    step = make_step(problem.model, SVF, tx, settings, problem.new_tokens)
    tasks, weights = problem.tasks, problem.weights
    state = init_state(SVF, weights, tx, len(tasks), jax.random.key(seed), settings)
    state = fitted(
        lambda state, number: step(weights, state, tasks, seed, number),
        lambda delta: validate(problem.scorer, weights, delta, tasks),
        settings,
        state,
    )
    best = np.asarray(state.best_accuracy).tolist()
    return dict(zip((t.name for t in problem.tasks), best, strict=True))


@clean_errors()
def main(args: Args) -> None:
    """Train at every rate."""
    problem = phase7.load(phase7.Args(unplanted=()))
    settings = phase7.Args().training
    found: dict[str, dict] = {"z": {}}
    for rate in args.z_rates:
        found["z"][rate] = z_accuracy(problem, settings.with_rate(rate), args.seed)
        print("z", rate, found["z"][rate], flush=True)
    weights = ceilings.dense_weights(problem)
    tasks = [t for t in problem.tasks if t.name in args.domains]
    for name in ceilings.RATES:
        found[name] = {}
        for rate in args.ceiling_rates:
            ceiling = ceilings.make_ceilings(problem, settings, {name: rate})[name]
            found[name][rate] = {
                t.name: ceilings.train(problem, weights, ceiling, t, args.seed, Event())[1]
                for t in tasks
            }
            print(name, rate, found[name][rate], flush=True)
        write_json(args.out, found)


if __name__ == "__main__":
    main(tyro.cli(Args, prog="python -m experiments.bench.rates", description=__doc__))
