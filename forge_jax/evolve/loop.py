"""The search: who is born, who is trained, and what is written down.

Every decision is a function of the events so far and of one seed, so a search that was killed
continues from its log to the events that it would have written.
"""

import math
import random
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import flax.errors
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from forge_jax import arch
from forge_jax.evolve.asha import Ladder, checked, continuation, hurdles, promotion
from forge_jax.evolve.history import Event, Trial, trials_of
from forge_jax.evolve.mutate import Child, crossover, mutate
from forge_jax.evolve.novelty import novelty_of
from forge_jax.evolve.tree import tree_of
from forge_jax.search import non_dominated_rank

# What a candidate may fail with; anything else is a mistake of this program.
FAILURES = (
    *(ArithmeticError, LookupError, MemoryError, RuntimeError, TypeError, ValueError),
    flax.errors.FlaxError,
)


class Refused(ValueError):
    """An evaluation's word that a candidate is not to be trained, and why: no failure."""


class Result(NamedTuple):
    """What an evaluation found; lower is better throughout."""

    score: float
    objectives: tuple[float, ...] = ()
    metrics: dict[str, Any] | None = None
    """what else the event shall say, strict JSON; no decision reads it"""


Evaluate = Callable[[arch.Spec, int, int, int], Result]
"""`evaluate(spec, trial, done, steps)` trains a trial from `done` to `steps` total steps.

It keeps the checkpoints, by the trial's number, and continues from the one at `done`.
"""


class Settings(NamedTuple):
    """A search; `ladder.steps` and `steps` are training steps."""

    steps: int
    """in all: no training starts that would go beyond"""
    trials: int = 1000
    population: int = 12
    """so many trained trials live: the youngest, or the best where `aging` is false"""
    aging: bool = True
    parents: int = 0
    """the best so many of the living may be parents; all where 0"""
    novel_parents: int = 0
    """and so many of the most novel among the others"""
    tournament: int = 4
    crossover: float = 0.2
    """share of the children with two parents"""
    novel: float = 0.1
    """share of the children whose parent is the most novel of the tournament"""
    immigrants: float = 0.0
    """share of the children that come of a seed"""
    macro: float | None = None
    """share of the mutations by several operators; None: any number is as likely"""
    mutations: int = 2
    """at most so many operators per child"""
    pareto: bool = False
    """parents by the rank of (score, *objectives) in place of the score"""
    ladder: Ladder = Ladder()


def run(
    seeds: Sequence[arch.Spec],
    evaluate: Evaluate,
    settings: Settings,
    *,
    seed: int = 0,
    events: Sequence[Event] = (),
) -> Iterator[Event]:
    """Yield the events that follow `events`, until the steps are spent.

    The caller appends each event to its log before it asks for the next. A trial that fails is
    reported with its traceback and goes no further, one that is `Refused` with the reason. Events
    are strict JSON: a score that is not finite is null.

    Raises:
      ValueError: there are no seeds, or the ladder is none.
    """
    if not seeds or settings.population < 1 or settings.tournament < 1 or settings.mutations < 1:
        raise ValueError(f"Wanted a seed and positive sizes, got {len(seeds)} and {settings}.")
    checked(settings.ladder)
    log = list(events)
    while (event := step(seeds, evaluate, settings, seed, log)) is not None:
        log.append(event)
        yield event


def step(
    seeds: Sequence[arch.Spec],
    evaluate: Evaluate,
    settings: Settings,
    seed: int,
    events: Sequence[Event],
) -> Event | None:
    """The next event, or None at the end.

    First who passed a hurdle, then who is promoted, then who was born last; only then is another
    trial born. Trained trials thus climb as soon as they may.
    """
    trials, ladder = trials_of(events), settings.ladder
    trial = continuation(trials, hurdles(events, ladder), ladder) or promotion(trials, ladder)
    trial = trial or next((t for t in trials.values() if not t.reports), None)
    if trial is None:
        if len(trials) >= settings.trials or spent(trials, ladder) + ladder.first > settings.steps:
            return None
        return born(seeds, trials, settings, random.Random(f"{seed} {len(events)}"))
    rung = trial.rung + 1
    done, total = ladder.steps(rung - 1), ladder.steps(rung)
    if spent(trials, ladder) + total - done > settings.steps:
        return None
    return trained(trial, rung, done, total, evaluate)


def spent(trials: dict[int, Trial], ladder: Ladder) -> int:
    """Training steps of all trials; a failed one counts as trained."""
    return sum(ladder.steps(t.rung) for t in trials.values())


def trained(trial: Trial, rung: int, done: int, total: int, evaluate: Evaluate) -> Event:
    """Evaluate a trial at a rung."""
    result, failure = Result(math.nan), NO_FAILURE
    try:
        result = evaluate(arch.from_dict(trial.document), trial.id, done, total)
    except FAILURES as error:
        failure = failure_of(error)
    if failure is NO_FAILURE and not math.isfinite(result.score):
        failure = {**NO_FAILURE, "error": f"The score is {result.score}."}
    score, *objectives = (
        float(v) if math.isfinite(v) else None for v in (result.score, *result.objectives)
    )
    return {
        "event": "report",
        "trial": trial.id,
        "rung": rung,
        "steps": total,
        "score": score,
        "objectives": objectives,
        "metrics": result.metrics or {},
        **failure,
    }


