"""Phase 1 on models of a few thousand parameters: what a run leaves, resumption, three at once."""

import dataclasses
import errno
import json
import os
import re

import jax
import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file

from experiments import checkpoints, phase1
from experiments import run as runs
from experiments.checkpoints import flatten, steps
from experiments.cognate import metrics
from experiments.cognate.problem import next_batch
from experiments.cognate.training import schedule
from forge_jax.models.cognate import SPECIALIZATIONS
from interop.cognate import cognate_names, load_cognate
from tests.experiments.cognate_runs import (
    SETTINGS,
    SHAPE,
    cached_scorer,
    cached_update,
    initial,
    make_args,
)

TIMED = ("tokens_per_second", "duration_minutes", "time_hours")


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """Runs share their programs, which take longer to trace and compile than to run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            phase1,
            "make_update",
            lambda model, tx, settings, seed: cached_update(model.config, settings, seed),
        )
        patch.setattr(phase1, "init_state", initial)
        patch.setattr(
            phase1.validation, "make_scorer", lambda model, options: cached_scorer(model.config)
        )
        yield


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A run of all three models."""
    out = tmp_path_factory.mktemp("phase1") / "run"
    phase1.main(make_args(out, specialization="all"))
    return out


def last_checkpoint(out):
    """The leaves of the last checkpoint, by name."""
    args = make_args(out, specialization="all")
    problem = phase1.load_problem(args)
    state = initial(problem.model, None, problem.keys())
    template = phase1.Stand(state, problem.start(), np.zeros(3, np.int64), 0.0)
    found = checkpoints.restore_latest(out / "checkpoints" / "state", template)
    assert found is not None
    note, stand = found
    return note["step"], stand


def test_a_run_logs_exactly_the_37_names_of_each_model(unbroken):
    rows = runs.rows(unbroken)
    assert len(metrics.NAMES) == len(set(metrics.NAMES)) == 37
    names = {name for row in rows for name in row}
    models = [f"{m}/{name}" for m in SPECIALIZATIONS for name in metrics.NAMES]
    assert names == {"step", "seed", *models}
    assert all(np.isfinite(v) for row in rows for v in row.values())
    measured = {n: [row[n] for row in rows if n in row] for n in models}
    constant = ("epoch_duration", "gpu_memory", "params", "_std", "hours", "accuracy", "stage")
    halting = ("max_halting", "min_halting", "avg_halting", "halting_variance")
    layout = ("memory_usage",)  # the moving average holds by the documents' lengths alone
    for name, values in measured.items():
        if not any(part in name for part in (*constant, *halting, *layout)):
            assert len(set(values)) > 1, name
    first = {n.partition("/")[2]: v[0] for n, v in measured.items() if n.startswith("memory/")}
    assert first["train/loss"] == pytest.approx(
        first["train/loss_ce"] + first["train/loss_act"] + first["train/loss_gate"]
    )
    assert abs(first["train/loss_ce"] - np.log(300)) < 0.7
    assert first["final/trainable_params"] == first["final/total_params"]
    assert first["diversity/ltm_capacity_std"] == pytest.approx(2554, abs=1)
    assert first["diversity/act_threshold_std"] == pytest.approx(0.0368, abs=1e-4)
    assert first["diversity/surprise_threshold_std"] == pytest.approx(0.163, abs=1e-3)
    stages = measured["speed/curriculum/stage"]
    assert stages == [1, 2, 3]
    rates = measured["speed/train/learning_rate"]
    wanted = [float(schedule(SETTINGS, SETTINGS.muon_lr)(i)) for i in range(6)]
    assert rates == pytest.approx(wanted)
    assert len(set(rates)) == 6


def test_a_run_leaves_plots_a_table_and_a_dashboard(unbroken):
    for name in ("loss", "halting", "memory", "curriculum"):
        assert (unbroken / "plots" / f"{name}.svg").read_text().startswith("<svg")
    page = (unbroken / "report.html").read_text()
    assert page.count("data:image/svg+xml") == 4
    table = (unbroken / "comparison.md").read_text()
    assert "| reasoning | memory | speed |" in table
    summary = runs.read_json(unbroken / "summary.json")
    assert 0 < summary["unigram_entropy"] < np.log(summary["tokenizer_tokens"])
    for name, model in summary["models"].items():
        assert f"{model['loss']:.4g}" in table
        assert 1 <= model["answers"] <= 2
        last = [r for r in runs.rows(unbroken) if f"{name}/val/loss" in r]
        assert any(model["loss"] == pytest.approx(r[f"{name}/val/loss"]) for r in last)
    board = yaml.safe_load((unbroken / "wandb_config.yaml").read_text())
    assert len(board["charts"]) == 37
    shown = [name for chart in board["charts"] for name in chart["metric"]]
    assert (
        set(shown)
        == set(board["metrics"])
        == {name for row in runs.rows(unbroken) for name in row if name not in ("step", "seed")}
    )


def test_torch_loads_what_is_exported_and_it_is_the_best_average(unbroken):
    _, stand = last_checkpoint(unbroken)
    for k, name in enumerate(SPECIALIZATIONS):
        found = torch.load(unbroken / name / "model.pt", weights_only=True)
        tensors = found["model_state_dict"]
        beside = load_file(unbroken / name / "model.safetensors")
        assert set(beside) == set(cognate_names(SHAPE))
        assert set(tensors) == {*beside, "lm_head.weight"}
        assert all(torch.equal(tensors[n], torch.from_numpy(x)) for n, x in beside.items())
        assert found["config"]["d_model"] == 16
        params, config = load_cognate(unbroken / name / "model.safetensors")
        assert config == SHAPE
        best = jax.tree.map(lambda x, k=k: np.asarray(x[k]), stand.state.best)
        jax.tree.map(np.testing.assert_array_equal, params, best)
    a, b = (load_file(unbroken / n / "model.safetensors") for n in ("memory", "speed"))
    assert any((a[n] != b[n]).any() for n in a)


