"""The report: every number of the files is on the page, and nothing that is in no file."""

import base64
import json
import re
import shutil
import statistics
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from experiments import figures
from experiments.files import write_json
from experiments.report import write_report

ROOT = Path(__file__).resolve().parents[2]
DOMAINS = ["math", "code", "reasoning", "vision"]
KINDS = [f"self_attn/{k}_proj" for k in "qkvo"] + [f"mlp/{k}_proj" for k in ("gate", "up", "down")]


def scores(rng, low, high):
    return dict(zip(DOMAINS, np.round(rng.uniform(low, high, 4), 4).tolist(), strict=True))


def one_seed(rng):
    experts = {d: scores(rng, 0.2, 0.5) | {d: float(rng.uniform(0.88, 0.97))} for d in DOMAINS}
    return {
        "base": scores(rng, 0.2, 0.4),
        "experts": experts,
        "uniform": scores(rng, 0.4, 0.6),
        "alpha_one": scores(rng, 0.5, 0.7),
        "best": scores(rng, 0.75, 0.9),
    }


def average(seeds) -> Any:
    """Return the mean of nested dicts of numbers, key by key."""
    if isinstance(seeds[0], dict):
        return {k: average([s[k] for s in seeds]) for k in seeds[0]}
    return statistics.fmean(seeds)


def curves(rng, seed):
    for step in range(2, 62, 2):
        rise = 1 / (1 + np.exp(-(step - 30 + rng.normal(0, 2, 4)) / 6))
        row = {"step": step, "seed": seed}
        for d, r in zip(DOMAINS, rise, strict=True):
            row |= {f"svf/{d}/reward": 2 * r - 1, f"svf/{d}/accuracy": r, f"svf/{d}/kl_div": r / 3}
            row |= {f"svf/{d}/loss": 0.7 - 0.8 * r + rng.normal(0, 0.03)}
        yield row
    for g in range(30):
        yield {
            "step": g,
            "seed": seed,
            "adas/generation": g,
            "adas/hypervolume": 0.8 - 0.5 / (g + 1) + 0.01 * seed,
        }
    yield {"step": 30, "seed": seed} | {
        f"mixture/{d}": float(rng.uniform(0.3, 1.6)) for d in DOMAINS
    }


