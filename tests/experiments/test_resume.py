"""The whole of Phase 7 from the command line: what it writes, kill -9 and resume."""

import io
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments import artifacts
from experiments import run as runs
from interop import load_phase8

SMALL: dict[str, Any] = {
    **{"train_items": 16, "validation_items": 8, "test_items": 8},
    **{"steps": 4, "prompts": 4, "samples": 4, "validate_every": 2},
    **{"population": 8, "generations": 3, "search_items": 4},
}


def command(checkpoint, out, *more):
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in SMALL.items()]
    return [
        *(sys.executable, "-m", "experiments.phase7", "nano", f"--checkpoint={checkpoint}"),
        *(f"--out={out}", "--unplanted", "--diagnostics", *flags, *more),
    ]


ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache" / "jax"
MLP = ("gate", "up", "down")
# Each process compiles what the first has compiled already: small programs are kept too.
KEPT = {"JAX_COMPILATION_CACHE_DIR": str(CACHE), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
ENVIRONMENT = {**os.environ, **KEPT}
TWO_SEEDS = ("--seeds=0,1", "--replace")


def finished(checkpoint, out, *more, devices=1):
    line = command(checkpoint, out, *more)
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    environment = ENVIRONMENT | {"XLA_FLAGS": flags} if devices > 1 else ENVIRONMENT
    done = subprocess.run(line, capture_output=True, text=True, timeout=900, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def unbroken(checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken") / "run"
    return out, finished(checkpoint, out, *TWO_SEEDS)


def test_writes_everything_it_promises(unbroken):
    out, printed = unbroken
    report = json.loads((out / "phase7.json").read_text())
    assert list(report) == ["success", "experts", "best_mixture", "adapted_model", "metrics"]
    assert list(report["experts"]) == ["math", "code", "reasoning", "vision"]
    for name in [*report["experts"].values(), report["adapted_model"], "vision.safetensors"]:
        assert (out / name).is_file()
    summary = json.loads((out / "summary.json").read_text())
    assert {"base", "experts", "uniform", "best", "seeds", "seconds", "peak_rss_gb"} <= set(summary)
    assert set(summary["experts"]) == set(summary["best"]) == set(report["experts"])
    assert "re-opened in PyTorch" in printed
    assert "best mixture" in printed
    assert "data:image/svg+xml" in (out / "report.html").read_text()
    found = load_phase8(out)
    assert any(np.abs(z - 1).max() > 1e-3 for e in found.experts.values() for z in e.values())


def test_metrics_carry_the_guides_names(unbroken):
    rows = [json.loads(line) for line in (unbroken[0] / "metrics.jsonl").read_text().splitlines()]
    names = {name for row in rows for name in row}
    for domain in ("math", "code", "reasoning", "vision"):
        assert {f"svf/{domain}/{m}" for m in ("loss", "reward", "kl_div", "accuracy")} <= names
        assert f"mixture/{domain}" in names
    searched = ("generation", "best_latency_ms", "best_accuracy", "best_memory_gb")
    assert {f"adas/{m}" for m in (*searched, "best_throughput_tps", "pareto_front_size")} <= names
    assert {f"final/{m}" for m in ("latency_ms", "accuracy", "vram_gb", "throughput_tps")} <= names


def documented(domains, matrices):
    """Name -> the count that its family has in the table of docs/metrics.md."""
    table = (ROOT / "docs" / "metrics.md").read_text()
    found = {}
    for family, count in re.findall(r"^\| `(\S+)` \|.*?\| (\d[^|]*) \|", table, re.MULTILINE):
        parts = [part.split(",") for part in re.split(r"[{}]", family)]
        filled = {"domain": domains, "matrix": matrices}
        parts = [filled.get(",".join(part), part) for part in parts]
        names = ["".join(name) for name in itertools.product(*parts)]
        counts = count.replace("K", str(len(domains))).replace("M", str(len(matrices)))
        size = math.prod(int(word) for word in counts.split())
        assert len(names) == size, family
        found |= dict.fromkeys(names, family)
    return found


def test_the_documented_names_are_those_of_a_run(unbroken):
    out, printed = unbroken
    names = {name for row in runs.rows(out) for name in row}
    kernels = [f"self_attn/{n}_proj" for n in "qkvo"] + [f"mlp/{n}_proj" for n in MLP]
    matrices = [f"layers_0/{kernel}/kernel" for kernel in kernels]
    assert names == set(documented(["math", "code", "reasoning", "vision"], matrices))
    assert len(names) == 13 + 9 * 4 + 4 * 4 * 7 + 4 * 4
    assert f"metrics: {len(names)} names" in printed


@pytest.mark.slow
def test_a_mesh_trains_the_same_experts(checkpoint, unbroken, tmp_path):
    """All of Phase 7 on four devices; the first rows, before rounding can change a choice."""
    small = ("--mesh=data=2,population=2", "--steps=2", "--generations=1")
    printed = finished(checkpoint, tmp_path / "run", *small, devices=4)
    assert "re-opened in PyTorch" in printed
    ours, theirs = (runs.rows(path)[:2] for path in (tmp_path / "run", unbroken[0]))
    assert len(ours[1]) > 100
    for row, wanted in zip(ours, theirs, strict=True):
        assert row == pytest.approx(wanted, abs=1e-5)


def training(partial):
    return (partial / "checkpoints" / "seed0-experts").is_dir()


def searching_the_second_seed(partial):
    rows = (partial / "metrics.jsonl").read_text().splitlines()
    return any('"seed": 1' in row and "adas/generation" in row for row in rows)


def writing_the_second_seed(partial):
    return (partial / ".seed1.staged").is_dir()


def rows_of(out):
    """The record without what was measured of the files: timings differ from run to run."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("final/")} for row in rows]


def killed(process, partial, moment):
    """Wait for the moment, then kill -9."""
    while process.poll() is None and not moment(partial):
        time.sleep(0.02)
    assert process.poll() is None, f"the run was over before it could be killed in {moment}"
    process.kill()
    process.wait()


def test_one_run_killed_three_times_ends_in_the_same_bits(checkpoint, unbroken, tmp_path):
    out, partial = tmp_path / "run", tmp_path / "run.partial"
    silent: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    line = command(checkpoint, out, *TWO_SEEDS)
    process = subprocess.Popen(line, env=ENVIRONMENT, **silent)
    while not (partial / "metrics.jsonl").is_file():
        assert process.poll() is None, "the run ended before it began"
        time.sleep(0.02)
    # timings are measured once and reused: with those of the unbroken run all else must agree
    (partial / "once").mkdir()
    shutil.copy(unbroken[0] / "once" / "calibration.json", partial / "once" / "calibration.json")
    killed(process, partial, training)
    for moment in (searching_the_second_seed, writing_the_second_seed):
        killed(subprocess.Popen([*line, "--resume"], env=ENVIRONMENT, **silent), partial, moment)
    assert not out.exists()
    finished(checkpoint, out, *TWO_SEEDS, "--resume")
    assert not partial.exists()
    for folder in (".", "seed1"):
        experts = [f"z_vectors_{d}.safetensors" for d in ("math", "code", "reasoning", "vision")]
        for name in ("svf_adapted_model.safetensors", *experts):
            ours, theirs = (o / folder / name for o in (out, unbroken[0]))
            assert ours.read_bytes() == theirs.read_bytes()
        ours, theirs = (runs.read_json(o / folder / "phase7.json") for o in (out, unbroken[0]))
        assert ours["best_mixture"] == theirs["best_mixture"]
    for name in ("search.npz", "search_seed1.npz"):
        ours, theirs = (np.load(o / name) for o in (out, unbroken[0]))
        for array in ("alpha", "rank", "front", "accuracy", "hypervolume"):
            np.testing.assert_array_equal(ours[array], theirs[array])
    assert rows_of(out) == rows_of(unbroken[0])
    seen = [runs.read_json(o / "summary.json") for o in (out, unbroken[0])]
    for summary in seen:
        del summary["seconds"], summary["peak_rss_gb"]
    assert seen[0] == seen[1]


def test_a_killed_lift_is_called_again(tmp_path):
    """The artifacts end on top whole, whatever had been moved, and are not written anew."""
    final = ["huggingface/model.txt", "phase7.json", "svf_adapted_model.json", "z.pt"]
    for moved in range(len(final) + 1):
        top = tmp_path / str(moved)
        run = runs.Run(top, top, {}, io.StringIO(), 0.0)
        for i, name in enumerate(sorted(final, key=lambda n: n == "phase7.json")):
            path = (top if i < moved else top / "seed3") / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"metadata": {"seed": 3}}))
        left = top / "seed3"
        left.mkdir(exist_ok=True)
        if "phase7.json" in {p.name for p in top.iterdir()}:  # all moved: there is nothing to do
            assert artifacts.is_lifted(run, 3)
        artifacts.lift(run, left)
        assert sorted(p.relative_to(top).as_posix() for p in top.rglob("*.*")) == sorted(final)
        assert not left.exists()
        assert artifacts.is_lifted(run, 3)
        assert not artifacts.is_lifted(run, 4)
