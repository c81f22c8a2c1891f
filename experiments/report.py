"""Write `report.html`, one page that shows a run and needs nothing else: no network, no script.

    python -m experiments.report runs/demo

It is made from what lies in the run directory; a section whose file is missing is left out.

    config.json     the settings
    metrics.jsonl   rows {"step": 10, "seed": 0, "svf/math/loss": ...}; svf/<domain>/{reward,
                    accuracy,kl_div,loss}, adas/generation with adas/hypervolume, mixture/<domain>
    summary.json    base, uniform, best: domain -> test accuracy in [0, 1]; experts: expert -> the
                    same; seeds, seconds, peak_rss_gb. Optional: alpha_one, like uniform; kept:
                    domain -> share of the expert's own accuracy; per_seed: a list of {base,
                    experts, uniform, alpha_one, best}; gain: {mean, low, high} of best over the
                    best single expert; ceilings: name -> {accuracy: domain -> accuracy, bytes};
                    unplanted: row -> task -> accuracy
    phase7.json     best_mixture, experts (their order), success, metrics
    search.npz      accuracy, latency_ms, memory_gb (n,); optional front (n,) bool and
                    hypervolume (generations,) or (seeds, generations)
    z_heatmap.npz   names (matrices,), values (experts, matrices): rms(z - 1); optional: experts
"""

import dataclasses
import hashlib
import html
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from experiments import figures
from experiments.page import Html, cell, document, percent, picture, section, size_words, table, td
from experiments.run import clean_errors, read_json, rows, write_atomic

QUANTITIES = {
    "reward": "reward",
    "accuracy": "accuracy",
    "kl_div": "KL to the base",
    "loss": "loss",
}
# Not results: what a run needs to go on, and the views of its record.
HIDDEN = {"checkpoints", "once", "tensorboard", "wandb", "wandb.json", "report.html"}

ROWS = {
    "base": "base",
    "uniform": "uniform, α = 1/K",
    "alpha_one": "all in full, α = 1",
    "best": "best mixture",
}
"""keys of summary.json and what the tables call them; the other rows are experts"""

LEAD = "Self-adaptation of one checkpoint: SVF experts and their mixture."
Scores = Mapping[str, float | None]  # domain -> accuracy in [0, 1]


@dataclasses.dataclass(frozen=True)
class Args:
    run: tyro.conf.Positional[Path]
    """the run directory"""


def write_report(run_directory: str | Path) -> Path:
    """Write `report.html` into the run directory and return its path.

    Raises FileNotFoundError if the directory has no `config.json`, ValueError for a broken file.
    """
    path = Path(run_directory)
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path} is not a run directory: it has no config.json.")
    config = read_json(path / "config.json")
    summary = optional_json(path / "summary.json")
    phase7 = optional_json(path / "phase7.json")
    record = rows(path)
    sections = [
        cards(summary, phase7),
        headline(summary),
        accuracy_bars(summary),
        unplanted(summary),
        ceilings(summary),
        training(record),
        search(path, record, phase7),
        heat_map(path, phase7),
        artifacts(path),
        settings(config),
    ]
    title = str(config.get("name", path.resolve().name.removesuffix(".partial")))
    write_atomic(path / "report.html", document(title, LEAD, sections))
    return path / "report.html"


