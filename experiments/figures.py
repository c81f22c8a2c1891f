"""The report's pictures: each function takes plain data and returns an SVG as text."""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart by colour-blind readers too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6b6b6b")
INK, GRID = "#3a4250", "#e6e9ee"
STYLE: Any = {
    "font.size": 9.5,
    "font.family": "DejaVu Sans",  # comes with matplotlib; drawn as outlines, so it shows anywhere
    "svg.fonttype": "path",
    "svg.hashsalt": "forge_jax",  # the same data gives the same bytes
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#c4cad4",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.xmargin": 0.02,
    "grid.color": GRID,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
}

Curve = Mapping[int, Sequence[tuple[float, float]]]  # seed -> (x, y) points


def drawn(draw: Callable[[Figure], None], width: float, height: float) -> str:
    """Return the SVG of what `draw` puts on a figure of `width` x `height` inches."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    return text[text.index("<svg") :]


def colour(index: int) -> str:
    """Return the colour of the domain or expert number `index`."""
    return COLOURS[index % len(COLOURS)]


def band(axes: Axes, curve: Curve, shade: str, label: str) -> None:
    """Draw the mean over seeds; with several, each seed as a thin line and the band they fill.

    Mean and band end with the shortest seed, such as one that was stopped early.
    """
    seeds = [dict(points) for points in curve.values()]
    xs = sorted(set.intersection(*[set(points) for points in seeds]))
    ys = np.array([[points[x] for x in xs] for points in seeds], float)
    axes.plot(xs, ys.mean(axis=0), color=shade, label=label, linewidth=1.7)
    if len(seeds) > 1:
        low, high = ys.min(axis=0), ys.max(axis=0)
        axes.fill_between(xs, low, high, color=shade, alpha=0.15, linewidth=0)
        for points in curve.values():
            axes.plot(*zip(*points, strict=True), color=shade, alpha=0.35, linewidth=0.7)


def training(curves: Mapping[str, Mapping[str, Curve]]) -> str:
    """Draw one panel per quantity with one line per expert; `curves[quantity][expert]`."""
    names = list(dict.fromkeys(name for by_expert in curves.values() for name in by_expert))
    height = (len(curves) + 1) // 2

    def draw(figure: Figure) -> None:
        grid = figure.subplots(height, 2, squeeze=False)
        for axes, (quantity, by_expert) in zip(grid.flat, curves.items(), strict=False):
            for name, curve in by_expert.items():
                band(axes, curve, colour(names.index(name)), name)
            axes.set_title(quantity)
            axes.set_xlabel("step")
        for axes in grid.flat[len(curves) :]:
            axes.set_axis_off()
        handles, labels = grid.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=min(len(names), 6))

    return drawn(draw, 9.6, 0.4 + 2.6 * height)


def bars(
    groups: Sequence[str],
    series: Mapping[str, tuple[Sequence[float], Sequence[float] | None]],
) -> str:
    """Draw grouped bars in [0, 1] as percentages; a series is (heights, half errors or None)."""
    shades = ["#c9ced7", COLOURS[5], COLOURS[4], COLOURS[6], COLOURS[0], COLOURS[2]]
    width = 0.82 / len(series)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for i, (label, (heights, errors)) in enumerate(series.items()):
            x = np.arange(len(groups)) + (i - (len(series) - 1) / 2) * width
            values = 100 * np.asarray(heights, float)
            spread = None if errors is None else 100 * np.asarray(errors, float)
            style = {"elinewidth": 1, "ecolor": INK, "capsize": 2}
            shade = shades[i % len(shades)]
            axes.bar(x, values, width * 0.92, color=shade, label=label, yerr=spread, error_kw=style)
        axes.set_xticks(range(len(groups)), groups)
        axes.set(ylim=(0, 104), ylabel="test accuracy, %")
        axes.grid(visible=False, axis="x")
        figure.legend(loc="outside upper center", ncols=len(series))

    return drawn(draw, 9.6, 3.4)


def pareto(
    accuracy: Float[np.ndarray, " n"],
    latency_ms: Float[np.ndarray, " n"],
    memory_gb: Float[np.ndarray, " n"],
    front: Bool[np.ndarray, " n"],
) -> str:
    """Draw accuracy against latency, memory as colour, the front's outline.

    Where latency is no objective, all candidates have the same: the two change places.
    """
    costs = {"latency, ms": latency_ms, "memory, MB": 1000 * memory_gb}
    (across, cost), (shade, other) = sorted(costs.items(), key=lambda item: np.ptp(item[1]) == 0)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        rest = axes.scatter(cost[~front], 100 * accuracy[~front], s=14, color="#cfd4dc")
        rest.set_label("dominated")
        order = np.argsort(cost[front])
        x, y, c = (v[front][order] for v in (cost, 100 * accuracy, other))
        # The front of four objectives is no line; its outline in these two is a staircase.
        reached = np.maximum.accumulate(y)
        axes.plot(x, reached, color="#aab2bf", linewidth=1, zorder=1, drawstyle="steps-post")
        dots = axes.scatter(x, y, c=c, s=46, cmap="viridis", edgecolor="white", zorder=3)
        dots.set_label("Pareto front")
        axes.set(xlabel=across, ylabel="validation accuracy, %")
        figure.colorbar(dots, ax=axes, label=shade, pad=0.01).outline.set_visible(False)
        figure.legend(loc="outside upper center", ncols=3)

    return drawn(draw, 9.6, 3.9)


def hypervolume(curve: Curve) -> str:
    """Draw the hypervolume of the front by generation, the mean over seeds with its band."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        band(axes, curve, COLOURS[0], "hypervolume")
        axes.set(xlabel="generation", ylabel="hypervolume")

    return drawn(draw, 4.7, 2.9)


