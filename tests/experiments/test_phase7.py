"""The whole of Phase 7 on a one-layer model: results, kill -9 and resume, bad input."""

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from experiments import artifacts, experts, mixture, phase7
from experiments import run as runs
from experiments.forms import SVF
from experiments.model import NANO
from experiments.problem import score_all
from forge_jax import optim, svf
from interop import load_phase6, load_phase8

DATA: dict[str, Any] = {"train_items": 16, "validation_items": 8, "test_items": 8}
TRAINING: dict[str, Any] = {"steps": 4, "prompts": 4, "samples": 4, "validate_every": 2}
MIXING: dict[str, Any] = {"population": 8, "generations": 3, "search_items": 4}


def first_layers(folder, count):
    """The first layers of the shipped nano base, a Phase 6 pair of its own."""
    base = load_phase6(NANO)
    record = json.loads(NANO.read_text())
    record["config"]["num_hidden_layers"] = count
    (folder / "tiny.json").write_text(json.dumps(record))
    tensors = load_file(NANO.parent / "phase6.safetensors")
    kept = tuple(f".layers.{i}." for i in range(count))
    tensors = {k: v for k, v in tensors.items() if ".layers." not in k or any(x in k for x in kept)}
    save_file(tensors, folder / "tiny.safetensors", metadata={"format": "pt"})
    projector = load_file(NANO.parent / "phase6.vision.safetensors")
    save_file(projector, folder / "tiny.vision.safetensors", metadata={"format": "pt"})
    assert base.tokenizer is not None
    base.tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tiny.json"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return first_layers(tmp_path_factory.mktemp("tiny"), 1)


def command(checkpoint, out, *more):
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in {**DATA, **TRAINING, **MIXING}.items()]
    return [
        *(sys.executable, "-m", "experiments.phase7", "nano", f"--checkpoint={checkpoint}"),
        *(f"--out={out}", "--unplanted", *flags, *more),
    ]


CACHE = Path(__file__).resolve().parents[2] / ".cache" / "jax"
ENVIRONMENT = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(CACHE)}
TWO_SEEDS = ("--seeds=0,1", "--replace")


