"""The compiled update of all K experts, one for each way to learn from rewarded responses.

Each is `update(weights, state, batch, responses, reward, key) -> state, metrics` with rewards
(K, prompts, samples) and metrics (K,). No expert's loss depends on another's parameters, so one
gradient of the sum is the gradient of each.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from experiments.data.batches import Batch
from experiments.forms import Delta, Form
from experiments.model import Model, Weights, images
from experiments.training import Critic, Settings, State
from forge_jax import optim, rl
from forge_jax.models import Generated, response_logits, with_hidden

Update = Callable[..., tuple[State, dict[str, Any]]]


def make_update(
    model: Model, form: Form, tx: optax.GradientTransformation, settings: Settings
) -> Update:
    """The update of the algorithm that the settings name."""
    make = make_clipped if settings.is_clipped else make_plain
    return make(model, form, tx, settings)


def next_kl_coefficient(state: State, kl, settings: Settings):
    """The weight of the KL, (K,), after a step at which it was `kl` nats per token."""
    if settings.kl_target is None:
        return state.kl_coefficient
    return rl.adapt_kl(state.kl_coefficient, kl, target=settings.kl_target)


def measured(opt_state, settings: Settings) -> dict[str, Any]:
    """What the optimizer measured in its last update, if it was asked to."""
    return optim.diagnostics(opt_state) if settings.diagnostics else {}


def per_expert(x, mask, experts: int):
    """Mean over the unmasked tokens of every expert's responses, (K,)."""
    total = jnp.where(mask, x, 0).reshape(experts, -1).sum(axis=1)
    return total / jnp.maximum(mask.reshape(experts, -1).sum(axis=1), 1)


def advantages(reward, settings: Settings):
    """(K, B, G) rewards less their baseline, as (K x B x G,)."""
    is_plain = settings.baseline == "none" or settings.algorithm == "supervised"
    return (reward if is_plain else rl.leave_one_out(reward)).reshape(-1)


