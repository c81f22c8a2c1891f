"""One compiled update of K experts: what each algorithm does to z, on a decoder of one layer."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import training, updates
from experiments.data.batches import Batch
from experiments.forms import SVF
from experiments.model import Model
from forge_jax import rl, svf
from forge_jax.models import Decoder, DecoderSpec, Generated

SPEC = DecoderSpec(
    vocab_size=17,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
)
K, B, G, PROMPT = 2, 4, 3, 5
DECODER = Decoder(SPEC)
MODEL: Any = Model(None, DECODER, svf.transform(DECODER), None, None, 0, (0,), None)  # pyright: ignore


class Case:
    """Two experts, their prompts, and responses of up to `length` tokens."""

    def __init__(self, length):
        rng = np.random.default_rng(length)
        params = DECODER.init(jax.random.key(0), np.zeros((1, 2), np.int32))["params"]
        params = jax.tree.map(lambda w: 3 * w if w.ndim == 2 else w, params)
        factors, _ = svf.decompose(params, svf.is_attention_or_mlp)
        self.weights = {"factors": factors, "projector": None}
        tokens = rng.integers(0, 17, (K * B, PROMPT), dtype=np.int32)
        mask = np.arange(PROMPT) >= rng.integers(0, 3, (K * B, 1))
        answers = rng.integers(0, 17, (K * B, 2), dtype=np.int32)
        self.batch = Batch(tokens, mask, np.zeros((K * B, 4, 16), np.float32), answers, answers > 0)
        rows = K * B * G
        live = np.arange(length) < rng.integers(1, length + 1, (rows, 1))
        written = rng.integers(0, 17, (rows, length), dtype=np.int32)
        self.responses = Generated(jnp.asarray(written), jnp.asarray(live))
        self.reward = jnp.asarray(rng.choice([-1.0, 1.0], (K, B, G)), jnp.float32)

    def run(self, reward=None, rounds=1, kl_coefficient=None, **settings):
        """The state after some updates on the same responses, and the last metrics."""
        given = training.Settings(**settings)
        update = compiled(given)
        state = training.init_state(SVF, self.weights, TX, K, jax.random.key(0), given)
        if kl_coefficient is not None:
            state = state._replace(kl_coefficient=jnp.full(K, kl_coefficient))
        metrics: dict[str, Any] = {}
        for i in range(rounds):
            args = (self.batch, self.responses, self.reward if reward is None else reward)
            state, metrics = update(self.weights, state, *args, jax.random.key(i))
        return state, metrics


TX = optax.sgd(0.1)


@functools.cache
def compiled(settings):
    return updates.make_update(MODEL, SVF, TX, settings)


@pytest.fixture(scope="module")
def case():
    return Case(3)


def flat(delta):
    """(K, all scales)."""
    return np.concatenate([np.asarray(v) for v in delta.values()], axis=-1)


PPO: dict[str, Any] = {"algorithm": "ppo", "value_rate": 0.05}
GRPO: dict[str, Any] = {"algorithm": "grpo", "epochs": 3, "clip": 0.02, "kl_target": 0.05}
PENALTY: dict[str, Any] = {**PPO, "kl_as": "reward", "entropy_coefficient": 0.01}


@pytest.mark.parametrize("settings", [{"algorithm": "reinforce"}, GRPO, PPO])
def test_every_expert_moves_by_its_own_rewards(case, settings):
    """Other rewards of the second expert move the second alone; one program for all rounds."""
    other = case.reward.at[1].multiply(-1.0)
    moved, metrics = case.run(**settings, rounds=2)
    changed, _ = case.run(**settings, rounds=2, reward=other)
    a, b = flat(moved.delta), flat(changed.delta)
    np.testing.assert_allclose(a[0], b[0], atol=1e-7)
    assert np.abs(a[1] - b[1]).max() > 1e-4
    assert np.abs(a).max(axis=1).min() > 1e-4
    assert all(v.shape == (K,) and np.isfinite(v).all() for v in metrics.values())
    assert compiled(training.Settings(**settings))._cache_size() == 1


def test_grpo_clips_and_holds_its_kl(case):
    """Below the target, at the base, the weight of the KL falls by the rate times the clip."""
    state, metrics = case.run(**GRPO)
    assert float(metrics["clip_fraction"].min()) > 0
    np.testing.assert_array_equal(metrics["kl_div"] < 1e-6, True)  # before the first update
    np.testing.assert_allclose(state.kl_coefficient, 0.2 * (1 - 0.1 * 0.2), rtol=1e-5)
    np.testing.assert_allclose(case.run(**PPO)[0].kl_coefficient, 0.2)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_grpo_of_one_token_is_reinforce_with_group_advantages(temperature):
    """One epoch, one minibatch, ratio 1: the same gradient, since a token is a response."""
    short = Case(1)
    advantage = rl.group_advantage(short.reward)
    plain = {"algorithm": "reinforce", "baseline": "none", "temperature": temperature}
    wanted, _ = short.run(**plain, reward=advantage)
    got, metrics = short.run(algorithm="grpo", epochs=1, minibatches=1, temperature=temperature)
    np.testing.assert_allclose(flat(got.delta), flat(wanted.delta), atol=2e-6)
    assert np.abs(flat(wanted.delta)).max() > 1e-3
    np.testing.assert_array_equal(metrics["clip_fraction"], 0)
    np.testing.assert_allclose(metrics["ratio"], 1, atol=1e-5)


def test_the_value_heads_learn_what_their_experts_earn(case):
    """Rewards +1 for one expert, -1 for the other: the values go there, each its own way."""
    reward = jnp.ones((K, B, G)).at[1].set(-1.0)
    state, metrics = case.run(**PPO, reward=reward, rounds=30)
    assert float(metrics["value_loss"].max()) < 0.1
    assert np.sign(state.critic[0].bias).tolist() == [1.0, -1.0]


def test_kl_pulls_back_as_loss_and_as_reward(case):
    """A heavy KL leaves a smaller one than none; as a reward it is paid token by token."""

    def kl_after(settings, coefficient):
        return case.run(**settings, rounds=8, kl_coefficient=coefficient)[1]["kl_div"]

    for settings in (PPO, PENALTY):
        assert (kl_after(settings, 2.0) < 0.8 * kl_after(settings, 0.0)).all()


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"algorithm": "grpo", "samples": 1}, "samples"),
        ({"algorithm": "ppo", "prompts": 6, "minibatches": 4}, "minibatches"),
        ({"algorithm": "ppo", "clip": 0.0}, "clip"),
        ({"algorithm": "ppo", "gae_lambda": 1.5}, "gae_lambda"),
        ({"kl_as": "reward"}, "kl_as"),
        ({"kl_target": -1.0}, "kl_target"),
        ({"epochs": 0}, "epochs"),
    ],
)
def test_settings_that_cannot_be_are_named(wrong, named):
    with pytest.raises(ValueError, match=named):
        training.Settings(**wrong).check()


def test_one_sample_is_enough_where_no_group_is_needed():
    for algorithm in ("supervised", "ppo"):
        training.Settings(algorithm=algorithm, samples=1).check()
