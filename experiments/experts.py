"""Training the scales z of K experts at once: sampled rollouts, rewards, one compiled update.

A step is: rollout (compiled, all experts in one batch), reward (Python, any function of the
text), update (compiled, all experts). What the optimizer holds is z - 1.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import run as runs
from experiments.data.batches import Batch, stack
from experiments.data.tasks import Task, select
from experiments.model import Model, Weights, images, policy
from experiments.scoring import make_rollout, rewards
from forge_jax import optim, rl, svf
from forge_jax.models import Generated, response_logits


class State(NamedTuple):
    """K experts in training; every leaf of the dictionaries is (K, r)."""

    delta: dict[str, jax.Array]  # z - 1
    opt_state: Any  # one per expert, stacked
    best: dict[str, jax.Array]  # delta at the best validation accuracy
    best_accuracy: jax.Array  # (K,)
    stale: jax.Array  # (K,) int32, validations since the best


class Settings(NamedTuple):
    """What an expert's training depends on."""

    steps: int
    prompts: int  # per expert and step
    samples: int  # per prompt
    max_new_tokens: int
    temperature: float
    top_p: float
    supervised: bool  # fit the answers instead of sampling
    baseline: str  # leave_one_out, or none: the guide's plain rewards
    validate_every: int
    patience: int  # validations without a better accuracy before training stops


def init_state(weights: Weights, tx: optax.GradientTransformation, experts: int) -> State:
    """All experts at the base model."""
    z = svf.identity(weights["factors"])
    delta = {k: jnp.zeros((experts, *v.shape)) for k, v in z.items()}
    opt_state = jax.vmap(tx.init)(delta)
    worst, stale = jnp.full(experts, -1.0), jnp.zeros(experts, jnp.int32)
    return State(delta, opt_state, delta, worst, stale)


def flat(batch: Batch) -> Batch:
    """(experts, prompts, ...) as rows."""
    return Batch(*(leaf.reshape(-1, *leaf.shape[2:]) for leaf in batch))


def z_of(delta):
    """z from what the optimizer holds."""
    return jax.tree.map(lambda d: 1 + d, delta)


def expert_losses(
    model: Model, weights: Weights, delta, batch: Batch, responses: Generated, advantage, kl_weight
):
    """Loss and KL per token of every expert, (K,) each; see `rl.reinforce_loss`."""
    experts = advantage.shape[0]
    spec, factors = model.decoder.spec, weights["factors"]
    seen = images(weights, batch)

    def logits(s):
        apply = policy(model, weights, s)
        rows = (batch.tokens, batch.mask, responses.tokens, responses.mask)
        return response_logits(apply, spec, *rows, images=seen)

    now = logits(svf.scales(factors, z_of(delta)))
    reference = logits({k: leaf.s[None] for k, leaf in svf.named_factors(factors)})
    kl = rl.kl_to_reference(now, jax.lax.stop_gradient(reference))
    logp = rl.log_probability(now, responses.tokens)
    loss = jax.vmap(lambda *row: rl.reinforce_loss(*row, kl_coefficient=kl_weight))(
        logp, kl, responses.mask, advantage.reshape(-1)
    )
    tokens = responses.mask.reshape(experts, -1).sum(axis=1)
    kl_per_token = (kl * responses.mask).reshape(experts, -1).sum(axis=1) / tokens
    return loss.reshape(experts, -1).mean(axis=1), kl_per_token


def make_update(model: Model, tx: optax.GradientTransformation, kl_weight: float):
    """A compiled function (weights, state, batch, responses, advantage) -> state, metrics.

    `advantage` is (K, B x G), the metrics are (K,).
    """

    @jax.jit
    def update(weights: Weights, state: State, batch: Batch, responses: Generated, advantage):
        def total(delta):
            losses, kl = expert_losses(
                model, weights, delta, batch, responses, advantage, kl_weight
            )
            return losses.sum(), (losses, kl)  # no expert's loss depends on another's delta

        grads, (losses, kl) = jax.grad(total, has_aux=True)(state.delta)
        updates, opt_state = jax.vmap(tx.update)(grads, state.opt_state, state.delta)
        delta = optax.apply_updates(state.delta, updates)
        return state._replace(delta=delta, opt_state=opt_state), {"loss": losses, "kl_div": kl}

    return update


def draw(tasks: Sequence[Task], prompts: int, seed: int, step: int):
    """The step's prompts of every task and the indices of their items; a function of the step."""
    rng = np.random.default_rng((seed, step))
    indices = [rng.choice(len(t.items["train"]), prompts, replace=False) for t in tasks]
    batches = [select(t.batches["train"], i) for t, i in zip(tasks, indices, strict=True)]
    return flat(stack(batches)), indices


def advantages(reward, baseline: str):
    """(K, B, G) rewards less their baseline, as (K, B x G)."""
    used = rl.leave_one_out(reward) if baseline == "leave_one_out" else reward
    return used.reshape(len(reward), -1)


