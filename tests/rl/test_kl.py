"""KL as a reward, estimated, and held at a target."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from forge_jax import rl


def test_the_estimate_is_unbiased_and_never_negative():
    policy, reference = np.random.default_rng(0).normal(size=(2, 1, 6)).astype(np.float32)
    logp, logq = (np.asarray(jax.nn.log_softmax(x))[0] for x in (policy, reference))
    each = rl.kl_estimate(jnp.asarray(logp), jnp.asarray(logq))
    assert float(each.min()) >= 0
    exact = rl.kl_to_reference(jnp.asarray(policy), jnp.asarray(reference))[0]
    np.testing.assert_allclose(np.sum(np.exp(logp) * each), exact, rtol=1e-4)
    want = np.exp(logq - logp) - (logq - logp) - 1  # Shao et al. 2024, eq. 4
    np.testing.assert_allclose(each, want, atol=1e-6)


def test_the_reward_comes_with_the_last_token_less_the_kl_of_each():
    logp, reference = np.random.default_rng(1).normal(size=(2, 5)).astype(np.float32)
    for live in (5, 3, 1):
        mask = np.arange(5) < live
        now = np.where(mask, logp, -np.inf)
        want = np.array([-0.3 * (logp[t] - reference[t]) if t < live else 0 for t in range(5)])
        want[live - 1] += 2.0
        args = (jnp.float32(2.0), jnp.asarray(now), jnp.asarray(reference), jnp.asarray(mask))
        np.testing.assert_allclose(rl.kl_reward(*args, coefficient=0.3), want, rtol=1e-5)


def test_without_a_token_there_is_no_reward():
    zeros = jnp.zeros(3)
    got = rl.kl_reward(jnp.float32(1.0), zeros, zeros, jnp.zeros(3, bool), coefficient=1.0)
    np.testing.assert_array_equal(got, zeros)


def test_the_controller_follows_its_equation():
    kl = np.array([0.0, 0.09, 0.1, 0.11, 5.0], np.float32)
    got = rl.adapt_kl(jnp.full(5, 0.2), jnp.asarray(kl), target=0.1, rate=0.5)
    want = [0.2 * (1 + 0.5 * min(max(k / 0.1 - 1, -0.2), 0.2)) for k in kl]
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_the_controller_holds_a_kl_that_answers_it():
    """A policy whose KL is 1 / coefficient is brought to the target."""
    coefficient = jnp.float32(50.0)
    for _ in range(400):
        coefficient = rl.adapt_kl(coefficient, 1 / coefficient, target=0.25)
    np.testing.assert_allclose(1 / coefficient, 0.25, rtol=0.01)


def test_a_kl_that_is_not_finite_moves_nothing():
    kl = jnp.array([jnp.nan, jnp.inf, 1.0])
    got = rl.adapt_kl(jnp.ones(3), kl, target=0.5)
    np.testing.assert_allclose(got, [1.0, 1.0, 1.02])


@pytest.mark.parametrize("wrong", [{"target": 0.0}, {"target": 1.0, "rate": -1.0}])
def test_the_controller_refuses_targets_it_cannot_reach(wrong):
    with pytest.raises(ValueError, match="positive"):
        rl.adapt_kl(jnp.ones(1), jnp.ones(1), **wrong)
