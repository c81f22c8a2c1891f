"""Phase 1 on models of a few thousand parameters: what a run leaves, resumption, three at once."""

import dataclasses
import errno
import functools
import json
import os
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import tyro
import yaml
from safetensors.numpy import load_file

from experiments import checkpoints, phase1
from experiments import run as runs
from experiments.checkpoints import flatten, steps
from experiments.cognate import metrics
from experiments.cognate.args import Args, defaults
from experiments.cognate.problem import next_batch
from experiments.cognate.training import (
    Settings,
    State,
    gradient,
    init_state,
    keep_best,
    make_tx,
    make_update,
    schedule,
)
from experiments.cognate.validation import Held, Scores, make_scorer, summarize
from experiments.data.packing import Rows
from forge_jax.models.cognate import SPECIALIZATIONS, Cognate, CognateConfig
from interop.cognate import cognate_names, load_cognate

SHAPE = CognateConfig(
    vocab_size=300,
    d_model=16,
    layers=1,
    heads=2,
    d_ff=16,
    max_positions=64,
    window=16,
    positions="learned",
    memory="ema",
    d_mem=4,
    gate_hidden=4,
    steps=1,
    micro_steps=1,
    step_weights=(0.5, 1.0),
    answer_heads=2,
    loss_rows=64,
)
SETTINGS = Settings(steps=6, batch=2, accumulate=2, average_decay=0.9, quick_compile=True)
SMALL: dict[str, Any] = {
    **{"data": "offline", "train_examples": 30, "validation_examples": 4, "length": 48},
    **{"epochs": 3, "held_batch": 4, "halting_rows": 2, "log_every": 1, "save_every": 1},
    **{"training": SETTINGS, "shape": SHAPE},
}
TIMED = ("tokens_per_second", "duration_minutes", "time_hours")


def make_args(out, **changes):
    return Args(**{**SMALL, "out": out, **changes})


@functools.cache
def cached_update(config, settings, seed):
    return make_update(Cognate(config), make_tx(settings, config), settings, seed)


@functools.cache
def cached_scorer(config):
    return make_scorer(Cognate(config), SETTINGS.compiler_options)


@functools.cache
def cached_init(config, settings, keys):
    made = jax.random.wrap_key_data(jnp.asarray(np.array(keys, np.uint32)))
    return init_state(Cognate(config), make_tx(settings, config), made)


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


def initial(model, tx, keys, settings=SETTINGS):
    """A copy: an update takes its arguments over."""
    del tx
    data = tuple(map(tuple, np.asarray(jax.random.key_data(keys)).tolist()))
    return jax.tree.map(jnp.copy, cached_init(model.config, settings, data))


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
    note, stand = checkpoints.restore_latest(out / "checkpoints" / "state", template)
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


def drawn_batch():
    """A problem, one model's batch of two parts, and parameters."""
    args = make_args("unused")
    problem = phase1.load_problem(args)
    batch, _ = next_batch(problem, problem.start(), 0, parts=2, rows=2, length=48)
    state = initial(problem.model, None, problem.keys())
    params = jax.tree.map(lambda x: x[0], state.params)
    return problem, tuple(jnp.asarray(x[0]) for x in batch), params


def test_how_a_batch_is_cut_into_parts_does_not_matter():
    """Also when their numbers of labels differ: means are over tokens, not over parts."""
    problem, rows, params = drawn_batch()
    tokens, labels, segments = rows
    counts = (labels >= 0).sum((1, 2))
    assert counts.min() > 0
    assert counts[0] != counts[1]
    rows = (tokens, labels, segments)
    empty = [jnp.full_like(x, fill) for x, fill in zip(rows, (0, -100, 0), strict=True)]
    # four rows and four empty ones: two and two of each in both parts, or all labels in the first
    even = tuple(jnp.concatenate([x, e], axis=1) for x, e in zip(rows, empty, strict=True))
    uneven = tuple(
        jnp.stack([x.reshape(4, 48), e.reshape(4, 48)]) for x, e in zip(rows, empty, strict=True)
    )
    controls = jax.tree.map(lambda x: x[0], problem.controls)
    take = jax.jit(
        lambda batch: gradient(problem.model, SETTINGS, params, batch, controls, None),
        compiler_options=SETTINGS.compiler_options,
    )
    (ours, metrics_a), (theirs, metrics_b) = take(even), take(uneven)
    assert optax.tree.norm(ours) > 1e-2
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=5e-6), ours, theirs)
    for name, value in metrics_b.items():
        np.testing.assert_allclose(metrics_a[name], value, rtol=1e-3, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_short_numbers_train_long_weights():
    problem, batch, params = drawn_batch()
    controls = jax.tree.map(lambda x: x[0], problem.controls)

    def take(settings):
        return jax.jit(
            lambda batch: gradient(problem.model, settings, params, batch, controls, None)[0],
            compiler_options=SETTINGS.compiler_options,
        )(batch)

    exact, rough = take(SETTINGS), take(dataclasses.replace(SETTINGS, compute="bfloat16"))
    assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(rough))
    error = optax.tree.norm(optax.tree.sub(rough, exact)) / optax.tree.norm(exact)
    assert 1e-4 < error < 0.1


