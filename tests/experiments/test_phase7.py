"""Phase 7 on a one-layer model: every way through it, and bad input."""

import dataclasses
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from experiments import experts, mixture, phase7
from experiments import run as runs
from experiments.forms import SVF, z_of
from experiments.problem import score_all
from experiments.scoring import Mixtures
from forge_jax import optim
from interop import load_phase6, load_phase8

DATA: dict[str, Any] = {"train_items": 16, "validation_items": 8, "test_items": 8}
TRAINING: dict[str, Any] = {"steps": 4, "prompts": 4, "samples": 4, "validate_every": 2}
MIXING: dict[str, Any] = {"population": 8, "generations": 3, "search_items": 4}


@pytest.mark.slow
def test_the_other_ways_through(first_layers, tmp_path):
    """CEM, one alpha a layer that sums to 1, supervised z, and every view of the record."""
    training = {**TRAINING, "algorithm": "supervised", "learning_rate": 0.05}
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
    settings = experts.Settings(**TRAINING, algorithm="ppo", kl_target=0.1)
    given = {"checkpoint": checkpoint, "source": "hub", "data": str(tmp_path), "free_tokens": 12}
    given |= {"mixing": mixture.Settings(**MIXING)}
    args = phase7.Args(domains=("math",), unplanted=(), training=settings, **given)
    problem = phase7.load(args)
    assert problem.new_tokens == 12
    with pytest.raises(ValueError, match="2000 new ones are longer than the context of"):
        phase7.load(dataclasses.replace(args, free_tokens=2000))
    counts = [len(items) for items in problem.tasks[0].items.values()]
    assert sum(counts) == 80
    tx = optim.mugrok(settings.optimizer())
    step = experts.make_step(problem.model, SVF, tx, settings, problem.new_tokens)
    state = experts.init_state(SVF, problem.weights, tx, 1, jax.random.key(0), settings)
    after, metrics = step(problem.weights, state, problem.tasks, 0, 0)
    assert -1 <= metrics["reward"][0] <= 1
    assert all(np.isfinite(d).all() for d in jax.tree.leaves(after.delta))
    base = Mixtures(z_of(state.delta), np.zeros((1, 1)))
    score = score_all(problem, base, problem.tasks, "test")[0]
    assert score.correct.shape == (1, counts[2])


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


def test_unknown_domains_are_refused_before_anything_is_loaded(tmp_path, capsys):
    said = refused(args_for(tmp_path, checkpoint=tmp_path / "none.json", domains=("art",)), capsys)
    assert "art" in said
    assert "math" in said


def test_a_domain_comes_once(checkpoint, tmp_path, capsys):
    args = args_for(tmp_path, checkpoint=checkpoint, domains=("math", "math"))
    assert "once" in refused(args, capsys)


def test_a_domain_with_an_expert_is_not_apart_too(checkpoint, tmp_path):
    args = args_for(tmp_path, checkpoint=checkpoint, domains=("bits",), unplanted=("bits", "sums"))
    problem = phase7.load(args)
    assert [task.name for task in problem.tasks] == ["bits"]
    assert [task.name for task in problem.unplanted] == ["sums"]


def test_counts_that_do_not_go_together_are_refused(checkpoint, tmp_path, capsys):
    args = args_for(tmp_path, checkpoint=checkpoint, train_items=2, validation_items=1)
    said = refused(args, capsys)
    assert "train_items" in said
    assert "validation_items" in said


@pytest.mark.parametrize(
    ("mesh", "said"),
    [
        ("data=2", "needs 2 devices, got 1"),
        ("rows=1", "may name the axes data, model, population, got rows"),
        ("data", "must be axes and sizes such as data=2,model=4, got 'data'"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(checkpoint, tmp_path, capsys, mesh, said):
    assert said in refused(args_for(tmp_path, checkpoint=checkpoint, mesh=mesh), capsys)
    assert not (tmp_path / "run").exists()


def test_an_unknown_task_names_those_there_are(checkpoint, tmp_path, capsys):
    args = args_for(tmp_path, checkpoint=checkpoint, domains=("maths",))
    assert "reasoning" in refused(args, capsys)
