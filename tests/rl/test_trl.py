"""Our losses against trl's own functions on the same arrays.

trl's trainers want a model and a dataset; their loss needs neither. It is called on an object that
has only the settings it reads, with the tokens' log probabilities in the model's place. trl 1.16
has no PPO trainer any more: what is left to hold `ppo_loss` against is GRPO's, per token and per
response.
"""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")
from trl.trainer.grpo_trainer import GRPOTrainer  # noqa: E402
from trl.trainer.rloo_trainer import RLOOTrainer  # noqa: E402
from trl.trainer.utils import entropy_from_logits, selective_log_softmax  # noqa: E402

from forge_jax import rl  # noqa: E402

pytestmark = pytest.mark.torch

B, T = 4, 6
MASK = np.arange(T) < np.array([[6], [2], [3], [1]])
ADVANTAGE = np.array([1.5, -0.5, -1.0, 0.3], np.float32)
UNCHANGED = SimpleNamespace(
    gather=lambda x: x,
    gather_for_metrics=lambda x: x,
    reduce=lambda x, **_: x,
    num_processes=1,
)


def draw(seed=0):
    """Log probabilities of the drawn tokens: now, under the old policy, under the reference."""
    rng = np.random.default_rng(seed)
    old = rng.normal(-1.5, 0.5, (B, T)).astype(np.float32)
    now, reference = (old + 0.4 * rng.normal(size=(2, B, T))).astype(np.float32)
    return now, old, reference


def trainer(logp, **settings) -> Any:
    """What trl's loss reads of its trainer."""
    return SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logp, torch.zeros(B, T), None),
        accelerator=UNCHANGED,
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        aux_loss_enabled=False,
        epsilon_low=0.2,
        epsilon_high=0.2,
        _metrics={"train": defaultdict(list)},
        **settings,
    )


def inputs(**more) -> dict[str, Any]:
    ids = torch.zeros(B, T, dtype=torch.long)
    mask = torch.tensor(MASK).long()
    given = {"prompt_ids": ids, "prompt_mask": ids + 1, "completion_ids": ids}
    return {**given, "completion_mask": mask, "advantages": torch.tensor(ADVANTAGE), **more}


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo"])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_grpo_has_trls_loss_and_gradient(loss_type, beta):
    """grpo: every response counts the same; bnpo: every token. beta: the KL estimate's weight."""
    now, old, reference = draw()
    logp = torch.tensor(now, requires_grad=True)
    settings = {
        "beta": beta,
        "loss_type": loss_type,
        "importance_sampling_level": "token",
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "use_vllm": False,
        "_entropy_bonus_enabled": False,
        "args": SimpleNamespace(delta=None, use_bias_correction_kl=False),
    }
    asked = inputs(
        old_per_token_logps=torch.tensor(old), ref_per_token_logps=torch.tensor(reference)
    )
    wanted = GRPOTrainer._compute_loss(trainer(logp, **settings), None, asked)
    wanted.backward()

    weight = rl.equal_responses(jnp.asarray(MASK)) if loss_type == "grpo" else jnp.asarray(MASK)
    advantage = jnp.broadcast_to(ADVANTAGE[:, None], (B, T))

    def ours(logp):
        kl = rl.kl_estimate(logp, jnp.asarray(reference))
        return rl.ppo_loss(logp, jnp.asarray(old), advantage, weight, kl=kl, kl_coefficient=beta)[0]

    got, gradient = jax.value_and_grad(ours)(jnp.asarray(now))
    np.testing.assert_allclose(got, wanted.item(), rtol=1e-5)
    assert logp.grad is not None
    np.testing.assert_allclose(gradient, logp.grad.numpy(), atol=1e-6)
    assert np.abs(logp.grad.numpy()).max() > 1e-2


def test_reinforce_has_the_gradient_of_trls_rloo():
    """trl takes the ratio of whole responses; where nothing has moved yet that is REINFORCE."""
    now = draw()[0]
    logp = torch.tensor(now, requires_grad=True)
    old = (torch.tensor(now) * torch.tensor(MASK)).sum(1)
    wanted = RLOOTrainer._compute_loss(trainer(logp), None, inputs(old_logps=old))
    wanted.backward()

    def ours(logp):
        loss = jax.vmap(lambda *row: rl.reinforce_loss(*row, kl_coefficient=0.0))
        return loss(logp, jnp.zeros((B, T)), jnp.asarray(MASK), jnp.asarray(ADVANTAGE)).mean()

    assert logp.grad is not None
    np.testing.assert_allclose(jax.grad(ours)(jnp.asarray(now)), logp.grad.numpy(), atol=1e-6)
    assert np.abs(logp.grad.numpy()).max() > 1e-2


def test_log_probability_and_entropy_are_trls():
    rng = np.random.default_rng(1)
    logits = (3 * rng.normal(size=(B, T, 17))).astype(np.float32)
    tokens = rng.integers(17, size=(B, T))
    wanted = selective_log_softmax(torch.tensor(logits), torch.tensor(tokens))
    got = rl.log_probability(jnp.asarray(logits), jnp.asarray(tokens))
    np.testing.assert_allclose(got, wanted.numpy(), atol=1e-5)
    own = entropy_from_logits(torch.tensor(logits)).numpy()
    np.testing.assert_allclose(rl.entropy(jnp.asarray(logits)), own, atol=1e-5)
