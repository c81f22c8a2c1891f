"""PPO's and GRPO's losses against the papers' equations in NumPy, token by token."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from forge_jax import rl

B, T = 3, 5
MASK: Any = np.arange(T) < np.array([[5], [2], [3]])


def draw(seed=0, spread=0.5) -> Any:
    rng = np.random.default_rng(seed)
    old = rng.normal(-1.5, 0.5, (B, T)).astype(np.float32)
    now = (old + spread * rng.normal(size=(B, T))).astype(np.float32)
    return now, old, rng.normal(size=(B, T)).astype(np.float32)


def clipped_term(now, old, advantage, clip):
    """Schulman et al. 2017, eq. 7, of one token; Python's own floats."""
    ratio = np.exp(float(now) - float(old))
    return min(ratio * advantage, min(max(ratio, 1 - clip), 1 + clip) * advantage)


def reference(now, old, advantage, clip):
    live = np.argwhere(MASK)
    terms = [clipped_term(now[i, t], old[i, t], advantage[i, t], clip) for i, t in live]
    return -np.mean(terms)


@pytest.mark.parametrize("clip", [0.05, 0.2, 10.0])
def test_the_policy_loss_is_the_papers(clip):
    args = draw()
    got, metrics = rl.ppo_loss(*args, MASK, clip=clip)
    np.testing.assert_allclose(got, reference(*args, clip), rtol=1e-5)
    outside = np.abs(np.exp(args[0] - args[1]) - 1) > clip
    np.testing.assert_allclose(metrics["clip_fraction"], outside[MASK].mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["ratio"], np.exp(args[0] - args[1])[MASK].mean(), rtol=1e-5)


def test_grpo_averages_over_responses():
    """Shao et al. 2024, eq. 3: each response's mean over its own tokens, then the mean."""
    now, old, _ = draw(1)
    advantage = np.array([1.5, -0.5, -1.0])
    kl = np.abs(draw(2)[2])
    rows = []
    for i in range(B):
        tokens = [
            clipped_term(now[i, t], old[i, t], advantage[i], 0.2) - 0.3 * kl[i, t]
            for t in range(MASK[i].sum())
        ]
        rows.append(np.mean(tokens))
    spread = jnp.broadcast_to(jnp.asarray(advantage, jnp.float32)[:, None], (B, T))
    weight = rl.equal_responses(jnp.asarray(MASK))
    got, _ = rl.ppo_loss(now, old, spread, weight, kl=jnp.asarray(kl), kl_coefficient=0.3)
    np.testing.assert_allclose(got, -np.mean(rows), rtol=1e-5)
    by_token, _ = rl.ppo_loss(now, old, spread, MASK, kl=jnp.asarray(kl), kl_coefficient=0.3)
    assert abs(float(by_token - got)) > 1e-3  # lengths differ, so the means do


def test_the_value_loss_takes_the_larger_error():
    value, old, returns = draw(3, spread=1.0)
    errors = [
        max(
            (value[i, t] - returns[i, t]) ** 2,
            (old[i, t] + np.clip(value[i, t] - old[i, t], -0.2, 0.2) - returns[i, t]) ** 2,
        )
        for i, t in np.argwhere(MASK)
    ]
    got = rl.value_loss(value, old, returns, MASK, clip=0.2)
    np.testing.assert_allclose(got, 0.5 * np.mean(errors), rtol=1e-5)


def test_the_terms_add_up_with_their_weights():
    now, old, advantage = draw(4)
    logits = jnp.asarray(np.random.default_rng(5).normal(size=(B, T, 9)), jnp.float32)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(rl.entropy(logits), -(p * np.log(p)).sum(-1), rtol=1e-5)
    kl, values = jnp.abs(logits[..., 0]), rl.Values(*map(jnp.asarray, draw(6)))
    got, metrics = rl.ppo_loss(
        now,
        old,
        advantage,
        MASK,
        values=values,
        value_coefficient=0.7,
        entropy=rl.entropy(logits),
        entropy_coefficient=0.3,
        kl=kl,
        kl_coefficient=jnp.float32(0.2),
    )
    want = metrics["policy_loss"] + 0.7 * metrics["value_loss"] - 0.3 * metrics["entropy"]
    np.testing.assert_allclose(got, want + 0.2 * np.asarray(kl)[MASK].mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["entropy"], rl.entropy(logits)[MASK].mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["policy_loss"], reference(now, old, advantage, 0.2), 1e-5)