def optional_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; an empty one if there is no such file."""
    return read_json(path) if path.is_file() else {}


def optional_npz(path: Path) -> dict[str, np.ndarray]:
    """Read the arrays of an .npz file; none if there is no such file."""
    if not path.is_file():
        return {}
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def mean(scores: Scores) -> float | None:
    """Return the mean over domains, None if one was not measured."""
    values = list(scores.values())
    known = [v for v in values if v is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def results(summary: Mapping[str, Any]) -> dict[str, Scores]:
    """Return the rows of the headline table, label -> scores, in order."""
    found = {"base": summary.get("base")}
    found |= {f"{name} expert": scores for name, scores in summary.get("experts", {}).items()}
    found |= {ROWS[row]: summary.get(row) for row in ("uniform", "alpha_one", "best")}
    return {label: scores for label, scores in found.items() if scores}


def spreads(summary: Mapping[str, Any], label: str) -> dict[str, float]:
    """Return the standard deviation over seeds of each domain and the mean, if there are seeds."""
    seeds = [results(one).get(label) for one in summary.get("per_seed", [])]
    known = [s | {"mean": mean(s)} for s in map(dict, filter(None, seeds))]
    if len(known) < 2:
        return {}
    found = {}
    for name in known[0]:
        values = [v for one in known if (v := one.get(name)) is not None]
        if len(values) == len(known):
            found[name] = statistics.stdev(values)
    return found


def headline(summary: Mapping[str, Any]) -> str:
    """Return the table of every candidate against every domain."""
    found = results(summary)
    if not found:
        return ""
    domains = list(next(iter(found.values())))
    columns = {d: [s.get(d) for s in found.values()] for d in domains}
    columns["mean"] = [mean(s) for s in found.values()]
    best = {
        n: max((v for v in values if v is not None), default=None) for n, values in columns.items()
    }
    lines = []
    for i, label in enumerate(found):
        spread = spreads(summary, label)
        cells = []
        for name, values in columns.items():
            kind = "own " if label == f"{name} expert" else ""
            kind += "top" if values[i] is not None and values[i] == best[name] else ""
            cells.append(cell(values[i], spread.get(name), kind))
        lines.append([td(label, "label"), *cells])
    kept = summary.get("kept")
    if kept:
        shares = [td(percent(kept.get(d))) for d in domains]
        lines.append(
            [
                td("mixture keeps, of the expert's own", "label"),
                *shares,
                td(percent(mean(kept))),
            ]
        )
    seeds = summary.get("seeds", [])
    note = "Test accuracy in percent, items never seen in training or search. Bold: best of its "
    note += "column. Framed: an expert on its own domain."
    if len(seeds) > 1:
        note += f" Mean ± standard deviation over seeds {', '.join(map(str, seeds))}."
    return section("Accuracy", table(["", *domains, "mean"], lines, "scores"), note)


def cards(summary: Mapping[str, Any], phase7: Mapping[str, Any]) -> str:
    """Return the numbers that the run exists for."""
    found = results(summary)
    items = []
    for label in ("best mixture", "base"):
        if label in found:
            items.append((f"{label}, mean accuracy", f"{percent(mean(found[label]))} %"))
    gain = summary.get("gain")
    if gain:
        interval = f"95 %: {100 * gain['low']:+.1f} to {100 * gain['high']:+.1f}"
        items.append((f"points over the best expert ({interval})", f"{100 * gain['mean']:+.1f}"))
    metrics, seeds = phase7.get("metrics", {}), summary.get("seeds", [])
    of = f", seed {seeds[0]}" if len(seeds) > 1 else ""
    if metrics.get("latency_ms") is not None:
        items.append((f"latency{of}", f"{metrics['latency_ms']:.3g} <small>ms</small>"))
    if metrics.get("vram_gb") is not None:
        items.append((f"memory{of}", size_words(1e9 * metrics["vram_gb"])))
    if metrics.get("throughput_tps") is not None:
        items.append(
            (f"throughput{of}", f"{metrics['throughput_tps']:,.0f} <small>tokens/s</small>")
        )
    if "success" in phase7:
        items.append((f"constraints{of}", "hold" if phase7["success"] else "do not all hold"))
    if summary.get("seconds") is not None:
        items.append(("time", f"{summary['seconds'] / 60:.1f} <small>min</small>"))
    if summary.get("peak_rss_gb") is not None:
        items.append(("peak memory of the run", f"{summary['peak_rss_gb']:.2f} <small>GB</small>"))
    boxes = "".join(
        f"<div><b>{value}</b><span>{html.escape(name)}</span></div>" for name, value in items
    )
    return f"<div class=cards>{boxes}</div>" if boxes else ""


def accuracy_bars(summary: Mapping[str, Any]) -> str:
    """Return bars by domain: the base, the domain's own expert, the mixtures."""
    found = results(summary)
    experts = summary.get("experts", {})
    domains = [d for d in summary.get("base", {}) if d in experts]
    if not domains:
        return ""

    def heights(label: str, domain: str) -> tuple[float, float | None]:
        label = f"{domain} expert" if label == "own expert" else label
        return found[label].get(domain) or 0.0, spreads(summary, label).get(domain)

    series = {}
    for label in ["base", "uniform, α = 1/K", "all in full, α = 1", "own expert", "best mixture"]:
        if label == "own expert" or label in found:
            values, errors = zip(*[heights(label, d) for d in domains], strict=True)
            series[label] = (values, None if None in errors else errors)
    return section("Accuracy by domain", picture(figures.bars(domains, series), "accuracy bars"))


def unplanted(summary: Mapping[str, Any]) -> str:
    """Return the table of tasks whose answers have no planted frequencies."""
    found = summary.get("unplanted") or {}
    if not found:
        return ""
    tasks = list(next(iter(found.values())))
    lines = [
        [ROWS.get(row, f"{row} expert"), *[cell(scores.get(t), None, "") for t in tasks]]
        for row, scores in found.items()
    ]
    note = "Their training text answers a prompt in one way only. Test accuracy in percent."
    return section("Tasks without planted frequencies", table(["", *tasks], lines, "scores"), note)


def ceilings(summary: Mapping[str, Any]) -> str:
    """Return what training far more parameters on the same samples reaches."""
    found = summary.get("ceilings") or {}
    if not found:
        return ""
    domains = list(next(iter(found.values()))["accuracy"])
    lines = []
    for label, one in found.items():
        scores = one["accuracy"]
        cells = [cell(scores.get(d), None, "") for d in domains]
        size = [size_words(one["bytes"]) if one.get("bytes") is not None else "–"]
        lines.append([label, *cells, cell(mean(scores), None, ""), *size])
    head = ["", *domains, "mean", "bytes per expert"]
    note = "The same base and the same number of samples. Test accuracy on the own domain, percent."
    return section("Ceilings", table(head, lines, "scores"), note)