def test_a_stopped_run_goes_on_to_the_same_bits(unbroken, tmp_path, monkeypatch, capsys):
    """Stopped after a checkpoint in the middle of an epoch, and before the next."""
    args = make_args(tmp_path / "run", specialization="all")
    save = runs.save

    def stop(run, step, tree, **more):
        save(run, step, tree, **more)
        if step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(runs, "save", stop)
    with pytest.raises(SystemExit) as stopped:
        phase1.main(args)
    assert stopped.value.code == 130
    assert [p.name for p in steps(args.out / "checkpoints" / "state")][-1] == "00000003"
    monkeypatch.undo()
    phase1.main(dataclasses.replace(args, resume=True))
    (step, ours), (_, theirs) = last_checkpoint(args.out), last_checkpoint(unbroken)
    assert step == 6
    names, leaves = flatten(ours._replace(epoch_seconds=0.0))
    assert {"cursor/taken", "state/step"} <= set(names)
    for name, a, b in zip(
        names, leaves, flatten(theirs._replace(epoch_seconds=0.0))[1], strict=True
    ):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), name

    def untimed(out):
        return [{k: v for k, v in row.items() if not k.endswith(TIMED)} for row in runs.rows(out)]

    assert untimed(args.out) == untimed(unbroken)


@pytest.mark.slow
def test_three_at_once_are_three_alone(unbroken, tmp_path):
    _, together = last_checkpoint(unbroken)
    for k, name in enumerate(SPECIALIZATIONS):
        args = make_args(tmp_path / name, specialization=name)
        problem = phase1.load_problem(args)
        update = cached_update(args.shape, args.training, args.seed)
        state = initial(problem.model, None, problem.keys())
        cursor = problem.start()
        for step in range(6):
            batch, cursor = next_batch(problem, cursor, step, parts=2, rows=2, length=48)
            state, _ = update(state, batch, problem.controls)
        np.testing.assert_array_equal(cursor["taken"][0], together.cursor["taken"][k])
        theirs = jax.tree.map(lambda x, k=k: x[k], tuple(together.state[:2]))
        moved = jax.tree.map(lambda x, y: np.abs(x[0] - y).max(), tuple(state[:2]), theirs)
        assert max(jax.tree.leaves(moved)) < 1e-5


def refused(args, capsys):
    """The one sentence with which a run ends before it begins."""
    with pytest.raises(SystemExit) as stop:
        phase1.main(args)
    assert stop.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("error: ")
    return said[-1]


def files_of(folder, text, name="gsm8k"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.jsonl").write_text(text)
    return str(folder)


def test_bad_input_is_refused_in_a_sentence(tmp_path, capsys):
    out = tmp_path / "run"
    cases = {
        "between 2 and the model's 64 positions": {"length": 65},
        "holds none of the data sets": {"data": str(tmp_path)},
        "gsm8k has no examples": {"data": files_of(tmp_path / "a", "")},
        "with the fields query does not fit": {"data": files_of(tmp_path / "b", '{"query": 1}\n')},
        "No data set of stage 1": {
            "data": files_of(
                tmp_path / "c",
                "".join(
                    json.dumps({"passage": "P.", "question": f"{i}", "answer": True}) + "\n"
                    for i in range(40)
                ),
                "boolq",
            )
        },
        "There is no tokenizer": {"tokenizer": tmp_path / "none.json"},
        "`clip` must be positive": {"training": dataclasses.replace(SETTINGS, clip=0.0)},
        "at most `steps`, 6, got 7": {"epochs": 7},
        "`vocabulary` must be at least 258": {"shape": dataclasses.replace(SHAPE, vocab_size=99)},
    }
    for said, changes in cases.items():
        assert said in refused(make_args(out, **changes), capsys)
        assert not out.exists()


def test_a_run_of_another_configuration_or_tokenizer_is_refused(unbroken, tmp_path, capsys):
    args = make_args(unbroken, specialization="all", resume=True)
    other = dataclasses.replace(args, shape=dataclasses.replace(SHAPE, d_ff=32))
    assert "shape.d_ff (was 16, now 32)" in refused(other, capsys)
    fewer = dataclasses.replace(args, train_examples=29)
    said = refused(fewer, capsys)
    assert "train_examples (was 30, now 29)" in said
    assert "texts_sha256 (was " in said
    assert "already exists" in refused(dataclasses.replace(args, resume=False), capsys)
    given = make_args(
        tmp_path / "run",
        tokenizer=unbroken / "tokenizer.json",
        shape=dataclasses.replace(SHAPE, vocab_size=280),
    )
    assert re.search("token ids up to 299, but the model has 280", refused(given, capsys))
    assert not (tmp_path / "run").exists()


def test_a_full_disk_is_one_sentence(unbroken, capsys, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    before = (unbroken / "tokenizer.json").read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    args = make_args(unbroken, specialization="all", resume=True)
    said = f"{unbroken / 'tokenizer.json'} was not written and is as it was before"
    assert refused(args, capsys) == f"error: {said}: No space left on device"
    assert (unbroken / "tokenizer.json").read_bytes() == before