def make_run(path, seeds=(0, 1, 2), layers=4):
    """Write a run directory with invented numbers, everything that the report knows in it."""
    rng = np.random.default_rng(7)
    each = [one_seed(rng) for _ in seeds]
    write_json(path / "config.json", {"seeds": seeds, "base": "<nano> & co", "steps": 60})
    lines = [json.dumps(row) for seed in seeds for row in curves(rng, seed)]
    (path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    summary = average(each) | {"seeds": list(seeds), "seconds": 512.0, "peak_rss_gb": 2.345}
    summary |= {"per_seed": each, "kept": dict.fromkeys(DOMAINS, 0.87)}
    summary |= {"gain": {"mean": 0.31, "low": 0.27, "high": 0.36}}
    tuned = {d: 0.98 for d in DOMAINS}
    summary["ceilings"] = {
        "full fine-tuning": {"accuracy": tuned, "bytes": 4_010_000},
        "LoRA, r = 16": {"accuracy": scores(rng, 0.9, 0.98), "bytes": 524_288},
        "SVF": {"accuracy": scores(rng, 0.88, 0.97), "bytes": 14_336},
    }
    summary["unplanted"] = {
        "base": {"copy": 0.51, "sort": 0.22},
        "best": {"copy": 0.55, "sort": 0.23},
    }
    write_json(path / "summary.json", summary)
    metrics = {"latency_ms": 41.27, "accuracy": 0.87, "vram_gb": 0.0123, "throughput_tps": 312.4}
    names = {d: f"z_vectors_{d}.pt" for d in DOMAINS}
    write_json(
        path / "phase7.json",
        {
            "success": True,
            "experts": names,
            "best_mixture": [1.2, 0.8, 1.5, 0.9],
            "metrics": metrics,
        },
    )
    accuracy = rng.uniform(0.3, 0.8, 80)
    latency = 20 + 40 * accuracy**2 + rng.exponential(4, 80)
    front = np.array(
        [not np.any((accuracy > a) & (latency < b)) for a, b in zip(accuracy, latency, strict=True)]
    )
    np.savez(
        path / "search.npz",
        accuracy=accuracy,
        latency_ms=latency,
        memory_gb=0.004 + latency / 1e4,
        front=front,
    )
    matrices = [f"layers_{i}/{kind}/kernel" for i in range(layers) for kind in KINDS]
    values = rng.gamma(2, 0.03, (4, len(matrices)))
    np.savez(path / "z_heatmap.npz", names=np.array(matrices), values=values)
    (path / "svf_adapted_model.pt").write_bytes(bytes(3_456_789))
    (path / "checkpoints").mkdir()
    (path / "checkpoints" / "secret").write_text("not a result")
    return summary


class Page(HTMLParser):
    """Collects what a reader sees: text by tag, images, and every attribute."""

    def __init__(self, text):
        super().__init__()
        self.attributes, self.tags, self.rows = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th") and self.rows:
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        if tag == "table":  # what follows belongs to no cell
            self.rows.append([])

    def handle_data(self, data):
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data

    def images(self):
        sources = [v for k, v in self.attributes if k == "src"]
        return [
            base64.b64decode(s.removeprefix("data:image/svg+xml;base64,")).decode() for s in sources
        ]


@pytest.fixture(scope="module")
def run_and_page(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "demo"
    path.mkdir()
    summary = make_run(path)
    text = write_report(path).read_text()
    return path, summary, text, Page(text)


def test_the_page_needs_nothing_else(run_and_page):
    _, _, text, page = run_and_page
    assert not {"script", "link", "iframe"} & set(page.tags)
    references = [v for k, v in page.attributes if k in ("src", "href")]
    assert all(v.startswith("data:image/svg+xml;base64,") for v in references)
    assert "url(" not in text
    assert len(text) < 3_000_000


def test_every_picture_is_there_and_is_whole(run_and_page):
    *_, page = run_and_page
    names = [v for k, v in page.attributes if k == "alt"]
    wanted = ["accuracy bars", "training curves", "Pareto front", "hypervolume by generation"]
    assert names == [*wanted, "mixture weights", "heat map of z"]
    for svg in page.images():
        assert ElementTree.fromstring(svg).tag.endswith("svg")


def test_the_table_has_the_numbers_of_the_summary(run_and_page):
    _, summary, _, page = run_and_page
    found = {"base": summary["base"], "uniform, α = 1/K": summary["uniform"]}
    found |= {"all in full, α = 1": summary["alpha_one"], "best mixture": summary["best"]}
    found |= {f"{d} expert": summary["experts"][d] for d in DOMAINS}
    first = next(i for i, r in enumerate(page.rows) if r[1:] == [*DOMAINS, "mean"])
    table = {row[0]: row[1:] for row in page.rows[first + 1 : first + 10]}
    assert table.keys() == found.keys() | {"mixture keeps, of the expert's own"}
    for label, values in found.items():
        wanted = [*values.values(), np.mean(list(values.values()))]
        assert [cell.split()[0] for cell in table[label]] == [f"{100 * v:.1f}" for v in wanted]
    spread = np.std([s["best"]["math"] for s in summary["per_seed"]], ddof=1)
    assert table["best mixture"][0].split()[-1] == f"{100 * spread:.1f}"
    means = [np.mean(list(s["best"].values())) for s in summary["per_seed"]]
    assert table["best mixture"][-1].split()[-1] == f"{100 * np.std(means, ddof=1):.1f}"


def test_files_are_listed_with_their_hash(run_and_page):
    path, _, text, page = run_and_page
    lines = {row[0]: row[1:] for row in page.rows if len(row) == 3}
    wanted = subprocess.run(
        ["sha256sum", "svf_adapted_model.pt"], cwd=path, capture_output=True, text=True
    )
    assert lines["svf_adapted_model.pt"] == ["3.46 MB", wanted.stdout.split()[0]]
    assert "secret" not in text


def test_text_is_escaped_and_the_page_is_the_same_twice(run_and_page):
    path, _, text, _ = run_and_page
    assert "<nano>" not in text
    assert "&lt;nano&gt; &amp; co" in text
    assert write_report(path).read_text() == text


def test_missing_files_leave_their_section_out(tmp_path):
    write_json(tmp_path / "config.json", {"steps": 3})
    text = write_report(tmp_path).read_text()
    assert re.findall("<h2>(.*?)</h2>", text) == ["Files", "Settings"]
    assert "img" not in Page(text).tags


def test_half_a_run_shows_what_there_is(tmp_path):
    make_run(tmp_path, seeds=(0,))
    for name in ("summary.json", "search.npz", "z_heatmap.npz"):
        (tmp_path / name).unlink()
    text = write_report(tmp_path).read_text()
    assert re.findall("<h2>(.*?)</h2>", text) == [
        "Training",
        "Search for the mixture",
        "Files",
        "Settings",
    ]
    assert "±" not in text


def test_one_seed_without_extras(tmp_path):
    make_run(tmp_path, seeds=(0,))
    summary = json.loads((tmp_path / "summary.json").read_text())
    keys = ("base", "experts", "uniform", "best", "seeds", "seconds", "peak_rss_gb")
    summary = {k: summary[k] for k in keys}
    summary["best"]["vision"] = None  # not measured
    write_json(tmp_path / "summary.json", summary)
    page = Page(write_report(tmp_path).read_text())
    assert next(r for r in page.rows if r[:1] == ["best mixture"])[-2:] == ["–", "–"]


@pytest.mark.parametrize("broken", ["missing", "json", "metrics"])
def test_bad_input_is_one_sentence(tmp_path, broken):
    path = tmp_path / "run"
    if broken != "missing":
        path.mkdir()
        write_json(path / "config.json", {})
        name = {"json": "summary.json", "metrics": "metrics.jsonl"}[broken]
        (path / name).write_text('{"base": \n')
    command = [sys.executable, "-m", "experiments.report", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert str(path) in done.stderr
    assert not (path / "report.html").exists()


def test_the_command_prints_where_the_report_is(tmp_path):
    (tmp_path / "run").mkdir()
    make_run(tmp_path / "run")
    command = [sys.executable, "-m", "experiments.report", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(tmp_path / "run" / "report.html")


@pytest.mark.parametrize(
    ("name", "parts", "wanted"),
    [
        ("layers_12/self_attn/q_proj/kernel", 1, (12, "q")),
        ("layers_0/mlp/down_proj/kernel", 2, (0, "mlp/down")),
        ("lm_head/kernel", 1, (0, "lm_head")),
        ("h/3/attn/c_proj/kernel", 2, (3, "attn/c")),
    ],
)
def test_a_matrix_has_a_layer_and_a_kind(name, parts, wanted):
    assert figures.place(name, parts) == wanted


def test_gpt2_names_do_not_fall_on_each_other():
    names = ["h_0/attn/c_proj/kernel", "h_0/mlp/c_proj/kernel"]
    grids = []

    def record(axes, image, **_):
        grids.append(np.asarray(image))
        return real(axes, image, **_)

    real = figures.Axes.imshow
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures.Axes, "imshow", record)
        figures.heat_map(["math"], names, np.array([[0.1, 0.2]]))
    assert grids[0].tolist() == [[0.1, 0.2]]


def test_degenerate_data_is_drawn():
    one = np.ones(1)
    ElementTree.fromstring(figures.pareto(one, one, one, np.array([True])))
    ElementTree.fromstring(figures.pareto(one, one, one, np.array([False])))
    ElementTree.fromstring(figures.heat_map(["math"], ["kernel"], np.zeros((1, 1))))
    ElementTree.fromstring(figures.hypervolume({0: [(0, 0.0)]}))


def keep_for_a_look(folder):
    """Write the invented run to `folder`, to open its page in a browser."""
    shutil.rmtree(folder, ignore_errors=True)
    Path(folder).mkdir(parents=True)
    make_run(Path(folder))
    print(write_report(folder))


if __name__ == "__main__":
    keep_for_a_look(sys.argv[1])
