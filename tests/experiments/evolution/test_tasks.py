"""Rows against what their task says of them; the floors against the rows' own entropy."""

import math

import numpy as np
import pytest

from experiments.evolution import tasks

SIZES = {"rows": 3, "length": 21}


def drawn(name, part="train", count=40, **sizes):
    return tasks.batches(tasks.load(name), part, 0, range(count), **SIZES | sizes)


def rows_of(found):
    """Every row with the places of its scored tokens."""
    for tokens, scored in zip(
        found.tokens.reshape(-1, found.tokens.shape[-1]),
        found.scored.reshape(-1, found.scored.shape[-1]),
        strict=True,
    ):
        yield tokens.tolist(), (1 + np.flatnonzero(scored)).tolist()


@pytest.mark.parametrize("name", ["recall", "copy", "sums"])
@pytest.mark.parametrize("length", [8, 21, 22, 23])
def test_scored_tokens_follow_from_those_before(name, length):
    """What makes the floor zero: an oracle that reads only the past is right everywhere."""

    def told(row, t):
        if name == "sums":
            return 5 + sum(x for x in row[:t] if x < 5) % 5
        if name == "copy":
            return row[t - (length + 1) // 2]
        pairs = dict(zip(row[: t - 1 : 2], row[1 : t - 1 : 2], strict=True))
        return pairs[row[t - 1]]

    task = tasks.load(name)
    assert task.floor is not None
    assert task.floor(length) == 0
    seen = 0
    for row, places in rows_of(drawn(name, length=length)):
        assert len(row) == length + 1
        assert all(row[t] == told(row, t) for t in places)
        assert set(row) <= set(range(task.vocabulary))
        seen += len(places)
    assert seen > 100


def test_the_floor_of_the_chain_is_its_entropy():
    """Mean surprise of who knows the table; a bigram counted from the rows stays above it."""
    task = tasks.markov(5)
    table = np.random.default_rng(2).dirichlet(np.full(5, 0.2), size=(5, 5))
    found = tasks.batches(task, "train", 0, range(300), **SIZES)
    surprise = [
        -math.log(table[row[t - 2], row[t - 1], row[t]])
        for row, places in rows_of(found)
        for t in places
    ]
    assert task.floor is not None
    assert len(surprise) == 300 * 3 * 20
    error = np.std(surprise) / len(surprise) ** 0.5
    assert abs(np.mean(surprise) - task.floor(21)) < 4 * error
    assert task.floor(21) + 0.2 < tasks.unigram_entropy(found, 5) < math.log(5)


def test_text_is_split_by_its_bytes(tmp_path):
    content = bytes(range(256)) * 4
    (tmp_path / "a.txt").write_bytes(content)
    task = tasks.load("text", tmp_path / "a.txt")
    cut = int(len(content) * 0.9)
    for part, text in (("train", content[:cut]), ("held_out", content[cut:])):
        found = tasks.batches(task, part, 0, range(20), **SIZES)
        assert found.scored.all()
        assert all(bytes(row) in text for row, _ in rows_of(found))
    other = tasks.bytes_of("a.txt", content[::-1])
    assert (task.vocabulary, task.unit, task.floor) == (256, "byte", None)
    assert task.digest != other.digest
    with pytest.raises(ValueError, match=r"does not fit into the held_out part of a.txt"):
        tasks.batches(task, "held_out", 0, range(1), rows=1, length=200)


@pytest.mark.parametrize("name", sorted(tasks.TASKS))
def test_a_batch_is_a_function_of_part_seed_and_number(name):
    whole = drawn(name, count=4)
    later = tasks.batches(tasks.load(name), "train", 0, range(2, 4), **SIZES)
    np.testing.assert_array_equal(whole.tokens[2:], later.tokens)
    np.testing.assert_array_equal(whole.scored[2:], later.scored)
    others = [
        drawn(name, "held_out", 4),
        tasks.batches(tasks.load(name), "train", 1, range(4), **SIZES),
    ]
    for other in others:
        assert (other.tokens != whole.tokens).any(axis=-1).all()
    assert (whole.tokens[0] != whole.tokens[1]).any()


def test_unigram_entropy_counts_scored_targets_only():
    tokens = np.array([[[9, 0, 0, 1, 1, 7]]])
    found = tasks.Batches(tokens, np.array([[[True, True, True, True, False]]]))
    assert tasks.unigram_entropy(found, 10) == pytest.approx(math.log(2))
