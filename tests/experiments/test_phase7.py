"""The whole of Phase 7 on a one-layer model: results, kill -9 and resume, bad input."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from experiments import phase7
from experiments.model import NANO
from interop import load_phase6, load_phase8

SMALL = {
    "train_items": 16,
    "validation_items": 8,
    "test_items": 8,
    "steps": 4,
    "prompts": 4,
    "samples": 4,
    "validate_every": 2,
    "population": 8,
    "generations": 3,
    "search_items": 4,
    "unplanted": (),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The first layer of the shipped nano base, a Phase 6 pair of its own."""
    folder = tmp_path_factory.mktemp("tiny")
    base = load_phase6(NANO)
    record = json.loads(NANO.read_text())
    record["config"]["num_hidden_layers"] = 1
    (folder / "tiny.json").write_text(json.dumps(record))
    tensors = load_file(NANO.parent / "phase6.safetensors")
    kept = {k: v for k, v in tensors.items() if "layers." not in k or ".layers.0." in k}
    save_file(kept, folder / "tiny.safetensors", metadata={"format": "pt"})
    projector = load_file(NANO.parent / "phase6.vision.safetensors")
    save_file(projector, folder / "tiny.vision.safetensors", metadata={"format": "pt"})
    assert base.tokenizer is not None
    base.tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tiny.json"


def command(checkpoint, out, *more):
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in SMALL.items() if not isinstance(v, tuple)]
    return [
        *(sys.executable, "-m", "experiments.phase7", "nano", f"--checkpoint={checkpoint}"),
        *(f"--out={out}", "--unplanted", *flags, *more),
    ]


CACHE = Path(__file__).resolve().parents[2] / ".cache" / "jax"
ENVIRONMENT = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(CACHE)}


def finished(checkpoint, out, *more):
    line = command(checkpoint, out, *more)
    done = subprocess.run(line, capture_output=True, text=True, timeout=900, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def unbroken(checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken") / "run"
    return out, finished(checkpoint, out)


@pytest.mark.slow
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
    assert any(np.abs(z - 1).max() > 1e-3 for z in found.experts["math"].values())


@pytest.mark.slow
def test_metrics_carry_the_guides_names(unbroken):
    rows = [json.loads(line) for line in (unbroken[0] / "metrics.jsonl").read_text().splitlines()]
    names = {name for row in rows for name in row}
    for domain in ("math", "code", "reasoning", "vision"):
        assert {f"svf/{domain}/{m}" for m in ("loss", "reward", "kl_div", "accuracy")} <= names
        assert f"mixture/{domain}" in names
    searched = ("generation", "best_latency_ms", "best_accuracy", "best_memory_gb")
    assert {f"adas/{m}" for m in (*searched, "best_throughput_tps", "pareto_front_size")} <= names
    assert {f"final/{m}" for m in ("latency_ms", "accuracy", "vram_gb", "throughput_tps")} <= names


def training(out):
    return (out / "checkpoints" / "seed0-experts").is_dir()


def searching(out):
    return "adas/generation" in (out / "metrics.jsonl").read_text()


def writing(out):
    return (out / ".seed0.staged").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("moment", [training, searching, writing])
def test_resumes_to_the_same_bits_after_kill(checkpoint, unbroken, tmp_path, moment):
    out = tmp_path / "run"
    # timings are measured once and reused: with those of the unbroken run all else must agree
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command(checkpoint, out), env=ENVIRONMENT, **silent)
    while not (out / "metrics.jsonl").is_file():
        assert process.poll() is None, "the run ended before it began"
        time.sleep(0.02)
    (out / "once").mkdir()
    shutil.copy(unbroken[0] / "once" / "calibration.json", out / "once" / "calibration.json")
    while process.poll() is None and not moment(out):
        time.sleep(0.02)
    assert process.poll() is None, "the run was over before it could be killed"
    process.kill()
    process.wait()
    assert not (out / "summary.json").exists(), "the run was over before it could be killed"
    finished(checkpoint, out, "--resume")
    for name in ("svf_adapted_model.safetensors", "z_vectors_math.safetensors"):
        assert (out / name).read_bytes() == (unbroken[0] / name).read_bytes()
    ours, theirs = (json.loads((o / "phase7.json").read_text()) for o in (out, unbroken[0]))
    assert ours["best_mixture"] == theirs["best_mixture"]
    ours, theirs = (np.load(o / "search.npz") for o in (out, unbroken[0]))
    for name in ("alpha", "rank", "front", "accuracy"):
        np.testing.assert_array_equal(ours[name], theirs[name])
    seen = [json.loads((o / "summary.json").read_text()) for o in (out, unbroken[0])]
    for summary in seen:
        del summary["seconds"], summary["peak_rss_gb"]
    assert seen[0] == seen[1]


def refused(args, capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        phase7.main(args)
    assert stop.value.code == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: ")
    assert "\n" not in said
    return said


def args_for(tmp_path, **changes):
    return dataclasses.replace(phase7.Args(out=tmp_path / "run", **SMALL), **changes)


def test_refuses_a_missing_checkpoint(tmp_path, capsys):
    said = refused(args_for(tmp_path, checkpoint=tmp_path / "none.json"), capsys)
    assert "none.json" in said
    assert not (tmp_path / "run").exists()


def test_refuses_a_truncated_checkpoint(checkpoint, tmp_path, capsys):
    for name in ("tiny.json", "tiny.safetensors", "tokenizer.json"):
        content = (checkpoint.parent / name).read_bytes()
        (tmp_path / name).write_bytes(content[:-100] if name == "tiny.safetensors" else content)
    said = refused(args_for(tmp_path, checkpoint=tmp_path / "tiny.json"), capsys)
    assert "tiny.safetensors" in said
    assert not (tmp_path / "run").exists()


def test_refuses_an_existing_directory(checkpoint, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("keep")
    said = refused(args_for(tmp_path, checkpoint=checkpoint), capsys)
    assert "already exists" in said
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["mine.txt"]


def test_refuses_nothing_to_resume(checkpoint, tmp_path, capsys):
    said = refused(args_for(tmp_path, checkpoint=checkpoint, resume=True), capsys)
    assert "resume" in said


def test_seeds_must_be_numbers(checkpoint, tmp_path, capsys):
    assert "one" in refused(args_for(tmp_path, checkpoint=checkpoint, seeds="one"), capsys)