def make_step(model: Model, tx: optax.GradientTransformation, tasks, settings: Settings, kl_weight):
    """A function (weights, state, seed, step) -> state, metrics of (K,) arrays."""
    rollout = make_rollout(
        model,
        max_new_tokens=settings.max_new_tokens,
        samples=settings.samples,
        temperature=settings.temperature,
        top_p=settings.top_p,
    )
    update = make_update(model, tx, kl_weight)

    def step(weights: Weights, state: State, seed: int, number: int):
        batch, indices = draw(tasks, settings.prompts, seed, number)
        if settings.supervised:
            responses = Generated(jnp.asarray(batch.answers), jnp.asarray(batch.answer_mask))
            reward = np.ones((len(tasks), settings.prompts, 1), np.float32)
            return update(weights, state, batch, responses, advantages(reward, "none"))
        s = svf.scales(weights["factors"], z_of(state.delta))
        key = jax.random.fold_in(jax.random.key(seed), number)
        responses = rollout(weights, s, batch, key)
        rows = zip(
            np.split(np.asarray(responses.tokens), len(tasks)),
            np.split(np.asarray(responses.mask), len(tasks)),
            strict=True,
        )
        reward = np.stack(
            [
                rewards(model, task, tokens, mask, [task.items["train"][i].answer for i in chosen])
                for task, (tokens, mask), chosen in zip(tasks, rows, indices, strict=True)
            ]
        ).reshape(len(tasks), settings.prompts, settings.samples)
        state, metrics = update(
            weights, state, batch, responses, advantages(reward, settings.baseline)
        )
        return state, {**metrics, "reward": reward.mean(axis=(1, 2))}

    return step


def keep_best(state: State, accuracy) -> State:
    """Keep each expert's delta where its validation accuracy is the best so far."""
    accuracy = jnp.asarray(accuracy)
    better = accuracy > state.best_accuracy
    best = {
        k: jnp.where(better.reshape(-1, *[1] * (d.ndim - 1)), d, state.best[k])
        for k, d in state.delta.items()
    }
    stale = jnp.where(better, 0, state.stale + 1)
    return state._replace(
        best=best, best_accuracy=jnp.maximum(accuracy, state.best_accuracy), stale=stale
    )


def z_statistics(delta, expert: int) -> dict[str, float]:
    """Mean, standard deviation, extremes of one expert's z, over all matrices."""
    z = 1 + np.concatenate([np.ravel(d[expert]) for d in delta.values()])
    return {
        "z_mean": float(z.mean()),
        "z_std": float(z.std()),
        "z_min": float(z.min()),
        "z_max": float(z.max()),
    }


def validate(scorer, weights, delta, tasks: Sequence[Task]) -> np.ndarray:
    """Each expert's greedy accuracy on its own domain's validation items, (K,)."""
    s = svf.scales(weights["factors"], z_of(delta))
    out = []
    for k, task in enumerate(tasks):
        own = {name: v[k : k + 1] for name, v in s.items()}
        answers = [i.answer for i in task.items["validation"]]
        score = scorer(weights, own, task.batches["validation"], task, answers)
        out.append(score.correct.mean())
    return np.array(out, np.float32)


def train(
    run: runs.Run,
    weights: Weights,
    tasks: Sequence[Task],
    scorer,
    step_fn,
    config: optim.MuGrokConfig,
    settings: Settings,
    seed: int,
) -> dict[str, np.ndarray]:
    """Train K experts with `make_step`'s function; each path's best z on validation, (K, r).

    Logs every step, and checkpoints where it validates.
    """
    tx = optim.mugrok(config)
    state = init_state(weights, tx, len(tasks))
    name = f"seed{seed}-experts"
    number, state = runs.restore_latest(run, state, name=name) or (0, state)
    with runs.progress(settings.steps, f"experts, seed {seed}", initial=number) as advance:
        while number < settings.steps and int(jnp.min(state.stale)) < settings.patience:
            state, metrics = step_fn(weights, state, seed, number)
            number += 1
            row = {"step": number, "seed": seed}
            for k, task in enumerate(tasks):
                row |= {f"svf/{task.name}/{m}": float(v[k]) for m, v in metrics.items()}
            if number % settings.validate_every == 0 or number == settings.steps:
                accuracy = validate(scorer, weights, state.delta, tasks)
                state = keep_best(state, accuracy)
                for k, task in enumerate(tasks):
                    row[f"svf/{task.name}/accuracy"] = float(accuracy[k])
                    statistics = z_statistics(state.delta, k)
                    row |= {f"svf/{task.name}/{m}": v for m, v in statistics.items()}
            runs.log(run, row)
            if number % settings.validate_every == 0 or number == settings.steps:
                runs.save(run, number, state, name=name)
            advance(1, reward=float(np.mean(metrics.get("reward", metrics["loss"]))))
    return {k: np.asarray(v) for k, v in z_of(state.best).items()}