NO_FAILURE = {"error": None, "refused": False}


def failure_of(error: BaseException) -> dict[str, Any]:
    """What an event says of an evaluation that raised: the traceback, or why it was refused."""
    refused = isinstance(error, Refused)
    words = str(error) if refused else "".join(traceback.format_exception(error))
    return {"error": words, "refused": refused}


def born(
    seeds: Sequence[arch.Spec], trials: dict[int, Trial], settings: Settings, rng: random.Random
) -> Event:
    """The next seed, or a child of the trained trials."""
    parents: tuple[int, ...] = ()
    if len(trials) < len(seeds):
        child = Child(arch.canonical(seeds[len(trials)]), "seed", ())
    else:
        child, parents = bred(trials, settings, rng) or arrived(seeds, trials, settings, rng)
    return {
        "event": "create",
        "trial": len(trials),
        "operator": child.operator,
        "parents": list(parents),
        "diff": list(child.diff),
        "fingerprint": arch.fingerprint(child.spec),
        "spec": tree_of(child.spec),
    }


def arrived(
    seeds: Sequence[arch.Spec], trials: dict[int, Trial], settings: Settings, rng: random.Random
) -> tuple[Child, tuple[int, ...]]:
    """A child of a seed; the seeds are the first trials."""
    parent, known = rng.randrange(len(seeds)), {t.fingerprint for t in trials.values()}
    return mutate(seeds[parent], rng, steps=operators(settings, rng), known=known), (parent,)


def operators(settings: Settings, rng: random.Random) -> int:
    """How many operators make a child: one, or up to `mutations`."""
    if settings.macro is None:
        return rng.randint(1, settings.mutations)
    several = settings.mutations > 1 and rng.random() < settings.macro
    return rng.randint(2, settings.mutations) if several else 1


def eligible(living: list[Trial], order: dict[int, tuple], settings: Settings) -> list[Trial]:
    """Who may be a parent: the best, and the most novel of the others."""
    if not settings.parents or settings.parents >= len(living):
        return living
    ranked = sorted(living, key=lambda t: order[t.id])
    values = novelty_of([arch.from_dict(t.document) for t in ranked])
    others = sorted(range(settings.parents, len(ranked)), key=lambda i: -values[i])
    return ranked[: settings.parents] + [ranked[i] for i in others[: settings.novel_parents]]


def bred(
    trials: dict[int, Trial], settings: Settings, rng: random.Random
) -> tuple[Child, tuple[int, ...]] | None:
    """A child of the living; None while nobody has a score, or where a seed is to have it."""
    trained = [t for t in trials.values() if math.isfinite(t.score)]
    if not trained or (settings.immigrants and rng.random() < settings.immigrants):
        return None
    if not settings.aging:
        trained.sort(key=lambda t: (t.rung, -t.score, -t.id))
    trained = trained[-settings.population :]
    order = fitness(trained, settings.pareto)
    living = eligible(trained, order, settings)
    known = {t.fingerprint for t in trials.values()}
    one = chosen(living, order, settings, rng)
    if len(living) > 1 and rng.random() < settings.crossover:
        two = chosen([t for t in living if t.id != one.id], order, settings, rng)
        pair = arch.from_dict(one.document), arch.from_dict(two.document)
        child = crossover(*pair, rng, known=known)
        if child is not None:
            return child, (one.id, two.id)
    parent = arch.from_dict(one.document)
    return mutate(parent, rng, steps=operators(settings, rng), known=known), (one.id,)


def chosen(
    living: Sequence[Trial], order: dict[int, tuple], settings: Settings, rng: random.Random
) -> Trial:
    """The winner of a tournament: the fittest, or now and then the most novel."""
    drawn = rng.sample(list(living), min(settings.tournament, len(living)))
    if rng.random() < settings.novel:
        values = novelty_of([arch.from_dict(t.document) for t in drawn])
        return drawn[int(values.argmax())]
    return min(drawn, key=lambda t: order[t.id])


def fitness(living: Sequence[Trial], pareto: bool) -> dict[int, tuple]:
    """What a tournament compares: the rank among the living, where asked for, then the score."""
    if not pareto:
        return {t.id: (t.score, t.id) for t in living}
    ranks = pareto_ranks(np.array([(t.score, *t.reports[-1].objectives) for t in living]))
    return {t.id: (int(r), t.score, t.id) for t, r in zip(living, ranks, strict=True)}


def pareto_ranks(rows: Float[np.ndarray, "rows objectives"]) -> Int[np.ndarray, " rows"]:
    """0 for the rows that no other dominates, and so on; all objectives are minimised."""
    # of 64 rows, or a multiple: the ranks are then compiled once
    padded = np.pad(np.float32(rows), ((0, -len(rows) % 64), (0, 0)), constant_values=np.inf)
    return np.asarray(non_dominated_rank(jnp.asarray(padded)))[: len(rows)]


def best(events: Sequence[Event]) -> Trial | None:
    """The trial with the best score among those trained longest."""
    trials = [t for t in trials_of(events).values() if math.isfinite(t.score)]
    return min(trials, key=lambda t: (-t.rung, t.score, t.id), default=None)