def training(record: Sequence[Mapping[str, Any]]) -> str:
    """Return the training curves of every expert."""
    curves: dict[str, dict[str, dict[int, list]]] = {}
    for row in record:
        for key, value in row.items():
            parts = key.split("/")
            if (
                len(parts) == 3
                and parts[0] == "svf"
                and parts[2] in QUANTITIES
                and value is not None
            ):
                by_seed = curves.setdefault(parts[2], {}).setdefault(parts[1], {})
                by_seed.setdefault(row.get("seed", 0), []).append((row["step"], value))
    ordered = {title: curves[key] for key, title in QUANTITIES.items() if key in curves}
    if not ordered:
        return ""
    note = "With several seeds: their mean, each seed as a thin line, and the band that they fill."
    return section("Training", picture(figures.training(ordered), "training curves"), note)


def search(path: Path, record: Sequence[Mapping[str, Any]], phase7: Mapping[str, Any]) -> str:
    """Return the Pareto front, the hypervolume by generation and the weights of the mixture."""
    found = optional_npz(path / "search.npz")
    content = ""
    objectives = ("accuracy", "latency_ms", "memory_gb")
    if set(objectives) <= found.keys():
        accuracy, latency, memory = (found[n].astype(float) for n in objectives)
        front = found.get("front", np.ones(len(accuracy), bool)).astype(bool)
        svg = figures.pareto(accuracy, latency, memory, front)
        content += picture(svg, "Pareto front")
    pair = ""
    curve = generations(record, found.get("hypervolume"))
    if curve:
        pair += picture(figures.hypervolume(curve), "hypervolume by generation")
    weights = mixture_weights(record, phase7)
    if weights:
        pair += picture(figures.mixture(weights), "mixture weights")
    content += f"<div class=pair>{pair}</div>" if pair else ""
    note = "The front is the first seed's; memory and latency from the calibrated cost model."
    return section("Search for the mixture", content, note if content else "")


def generations(record: Sequence[Mapping[str, Any]], stored: np.ndarray | None) -> dict[int, list]:
    """Return seed -> [(generation, hypervolume)], from the rows or else from `search.npz`."""
    curve: dict[int, list] = {}
    for row in record:
        if row.get("adas/hypervolume") is not None:
            x = row.get("adas/generation", row.get("step"))
            curve.setdefault(row.get("seed", 0), []).append((x, row["adas/hypervolume"]))
    if not curve and stored is not None and stored.size:
        curve = {
            seed: list(enumerate(map(float, v))) for seed, v in enumerate(np.atleast_2d(stored))
        }
    return curve


def mixture_weights(
    record: Sequence[Mapping[str, Any]], phase7: Mapping[str, Any]
) -> dict[str, list[float]]:
    """Return expert -> its weight in the best mixture of each seed, the last row of each."""
    by_seed = {
        row.get("seed", 0): row for row in record if any(k.startswith("mixture/") for k in row)
    }
    names = dict.fromkeys(k for row in by_seed.values() for k in row if k.startswith("mixture/"))
    found = {
        k.removeprefix("mixture/"): [row[k] for row in by_seed.values() if row.get(k) is not None]
        for k in names
    }
    if not found:
        found = {
            n: [float(a)]
            for n, a in zip(phase7.get("experts", {}), phase7.get("best_mixture", []), strict=False)
        }
    return {name: values for name, values in found.items() if values}


def heat_map(path: Path, phase7: Mapping[str, Any]) -> str:
    """Return how far each expert has moved each matrix."""
    found = optional_npz(path / "z_heatmap.npz")
    if not {"names", "values"} <= found.keys():
        return ""
    values = np.atleast_2d(found["values"]).astype(float)
    experts = [str(e) for e in found.get("experts", list(phase7.get("experts", {})))]
    if len(experts) != len(values):
        experts = [f"expert {i}" for i in range(len(values))]
    svg = figures.heat_map(experts, [str(n) for n in found["names"]], values)
    note = "Root mean square of z − 1 over the singular values of each matrix; 0 is the base model."
    return section("What the experts changed", picture(svg, "heat map of z"), note)


def artifacts(path: Path) -> str:
    """Return the files of the run with their sizes and SHA-256."""
    lines = []
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        name = file.relative_to(path)
        if name.parts[0] in HIDDEN or any(part.startswith(".") for part in name.parts):
            continue
        with open(file, "rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        size = size_words(file.stat().st_size)
        lines.append([str(name), td(size, "number"), td(Html(f"<code>{digest}</code>"))])
    return section("Files", table(["file", "size", "sha256"], lines, "files"))


def settings(config: Mapping[str, Any]) -> str:
    """Return the settings, folded."""
    lines = [
        [name, td(Html(f"<code>{html.escape(json.dumps(v))}</code>"))] for name, v in config.items()
    ]
    body = table(["", ""], lines, "files")
    content = f"<details><summary>{len(lines)} values</summary>{body}</details>"
    return section("Settings", content if lines else "")


@clean_errors()
def main(args: Args) -> None:
    """Write the report and say where it is."""
    print(write_report(args.run))


if __name__ == "__main__":
    main(tyro.cli(Args, prog="python -m experiments.report", description=__doc__))