def test_the_schedule_acts_on_both_routes():
    settings = dataclasses.replace(SETTINGS, steps=20, warmup=0.2, clip=1e9)
    tx = make_tx(settings, SHAPE)
    params = {"attention": {"w_q": {"kernel": jnp.eye(16)}}, "norm": {"scale": jnp.ones(16)}}
    params = {"layers": params}
    state, moved = tx.init(params), []
    update = jax.jit(tx.update, compiler_options=SETTINGS.compiler_options)
    for _ in range(20):
        updates, state = update(jax.tree.map(jnp.ones_like, params), state, params)
        moved.append([float(optax.tree.norm(u)) for u in jax.tree.leaves(updates)])
    wanted = np.array([float(schedule(settings, 1.0)(i)) for i in range(20)])
    assert wanted[4] == wanted.max() == 1
    assert wanted[-1] < 0.1 < wanted[0] < 0.3
    for route in np.array(moved).T:  # the filter lets the gradient grow by 5 %, seen by AdamW
        np.testing.assert_allclose(route / route[4], wanted, rtol=0.03)


def test_only_a_clear_improvement_is_kept_and_patience_ends():
    args = make_args("unused", specialization="all")
    leaf = {"w": jnp.arange(3.0)}
    zeros = jnp.zeros(3, jnp.int32)
    state = State(
        leaf,
        {"w": jnp.array([7.0, 8.0, 9.0])},
        None,
        zeros,
        leaf,
        jnp.array([1.0, 1.0, 1.0]),
        jnp.array([0, 2, 3]),
    )
    got = keep_best(state, np.array([0.5, 0.995, 0.1]), args.margin, args.patience)
    np.testing.assert_array_equal(got.best["w"], [7, 1, 2])
    np.testing.assert_array_equal(got.best_loss, [0.5, 1, 1])
    np.testing.assert_array_equal(got.stale, [0, 3, 4])


def test_a_question_is_right_when_all_of_its_answer_is():
    segments = np.array([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1]])
    labels = np.array([[-100, 5, 6, -100, 7, -100], [3, 3, 3, 3, 3, -100]])
    correct = np.array([[0, 1, 0, 0, 1, 0], [1, 1, 0, 0, 0, 0]], bool)[None]
    nll = np.arange(12.0).reshape(1, 2, 6)
    held = Held(Rows(segments, labels, segments), ["math", "language"])
    (got,) = summarize(Scores(nll, correct, nll, correct), held)
    assert got["math"] == 0.5
    assert got["language"] == 0.4
    assert got["loss"] == pytest.approx(nll[0][labels >= 0].mean())
    assert got["tokens_held"] == pytest.approx(nll[0][segments > 0].mean())


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
    assert refused(args, capsys) == "error: No space left on device"
    assert (unbroken / "tokenizer.json").read_bytes() == before


def test_the_command_line_picks_its_defaults():
    assert defaults(["--smoke"]).shape.d_model < defaults(["--small"]).shape.d_model
    assert defaults([]).shape == CognateConfig()
    given = tyro.cli(Args, args=["--model", "speed", "--steps", "7", "--shape.layers", "2"])
    assert (given.names, given.training.steps, given.shape.layers) == (["speed"], 7, 2)
    assert tyro.cli(Args, args=["--specialization", "all"]).names == list(SPECIALIZATIONS)


def test_a_loss_that_is_no_number_ends_the_run_in_a_sentence(unbroken):
    args = make_args(unbroken)
    problem = phase1.load_problem(args)
    plain = ("gradient_norm", "memory_tokens", "surprise_rate", "loss_step_1")
    acts = ("avg_halting_steps", "max_halting_steps", "min_halting_steps", "halting_variance")
    parts = ("loss_ce", "loss_act", "loss_gate", "halt_prob_mean", "halt_prob_std")
    measured = {name: np.ones(1) for name in (*plain, *acts, *parts)}
    assert phase1.training_rows(args, problem, 3, measured, 1.0)["train/loss"] == 3
    measured["loss_act"] = np.full(1, np.nan)
    with pytest.raises(ValueError, match="reasoning model is not finite at step 3: lower"):
        phase1.training_rows(args, problem, 3, measured, 1.0)
