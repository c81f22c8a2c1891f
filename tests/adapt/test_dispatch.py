"""Dispatch by logits, by text and by a head fitted here, against loops and scikit-learn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from forge_jax import adapt, models, svf

TOKENS = [(5, 9), (7,), (11, 5), (2,)]
EXPERTS = [0, 1, 2, adapt.BASE]


@pytest.fixture(scope="module")
def last_logits(case):
    return np.asarray(
        case.decoder.apply({"params": case.params_of([0, 0, 0])}, case.tokens, case.mask)[0]
    )[:, -1]


def test_a_mixture_follows_the_labels_and_leaves_other_to_the_base():
    labels = adapt.make_labels([1, adapt.BASE, 0], room=5)
    choice = labels.choose(jnp.log(jnp.array([[0.2, 0.5, 0.3, 9.0, 9.0]])))
    np.testing.assert_allclose(labels.mixture(choice, 4), [[0.3, 0.2, 0, 0]], atol=1e-6)


def test_the_most_probable_label_wins(case, last_logits):
    """Its first token's logit after the prompt; "other" is the base, whose alpha is zero."""
    dispatch = adapt.PromptDispatch.of(TOKENS, EXPERTS)
    choice = dispatch(case.base(), case.tokens, case.mask)
    picked = last_logits[:, [5, 7, 11, 2]].argmax(axis=-1)
    want = np.array(EXPERTS)[picked]
    np.testing.assert_array_equal(choice.expert, want)
    assert len(set(want.tolist())) > 1
    alpha = np.zeros((8, 3))
    for row, expert in enumerate(want):
        if expert >= 0:
            alpha[row, expert] = 1
    np.testing.assert_array_equal(choice.alpha(3), alpha)
    np.testing.assert_allclose(choice.probability.sum(axis=1), 1, rtol=1e-5)


def test_padding_may_stand_on_either_side(case):
    dispatch = adapt.PromptDispatch.of(TOKENS, EXPERTS)
    wanted = dispatch.scores(case.base(), case.tokens, case.mask)
    behind = models.pad_right(case.tokens, case.mask)
    both = tuple(jnp.roll(x, 1, axis=1) for x in behind)
    both = tuple(jnp.where(case.mask[:, :1], x, y) for x, y in zip(behind, both, strict=True))
    assert (~both[1][:, 0] & ~both[1][:, -1]).any()
    for tokens, mask in (behind, both):
        got = dispatch.scores(case.base(), tokens, mask)
        np.testing.assert_allclose(got, wanted, atol=1e-4)


def test_every_label_can_win(case):
    """A bias lifts any of them, so the choice is no constant."""
    dispatch = adapt.PromptDispatch.of(TOKENS, EXPERTS)
    for i, expert in enumerate(EXPERTS):
        lifted = dispatch._replace(bias=jnp.zeros(4).at[i].set(100.0))
        np.testing.assert_array_equal(lifted(case.base(), case.tokens, case.mask).expert, expert)