def finished(checkpoint, out, *more):
    line = command(checkpoint, out, *more)
    done = subprocess.run(line, capture_output=True, text=True, timeout=900, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def unbroken(checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken") / "run"
    return out, finished(checkpoint, out, *TWO_SEEDS)


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


@pytest.mark.slow
@pytest.mark.parametrize("moment", [training, searching_the_second_seed, writing_the_second_seed])
def test_resumes_to_the_same_bits_after_kill(checkpoint, unbroken, tmp_path, moment):
    out, partial = tmp_path / "run", tmp_path / "run.partial"
    # timings are measured once and reused: with those of the unbroken run all else must agree
    silent: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    line = command(checkpoint, out, *TWO_SEEDS)
    process = subprocess.Popen(line, env=ENVIRONMENT, **silent)
    while not (partial / "metrics.jsonl").is_file():
        assert process.poll() is None, "the run ended before it began"
        time.sleep(0.02)
    (partial / "once").mkdir()
    shutil.copy(unbroken[0] / "once" / "calibration.json", partial / "once" / "calibration.json")
    while process.poll() is None and not moment(partial):
        time.sleep(0.02)
    assert process.poll() is None, "the run was over before it could be killed"
    process.kill()
    process.wait()
    assert not out.exists(), "the run was over before it could be killed"
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


@pytest.mark.slow
def test_the_other_ways_through(tmp_path):
    """CEM, one alpha a layer that sums to 1, supervised z, and every view of the record."""
    training = {**TRAINING, "supervised": True, "learning_rate": 0.05}
    mixing: dict[str, Any] = {
        "search": "cem",
        "per_layer": True,
        "normalize_alpha": True,
        "evaluations": 2,
    }
    (tmp_path / "base").mkdir()
    args = args_for(
        tmp_path,
        checkpoint=first_layers(tmp_path / "base", 2),
        domains=("math", "code"),
        training=experts.Settings(**training),
        mixing=mixture.Settings(**{**MIXING, **mixing}, calibration_ranks=(1.0, 0.2)),
        wandb="test",
        wandb_mode="offline",
        tensorboard=True,
    )
    phase7.main(args)
    found = load_phase8(args.out)
    assert found.alpha_by_path is not None
    rows = [json.loads(line) for line in (args.out / "metrics.jsonl").read_text().splitlines()]
    losses = [row["svf/math/loss"] for row in rows if "svf/math/loss" in row]
    assert losses[-1] < losses[0]
    assert not any("svf/math/reward" in row for row in rows)
    assert [r["adas/generation"] for r in rows if "adas/generation" in r] == [1, 2, 3]
    drawn = np.load(args.out / "search.npz")["alpha"]
    assert drawn.shape == (8, 2, 2)  # population, layers, experts
    np.testing.assert_allclose(drawn.sum(axis=-1), 1, rtol=1e-5)
    assert list((args.out / "tensorboard").rglob("events*"))
    assert list((args.out / "wandb").glob("offline-run-*"))


@pytest.mark.slow
def test_plain_rewards_unit_alpha_and_ceilings(checkpoint, tmp_path):
    args = args_for(
        tmp_path,
        checkpoint=checkpoint,
        domains=("vision",),
        training=experts.Settings(**TRAINING, baseline="none"),
        mixing=mixture.Settings(**MIXING, alpha_upper=1.0, calibration_ranks=(1.0, 0.2)),
        ceilings=True,
    )
    phase7.main(args)
    assert np.load(args.out / "search.npz")["alpha"].max() <= 1
    summary = runs.read_json(args.out / "summary.json")
    spec = load_phase6(checkpoint).spec
    q, kv, d, f = 128, 64, spec.hidden_size, spec.intermediate_size
    lora = 16 * (2 * (d + q) + 2 * (d + kv) + 3 * (d + f))
    assert summary["ceilings"]["LoRA, rank 16"]["bytes"] == 4 * lora
    weights = load_file(checkpoint.with_suffix(".safetensors"))
    size = sum(w.size for k, w in weights.items())
    assert summary["ceilings"]["full fine-tuning"]["bytes"] == 4 * size
    z = load_phase8(args.out).experts["vision"]
    assert summary["ceilings"]["SVF"]["bytes"] == 4 * sum(v.size for v in z.values())
    assert set(summary["ceilings"]["SVF"]["accuracy"]) == {"vision"}
    assert "LoRA" in (args.out / "report.html").read_text()


@pytest.mark.slow
def test_a_hub_set_trains_on_free_text(checkpoint, tmp_path, monkeypatch):
    """gsm8k from a local copy smaller than the counts: a response is read, not compared."""
    import datasets
    from datasets import config

    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    (tmp_path / "gsm8k").mkdir()
    rows = [{"question": f"What is {i}?", "answer": f"It is.\n#### {i}"} for i in range(80)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "gsm8k" / "train.jsonl").write_text(text)
    settings = experts.Settings(**TRAINING)
    given = {"checkpoint": checkpoint, "source": "hub", "data": str(tmp_path), "free_tokens": 12}
    args = phase7.Args(domains=("math",), unplanted=(), training=settings, **given)
    problem = phase7.load(args)
    assert problem.new_tokens == 12
    counts = [len(items) for items in problem.tasks[0].items.values()]
    assert sum(counts) == 80
    tx = optim.mugrok(settings.optimizer())
    step = experts.make_step(problem.model, SVF, tx, settings, problem.new_tokens)
    state = experts.init_state(SVF, problem.weights, tx, 1, jax.random.key(0))
    after, metrics = step(problem.weights, state, problem.tasks, 0, 0)
    assert -1 <= metrics["reward"][0] <= 1
    assert all(np.isfinite(d).all() for d in jax.tree.leaves(after.delta))
    score = score_all(problem, base_scales(problem), problem.tasks, "test")[0]
    assert score.correct.shape == (1, counts[2])


def base_scales(problem):
    return {k: leaf.s[None] for k, leaf in svf.named_factors(problem.weights["factors"])}


def refused(args, capsys, lines: int | None = 1) -> str:
    with pytest.raises(SystemExit) as stop:
        phase7.main(args)
    assert stop.value.code == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: ")
    assert lines is None or len(said.splitlines()) == lines
    return said


def args_for(tmp_path, **changes):
    small = {"training": experts.Settings(**TRAINING), "mixing": mixture.Settings(**MIXING)}
    given = {"out": tmp_path / "run", "unplanted": (), **DATA, **small, **changes}
    return phase7.Args(**given)


def changed(checkpoint, tmp_path, change):
    """A copy of the checkpoint whose tensors went through `change`."""
    for path in checkpoint.parent.iterdir():
        shutil.copy(path, tmp_path / path.name)
    tensors = load_file(tmp_path / "tiny.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "tiny.safetensors", metadata={"format": "pt"})
    return tmp_path / "tiny.json"


UP = "model.layers.0.mlp.up_proj.weight"
GATE = "model.layers.0.mlp.gate_proj.weight"


def unknown_and_missing(tensors):
    tensors["surprise.weight"] = tensors.pop(UP)


def not_finite(tensors):
    tensors[UP][3, 4] = np.nan


def other_shapes(tensors):
    tensors[UP], tensors[GATE] = tensors[UP][:, :-1].copy(), tensors[GATE].T.copy()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (unknown_and_missing, ("surprise.weight", "layers_0/mlp/up_proj/kernel")),
        (not_finite, (UP,)),
        (other_shapes, (UP, GATE)),
    ],
)
def test_refuses_tensors_that_do_not_fit(checkpoint, tmp_path, capsys, change, named):
    bad = changed(checkpoint, tmp_path, change)
    said = refused(args_for(tmp_path, checkpoint=bad), capsys, lines=None)
    assert all(name in said for name in named)
    assert not (tmp_path / "run").exists()


class Touch:
    """Pickled, it would make a file when loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_refuses_a_pickle_that_runs_code(tmp_path, capsys):
    ran = tmp_path / "ran"
    with open(tmp_path / "bad.pt", "wb") as file:
        pickle.dump({"model_state_dict": Touch(ran)}, file)
    said = refused(args_for(tmp_path, checkpoint=tmp_path / "bad.pt"), capsys)
    assert "bad.pt" in said
    assert not ran.exists()
    assert not (tmp_path / "run").exists()


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


def test_seeds_must_differ(checkpoint, tmp_path, capsys):
    assert "differ" in refused(args_for(tmp_path, checkpoint=checkpoint, seeds="1,1"), capsys)


def test_a_domain_comes_once(checkpoint, tmp_path, capsys):
    args = args_for(tmp_path, checkpoint=checkpoint, domains=("math", "math"))
    assert "once" in refused(args, capsys)


def test_counts_that_do_not_go_together_are_refused(checkpoint, tmp_path, capsys):
    args = args_for(tmp_path, checkpoint=checkpoint, train_items=2, validation_items=1)
    said = refused(args, capsys)
    assert "train_items" in said
    assert "validation_items" in said


def test_an_unknown_task_names_those_there_are(checkpoint, tmp_path, capsys):
    args = args_for(tmp_path, checkpoint=checkpoint, domains=("maths",))
    assert "reasoning" in refused(args, capsys)
