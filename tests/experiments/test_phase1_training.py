"""Phase 1's pieces: one step's gradient, the schedule, what is kept, how answers are counted."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tyro

from experiments import phase1
from experiments.cognate.args import Args, defaults
from experiments.cognate.problem import next_batch
from experiments.cognate.training import State, gradient, keep_best, make_tx, schedule
from experiments.cognate.validation import Held, Scores, summarize, unigram_entropy
from experiments.data.packing import Rows
from forge_jax.models.cognate import SPECIALIZATIONS, CognateConfig
from tests.experiments.cognate_runs import SETTINGS, SHAPE, initial, make_args


def drawn_batch():
    """A problem, one model's batch of two parts, and parameters."""
    args = make_args(Path("unused"))
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
    args = make_args(Path("unused"), specialization="all")
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


def test_the_command_line_picks_its_defaults():
    assert defaults(["--smoke"]).shape.d_model < defaults(["--small"]).shape.d_model
    assert defaults([]).shape == CognateConfig()
    given = tyro.cli(Args, args=["--model", "speed", "--steps", "7", "--shape.layers", "2"])
    assert (given.names, given.training.steps, given.shape.layers) == (["speed"], 7, 2)
    assert tyro.cli(Args, args=["--specialization", "all"]).names == list(SPECIALIZATIONS)


def test_a_loss_that_is_no_number_ends_the_run_in_a_sentence():
    args = make_args(Path("unused"))
    problem = phase1.load_problem(args)
    plain = ("gradient_norm", "memory_tokens", "surprise_rate", "loss_step_1")
    acts = ("avg_halting_steps", "max_halting_steps", "min_halting_steps", "halting_variance")
    parts = ("loss_ce", "loss_act", "loss_gate", "halt_prob_mean", "halt_prob_std")
    measured = {name: np.ones(1) for name in (*plain, *acts, *parts)}
    assert phase1.training_rows(args, problem, 3, measured, 1.0)["train/loss"] == 3
    measured["loss_act"] = np.full(1, np.nan)
    with pytest.raises(ValueError, match="reasoning model is not finite at step 3: lower"):
        phase1.training_rows(args, problem, 3, measured, 1.0)


def test_what_frequencies_alone_would_give():
    labels = np.array([[3, 3, -100, 5], [5, 3, 3, -100]])
    held = Held(Rows(labels, labels, labels), ["math", "math"])
    p = np.array([4, 2]) / 6
    assert unigram_entropy(held) == pytest.approx(-(p * np.log(p)).sum())
