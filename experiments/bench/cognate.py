"""What each part of Cognate is good for: tasks with known answers, parts added one by one.

    python -m experiments.bench.cognate --tasks recall --out runs/bench_cognate
    python -m experiments.bench.cognate --seeds 0,1,2

Every arm sees the same rows in the same order and is trained by the same optimizer. Attention sees
`window` tokens everywhere. Arms: "window" has the moving average with decay 0, which hands over the
token before and nothing older, and one recursion step; "ema" and "titans" give it a memory;
"recursion" makes three steps of two; "halting" is that model, stopped where it says so. Writes
results.json and table.md.
"""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tyro

from experiments import run as runs
from experiments.cognate import validation
from experiments.cognate.training import QUICK, Settings, init_state, make_tx, make_update
from experiments.data.packing import Rows
from experiments.data.puzzles import Puzzle, Task, copy, modular, needle, recall
from experiments.files import write_atomic, write_json
from experiments.phase7 import parse_seeds
from forge_jax.models.cognate import Cognate, CognateConfig, Controls, count_parameters

ONE_STEP = {"steps": 1, "micro_steps": 1, "step_weights": (0.5, 1.0)}
ARMS: dict[str, dict[str, Any]] = {
    "window": {"memory": "ema", "memory_decay": 0.0, **ONE_STEP},
    "ema": {"memory": "ema", **ONE_STEP},
    "titans": {"memory": "titans", **ONE_STEP},
    "recursion": {"memory": "titans"},
}
HALTING = "halting"
"""the arm that is the last one's model"""


@dataclasses.dataclass(frozen=True)
class Args:
    out: Path = Path("runs/bench_cognate")
    """directory to write into"""
    tasks: tuple[str, ...] = ("recall", "copy", "modular", "needle")
    arms: tuple[str, ...] = tuple(ARMS)
    """the last one trained with recursion is measured with halting too"""
    seeds: str = "0"
    """as 0,1,2: all in one program"""
    steps: int = 600
    batch: int = 128
    rows: int = 256
    """that each task is measured on, never trained on"""
    muon_lr: float = 0.01
    fallback_lr: float = 3e-3
    width: int = 32
    layers: int = 1
    window: int = 8
    distances: tuple[int, ...] = (8, 16, 32, 64)
    """of recall and needle; the window-only stack reaches `reach` at most, see the results"""
    lengths: tuple[int, ...] = (4, 8, 16)
    """of copy"""
    terms: tuple[int, ...] = (2, 3, 4)
    """of modular, modulo 7"""
    quick_compile: bool = False


class Result(NamedTuple):
    """One arm on one task."""

    accuracy: dict[str, list[float]]  # group -> one for each seed
    answers: list[float]  # made by a token, for each seed
    parameters: int
    last_loss: list[float]


def tasks_of(args: Args) -> dict[str, Task]:
    """The tasks by name."""
    return {
        "recall": recall(args.distances),
        "copy": copy(args.lengths),
        "modular": modular(7, args.terms),
        "needle": needle(args.distances),
    }


def config_of(args: Args, task: Task, arm: str) -> CognateConfig:
    """The model of an arm."""
    return CognateConfig(
        **{
            "vocab_size": task.vocabulary,
            "d_model": args.width,
            "layers": args.layers,
            "heads": 2,
            "d_ff": 2 * args.width,
            "max_positions": task.length,
            "window": args.window,
            "d_mem": args.width,
            "gate_hidden": args.width,
            "answer_heads": 2,
            **ARMS[arm],
        }
    )


def reach(config: CognateConfig) -> int:
    """Tokens back from which anything comes without a memory that reaches further.

    Every layer sees `window` - 1 tokens back, the gate one. A refinement does so twice at once, in
    the features and in the answers that the step began with, and makes a state that only its own
    token sees until the next step.
    """
    attentions = config.layers + config.steps
    return attentions * (config.window - 1) + 1


def rows_of(puzzle: Puzzle) -> Rows:
    """The rows as one document each."""
    return Rows(puzzle.tokens, puzzle.labels, np.ones_like(puzzle.tokens))


def by_group(correct, puzzle: Puzzle) -> dict[str, float]:
    """Share of right answers among those of each group."""
    labelled = puzzle.labels >= 0
    found = {}
    for group in np.unique(puzzle.group).tolist():
        own = labelled & (puzzle.group == group)[:, None]
        found[str(group)] = float(correct[own].mean())
    return found


