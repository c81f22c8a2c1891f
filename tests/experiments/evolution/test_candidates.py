"""Candidates in training: rungs resume, scalars share programs, what fails is told.

One tiny structure serves all tests: what is compiled once is met again.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import checkpoints
from experiments.evolution import candidates, programs, tasks, training
from experiments.evolution.report import TIMINGS
from forge_jax import arch, evolve
from tests.arch.documents import edited

SIZES = {"rows": 2, "length": 8}
TASK = tasks.markov(4)


def document(window=3, **changes):
    """One layer of eight features that sees the last `window` tokens."""
    mixer = {"kind": "Attention", "heads": 1, "stencil": {"kind": "local", "window": window}}
    changes = {f"arch.{k}": v for k, v in changes.items()}
    tree = edited(
        {
            **{"arch.d_model": 8, "arch.n_layers": 1, "arch.mix_unit.mixer": mixer},
            **{"arch.pos.kind": "learned", "arch.ffn.act": "relu", "train.lr": 0.03},
            **changes,
        }
    )
    return candidates.adapted(arch.from_dict(tree), TASK, 8)


def make_setup(seeds=(0,), **more):
    held_out = candidates.held_out(TASK, 2, **SIZES)
    unigram = tasks.unigram_entropy(held_out, TASK.vocabulary)
    return candidates.Setup(TASK, 2, 8, seeds, 10, held_out, unigram, **more)


@pytest.fixture(scope="module")
def cache():
    return programs.Cache()


def store(path):
    """Checkpoints in a directory."""

    def restore(name, template):
        found = checkpoints.restore_latest(path / name, template)
        return None if found is None else (found[0]["step"], found[1])

    def save(name, step, tree):
        checkpoints.save(path / name, step, tree, {}, keep=1)

    return candidates.Store(save, restore)


def untimed(result):
    kept = {k: v for k, v in result.metrics.items() if k not in TIMINGS}
    return result._replace(metrics=kept)


def test_a_rung_that_resumes_is_a_longer_rung(cache, tmp_path):
    """20 steps and then 10 more from the checkpoint are 30 steps to the bit."""
    setup, kept = make_setup((3, 4)), store(tmp_path)
    half = candidates.evaluate(setup, cache, kept, document(), "a", 0, 20)
    whole = candidates.evaluate(setup, cache, kept, document(), "b", 0, 30)
    resumed = candidates.evaluate(setup, cache, kept, document(), "a", 20, 30)
    assert untimed(resumed) == untimed(whole)
    assert whole.score != half.score
    found: Any = whole.metrics
    assert found["loss_final"] < found["loss_start"] - 0.1
    assert found["score"] == pytest.approx(np.mean(found["score_by_seed"]))
    gap = abs(found["score_by_seed"][0] - found["score_by_seed"][1])
    assert found["score_se"] == pytest.approx(gap / 2)
    assert found["total_tokens"] == 30 * 2 * 8
    assert found["tokens_per_sec"] > 0
    # evaluated again from the checkpoint alone: killed between checkpoint and event
    again = candidates.evaluate(setup, cache, kept, document(), "a", 20, 30)
    assert untimed(again) == untimed(whole)


def test_what_was_trained_before_is_looked_up(cache, tmp_path):
    """Whatever the store holds; other seeds, steps, rates or held-out batches are other results."""
    results = tmp_path / "results"
    setup, known = make_setup((3, 4), memo=results), cache.known

    def score(setup, name, done, steps):
        kept = store(tmp_path / name)
        return candidates.evaluate(setup, cache, kept, document(), name, done, steps)

    half = score(setup, "a", 0, 20)
    assert score(setup, "b", 0, 20) == half
    assert cache.known == known + 1
    # a longer rung of whom the memo left without a checkpoint
    whole, plain = score(setup, "b", 20, 30), score(make_setup((3, 4)), "c", 0, 30)
    assert untimed(whole) == untimed(plain)
    others = [make_setup((3, 5), memo=results), make_setup((3, 4), memo=results, lr=0.02)]
    held_out = tasks.batches(TASK, "held_out", 1, range(2), **SIZES)
    for other in (*others, setup._replace(held_out=held_out)):
        assert score(other, "d", 0, 20).score != half.score
    assert cache.known == known + 1
    for file in results.iterdir():
        file.write_text("{")
    assert untimed(score(setup, "e", 0, 20)) == untimed(half)
    assert cache.known == known + 1


def test_scalars_share_one_program(cache, tmp_path):
    """Windows and rates are arguments: nothing is compiled, and they act."""
    scores = set()
    for i, (window, lr) in enumerate([(3, None), (5, None), (3, 0.01)]):
        setup = make_setup(lr=lr)
        found = candidates.evaluate(setup, cache, store(tmp_path), document(window), f"t{i}", 0, 10)
        scores.add(found.score)
    assert len(scores) == 3
    assert cache.misses == 1
    assert cache.hits >= 2


def test_a_loss_that_is_no_number_ends_in_a_report(cache, tmp_path):
    setup = make_setup(lr=1e38)
    steps = []

    def evaluate(spec, trial, done, total):
        steps.append(total)
        return candidates.evaluate(setup, cache, store(tmp_path), spec, f"{trial}", done, total)

    settings = evolve.Settings(1000, 1, ladder=evolve.Ladder(first=30, rungs=1))
    events = [*evolve.run([document()], evaluate, settings)]
    assert [e["score"] for e in events[1:]] == [None]
    assert "The score is nan" in events[1]["error"]
    assert steps == [30]


def test_who_costs_too_much_is_refused_before_compiling(cache, tmp_path):
    spent = arch.cost(document(), 8)
    cases = {
        "max_params": spent.params,
        "max_flops": spent.flops / 8,
        "max_kv_bytes": spent.kv_bytes,
    }
    for name, value in cases.items():
        fine = make_setup(limits=candidates.Limits(**{name: value}))
        assert candidates.admitted(document(), fine) == spent
        setup = make_setup(limits=candidates.Limits(**{name: 0.9 * value}))
        before = cache.counts()
        with pytest.raises(ValueError, match=f"Over budget: {name}"):
            candidates.evaluate(setup, cache, store(tmp_path), document(), "x", 0, 2)
        assert cache.counts() == before
    tree = arch.to_dict(document()) | {"budget": {"flops_target": "match:baseline"}}
    wide = arch.from_dict(edited({"arch.d_model": 32}, tree))
    setup = make_setup(references={"baseline": spent})
    assert candidates.admitted(arch.from_dict(tree), setup) == spent
    with pytest.raises(ValueError, match=r"budget\.flops_target"):
        candidates.admitted(wide, setup)


def test_equal_flops_are_other_steps():
    small, large = (arch.cost(document(**{"d_model": d}), 8) for d in (8, 32))
    setup = make_setup(step_flops=small.train_flops)
    assert candidates.own_steps(100, small, setup) == 100
    steps = candidates.own_steps(100, large, setup)
    ratio = steps * large.train_flops / (100 * small.train_flops)
    assert steps < 50
    assert abs(ratio - 1) < 0.5 / steps
    assert candidates.own_steps(100, large, make_setup()) == 100


def test_a_document_ends_its_training(cache, tmp_path):
    """Rungs beyond `max_steps` score what was trained until then; its batches are of `rows`."""
    tree: Any = arch.to_dict(document())
    setup = make_setup(memo=tmp_path / "results")
    tree["train"]["budget"] = {"max_steps": 3, "tokens_per_step": 8 * setup.rows}
    spec = arch.from_dict(tree)
    found: Any = [
        candidates.evaluate(setup, cache, store(tmp_path), spec, "a", done, steps)
        for done, steps in [(0, 2), (2, 4), (4, 9)]
    ]
    alone, known = (
        candidates.evaluate(given, cache, store(tmp_path), document(), name, 0, 3)
        for given, name in ((make_setup(), "b"), (setup, "c"))
    )
    assert [f.metrics["steps"] for f in found] == [2, 3, 3]
    assert found[0].score != found[1].score == found[2].score == alone.score
    assert known == found[1]
    tree["train"]["budget"]["tokens_per_step"] -= 1
    with pytest.raises(ValueError, match="tokens_per_step: 16 tokens in a step, over 15"):
        candidates.admitted(arch.from_dict(tree), setup)


class Table:
    """A network whose logits are those of a table, by the token read."""

    logits = np.random.default_rng(0).normal(size=(5, 5)).astype(np.float32)

    def apply(self, variables, tokens, knobs, rngs):
        return jnp.asarray(self.logits)[tokens], None


def test_scores_are_those_of_a_loop():
    """Cross entropy and calibration over the scored targets only, one target at a time."""
    rng = np.random.default_rng(1)
    found = tasks.Batches(rng.integers(5, size=(3, 2, 7)), rng.random((3, 2, 6)) < 0.6)
    nats, bins = np.zeros(3), {}
    for b, row, t in zip(*np.nonzero(found.scored), strict=True):
        p = np.exp(Table.logits[found.tokens[b, row, t]])
        p, target = p / p.sum(), found.tokens[b, row, t + 1]
        nats[b] -= math.log(p[target])
        bins.setdefault(int(p.max() * training.BINS), []).append((p.max(), p.argmax() == target))
    got = jax.jit(lambda x: training.score(Table(), {}, x, {}))(found)
    np.testing.assert_allclose(got.nats, nats, rtol=1e-5)
    np.testing.assert_array_equal(got.count, found.scored.sum((1, 2)))
    gaps = [abs(sum(c - r for c, r in inside)) for inside in bins.values()]
    wanted = sum(gaps) / found.scored.sum()
    assert training.calibration_error(got) == pytest.approx(wanted, rel=1e-5)


def test_a_document_may_not_fit_the_data():
    with pytest.raises(arch.DocumentError):
        candidates.adapted(document(), TASK, 4)
