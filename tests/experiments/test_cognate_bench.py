"""The puzzles' answers are right, and the bench measures what it says."""

import json
from typing import Any

import jax
import numpy as np
import pytest

from experiments.bench import cognate as bench
from experiments.data.puzzles import FILLER, QUERY, SYMBOLS, copy, modular, needle, recall
from forge_jax.models.cognate import Cognate


def drawn(task, rows=50):
    puzzle = task.draw(np.random.default_rng(0), rows)
    assert puzzle.tokens.shape == (rows, task.length)
    assert SYMBOLS <= puzzle.tokens.max() < task.vocabulary
    labelled = puzzle.labels[:, :-1] >= 0
    np.testing.assert_array_equal(puzzle.labels[:, :-1][labelled], puzzle.tokens[:, 1:][labelled])
    again = task.draw(np.random.default_rng(0), rows)
    np.testing.assert_array_equal(puzzle.tokens, again.tokens)
    return puzzle


@pytest.mark.parametrize("questions", [1, 3])
def test_a_recalled_value_is_the_one_of_its_key(questions):
    puzzle = drawn(recall((8, 20), pairs=3, symbols=6, questions=questions))
    assert set(puzzle.group) == {8, 20}
    for tokens, labels, distance in zip(*puzzle, strict=True):
        pairs = dict(zip(tokens[:6:2], tokens[1:6:2], strict=True))
        asked = np.flatnonzero(labels >= 0)
        np.testing.assert_array_equal(asked, distance + 2 * np.arange(questions))
        assert len({tokens[i] for i in asked} & set(pairs)) == questions
        assert all(labels[i] == pairs[tokens[i]] for i in asked)
        assert (tokens[6:distance] == FILLER).all()
    with pytest.raises(ValueError, match="at least the 6 tokens"):
        recall((5,), pairs=3, questions=questions)
    with pytest.raises(ValueError, match="`questions` must be 1 to 3"):
        recall((8,), pairs=3)


def test_a_needle_lies_at_its_distance():
    puzzle = drawn(needle((4, 9)))
    for tokens, labels, distance in zip(*puzzle, strict=True):
        (last,) = np.flatnonzero(labels >= 0)
        assert [*np.flatnonzero(tokens == QUERY)] == [last - distance, last]
        assert labels[last] == tokens[last - distance + 1]


def test_copies_and_sums():
    for tokens, labels, n in zip(*drawn(copy((2, 5))), strict=True):
        np.testing.assert_array_equal(labels[labels >= 0], tokens[:n])
        assert tokens[n] == QUERY
    for tokens, labels, n in zip(*drawn(modular(7, (2, 4))), strict=True):
        total = (tokens[:n] - SYMBOLS).sum() % 7
        np.testing.assert_array_equal(labels[labels >= 0], [SYMBOLS + total])


@pytest.mark.slow
def test_nothing_in_the_window_arm_comes_from_beyond_its_reach():
    """The first token is changed: answers within the reach move, those beyond do not."""
    args = bench.Args(width=8, window=4)
    task = bench.tasks_of(args)["recall"]
    config = bench.config_of(args, task, "window")
    model, tokens = Cognate(config), np.zeros((1, 20), np.int32)
    params = model.init(jax.random.key(0), tokens)["params"]
    params = jax.tree.map(lambda p: 9 * p if p.ndim > 1 else p, params)

    def answers(tokens) -> Any:
        out: Any = model.apply({"params": params}, tokens)
        return out.answers[-1, 0]

    compiled = jax.jit(answers, compiler_options={"xla_backend_optimization_level": 0})
    changed = tokens.copy()
    changed[0, 0] = 5
    moved = np.flatnonzero(np.abs(compiled(tokens) - compiled(changed)).max(axis=1))
    # what comes from the very end of the reach may be lost in rounding
    assert args.window < moved.max() <= bench.reach(config)
    full = bench.config_of(bench.Args(), task, "window")
    assert bench.reach(full) < 32


@pytest.mark.slow
def test_the_bench_writes_every_arm(tmp_path, capsys):
    args = bench.Args(
        out=tmp_path,
        tasks=("modular",),
        arms=("ema", "recursion"),
        seeds="0,1",
        steps=2,
        batch=4,
        rows=8,
        width=8,
        quick_compile=True,
    )
    bench.main(args)
    found = json.loads((tmp_path / "results.json").read_text())["modular"]
    assert set(found) == {"ema", "recursion", "halting"}
    assert found["recursion"]["parameters"] > found["ema"]["parameters"]
    assert all(len(values) == 2 for values in found["ema"]["accuracy"].values())
    assert found["recursion"]["answers"] == [4, 4]
    assert all(1 <= made <= 4 for made in found["halting"]["answers"])
    assert (tmp_path / "table.md").read_text() in capsys.readouterr().out
    with pytest.raises(SystemExit):
        bench.main(bench.Args(out=tmp_path, arms=("none",)))
    assert "`--arms` may name window" in capsys.readouterr().err
