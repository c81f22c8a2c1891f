"""Who came of whom: records with operator and diff, a Mermaid graph, and a picture."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from experiments import figures
from experiments.evolution.search import of_search, variant
from experiments.files import write_atomic, write_json
from forge_jax import evolve

Record = dict[str, Any]


def records(events: Sequence[evolve.Event], births: int) -> list[Record]:
    """One record per trial, in the order of birth."""
    trials = evolve.trials_of(of_search(events))
    return [
        {
            "gen": e["trial"] // births,
            "child": variant(e["trial"], births),
            "op": e["operator"],
            "parents": [variant(p, births) for p in e["parents"]],
            "score": s if (s := trials[e["trial"]].score) < float("inf") else None,
            "diff": e["diff"],
            "trial": e["trial"],
            "fingerprint": e["fingerprint"],
        }
        for e in events
        if e["event"] == "create"
    ]


def mermaid(found: Sequence[Record], direction: str = "TD") -> str:
    """The graph in Mermaid's language, a subgraph per generation, the best in bold lines."""
    ids = {r["child"]: f"t{r['trial']}" for r in found}
    scored = [r for r in found if r["score"] is not None]
    out = [f"graph {direction}"]
    for generation in sorted({r["gen"] for r in found}):
        out.append(f"  subgraph generation {generation}")
        for r in (r for r in found if r["gen"] == generation):
            score = "failed" if r["score"] is None else f"{r['score']:.4g}"
            out.append(f'    {ids[r["child"]]}["{r["trial"]}: {r["op"]}<br/>{score}"]')
        out.append("  end")
    out += [f"  {ids[p]} --> {ids[r['child']]}" for r in found for p in r["parents"]]
    if scored:
        best = min(scored, key=lambda r: r["score"])
        out.append(f"  style {ids[best['child']]} stroke-width:4px")
    return "\n".join(out) + "\n"


def picture(found: Sequence[Record], unit: str) -> bytes:
    """A PNG: trials in the order of birth over their scores, lines to the parents."""
    place = {r["child"]: (r["trial"], r["score"]) for r in found if r["score"] is not None}
    with mpl.rc_context(figures.STYLE):
        figure = Figure(figsize=(9.6, 4.2), layout="constrained")
        axes = figure.subplots()
        for r in (r for r in found if r["child"] in place):
            for parent in (p for p in r["parents"] if p in place):
                xs, ys = zip(place[parent], place[r["child"]], strict=True)
                axes.plot(xs, ys, color="#c4cad4", linewidth=0.9, zorder=1)
        for generation in sorted({r["gen"] for r in found}):
            members = [r["child"] for r in found if r["gen"] == generation]
            points = [place[name] for name in members if name in place]
            xs, ys = zip(*points, strict=True) if points else ((), ())
            shade = figures.colour(generation)
            axes.scatter(xs, ys, s=36, color=shade, label=f"generation {generation}", zorder=2)
        if place:
            best = min(place.values(), key=lambda p: p[1])
            name = next(r["op"] for r in found if r["trial"] == best[0])
            axes.annotate(f"{best[0]}: {name}", best, (4, -12), textcoords="offset points")
        axes.set(xlabel="trial", ylabel=f"held-out nats per {unit}, at the last rung reached")
        figure.legend(loc="outside upper center", ncols=6)
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=110, metadata={"Software": None})
    return out.getvalue()


def write(
    path: Path,
    events: Sequence[evolve.Event],
    settings: evolve.Settings,
    births: int,
    unit: str,
    direction: str,
) -> None:
    """Write lineage.json, lineage.mmd and lineage.png into the run directory."""
    found = records(events, births)
    top = {
        "macro_prob": settings.macro,
        "crossover_prob": settings.crossover,
        "novelty_extra": settings.novel_parents,
        "records": found,
    }
    write_json(path / "lineage.json", top)
    write_atomic(path / "lineage.mmd", mermaid(found, direction))
    write_atomic(path / "lineage.png", picture(found, unit))
