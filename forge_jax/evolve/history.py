"""The event log of a search, folded into what is known of every trial.

An event is a flat JSON object that is appended and never changed. `create` brings a trial into
being, `report` says what it scored at a rung; everything else is computed from these.
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

Event = dict[str, Any]


class Report(NamedTuple):
    """What a trial scored after the steps of a rung."""

    rung: int
    score: float  # lower is better; inf where it failed
    objectives: tuple[float, ...]  # more of the kind, the score not among them


class Trial(NamedTuple):
    """One document of the search."""

    id: int
    document: dict[str, Any]
    fingerprint: str
    parents: tuple[int, ...]
    reports: tuple[Report, ...] = ()

    @property
    def rung(self) -> int:
        """The last rung it was trained to; -1 before the first."""
        return self.reports[-1].rung if self.reports else -1

    @property
    def score(self) -> float:
        """Its last score; inf before the first."""
        return self.reports[-1].score if self.reports else math.inf


def trials_of(events: Iterable[Event]) -> dict[int, Trial]:
    """Every trial by its number, in the order of creation.

    Raises:
      ValueError: an event is of no known kind, or reports on a trial that was never created.
    """
    trials: dict[int, Trial] = {}
    for event in events:
        if event["event"] == "create":
            names = ("trial", "spec", "fingerprint")
            fields = (event[name] for name in names)
            trials[event["trial"]] = Trial(*fields, parents=tuple(event["parents"]))
        elif event["event"] == "report":
            if event["trial"] not in trials:
                raise ValueError(f"`events` report on trial {event['trial']}, never created.")
            old = trials[event["trial"]]
            trials[old.id] = old._replace(reports=(*old.reports, report_of(event)))
        else:
            raise ValueError(f"`events` must be create or report, got {event['event']!r}.")
    return trials


def report_of(event: Event) -> Report:
    """The report of an event; a missing number, or one that is not finite, is the worst."""
    values = [event["score"], *(event["objectives"] or ())]
    score, *others = (math.inf if v is None or not math.isfinite(v) else v for v in values)
    return Report(event["rung"], score, tuple(others))
