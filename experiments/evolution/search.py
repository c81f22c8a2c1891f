"""The run of a search: its events in `metrics.jsonl`, a YAML per trial, then the best once more.

The events are the state. A killed run reads them back and goes on; a candidate goes on from its
checkpoint, which knows how long the log was when it was written (`experiments.run`).
"""

import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments import checkpoints
from experiments import run as runs
from experiments.evolution.candidates import Store
from forge_jax import arch, evolve
from forge_jax.evolve.loop import FAILURES, NO_FAILURE, failure_of

Show = Callable[[list[evolve.Event]], None]
Evaluate = Callable[[arch.Spec, str, int, int], evolve.Result]
"""`evaluate(spec, name, done, steps)` trains on from what is kept under the name."""


def store_of(run: runs.Run) -> Store:
    """Checkpoints of trials in the run directory, the last of each."""

    def restore(name: str, template: Any) -> tuple[int, Any] | None:
        # not `runs.restore_latest`: the log is not rewound to when a trial was last trained
        found = checkpoints.restore_latest(run.path / "checkpoints" / name, template)
        return None if found is None else (found[0]["step"], found[1])

    return Store(functools.partial(save, run), restore)


def save(run: runs.Run, name: str, step: int, tree: Any) -> None:
    """Keep a trial's training."""
    runs.save(run, step, tree, name=name, keep=1)


def recorded(run: runs.Run) -> list[evolve.Event]:
    """The events of the run so far; what follows is written behind them."""
    return [runs.log(run, row) for row in runs.rows(run.path)]


def of_search(events: Sequence[evolve.Event]) -> list[evolve.Event]:
    """Those that the search decides by."""
    return [e for e in events if e["event"] in ("create", "report")]


def variant(trial: int, births: int) -> str:
    """Name of a trial: the generation is that in which it was born, by number, of so many."""
    return f"gen_{trial // births}/variant_{trial % births}"


def snapshot(path: Path, event: evolve.Event, births: int) -> None:
    """Write the document of a `create` event."""
    file = path / f"{variant(event['trial'], births)}.yaml"
    if event["event"] == "create" and not file.exists():
        runs.write_atomic(file, arch.emit(arch.from_dict(event["spec"])))


def search(
    run: runs.Run,
    evaluate: Evaluate,
    seeds: Sequence[arch.Spec],
    settings: evolve.Settings,
    *,
    births: int,
    seed: int,
    show: Show,
    deadline: float | None = None,
) -> tuple[list[evolve.Event], bool]:
    """Go on until the trials are spent, or until `runs.seconds` is past `deadline`.

    Returns all events of the run, and whether the time ran out.
    """
    events = recorded(run)
    for event in events:
        snapshot(run.path, event, births)
    show(events)

    def of_trial(spec: arch.Spec, trial: int, done: int, steps: int) -> evolve.Result:
        return evaluate(spec, f"trial{trial}", done, steps)

    coming = evolve.run(seeds, of_trial, settings, seed=seed, events=of_search(events))
    while not (late := past(run, deadline)) and (event := next(coming, None)) is not None:
        snapshot(run.path, event, births)
        events.append(runs.log(run, event))
        show(events)
    return events, late


def past(run: runs.Run, deadline: float | None) -> bool:
    """Whether the run has taken longer than so many seconds."""
    return deadline is not None and runs.seconds(run) > deadline


def finalists(events: Sequence[evolve.Event], count: int) -> list[evolve.Trial]:
    """The baseline (the first seed), then the `count` best of the others trained longest."""
    trials = evolve.trials_of(of_search(events))
    others = [t for t in trials.values() if t.id and t.score < float("inf")]
    others.sort(key=lambda t: (-t.rung, t.score, t.id))
    return [trials[0], *others[:count]] if trials else []


def deepen(
    run: runs.Run,
    evaluate: Evaluate,
    events: list[evolve.Event],
    *,
    count: int,
    steps: int,
    seeds: Sequence[int],
    show: Show,
    deadline: float | None = None,
) -> tuple[list[evolve.Event], bool]:
    """Train the baseline and the `count` best from scratch, `evaluate` with these fresh seeds.

    Returns all events of the run, and whether the time ran out.
    """
    for rank, trial in enumerate(finalists(events, count)):
        # a longer search may have ranked it otherwise when it was trained
        if any(e["event"] == "deep" and e["trial"] == trial.id for e in events):
            continue
        if past(run, deadline):
            return events, True
        result, failure, began = None, NO_FAILURE, time.perf_counter()
        try:
            spec = arch.from_dict(trial.document)
            result = evaluate(spec, f"deep{trial.id}", 0, steps)
        except FAILURES as error:
            failure = failure_of(error)
        row = {
            "event": "deep",
            "trial": trial.id,
            "rank": rank,
            "steps": steps,
            "seeds": list(seeds),
            "score": None if result is None else result.score,
            "metrics": {} if result is None else result.metrics,
            **failure,
            "seconds": time.perf_counter() - began,
        }
        events.append(runs.log(run, row))
        show(events)
    return events, False
