"""Responses that each algorithm needs until its experts are right; no test item is read.

    python -m experiments.bench.algorithms --out runs/algorithms.json

Trains nano's experts by REINFORCE, PPO and GRPO on the same prompts and writes, for each algorithm,
seed and domain, after how many responses validation accuracy first reached the line (null: not
within the steps), the median, and its ratio to REINFORCE's. An expert that does not get there
counts as if it got there one validation after its last step.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from experiments import phase7
from experiments.experts import Settings, fit, init_state, make_step, make_tx, validate
from experiments.files import write_json
from experiments.forms import SVF
from experiments.problem import Problem
from experiments.run import clean_errors


@dataclasses.dataclass(frozen=True)
class Args:
    out: Path
    """JSON file to write"""
    seeds: str = "100,101,102"
    """none of the demo's"""
    line: float = 0.85
    """validation accuracy to reach"""
    steps: int = 50
    validate_every: int = 2
    epochs: int = 2
    """of PPO and GRPO"""
    minibatches: int = 2
    """of PPO and GRPO"""
    clipped_rate: float = 5e-3
    """learning rate of PPO and GRPO, which make epochs x minibatches updates in a step"""


def settings_of(args: Args, algorithm: Any) -> Settings:
    """The demo's settings with one algorithm; training goes on to the last step."""
    settings = dataclasses.replace(
        phase7.Args().training,
        algorithm=algorithm,
        steps=args.steps,
        validate_every=args.validate_every,
        patience=args.steps,
        epochs=args.epochs,
        minibatches=args.minibatches,
    )
    return settings.with_rate(args.clipped_rate) if settings.is_clipped else settings


def reached(problem: Problem, settings: Settings, seeds: list[int], line: float) -> list[list]:
    """For each seed and domain the responses drawn until accuracy reached `line`, or None."""
    tx = make_tx(settings)
    step = make_step(problem.model, SVF, tx, settings, problem.new_tokens)
    tasks, weights = problem.tasks, problem.weights
    out = []
    for seed in seeds:
        state = init_state(SVF, weights, tx, len(tasks), jax.random.key(seed), settings)
        first: list[int | None] = [None] * len(tasks)
        for done in fit(
            lambda state, number, seed=seed: step(weights, state, tasks, seed, number),
            lambda delta: validate(problem.scorer, weights, delta, tasks),
            settings,
            0,
            state,
        ):
            if done.accuracy is None:
                continue
            drawn = done.number * settings.prompts * settings.samples
            first = crossed(first, done.accuracy.tolist(), line, drawn)
            if None not in first:
                break
        out.append(first)
    return out


def crossed(
    first: Sequence[int | None], accuracy: Sequence[float], line: float, drawn: int
) -> list[int | None]:
    """`first`, with `drawn` for each domain that is at the line now and was not before."""
    return [f if f is not None or a < line else drawn for f, a in zip(first, accuracy, strict=True)]


@clean_errors()
def main(args: Args) -> None:
    """Train by each algorithm."""
    seeds = phase7.parse_seeds(args.seeds)
    problem = phase7.load(phase7.Args(unplanted=()))
    names = [task.name for task in problem.tasks]
    found: dict[str, dict[str, Any]] = {}
    for algorithm in ("reinforce", "ppo", "grpo"):
        settings = settings_of(args, algorithm)
        settings.check()
        rows = reached(problem, settings, seeds, args.line)
        late = (args.steps + args.validate_every) * settings.prompts * settings.samples
        median = float(np.median([late if n is None else n for row in rows for n in row]))
        by_seed = {
            str(seed): dict(zip(names, row, strict=True))
            for seed, row in zip(seeds, rows, strict=True)
        }
        own = found.get("reinforce", {"median": median})["median"]
        found[algorithm] = {"responses": by_seed, "median": median, "of_reinforce": median / own}
        print(algorithm, found[algorithm], flush=True)
        write_json(args.out, found)
    print(args.out)


if __name__ == "__main__":
    main(tyro.cli(Args, prog="python -m experiments.bench.algorithms", description=__doc__))
