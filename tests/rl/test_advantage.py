"""Advantages against the papers' sums, written out in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from forge_jax import rl

TIME = 7


def gae_by_its_sum(reward, value, discount, lambda_, bootstrap):
    """Schulman et al. 2016, eq. 12 and 16, of a response without padding."""
    after = np.append(value[1:], bootstrap)
    delta = reward + discount * after - value
    steps = range(len(delta))
    return np.array(
        [sum((discount * lambda_) ** (k - t) * delta[k] for k in steps if k >= t) for t in steps]
    )


def draw(seed):
    rng = np.random.default_rng(seed)
    reward, value = rng.normal(size=(2, TIME)).astype(np.float32)
    return reward, value


@pytest.mark.parametrize(("discount", "lambda_"), [(1.0, 0.95), (0.9, 0.5), (0.99, 0.0), (0.9, 1)])
@pytest.mark.parametrize("mask", ["1111111", "1110000", "0011100", "1101001", "1000000"])
def test_gae_is_the_sum_over_the_unmasked_steps(discount, lambda_, mask):
    live = np.array([c == "1" for c in mask])
    reward, value = draw(int(mask, 2))
    want = np.zeros(TIME)
    want[live] = gae_by_its_sum(reward[live], value[live], discount, lambda_, 0.7)
    given = {"discount": discount, "lambda_": lambda_, "bootstrap": 0.7}
    reward[~live], value[~live] = np.nan, np.inf  # what padding holds must not matter
    got = jax.jit(lambda *a: rl.gae(*a, **given))(reward, value, live)
    np.testing.assert_allclose(got.advantage_t, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got.return_t[live], want[live] + value[live], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(got.return_t[~live], 0)


def test_a_stopped_response_is_worth_nothing_after_its_end():
    """The reward of the stop token is the return of every token, whatever stands behind it."""
    live = jnp.arange(TIME) < 4
    reward = jnp.where(jnp.arange(TIME) == 3, 1.0, 0.0).at[5].set(9.0)
    got = rl.gae(reward, jnp.full(TIME, 0.25), live, lambda_=1.0)
    np.testing.assert_allclose(got.return_t, np.where(live, 1.0, 0.0), atol=1e-6)
    np.testing.assert_allclose(got.advantage_t, np.where(live, 0.75, 0.0), atol=1e-6)
    cut_off = rl.gae(jnp.zeros(TIME), jnp.zeros(TIME), live, lambda_=1.0, bootstrap=0.5)
    np.testing.assert_allclose(cut_off.return_t, np.where(live, 0.5, 0.0), atol=1e-6)


def test_a_perfect_value_has_no_advantage():
    reward, live = draw(0)[0], np.arange(TIME) < 5
    left = np.array([reward[t:5].sum() for t in range(TIME)], np.float32)
    got = rl.gae(jnp.asarray(reward), jnp.asarray(left), jnp.asarray(live), lambda_=0.3)
    np.testing.assert_allclose(got.advantage_t, 0, atol=1e-5)


def test_an_empty_response_has_no_advantage():
    reward, value = draw(0)
    got = rl.gae(jnp.asarray(reward), jnp.asarray(value), jnp.zeros(TIME, bool))
    np.testing.assert_array_equal(got.advantage_t, np.zeros(TIME))


@pytest.mark.parametrize("wrong", [{"discount": 1.5}, {"lambda_": -0.1}, {"lambda_": np.nan}])
def test_gae_refuses_rates_out_of_range(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        rl.gae(jnp.zeros(3), jnp.zeros(3), jnp.ones(3, bool), **wrong)


def test_group_advantage_equals_a_loop():
    reward = np.random.default_rng(1).choice([-1.0, 1.0, 0.5], (2, 3, 4)).astype(np.float32)
    want = np.empty_like(reward)
    for i, j in np.ndindex(2, 3):
        row = reward[i, j].astype(np.float64)
        want[i, j] = (row - row.mean()) / (np.sqrt(((row - row.mean()) ** 2).mean()) + 0.01)
    got = rl.group_advantage(jnp.asarray(reward), epsilon=0.01)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_group_of_equal_rewards_teaches_nothing():
    """Not even where their mean is rounded: 0.1 has no exact float."""
    got = rl.group_advantage(jnp.full((2, 7), 0.1))
    np.testing.assert_allclose(got, np.zeros((2, 7)), atol=2e-3)
    np.testing.assert_array_equal(rl.group_advantage(jnp.full((2, 8), -1.0)), np.zeros((2, 8)))


def test_group_advantage_forgets_scale_and_shift():
    reward = jnp.asarray(np.random.default_rng(2).normal(size=(5, 6)), jnp.float32)
    got = rl.group_advantage(7 * reward + 3, epsilon=0.0)
    np.testing.assert_allclose(got, rl.group_advantage(reward, epsilon=0.0), atol=1e-5)


def test_whitened_tokens_have_mean_zero_and_variance_one():
    rng = np.random.default_rng(3)
    x, mask = rng.normal(3, 5, (4, 6)).astype(np.float32), rng.random((4, 6)) < 0.6
    x[~mask] = np.nan
    got = np.asarray(rl.whiten(jnp.asarray(x), jnp.asarray(mask)))
    np.testing.assert_allclose(got[mask], (x[mask] - x[mask].mean()) / x[mask].std(), rtol=1e-4)
    np.testing.assert_array_equal(got[~mask], 0)
