"""Shocks: what was tampered with, and what they say of networks whose answers are known."""

import numpy as np
import pytest

from experiments.evolution import shocks, tasks
from experiments.evolution.tasks import Batches

HELD_OUT = tasks.batches(tasks.markov(6), "held_out", 0, range(3), rows=5, length=12)


def test_a_swap_moves_two_tokens_and_scores_what_is_behind():
    (after, scored), (before, same) = shocks.swapped(HELD_OUT)
    np.testing.assert_array_equal(before, HELD_OUT.tokens)
    np.testing.assert_array_equal(scored, same)
    np.testing.assert_array_equal(after[..., 6], before[..., 7])
    np.testing.assert_array_equal(after[..., 7], before[..., 6])
    rest = np.delete(np.arange(13), [6, 7])
    np.testing.assert_array_equal(after[..., rest], before[..., rest])
    assert (after != before).any()
    targets = np.flatnonzero(scored[0, 0]) + 1
    assert targets.tolist() == [8, 9, 10, 11, 12]


@pytest.mark.parametrize("vocabulary", [3, 6, 50])
def test_a_needle_is_one_pair_that_comes_again(vocabulary):
    (seen, scored), (unseen, _) = shocks.needles(HELD_OUT, vocabulary)
    assert scored.sum(-1).max() == 1
    assert scored[..., -1].all()
    for row, control in zip(seen.reshape(-1, 13), unseen.reshape(-1, 13), strict=True):
        a, b = row[-2:]
        (first, last) = np.flatnonzero(row == a)
        assert last == 11
        assert first + 2 < 7
        assert row[first + 1] == control[first + 2] == b
        assert row[first + 2] == control[first + 1] != b
        kept = ~np.isin(np.arange(13), [first + 1, first + 2])
        np.testing.assert_array_equal(row[kept], control[kept])
    assert seen.min() >= 0
    assert seen.max() < vocabulary


def lookup(batches: Batches) -> float:
    """Nats of who expects, with 0.9, what last followed the present token; chance of 6 else."""
    nats = []
    for row, scored in zip(
        batches.tokens.reshape(-1, 13), batches.scored.reshape(-1, 12), strict=True
    ):
        for t in np.flatnonzero(scored):
            met = [row[i + 1] for i in range(t) if row[i] == row[t]]
            p = 1 / 6 if not met else 0.9 if met[-1] == row[t + 1] else 0.02
            nats.append(-np.log(p))
    return float(np.mean(nats))


def often(batches: Batches) -> float:
    """Nats of who expects what the row had most often, wherever it stood."""
    nats = []
    for row, scored in zip(
        batches.tokens.reshape(-1, 13), batches.scored.reshape(-1, 12), strict=True
    ):
        for t in np.flatnonzero(scored):
            counts = 1 + np.bincount(row[: t + 1], minlength=6)
            nats.append(-np.log(counts[row[t + 1]] / counts.sum()))
    return float(np.mean(nats))


def test_who_looks_up_what_followed_finds_the_needle_and_who_counts_does_not():
    found = shocks.make(HELD_OUT, 6)
    assert shocks.measured(lookup, found)["needle"] == pytest.approx(np.log(0.9 / 0.02))
    assert shocks.measured(often, found)["needle"] == 0


def test_a_swap_costs_who_reads_the_last_token():
    counts = Batches(np.tile(np.arange(13), (2, 3, 1)), np.ones((2, 3, 12), bool))

    def successor(batches):
        right = batches.tokens[..., 1:] == batches.tokens[..., :-1] + 1
        return float((~right)[batches.scored].mean())

    found = shocks.make(counts, 13)
    assert shocks.measured(successor, found)["error_recovery"] == pytest.approx(1 / 5)


def test_too_small_a_task_is_refused():
    short = Batches(np.zeros((1, 1, 6), int), np.ones((1, 1, 5), bool))
    with pytest.raises(ValueError, match="rows of six"):
        shocks.make(short, 6)
    early = Batches(np.zeros((1, 1, 9), int), np.arange(8)[None, None] < 2)
    with pytest.raises(ValueError, match="need a scored target behind"):
        shocks.make(early, 6)


@pytest.mark.parametrize("name", ["markov", "recall", "copy", "sums", "text"])
def test_every_task_can_be_shocked(name):
    task = tasks.load(name)
    found = tasks.batches(task, "held_out", 0, range(1), rows=30, length=16)
    (after, scored), (before, _) = shocks.make(found, task.vocabulary).error_recovery
    assert scored.any()
    assert (after != before).any()
    changed = (after != before).sum(-1)
    assert (changed <= 2).all()
    if name in ("recall", "sums"):  # of pairs, whose halves are never equal
        assert (changed == 2).all()
        assert ((after != before).argmax(-1) % 2 == 0).all()
