"""Experts on another base: warned of, refused where the shape differs, and compared with chance."""

import warnings
from types import SimpleNamespace

import numpy as np
import pytest

from experiments import transfer
from experiments.data import tasks
from forge_jax import svf


def given(z, sha, checkpoint, **more):
    """A run's experts, as `load_phase8` returns them."""
    return SimpleNamespace(experts=z, metadata={"base_sha256": sha}, checkpoint=checkpoint, **more)


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


def load(monkeypatch, checkpoint, experts, sha):
    monkeypatch.setattr(transfer, "load_phase8", lambda _: given(experts, sha, None))
    return transfer.load(transfer.Args(experts=checkpoint, to=checkpoint, items=6))


def test_another_base_is_a_warning_and_another_shape_an_error(made, checkpoint, monkeypatch):
    own = made[0].checkpoint.sha256
    with warnings.catch_warnings(action="error"):
        load(monkeypatch, checkpoint, {"math": made[1]}, own)
    with pytest.warns(UserWarning, match="are of the base 0123"):
        load(monkeypatch, checkpoint, {"math": made[1]}, "0123")
    short = {path: x[:-1] for path, x in made[1].items()}
    with pytest.raises(ValueError, match="do not fit the model"):
        load(monkeypatch, checkpoint, {"math": short}, own)


def test_rows_are_the_models_alone(made, checkpoint, monkeypatch):
    """The mark of every row is that of its z, materialized."""
    target, found = load(monkeypatch, checkpoint, {"bits": made[1]}, made[0].checkpoint.sha256)
    got = transfer.measure(target, found, draws=2, seed=3)["bits"]
    (task,) = target.tasks
    orders = transfer.orders(made[1], 2, np.random.default_rng(3))
    identity = svf.identity(target.weights["factors"])

    def mark(z):
        params = svf.materialize(target.weights["factors"], z)
        wanted = tasks.first(task.batches["test"], None)
        answers = [item.answer for item in task.items["test"]]
        return target.params_scorer(params, target.weights["projector"], wanted, task, answers)

    rows = [mark({p: x[i] for p, x in orders.items()}) for i in range(3)]
    assert got["base"]["accuracy"] == mark(identity).mean()
    assert got["ordered"]["accuracy"] == rows[0].mean()
    assert got["shuffled"]["accuracy"] == pytest.approx(np.mean(rows[1:]))
    less = got["ordered less shuffled"]
    assert less["difference"] == pytest.approx(rows[0].mean() - np.mean(rows[1:]))
    assert less["low"] <= less["difference"] <= less["high"]
