"""Scoring by one pass equals greedy decoding; token rewards equal the score."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments import experts, forms, scoring
from experiments.data.tasks import load_tasks
from experiments.experts import State, draw, keep_best
from experiments.model import NANO, load, policy
from forge_jax import optim, svf


@pytest.fixture(scope="module")
def problem():
    model, weights = load(NANO, "both")
    tasks = load_tasks(
        ("math", "code"),
        model.tokenizer,
        source="procedural",
        directory=None,
        image_token=model.image_token,
        counts={"train": 12, "validation": 8, "test": 12},
        bos=model.bos,
        eos=model.eos,
    )
    # far from the base, so that some of the answers are right and some are not
    z = svf.identity(weights["factors"])
    keys = jax.random.split(jax.random.key(3), len(z))
    experts = {
        path: 1 + 0.3 * jax.random.normal(key, (2, *ones.shape))
        for key, (path, ones) in zip(keys, z.items(), strict=True)
    }
    return model, weights, tasks, experts


def written(model, weights, s, batch, length):
    rollout = scoring.make_rollout(
        model, policy, max_new_tokens=length, samples=1, temperature=0.0, top_p=1.0
    )
    return rollout(weights, s, batch, jax.random.key(0))


def test_one_pass_equals_greedy_decoding(problem):
    """The model's own greedy text is what it scores as right, and any other text is not."""
    model, weights, tasks, z = problem
    task, length = tasks[1], tasks[1].batches["test"].answers.shape[1]
    one = svf.scales(weights["factors"], {path: v[:1] for path, v in z.items()})
    batch = task.batches["test"]
    own = written(model, weights, one, batch, length)
    tokens, mask = np.array(own.tokens), np.array(own.mask)
    changed = tokens.copy()
    changed[::2, 0] = (changed[::2, 0] + 1) % model.decoder.spec.vocab_size
    asked = batch._replace(answers=changed, answer_mask=mask)
    scorer = scoring.make_scorer(model, chunk=2, max_new_tokens=length)
    score = scorer(weights, scoring.Mixtures(z, np.eye(2)), asked, task, [])
    assert score.correct.shape == (2, 12)
    np.testing.assert_array_equal(score.correct[0], np.arange(12) % 2 == 1)
    np.testing.assert_array_equal(scoring.exact_rewards(tokens, asked) > 0, score.correct[0])
    assert (score.kl > 0).all()


def test_rewards_repeat_the_answers_for_every_sample(problem):
    _, _, tasks, _ = problem
    batch = tasks[0].batches["test"]
    responses = np.repeat(batch.answers, 3, axis=0)
    responses[1, 0] += 1
    got = scoring.exact_rewards(responses, batch).reshape(12, 3)
    want = np.ones((12, 3))
    want[0, 1] = -1
    np.testing.assert_array_equal(got, want)


def test_a_ceiling_draws_the_items_of_its_expert(problem):
    _, _, tasks, _ = problem
    together, indices = draw(tasks, 4, 5, 6)
    alone, own = draw(tasks[1:], 4, 5, 6)
    np.testing.assert_array_equal(indices[1], own[0])
    np.testing.assert_array_equal(np.asarray(together.tokens)[4:], np.asarray(alone.tokens))
    assert (draw(tasks, 4, 5, 7)[1][0] != indices[0]).any()


@pytest.mark.parametrize("form", ["full", "lora"])
def test_dense_forms_start_at_the_base_and_train_what_they_say(problem, form):
    model = problem[0]
    weights = {"params": model.checkpoint.params}
    start, merge = {
        "full": (forms.full_start, forms.full_params),
        "lora": (forms.lora_start, forms.lora_params),
    }[form]
    delta = start(weights, 1, jax.random.key(0))
    same = merge(weights, delta)
    jax.tree.map(np.testing.assert_array_equal, same, weights["params"])
    moved = merge(weights, jax.tree.map(lambda d: d + 0.1, delta))
    changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), moved, weights["params"])
    paths = {
        svf.path_name(path) for path, yes in jax.tree_util.tree_leaves_with_path(changed) if yes
    }
    every = {svf.path_name(p) for p, _ in jax.tree_util.tree_leaves_with_path(weights["params"])}
    matrices = {name for name, _ in forms.named_matrices(weights["params"])}
    assert paths == (every if form == "full" else matrices)
    assert len(matrices) == 28


def test_the_best_is_kept_for_each_expert_alone():
    """Better, equal, worse: of equals the last is kept, but it is no progress."""
    delta, stale = {"a": np.array([[1.0], [2.0], [3.0]])}, np.array([1, 1, 1])
    state = State(delta, (), {"a": np.zeros((3, 1))}, np.array([0.5, 0.5, 0.5]), stale, np.zeros(3))
    got = keep_best(state, np.array([0.6, 0.5, 0.4]))
    np.testing.assert_array_equal(got.best["a"], [[1.0], [2.0], [0.0]])
    np.testing.assert_allclose(got.best_accuracy, [0.6, 0.5, 0.5])
    np.testing.assert_array_equal(got.stale, [0, 2, 2])


def test_the_learning_rate_falls_to_nothing():
    """Adam's first step is the learning rate times the gradient's sign; weight decay is of 0."""
    settings = experts.Settings(steps=4, learning_rate=0.5, decay=True)
    z = {"z": np.zeros(3, np.float32)}

    def sizes(settings):
        tx = optim.mugrok(settings.optimizer())
        state = tx.init(z)
        for _ in range(settings.steps + 1):
            change, state = tx.update({"z": np.ones(3, np.float32)}, state, z)
            yield -jax.tree.leaves(change)[0][0]

    np.testing.assert_allclose(list(sizes(settings)), [0.5, 0.375, 0.25, 0.125, 0], atol=1e-4)
    steady = dataclasses.replace(settings, decay=False)
    np.testing.assert_allclose(list(sizes(steady)), [0.5] * 5, atol=1e-4)
