"""Experts on another base: warned of, refused where the shape differs, beside their shuffles."""

import dataclasses
import json
import warnings
from types import SimpleNamespace
from typing import Any
from zlib import crc32

import numpy as np
import pytest

from experiments import transfer
from forge_jax import svf


def given(z, sha) -> Any:
    """A run's experts, as `load_phase8` returns them."""
    return SimpleNamespace(experts=z, metadata={"base_sha256": sha})


@pytest.fixture(scope="module")
def made(checkpoint):
    """The target and experts of one domain that are the base, but for a factor at the end."""
    from experiments import model

    found, weights = model.load(checkpoint, "both")
    rng = np.random.default_rng(0)
    z = {
        path: np.asarray(x) * rng.uniform(0.5, 1.5, x.shape).astype(np.float32)
        for path, x in svf.identity(weights["factors"]).items()
    }
    return found, z


def test_orders_keep_every_value_and_the_first_is_the_z(made):
    got = transfer.orders(made[1], 3, np.random.default_rng(1))
    for path, x in made[1].items():
        assert got[path].shape == (4, *x.shape)
        np.testing.assert_array_equal(got[path][0], x)
        np.testing.assert_array_equal(np.sort(got[path], axis=1), np.sort([x] * 4, axis=1))
        assert all((row != x).any() for row in got[path][1:])


SETTINGS = {"test_items": 6, "select": "both", "source": "procedural", "data": None}
SETTINGS |= {"stop_token": True, "free_tokens": 16, "max_full": None, "reward": "task"}


def load(monkeypatch, folder, checkpoint, experts, sha):
    (folder / "config.json").write_text(json.dumps(SETTINGS))
    (folder / "manifest.json").write_text("{}")
    monkeypatch.setattr(transfer, "load_phase8", lambda _: given(experts, sha))
    return transfer.load(transfer.Args(experts=folder, to=checkpoint))


def test_another_base_is_a_warning_and_another_shape_an_error(
    made, checkpoint, tmp_path, monkeypatch
):
    own = made[0].checkpoint.sha256
    with warnings.catch_warnings(action="error"):
        load(monkeypatch, tmp_path, checkpoint, {"math": made[1]}, own)
    with pytest.warns(UserWarning, match="are of the base 0123"):
        load(monkeypatch, tmp_path, checkpoint, {"math": made[1]}, "0123")
    short = {path: x[:-1] for path, x in made[1].items()}
    with pytest.raises(ValueError, match="do not fit the model"):
        load(monkeypatch, tmp_path, checkpoint, {"math": short}, own)


def test_rows_are_the_models_alone(made, checkpoint, tmp_path, monkeypatch):
    """Every accuracy is that of its z, materialized."""
    sha = made[0].checkpoint.sha256
    target, found = load(monkeypatch, tmp_path, checkpoint, {"bits": made[1]}, sha)
    (task,) = target.tasks
    got = transfer.measure(target, task, found.experts["bits"], draws=2, seed=3)
    rng = np.random.default_rng([3, crc32(b"bits")])
    candidates = transfer.orders(made[1], 2, rng)
    identity = svf.identity(target.weights["factors"])

    def accuracy(z):
        params = svf.materialize(target.weights["factors"], z)
        wanted = [item.answer for item in task.items["test"]]
        projector, batch = target.weights["projector"], task.batches["test"]
        return target.params_scorer(params, projector, batch, task, wanted).mean()

    rows = [accuracy({p: x[i] for p, x in candidates.items()}) for i in range(3)]
    assert got == {"base": accuracy(identity), "ordered": rows[0], "shuffled": rows[1:]}


def test_a_run_goes_on_where_it_was(made, checkpoint, tmp_path, monkeypatch, capsys):
    """What is measured is measured once; the numbers printed are those of the file."""
    sha = made[0].checkpoint.sha256
    load(monkeypatch, tmp_path, checkpoint, {"bits": made[1]}, sha)
    args = transfer.Args(experts=tmp_path, to=checkpoint, out=tmp_path / "out", draws=2)
    row = {"base": 0.25, "ordered": 0.5, "shuffled": [0.125, 0.375]}
    monkeypatch.setattr(transfer, "measure", lambda *_: row)
    transfer.main(args)
    monkeypatch.setattr(transfer, "measure", lambda *_: pytest.fail("measured twice"))
    transfer.main(dataclasses.replace(args, resume=True))
    assert json.loads((args.out / "transfer.json").read_text()) == {"bits": row}
    assert "25.0     50.0  25.0 (12.5 to 37.5)" in capsys.readouterr().out
    (tmp_path / "manifest.json").write_text("{} ")
    with pytest.raises(SystemExit):
        transfer.main(dataclasses.replace(args, resume=True))
    assert "other settings: experts_sha256" in capsys.readouterr().err
