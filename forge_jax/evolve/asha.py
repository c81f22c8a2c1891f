"""Who is trained further: asynchronous successive halving, then progressive dynamic hurdles.

Both are functions of the event log. A rung is a total number of steps: whoever is promoted
continues from its checkpoint.
"""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from forge_jax.evolve.history import Event, Trial, report_of


class Ladder(NamedTuple):
    """Total steps at every rung: halving's first, then the hurdles' stages."""

    first: int = 20
    """steps of rung 0"""
    reduction: int = 2
    """one in so many is promoted, and trained for so many times the steps"""
    rungs: int = 3
    """of halving"""
    stages: int = 0
    """further rungs, behind hurdles"""
    stage_steps: int = 0
    """steps of each; as many as the last rung of halving in all, where 0"""
    births: int = 4
    """trials that end halving between two hurdles"""

    def steps(self, rung: int) -> int:
        """Total steps when the rung is reached; 0 before the first."""
        if rung < 0:
            return 0
        top = self.first * self.reduction ** min(rung, self.rungs - 1)
        return top + max(0, rung - self.rungs + 1) * (self.stage_steps or top)


def checked(ladder: Ladder) -> Ladder:
    """The ladder, if it is one."""
    least = (ladder.first, ladder.rungs, ladder.births, ladder.reduction - 1)
    if min(least) < 1 or min(ladder.stages, ladder.stage_steps) < 0:
        raise ValueError(
            "A ladder needs first, rungs and births of at least 1, a reduction of at least 2 and "
            f"nothing negative, got {ladder}."
        )
    return ladder


def promotion(trials: Mapping[int, Trial], ladder: Ladder) -> Trial | None:
    """The trial to promote within halving (Li et al. 2020, arXiv 1810.05934, algorithm 2).

    From the highest rung down: of the best 1 / reduction of all that reached a rung, the best that
    has not gone on. Failed trials count as reached and are never promoted.
    """
    for rung in range(ladder.rungs - 2, -1, -1):
        scores = {t.id: r.score for t in trials.values() for r in t.reports if r.rung == rung}
        best = sorted(scores, key=lambda i: (scores[i], i))[: len(scores) // ladder.reduction]
        waiting = [i for i in best if trials[i].rung == rung and math.isfinite(scores[i])]
        if waiting:
            return trials[waiting[0]]
    return None


def hurdles(events: Iterable[Event], ladder: Ladder) -> tuple[float, ...]:
    """Scores to beat after each stage (So et al. 2019, arXiv 1901.11117, section 4, algorithm 1).

    Stage 0 is the end of halving. Each time `births` more trials have reached it, a hurdle is added
    for the highest stage yet: the mean score of those that were trained to it. A stage that nobody
    reached sets none.
    """
    found: list[float] = []
    reached: list[dict[int, float]] = [{} for _ in range(ladder.stages + 1)]
    since = 0
    for event in events:
        if event["event"] != "report":
            continue
        report = report_of(event)
        stage = report.rung - ladder.rungs + 1
        if stage < 0 or not math.isfinite(report.score):
            continue
        reached[min(stage, ladder.stages)][event["trial"]] = report.score
        since += stage == 0
        if since >= ladder.births and len(found) < ladder.stages and reached[len(found)]:
            scores = reached[len(found)].values()
            found.append(sum(scores) / len(scores))
            since = 0
    return tuple(found)


def continuation(
    trials: Mapping[int, Trial], limits: tuple[float, ...], ladder: Ladder
) -> Trial | None:
    """The best trial that beats the hurdle of its stage, and so every one before; None if none."""
    waiting = []
    for trial in trials.values():
        stage = trial.rung - ladder.rungs + 1
        if 0 <= stage < len(limits) and trial.score <= limits[stage]:
            waiting.append(trial)
    return min(waiting, key=lambda t: (t.score, t.id), default=None)
