"""The optimizer race and the grokking script: their parameter set, counts and decisions."""

import math
from pathlib import Path

import numpy as np
import pytest

from experiments import grokking
from experiments.bench import optimizers as bench
from experiments.bench import race
from experiments.files import read_json


def test_the_parameter_set_is_cognates():
    shapes = bench.cognate_shapes()
    assert sum(math.prod(s) for s in shapes.values()) == 26_974_561
    assert len(shapes) == 107
    matrices = [n for n, s in shapes.items() if bench.to_muon(n, s)]
    assert not [n for n in matrices if "emb" in n]
    assert len(matrices) == 72 - 2 + 1  # the facts leave out the 1 x 320 head, and count embeddings


def test_counts():
    shapes = {"w": (1280, 320), "b": (10,), "token_emb.weight": (100, 320)}
    counts = bench.counted(shapes)
    assert counts["flops of the whole form"] == 2 * 5 * 320**2 * (2 * 1280 + 320)
    assert counts["flops"] == 2 * 320**2 * (2 * 1280 + 17 * 320)
    w, rest = 1280 * 320, 10 + 32000
    assert counts["bytes"] == 4 * (5 * (w + rest) + 2 * w + 4 * rest)


RATES = {
    "float32 product of 1536, flop/s": 1e9,
    "float32 product of 320, flop/s": 2e9,
    "torch bfloat16 product of 1536, flop/s": 8e9,
    "copy, bytes/s read and written": 1e8,
}


def test_the_roofline_is_at_the_better_rate_of_float32():
    assert set(race.ceilings(8, 1)) == {name.replace("1536", "8") for name in RATES}
    assert bench.roofline_s({"flops": 4e9, "bytes": 1e8}, RATES) == pytest.approx(3.0)


@pytest.mark.torch
def test_the_race_writes_its_table(tmp_path, capsys, monkeypatch):
    pytest.importorskip("torch")
    import jax

    few = {"w_q.weight": (20, 20), "up.weight": (80, 20), "token_emb.weight": (99, 20), "b": (9,)}
    monkeypatch.setattr(bench, "cognate_shapes", lambda: few)
    monkeypatch.setattr(bench, "ceilings", lambda: RATES)
    cache = jax.config.values["jax_enable_compilation_cache"]
    try:
        result = bench.main(bench.Args(tmp_path, rounds=1))
    finally:
        jax.config.update("jax_enable_compilation_cache", cache)
    assert set(result["rows"]) == set(read_json(tmp_path / "result.json")["rows"])
    assert (tmp_path / "table.md").read_text().count("\n") == 2 + len(result["rows"])
    assert result["rows"]["mugrok"]["state_of_params"] < 2.5
    assert "mugrok / optax.contrib.muon" in capsys.readouterr().out


def test_first_step_at_the_target():
    curves = np.array([[0.1, 0.96, 0.2, 0.99], [0.1, 0.2, 0.3, 0.4]])
    assert grokking.steps_to_target(curves, 25) == [50, None]
    assert grokking.summary([50, None, 100]) == {
        "steps": [50, None, 100],
        "reached": 2,
        "mean": 75.0,
        "std": pytest.approx(35.3553, abs=1e-3),
    }


def test_splits_are_whole_disjoint_and_differ_by_seed():
    args = grokking.Args(Path(), prime=7)
    train, rest = (np.asarray(x) for x in grokking.pairs_of(0, args))
    assert len({tuple(p) for p in np.concatenate([train, rest])}) == 49
    assert not np.array_equal(train, grokking.pairs_of(1, args)[0])


def test_grokking_runs_to_its_plot(tmp_path, monkeypatch):
    monkeypatch.setattr(grokking, "ARMS", {"muon + grokfast": (True, True)})
    result = grokking.main(grokking.Args(tmp_path / "run", smoke=True))
    row = result["rows"]["muon + grokfast"]
    assert len(row["steps"]) == 2
    assert row["rate"] in (3e-2, 1e-1)
    names = {"config.json", "result.json", "table.md", "grokking.png"}
    assert {p.name for p in (tmp_path / "run").iterdir()} == names
