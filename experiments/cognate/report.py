"""What a phase 1 run leaves to be looked at: curves, the curriculum, the models side by side."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments import figures, page
from experiments.data.corpora import CATEGORIES
from experiments.files import write_atomic
from experiments.views import Row

CURVES = {
    "loss": {
        "train/loss": "training loss, nats",
        "train/loss_ce": "cross-entropy, nats",
        "val/loss": "validation, last answer, nats",
        "train/learning_rate": "Muon's learning rate",
    },
    "halting": {
        "act/avg_halting_steps": "answers per token",
        "act/halting_variance": "their variance",
        "act/halt_prob_mean": "halting probability",
        "train/loss_act": "halting loss",
    },
    "memory": {
        "ltm/memory_usage": "tokens held / capacity",
        "ltm/surprise_rate": "tokens above the surprise threshold",
    },
}
"""figure -> metric -> title"""
COLUMNS = {
    "halt_threshold": "halts above",
    "capacity": "capacity",
    "surprise": "surprise threshold",
    "loss": "validation loss",
    "perplexity": "perplexity",
    **{c: c for c in CATEGORIES},
    "answers": "answers per token",
    "halted_loss": "loss where it stops",
    "halted_accuracy": "token accuracy where it stops",
    "tokens_held": "tokens held",
    "surprise_rate": "surprise rate",
    "tokens_per_second": "tokens/s",
}
"""key of a model's summary -> heading"""


def curve(rows: Sequence[Row], name: str) -> list[tuple[float, float]]:
    """The points of a metric over the steps."""
    return [(row["step"], row[name]) for row in rows if row.get(name) is not None]


def curves(rows: Sequence[Row], prefixes: Mapping[str, str], titles: Mapping[str, str]) -> str:
    """One panel per metric, one line per model, as SVG; `prefixes` are model -> prefix."""
    found: dict[str, dict[str, Any]] = {}
    for metric, title in titles.items():
        lines = {m: {0: curve(rows, prefix + metric)} for m, prefix in prefixes.items()}
        found[title] = {m: line for m, line in lines.items() if line[0]}
    return figures.training({title: lines for title, lines in found.items() if lines})


def curriculum(shares: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Shares of the data sets over the training, a panel per model, as SVG.

    `shares[model]` has one distribution for each of some equally spaced steps.
    """

    def draw(figure: Figure) -> None:
        row = figure.subplots(1, len(shares), squeeze=False, sharey=True)[0]
        names = sorted({n for by_step in shares.values() for at in by_step for n in at})
        for axes, (model, by_step) in zip(row, shares.items(), strict=True):
            x = np.linspace(0, 1, len(by_step))
            stack = [[at.get(n, 0.0) for at in by_step] for n in names]
            shades = [figures.colour(i) for i in range(len(names))]
            axes.stackplot(x, stack, labels=names, colors=shades, linewidth=0.5, edgecolor="w")
            axes.set(title=model, xlabel="share of the steps", ylim=(0, 1))
        handles, labels = row[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=7)

    return figures.drawn(draw, 9.6, 3.4)


def table(models: Mapping[str, Mapping[str, float]]) -> tuple[list[str], list[list[str]]]:
    """Heading and lines of the models side by side; one line per quantity."""
    lines = []
    for key, title in COLUMNS.items():
        values = [m.get(key) for m in models.values()]
        if any(v is not None for v in values):
            lines.append([title, *("–" if v is None else f"{v:.4g}" for v in values)])
    return ["", *models], lines


def markdown(models: Mapping[str, Mapping[str, float]]) -> str:
    """`table` in Markdown."""
    head, lines = table(models)
    rule = ["---"] * len(head)
    return "".join(f"| {' | '.join(line)} |\n" for line in [head, rule, *lines])


def write(
    path: Path,
    rows: Sequence[Row],
    prefixes: Mapping[str, str],
    shares: Mapping[str, Sequence[Mapping[str, float]]],
    models: Mapping[str, Mapping[str, float]],
    lead: str,
) -> None:
    """Write the plots, `comparison.md` and `report.html` into the run directory."""
    plots = {name: curves(rows, prefixes, titles) for name, titles in CURVES.items()}
    plots["curriculum"] = curriculum(shares)
    for name, svg in plots.items():
        write_atomic(path / "plots" / f"{name}.svg", svg)
    write_atomic(path / "comparison.md", markdown(models))
    head, lines = table(models)
    sections = [page.section("Models", page.table(head, lines, "scores"))]
    sections += [page.section(n.title(), page.picture(svg, n)) for n, svg in plots.items()]
    write_atomic(path / "report.html", page.document("Phase 1: Cognate", lead, sections))