def mixture(weights: Mapping[str, Sequence[float]]) -> str:
    """Draw the weight of each expert in the best mixture, one dot per seed over the mean's bar."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for i, (name, values) in enumerate(weights.items()):
            axes.barh(name, float(np.mean(values)), height=0.6, color=colour(i), alpha=0.85)
            if len(values) > 1:
                axes.plot(values, [name] * len(values), "o", color=INK, markersize=3.5)
        axes.axvline(1, color="#aab2bf", linewidth=1, linestyle="--")
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("weight α (1: the expert in full)")

    return drawn(draw, 4.7, 2.9)


def heat_map(experts: Sequence[str], names: Sequence[str], values: np.ndarray) -> str:
    """Draw rms(z - 1) of every matrix: a panel per expert, a row per layer, a column per kind.

    `names` are paths such as "layers_0/mlp/up_proj/kernel"; `values` is (experts, matrices).
    """
    places = [place(name) for name in names]
    if len(set(places)) < len(places):  # GPT-2 has a c_proj in the attention and one in the MLP
        places = [place(name, parts=2) for name in names]
    layers = sorted({layer for layer, _ in places})
    kinds = list(dict.fromkeys(kind for _, kind in places))
    grid = np.full((len(experts), len(layers), len(kinds)), np.nan)
    for j, (layer, kind) in enumerate(places):
        grid[:, layers.index(layer), kinds.index(kind)] = values[:, j]
    height = float(np.clip(0.24 * len(layers), 1.1, 5.0))

    def draw(figure: Figure) -> None:
        row = figure.subplots(1, len(experts), squeeze=False, sharey=True)[0]
        top = max(float(np.nanmax(values)), 1e-12)
        for axes, name, panel in zip(row, experts, grid, strict=True):
            image = axes.imshow(panel, cmap="magma_r", vmin=0, vmax=top, aspect="auto")
            axes.set_title(name)
            axes.set_xticks(range(len(kinds)), kinds, rotation=60, ha="right", fontsize=8)
            axes.grid(visible=False)
            axes.spines[:].set_visible(False)
        step = -(-len(layers) // 12)  # at most a dozen labels
        row[0].set_yticks(range(0, len(layers), step), [str(n) for n in layers[::step]])
        row[0].set_ylabel("layer")
        figure.colorbar(image, ax=row, label="rms(z − 1)", pad=0.01).outline.set_visible(False)

    return drawn(draw, 9.6, 1.3 + height)


def place(name: str, parts: int = 1) -> tuple[int, str]:
    """Return (layer, kind): "layers_3/mlp/up_proj/kernel" -> (3, "up"), of two parts "mlp/up"."""
    layer = re.search(r"\d+", name)
    words = [p for p in name.split("/") if p not in ("kernel", "embedding", "weight")]
    kind = re.sub(r"_proj$", "", "/".join(words[-parts:]))
    return int(layer[0]) if layer else 0, kind or name