def make_plain(
    model: Model, form: Form, tx: optax.GradientTransformation, settings: Settings
) -> Update:
    """REINFORCE, or cross-entropy where the responses are the answers: `rl.reinforce_loss`."""

    def losses(weights: Weights, delta: Delta, batch, responses, advantage, coefficient):
        """Loss and KL per token of every expert, (K,) each."""
        experts, seen = len(coefficient), images(weights, batch)

        def logits(delta):
            apply = form.policy(model, weights, delta)
            rows = (batch.tokens, batch.mask, responses.tokens, responses.mask)
            return response_logits(apply, model.decoder.spec, *rows, images=seen)

        now, base = logits(delta), logits(jax.tree.map(jnp.zeros_like, delta))
        kl = rl.kl_to_reference(now, jax.lax.stop_gradient(base))
        # of the distribution that was drawn from; answers were not drawn
        drawn_at = 1.0 if settings.algorithm == "supervised" else settings.temperature
        logp = rl.log_probability(now / drawn_at, responses.tokens)
        weight = jnp.repeat(coefficient, len(kl) // experts)
        loss = jax.vmap(lambda *row, c: rl.reinforce_loss(*row, kl_coefficient=c))(
            logp, kl, responses.mask, advantage, c=weight
        )
        return loss.reshape(experts, -1).mean(axis=1), per_expert(kl, responses.mask, experts)

    @jax.jit
    def update(weights: Weights, state: State, batch: Batch, responses: Generated, reward, key):
        del key
        advantage = advantages(reward, settings)

        def total(delta):
            loss, kl = losses(weights, delta, batch, responses, advantage, state.kl_coefficient)
            return loss.sum(), (loss, kl)

        grads, (loss, kl) = jax.grad(total, has_aux=True)(state.delta)
        updates, opt_state = jax.vmap(tx.update)(grads, state.opt_state, state.delta)
        state = state._replace(
            delta=optax.apply_updates(state.delta, updates),
            opt_state=opt_state,
            kl_coefficient=next_kl_coefficient(state, kl, settings),
        )
        return state, {"loss": loss, "kl_div": kl} | measured(opt_state, settings)

    return update


class Round(NamedTuple):
    """A step's prompts with their responses, and what does not change while they are used.

    Every leaf is (K, prompts, ...); with samples and time, (K, prompts, samples, time).
    """

    batch: Batch
    tokens: Any
    mask: Any
    logp: Any  # of the policy that drew the responses
    advantage: Any
    value: Any  # zeros without a critic
    returns: Any  # likewise


class Setup(NamedTuple):
    """What is fixed when an update is made."""

    model: Model
    form: Form
    settings: Settings

    @property
    def has_critic(self) -> bool:
        """Whether values are learned: PPO's baseline; GRPO's is the group."""
        return self.settings.algorithm == "ppo"


def run_round(setup: Setup, weights: Weights, delta: Delta, part: Round):
    """Logits and hidden states, rows (K x prompts x samples), of every response token."""
    batch = Batch(*(x.reshape(-1, *x.shape[2:]) for x in part.batch))
    tokens, mask = (x.reshape(-1, x.shape[-1]) for x in (part.tokens, part.mask))
    apply = with_hidden(setup.form.policy(setup.model, weights, delta))
    rows = (batch.tokens, batch.mask, tokens, mask)
    return response_logits(apply, setup.model.decoder.spec, *rows, images=images(weights, batch))


def base_logits(setup: Setup, weights: Weights, delta: Delta, part: Round):
    """The base's logits of the same tokens, as data."""
    start = jax.tree.map(jnp.zeros_like, delta)
    return jax.lax.stop_gradient(run_round(setup, weights, start, part)[0])


def log_probability(setup: Setup, logits, part: Round):
    """Of every response token at the rollout's temperature; a nucleus (`top_p`) is not in it."""
    tokens = part.tokens.reshape(-1, part.tokens.shape[-1])
    logp = rl.log_probability(logits / setup.settings.temperature, tokens)
    return logp.reshape(part.tokens.shape)


def values_of(heads: Critic, hidden, part: Round):
    """(K, prompts, samples, time); the hidden states are data.

    What the value loss would ask of z is not what the reward asks.
    """
    hidden = jax.lax.stop_gradient(hidden).reshape(*part.tokens.shape, -1)
    return jnp.einsum("k...h,kh->k...", hidden, heads.kernel) + heads.bias[:, None, None, None]


def begin_round(
    setup: Setup, weights: Weights, state: State, batch: Batch, responses: Generated, reward
):
    """The round, and the KL per token, (K,), before its first update."""
    experts, prompts, _ = reward.shape
    grouped = Batch(*(x.reshape(experts, prompts, *x.shape[1:]) for x in batch))
    tokens, mask = (x.reshape(*reward.shape, -1) for x in responses)
    nothing = jnp.zeros(mask.shape)
    part = Round(grouped, tokens, mask, nothing, nothing, nothing, nothing)
    logits, hidden = run_round(setup, weights, state.delta, part)
    base = base_logits(setup, weights, state.delta, part)
    kl = per_expert(rl.kl_to_reference(logits, base), responses.mask, experts)
    part = part._replace(logp=log_probability(setup, logits, part))
    if setup.has_critic:
        value = values_of(state.critic[0], hidden, part)
        paid = token_rewards(setup, state, part, reward, log_probability(setup, base, part))
        return with_advantages(setup, part._replace(value=value), paid), kl
    advantage = jnp.where(mask, rl.group_advantage(reward)[..., None], 0.0)
    return part._replace(advantage=advantage), kl


def token_rewards(setup: Setup, state: State, part: Round, reward, logp_base):
    """Every token's reward, the KL in it where the settings say so."""
    experts = len(reward)
    own = state.kl_coefficient if setup.settings.kl_as == "reward" else jnp.zeros(experts)
    each = jnp.broadcast_to(own[:, None, None], reward.shape)
    pay = over_rows(lambda r, p, q, m, c: rl.kl_reward(r, p, q, m, coefficient=c))
    return pay(reward, part.logp, logp_base, part.mask, each)


def with_advantages(setup: Setup, part: Round, paid) -> Round:
    """The round with returns, and advantages whitened for each expert."""
    rates = {"discount": setup.settings.discount, "lambda_": setup.settings.gae_lambda}
    found = over_rows(lambda *row: rl.gae(*row, **rates))(paid, part.value, part.mask)
    advantage = jax.vmap(rl.whiten)(tokens_of(found.advantage_t), tokens_of(part.mask))
    return part._replace(advantage=advantage.reshape(part.mask.shape), returns=found.return_t)


def clipped_losses(setup: Setup, weights: Weights, delta: Delta, heads, part: Round, coefficient):
    """Loss and metrics of every expert, (K,) each."""
    settings = setup.settings
    logits, hidden = run_round(setup, weights, delta, part)
    like = part.tokens.shape
    terms: dict[str, Any] = {}
    if settings.kl_as == "loss":
        kl = rl.kl_to_reference(logits, base_logits(setup, weights, delta, part))
        terms["kl"] = tokens_of(kl.reshape(like))
    if settings.entropy_coefficient:
        terms["entropy"] = tokens_of(rl.entropy(logits).reshape(like))
    if setup.has_critic:
        value = values_of(heads, hidden, part)
        terms["values"] = rl.Values(*map(tokens_of, (value, part.value, part.returns)))

    def one(logp, logp_old, advantage, mask, coefficient, terms):
        return rl.ppo_loss(
            logp,
            logp_old,
            advantage,
            mask if setup.has_critic else rl.equal_responses(mask),
            clip=settings.clip,
            value_clip=settings.value_clip,
            value_coefficient=settings.value_coefficient,
            entropy_coefficient=settings.entropy_coefficient,
            kl_coefficient=coefficient,
            **terms,
        )

    data = (log_probability(setup, logits, part), part.logp, part.advantage, part.mask)
    logp, logp_old, advantage, mask = map(tokens_of, data)
    return jax.vmap(one)(logp, logp_old, advantage, mask, coefficient, terms)


def make_clipped(
    model: Model, form: Form, tx: optax.GradientTransformation, settings: Settings
) -> Update:
    """PPO with GAE and value heads, or GRPO: minibatch epochs of `rl.ppo_loss`, one program."""
    setup, critic_tx = Setup(model, form, settings), settings.critic_optimizer()

    @jax.jit
    def update(weights: Weights, state: State, batch: Batch, responses: Generated, reward, key):
        whole, kl = begin_round(setup, weights, state, batch, responses, reward)

        def total(trained, part):
            delta, heads = trained
            loss, metrics = clipped_losses(setup, weights, delta, heads, part, state.kl_coefficient)
            return loss.sum(), {"loss": loss, **metrics}

        def one(carry, rows):
            delta, opt_state, critic = carry
            heads = critic[0] if setup.has_critic else ()
            part = jax.tree.map(lambda x: x[:, rows], whole)
            grads, metrics = jax.grad(total, has_aux=True)((delta, heads), part)
            updates, opt_state = jax.vmap(tx.update)(grads[0], opt_state, delta)
            if setup.has_critic:
                change, critic_state = critic_tx.update(grads[1], critic[1])
                critic = optax.apply_updates(heads, change), critic_state
            return (optax.apply_updates(delta, updates), opt_state, critic), metrics

        parts = {"epochs": settings.epochs, "parts": settings.minibatches}
        rows = rl.minibatches(key, reward.shape[1], **parts)
        start = (state.delta, state.opt_state, state.critic)
        (delta, opt_state, critic), metrics = jax.lax.scan(one, start, rows)
        state = state._replace(
            delta=delta,
            opt_state=opt_state,
            critic=critic,
            kl_coefficient=next_kl_coefficient(state, kl, settings),
        )
        metrics = {k: v.mean(axis=0) for k, v in metrics.items() if k != "kl"}
        return state, metrics | {"kl_div": kl} | measured(opt_state, settings)

    return update


def tokens_of(x):
    """(K, prompts, samples, time) as (K, prompts x samples, time)."""
    return x.reshape(len(x), -1, x.shape[-1])


def over_rows(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of one response, over (K, prompts, samples)."""
    return jax.vmap(jax.vmap(jax.vmap(function)))
