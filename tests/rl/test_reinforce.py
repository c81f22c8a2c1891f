"""The policy-gradient losses against closed forms, enumeration, SciPy and torch."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from scipy.special import rel_entr

from forge_jax import rl

TIME, VOCAB = 4, 5
MASK: Any = np.array([True, True, True, False])


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def draw(seed=0, *lead) -> Any:
    rng = np.random.default_rng(seed)
    policy, reference = rng.normal(size=(2, *lead, TIME, VOCAB)).astype(np.float32)
    return policy, reference, rng.integers(0, VOCAB, (*lead, TIME))


def loss(logits, reference, tokens, advantage, coefficient):
    logp, kl = rl.log_probability(logits, tokens), rl.kl_to_reference(logits, reference)
    return rl.reinforce_loss(
        logp, kl, jnp.asarray(MASK), jnp.asarray(advantage), kl_coefficient=coefficient
    )


def closed_form(logits, reference, tokens, advantage, coefficient):
    """Loss and its gradient for the logits, from d log p_a / dx = e_a - p, in NumPy."""
    p, q = softmax(logits.astype(np.float64)), softmax(reference.astype(np.float64))
    kl = (p * np.log(p / q)).sum(-1)
    chosen = np.eye(VOCAB)[tokens]
    value = -advantage * np.log((p * chosen).sum(-1)) + coefficient * kl
    grad = -advantage * (chosen - p) + coefficient * p * (np.log(p / q) - kl[:, None])
    return (value * MASK).sum(), grad * MASK[:, None]


@pytest.mark.parametrize(("advantage", "coefficient"), [(1.0, 0.2), (-1.0, 0.2), (0.0, 1.0)])
def test_loss_and_gradient_have_their_closed_form(advantage, coefficient):
    policy, reference, tokens = draw()
    want, want_grad = closed_form(policy, reference, tokens, advantage, coefficient)
    got, grad = jax.value_and_grad(loss)(policy, reference, tokens, advantage, coefficient)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    np.testing.assert_allclose(grad, want_grad, atol=1e-6)
    assert np.abs(want_grad[:3]).max() > 0.1


def test_gradient_equals_finite_differences():
    policy, reference, tokens = draw(1)
    check_grads(
        jax.jit(lambda x: loss(x, reference, tokens, -1.0, 0.2)),
        (policy,),
        order=1,
        modes=["rev"],
        atol=2e-2,
        rtol=2e-2,
    )


def test_the_advantage_is_data():
    policy, reference, tokens = draw()
    grad = jax.grad(loss, argnums=3)(policy, reference, tokens, 1.0, 0.2)
    assert float(grad) == 0


def test_tokens_after_the_end_do_not_count():
    """Not even where they are impossible."""
    policy, reference, tokens = draw()
    logp: Any = np.array(rl.log_probability(policy, tokens))
    kl: Any = np.array(rl.kl_to_reference(policy, reference))
    want = rl.reinforce_loss(logp, kl, MASK, jnp.ones(()), kl_coefficient=0.2)
    logp[3], kl[3] = -np.inf, np.inf
    got = rl.reinforce_loss(logp, kl, MASK, jnp.ones(()), kl_coefficient=0.2)
    np.testing.assert_allclose(got, want)
    np.testing.assert_allclose(want, -logp[:3].sum() + 0.2 * kl[:3].sum(), rtol=1e-6)


def test_log_probability_is_that_of_the_token():
    policy, _, tokens = draw(2, 3, 2)
    want = np.log(np.take_along_axis(softmax(policy), tokens[..., None], -1))[..., 0]
    np.testing.assert_allclose(rl.log_probability(policy, tokens), want, rtol=1e-5)


def test_kl_is_from_policy_to_reference():
    policy, reference, _ = draw(3, 2)
    p, q = softmax(policy.astype(np.float64)), softmax(reference.astype(np.float64))
    got = rl.kl_to_reference(policy, reference)
    np.testing.assert_allclose(got, rel_entr(p, q).sum(-1), rtol=1e-4)
    assert np.abs(got - rel_entr(q, p).sum(-1)).max() > 0.05
    np.testing.assert_allclose(rl.kl_to_reference(policy, policy + 3), 0, atol=1e-6)


@pytest.mark.torch
def test_kl_equals_torch():
    torch = pytest.importorskip("torch")
    policy, reference, _ = draw(4, 2)
    logp, logq = (torch.from_numpy(x).log_softmax(-1) for x in (policy, reference))
    # torch's kl_div(input, target) is KL(target || input)
    want = torch.nn.functional.kl_div(logq, logp, log_target=True, reduction="none").sum(-1)
    np.testing.assert_allclose(rl.kl_to_reference(policy, reference), want, rtol=1e-4, atol=1e-6)


def test_kl_of_almost_certain_tokens_is_finite():
    sure = jnp.array([[200.0, 0, 0, 0, 0]])
    value, grad = jax.value_and_grad(lambda x: rl.kl_to_reference(x, sure[:, ::-1])[0])(sure)
    np.testing.assert_allclose(value, 200, rtol=1e-6)
    assert np.isfinite(grad).all()


def test_leave_one_out_equals_a_loop():
    reward = np.random.default_rng(0).choice([-1.0, 1.0, 0.5], (3, 4)).astype(np.float32)
    want = [
        [row[i] - np.mean([r for j, r in enumerate(row) if j != i]) for i in range(4)]
        for row in reward
    ]
    np.testing.assert_allclose(rl.leave_one_out(jnp.asarray(reward)), want, atol=1e-6)


def test_leave_one_out_of_equal_rewards_is_nothing():
    np.testing.assert_array_equal(rl.leave_one_out(jnp.full((2, 7), -1.0)), np.zeros((2, 7)))


def test_leave_one_out_of_one_sample_is_its_reward():
    reward = jnp.asarray([[1.0], [-1.0]])
    np.testing.assert_array_equal(rl.leave_one_out(reward), reward)


def expected_gradient(logits, advantage_of):
    """The mean gradient over both samples and all pairs of one-token responses, exactly."""
    p = softmax(np.asarray(logits, np.float64))

    def grad(token, advantage):
        def one(x):
            logp = rl.log_probability(x[None], jnp.array([token]))
            return rl.reinforce_loss(
                logp, jnp.zeros(1), jnp.ones(1, bool), advantage, kl_coefficient=0.0
            )

        return jax.grad(one)(logits)

    pairs = np.array(list(itertools.product(range(VOCAB), repeat=2)))
    advantages = jnp.asarray(advantage_of(pairs))
    grads = jax.vmap(jax.vmap(grad))(jnp.asarray(pairs), advantages)
    weight = p[pairs].prod(axis=1)
    return np.einsum("n,nsv->v", weight, np.asarray(grads, np.float64)) / 2


def test_a_baseline_moves_nothing_on_average():
    """The same advantage for every token: the expected gradient vanishes."""
    logits = draw()[0][0]
    got = expected_gradient(logits, lambda pairs: np.ones(pairs.shape, np.float32))
    np.testing.assert_allclose(got, 0, atol=1e-6)


def test_leave_one_out_is_unbiased():
    """Its expected gradient is that of minus the expected reward: -p (r - p r)."""
    logits, reward = draw()[0][0], np.array([1, -1, -1, 1, -1], np.float32)
    p = softmax(logits.astype(np.float64))
    want = -p * (reward - p @ reward)
    got = expected_gradient(logits, lambda pairs: rl.leave_one_out(jnp.asarray(reward[pairs])))
    np.testing.assert_allclose(got, want, atol=1e-6)
    plain = expected_gradient(logits, lambda pairs: reward[pairs])
    np.testing.assert_allclose(plain, want, atol=1e-6)
