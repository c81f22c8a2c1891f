"""What a person sees of a search: a live table on a terminal, a line per event elsewhere."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from forge_jax.evolve import Event

Row = dict[str, Any]
HEADS = ("trial", "from", "by", "steps", "score", "params", "MFLOP/token", "tokens/s", "compile s")


def latest(events: Sequence[Event]) -> dict[int, Row]:
    """Per trial what it is and what was last said of it."""
    found: dict[int, Row] = {}
    for e in events:
        if e["event"] == "create":
            found[e["trial"]] = {"by": e["operator"], "parents": e["parents"]}
        elif e["event"] == "report":
            old = found[e["trial"]]
            compile_s = old.get("compile_s", 0.0) + (e["metrics"].get("compile_s") or 0.0)
            found[e["trial"]] = old | e["metrics"] | e | {"compile_s": compile_s}
    return found


def number(value: float | None, digits: int = 4) -> str:
    """A number in short, or a dash."""
    return "–" if value is None else f"{value:,.{digits}g}" if abs(value) < 1e4 else f"{value:,.0f}"


def cells(trial: int, row: Row) -> list[str]:
    """One line of the table."""
    parents = ",".join(map(str, row["parents"])) or "–"
    if row.get("error"):
        reason = row["error"].strip().splitlines()[-1]
        return [str(trial), parents, row["by"], str(row["steps"]), f"failed: {reason[:60]}"]
    if "score" not in row:
        return [str(trial), parents, row["by"], "", "in training"]
    error = f" ± {number(row['score_se'], 2)}" if row["score_se"] is not None else ""
    return [
        *(str(trial), parents, row["by"], str(row["steps"]), number(row["score"]) + error),
        *(number(row["params"]), number(row["flops_per_token"] / 1e6)),
        *(number(row["tokens_per_sec"]), number(row["compile_s"], 3)),
    ]


def table(events: Sequence[Event], title: str, most: int = 24) -> Table:
    """The trials, the best first; what is being trained on top."""
    out = Table(*HEADS, title=title, title_justify="left")
    rows = latest(events)
    worst = float("inf")

    def order(item: tuple[int, Row]) -> tuple:
        row = item[1]
        score = row.get("score", -worst)
        return (worst if score is None else score, item[0])

    for trial, row in sorted(rows.items(), key=order)[:most]:
        out.add_row(*cells(trial, row))
    return out


def line(event: Event) -> str:
    """An event in one line."""
    if event["event"] == "create":
        diff = "; ".join(event["diff"])
        return f"trial {event['trial']}: {event['operator']} of {event['parents']} {diff}"[:160]
    if event["error"]:
        return f"trial {event['trial']} failed: {event['error'].strip().splitlines()[-1][:120]}"
    what = f"rung {event['rung']}" if event["event"] == "report" else "fresh seeds"
    return f"trial {event['trial']}: {what}, {event['steps']} steps, {number(event['score'])}"


@contextlib.contextmanager
def live(title: Callable[[], str]) -> Iterator[Callable[[list[Event]], None]]:
    """Yield `show(events)`; the title is asked for at each call. All of it goes to stderr."""
    console = Console(stderr=True)
    if not console.is_terminal:
        seen = 0

        def tell(events: list[Event]) -> None:
            nonlocal seen
            for event in events[seen:]:
                print(line(event), file=sys.stderr, flush=True)
            seen = len(events)

        yield tell
        return
    with Live(console=console, auto_refresh=False) as screen:
        yield lambda events: screen.update(table(events, title()), refresh=True)