def test_an_impossible_token_has_no_entropy():
    logits = jnp.array([[0.0, 0.0, -jnp.inf]])
    np.testing.assert_allclose(rl.entropy(logits), np.log(2), rtol=1e-6)


def test_at_the_old_policy_the_gradient_is_reinforces():
    """Ratio 1: PPO's gradient is that of the plain policy gradient, per token."""
    now, _, advantage = draw(7)
    got = jax.grad(lambda x: rl.ppo_loss(x, now, advantage, MASK)[0])(now)
    np.testing.assert_allclose(got, np.where(MASK, -advantage / MASK.sum(), 0), atol=1e-6)


def test_a_token_outside_the_clip_earns_no_more():
    """No gradient where a good token's ratio is above, or a bad one's below; else there is one."""
    old = jnp.zeros((1, 4))
    now = jnp.log(jnp.array([[1.5, 1.5, 0.5, 0.5]]))
    advantage = jnp.array([[1.0, -1.0, 1.0, -1.0]])
    grad = jax.grad(lambda x: rl.ppo_loss(x, old, advantage, jnp.ones((1, 4), bool))[0])(now)
    np.testing.assert_allclose(grad, [[0.0, 1.5 / 4, -0.5 / 4, 0.0]], atol=1e-6)


def test_old_policy_advantage_and_returns_are_data():
    now, old, advantage = draw(8)
    values = rl.Values(*map(jnp.asarray, draw(9)))

    def loss(now, old, advantage, values):
        return rl.ppo_loss(now, old, advantage, MASK, values=values)[0]

    grads = jax.grad(loss, argnums=(0, 1, 2, 3))(now, old, advantage, values)
    for data in (grads[1], grads[2], grads[3].value_old, grads[3].returns):
        np.testing.assert_array_equal(data, np.zeros((B, T)))
    assert float(jnp.abs(grads[0]).max()) > 0
    assert float(jnp.abs(grads[3].value).max()) > 0


def test_gradient_equals_finite_differences():
    now, old, advantage = draw(10, spread=0.05)
    value, value_old, returns = map(jnp.asarray, draw(11, spread=0.05))

    def loss(now, value):
        values = rl.Values(value, value_old, returns)
        return rl.ppo_loss(now, old, advantage, MASK, values=values)[0]

    check_grads(jax.jit(loss), (now, value), order=1, modes=["rev"], atol=2e-2, rtol=2e-2)


def test_padding_may_hold_anything():
    """Infinite log probabilities there move neither the loss nor its gradient."""
    now, old, advantage = draw(12)
    want, grad = jax.value_and_grad(lambda x: rl.ppo_loss(x, old, advantage, MASK)[0])(now)
    now[~MASK], old[~MASK], advantage[~MASK] = -np.inf, -np.inf, np.nan
    got, same = jax.value_and_grad(lambda x: rl.ppo_loss(x, old, advantage, MASK)[0])(now)
    np.testing.assert_allclose(got, want)
    np.testing.assert_allclose(same, grad)


def test_nothing_unmasked_is_no_loss():
    loss, metrics = rl.ppo_loss(*draw(), jnp.zeros((B, T), bool))
    assert float(loss) == 0
    assert float(metrics["clip_fraction"]) == 0


@pytest.mark.parametrize("wrong", [{"clip": 0.0}, {"value_clip": -1.0}])
def test_a_clip_must_be_positive(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        rl.ppo_loss(*draw(), MASK, **wrong)


def test_every_epoch_sees_every_row_once(getkey):
    rows = np.asarray(rl.minibatches(getkey(), 12, epochs=3, parts=4))
    assert rows.shape == (12, 3)
    epochs = rows.reshape(3, 12)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(12), (3, 1)))
    assert len({tuple(order) for order in epochs}) == 3


def test_minibatches_must_divide():
    with pytest.raises(ValueError, match="multiple"):
        rl.minibatches(jax.random.key(0), 10, epochs=1, parts=4)