def train(args: Args, task: Task, arm: str, seeds: list[int]):
    """Models of an arm, one for each seed, and their last training losses."""
    settings = Settings(
        steps=args.steps,
        batch=args.batch,
        accumulate=1,
        muon_lr=args.muon_lr,
        fallback_lr=args.fallback_lr,
        average_decay=0.98,
        quick_compile=args.quick_compile,
    )
    config = config_of(args, task, arm)
    model, tx = Cognate(config), make_tx(settings, config)
    keys = jax.numpy.stack([jax.random.key(seed) for seed in seeds])
    state = init_state(model, tx, keys)
    update = make_update(model, tx, settings, 0)
    controls = every(Controls(), len(seeds))
    measured: dict[str, Any] = {}
    with runs.progress(args.steps, arm) as advance:
        for step in range(args.steps):
            drawn = [task.draw(np.random.default_rng([s, step]), args.batch) for s in seeds]
            batch: Any = tuple(
                np.stack([leaf[None] for leaf in leaves])
                for leaves in zip(*(rows_of(p) for p in drawn), strict=True)
            )
            state, measured = update(state, batch, controls)
            advance(1)
    return model, state.average, np.asarray(measured["loss_ce"]).tolist()


def every(controls: Controls, count: int) -> Controls:
    """The same controls for `count` models."""
    return jax.tree.map(lambda c: np.full(count, c, np.float32), controls)


def run_arm(args: Args, task: Task, arm: str, seeds: list[int]) -> dict[str, Result]:
    """Train an arm and measure it; with recursion also stopped where it says so."""
    model, params, losses = train(args, task, arm, seeds)
    puzzle = task.draw(np.random.default_rng([len(seeds), 2**31]), args.rows)
    rows, controls = rows_of(puzzle), every(Controls(), len(seeds))
    options = QUICK if args.quick_compile else None
    scores = validation.make_scorer(model, options)(params, rows, controls, args.rows)
    count = count_parameters(model.config)
    full = [by_group(correct, puzzle) for correct in scores.correct]
    answers = [float(model.config.steps + 1)] * len(seeds)
    found = {arm: Result(joined(full), answers, count, losses)}
    if arm == "recursion":
        stopped = validation.make_stopper(model, rows, options)
        outs = [
            stopped(jax.tree.map(lambda x, k=k: x[k], params), Controls())
            for k in range(len(seeds))
        ]
        right = [by_group(np.asarray(out.correct), puzzle) for out in outs]
        made = [float(np.asarray(out.answers).mean()) for out in outs]
        found[HALTING] = Result(joined(right), made, count, losses)
    return found


def joined(found: list[dict[str, float]]) -> dict[str, list[float]]:
    """One list of all seeds for each group."""
    return {group: [one[group] for one in found] for group in found[0]}


def table(results: dict[str, dict[str, Result]], tasks: dict[str, Task]) -> str:
    """Markdown: one table a task, accuracy in per cent by group, mean and range over seeds."""
    text = ""
    for name, arms in results.items():
        groups = list(next(iter(arms.values())).accuracy)
        head = [f"{name}, chance {100 * tasks[name].chance:.1f}", *groups, "answers", "parameters"]
        text += f"| {' | '.join(head)} |\n|{'---|' * len(head)}\n"
        for arm, result in arms.items():
            cells = [words(result.accuracy[group]) for group in groups]
            made = f"{np.mean(result.answers):.2f}"
            text += f"| {arm} | {' | '.join(cells)} | {made} | {result.parameters:,} |\n"
        text += "\n"
    return text


def words(values: list[float]) -> str:
    """ "93.4", or with several seeds "93.4 (90.1 to 95.0)", in per cent."""
    mean = f"{100 * np.mean(values):.1f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({100 * min(values):.1f} to {100 * max(values):.1f})"


@runs.clean_errors()
def main(args: Args) -> None:
    """Train every arm on every task."""
    seeds, tasks = parse_seeds(args.seeds), tasks_of(args)
    for option, names, known in (("tasks", args.tasks, tasks), ("arms", args.arms, ARMS)):
        if unknown := [n for n in names if n not in known]:
            raise ValueError(f"`--{option}` may name {', '.join(known)}, got {', '.join(unknown)}.")
    results: dict[str, dict[str, Result]] = {}
    for name in args.tasks:
        results[name] = {}
        for arm in args.arms:
            results[name] |= run_arm(args, tasks[name], arm, seeds)
            plain = {n: {a: r._asdict() for a, r in arms.items()} for n, arms in results.items()}
            reaches = {a: reach(config_of(args, tasks[name], a)) for a in args.arms}
            write_json(args.out / "results.json", {"args": args, "reach": reaches, **plain})
            write_atomic(args.out / "table.md", table(results, tasks))
    print(table(results, tasks))


if __name__ == "__main__":
    main(tyro.cli(Args, prog="python -m experiments.bench.cognate", description=__doc__))