def test_calibration_takes_the_mean_away(case):
    dispatch = adapt.PromptDispatch.of(TOKENS, EXPERTS)
    scores = dispatch.scores(case.base(), case.tokens, case.mask)
    again = dispatch.calibrate(scores).scores(case.base(), case.tokens, case.mask)
    np.testing.assert_allclose(again.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(again, scores - scores.mean(axis=0), atol=1e-5)


def test_room_for_labels_to_come_is_never_chosen(case):
    """The same choices, and a label more compiles nothing again."""
    traces = []

    @jax.jit
    def run(dispatch):
        traces.append(None)
        return dispatch(case.base(), case.tokens, case.mask)

    few = run(adapt.PromptDispatch.of(TOKENS[:2], EXPERTS[:2], room=6))
    np.testing.assert_array_equal(few.probability[:, 2:], 0)
    more = run(adapt.PromptDispatch.of(TOKENS, EXPERTS, room=6))
    plain = adapt.PromptDispatch.of(TOKENS, EXPERTS)(case.base(), case.tokens, case.mask)
    np.testing.assert_array_equal(more.expert, plain.expert)
    assert len(traces) == 1


def test_an_unsure_choice_goes_to_the_base():
    scores = jnp.log(jnp.array([[0.6, 0.4], [0.95, 0.05], [0.1, 0.9]]))
    labels = adapt.make_labels([0, 1], threshold=0.8)
    np.testing.assert_array_equal(labels.choose(scores).expert, [adapt.BASE, 0, 1])


@pytest.mark.parametrize(
    ("tokens", "experts", "options", "message"),
    [
        ([(5, 1), (5, 2)], [0, 1], {}, "first token"),
        ([(5,), ()], [0, 1], {}, "labels"),
        ([], [], {}, "labels"),
        ([(1,), (2,)], [0, 1], {"room": 1}, "labels"),
        ([(1,)], [0], {"threshold": 2.0}, "threshold"),
    ],
)
def test_labels_that_cannot_be_told_apart_are_refused(tokens, experts, options, message):
    with pytest.raises(ValueError, match=message):
        adapt.PromptDispatch.of(tokens, experts, **options)


def test_text_is_read_from_its_last_box():
    texts = [r"so \boxed{code}", r"\boxed{math} no, \boxed{ Reasoning }", "math", r"\boxed{art}"]
    labels = adapt.make_labels([0, 1, 2])
    choice, written = adapt.from_text(texts, ["math", "code", "reasoning"], labels)
    np.testing.assert_array_equal(choice.expert, [1, 2, adapt.BASE, adapt.BASE])
    assert written == ["code", "reasoning", None, "art"]
    np.testing.assert_array_equal(choice.alpha(3)[2:], np.zeros((2, 3)))


def test_classification_loss_is_the_cross_entropy_among_labels():
    scores = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    label, labels = np.array([0, 2, 1, 1, 0]), adapt.make_labels([0, 1, 2], room=4)
    kept = scores[:, :3]
    want = np.mean([np.log(np.exp(r).sum()) - r[i] for r, i in zip(kept, label, strict=True)])
    got = adapt.classification_loss(jnp.asarray(scores), jnp.asarray(label), labels)
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_an_expert_learns_the_classification(case):
    """The loss reaches every z, and a step against its gradient lowers it."""
    dispatch = adapt.PromptDispatch.of(TOKENS, EXPERTS)
    label = jnp.arange(8) % 4

    @jax.jit
    @jax.value_and_grad
    def loss(z):
        s = {k: v[None, None] for k, v in svf.scales(case.factors, z).items()}
        scores = dispatch.scores(case.base(), case.tokens, case.mask, scales=s)
        return adapt.classification_loss(scores, label, dispatch.labels)

    z = svf.identity(case.factors)
    first, grads = loss(z)
    assert all(float(jnp.abs(g).max()) > 0 for g in grads.values())
    last, _ = loss(jax.tree.map(lambda v, g: v - 0.05 * g, z, grads))
    assert float(last) < float(first)


def clusters(seed, items=120, hidden=6, classes=3):
    """Overlapping clouds of unlike scales, so that the optimum is finite."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, classes, items)
    centres = np.random.default_rng(99).normal(size=(classes, hidden))
    x = centres[label] + rng.normal(size=(items, hidden))
    return jnp.asarray(x * np.array([1, 10, 0.1, 1, 1, 5]) + 3, jnp.float32), jnp.asarray(label)


def test_the_head_is_scikit_learns_logistic_regression():
    sklearn = pytest.importorskip("sklearn.linear_model")
    x, label = clusters(0)
    labels = adapt.make_labels([0, 1, 2], room=4)
    head = adapt.fit_classifier(x, label, labels, ridge=0.1, steps=500)
    scaled = (np.asarray(x) - np.mean(x, 0)) / (np.std(x, 0) + 1e-6)
    # its penalty is ||W||^2 / (2 C) beside the sum, ours ridge / 2 ||W||^2 beside the mean
    theirs = sklearn.LogisticRegression(C=1 / (0.1 * len(x)), tol=1e-8, max_iter=1000)
    want = theirs.fit(scaled, np.asarray(label)).predict_proba(scaled)
    got = head.labels.choose(head.scores(x))
    np.testing.assert_allclose(got.probability[:, :3], want, atol=2e-3)
    np.testing.assert_array_equal(got.probability[:, 3], 0)
    fresh, wanted = clusters(1)
    right = np.asarray(head.labels.choose(head.scores(fresh)).expert) == np.asarray(wanted)
    assert right.mean() > 0.7


def test_the_head_reads_the_question_and_no_padding(case):
    """Fitted on the pooled states of the batch, it gives each row its label back."""
    apply = models.with_hidden(case.base())
    (_, hidden), _ = apply(case.tokens, case.mask)
    features = adapt.pool(hidden, case.mask)
    want = [np.asarray(h)[m].mean(axis=0) for h, m in zip(hidden, case.mask, strict=True)]
    np.testing.assert_allclose(features, want, atol=1e-5)
    label = jnp.arange(8) % 2
    head = adapt.fit_classifier(features, label, adapt.make_labels([2, adapt.BASE]))
    wanted = np.where(np.arange(8) % 2, adapt.BASE, 2)
    np.testing.assert_array_equal(head(apply, case.tokens, case.mask).expert, wanted)
    wide = np.pad(case.tokens, ((0, 0), (3, 0)), constant_values=7)
    seen = np.pad(case.mask, ((0, 0), (3, 0)))
    np.testing.assert_array_equal(head(apply, wide, seen).expert, wanted)
