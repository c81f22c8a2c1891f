"""Training K experts at once: sampled rollouts, rewards, one compiled update.

A step is: rollout (compiled, all experts in one batch), reward (Python, any function of the
text), update (compiled, all experts). What is trained is a `forms.Form`: z - 1 for the experts
of Phase 7, dense or LoRA weights for the ceilings beside them.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple
from zlib import crc32

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from experiments import run as runs
from experiments.data.batches import Batch, stack
from experiments.data.tasks import Task, select
from experiments.forms import SVF, Delta, Form, z_of, z_statistics
from experiments.model import Model, Weights, images
from experiments.scoring import exact_rewards, make_rollout, rewards
from forge_jax import optim, parallel, rl, svf
from forge_jax.models import Generated, response_logits


class State(NamedTuple):
    """K experts in training; every leaf of the trees is (K, ...)."""

    delta: Delta
    opt_state: Any  # one per expert, stacked
    best: Delta  # delta at the best validation accuracy
    best_accuracy: jax.Array  # (K,)
    stale: jax.Array  # (K,) int32, validations since the best


@dataclasses.dataclass(frozen=True)
class Settings:
    """How experts are trained."""

    steps: int = 50
    """updates of the experts at most"""
    prompts: int = 16
    """of each expert in a step"""
    samples: int = 8
    """responses to each prompt"""
    temperature: float = 1.0
    """of the sampled responses; 1 samples from the model itself"""
    top_p: float = 1.0
    """total probability of the tokens that are sampled from; 1 keeps all"""
    learning_rate: float = 1e-2
    """of z; preset 7's `fallback_lr` is 2e-3, for runs of hundreds of steps"""
    decay: bool = False
    """let the learning rate fall linearly, to nothing after the last of `steps`"""
    grokfast_lambda: float = 0.05
    """weight of the gradient's moving average"""
    kl_coefficient: float = 0.2
    """weight of KL(expert || base) in the loss"""
    baseline: Literal["leave_one_out", "none"] = "leave_one_out"
    """none: the guide's plain rewards"""
    supervised: bool = False
    """fit the answers by cross-entropy (plus the KL term) instead of sampling"""
    validate_every: int = 10
    """steps from one validation to the next"""
    patience: int = 3
    """training stops when no expert has improved for so many validations"""
    diagnostics: bool = False
    """log the optimizer's measurements at each step, see `optim.diagnostics`"""

    def check(self) -> None:
        """Raise a ValueError that lists every setting out of its range."""
        counts = ("steps", "prompts", "samples", "validate_every", "patience")
        wrong = [f"`{n}` must be at least 1" for n in counts if getattr(self, n) < 1]
        rates = ("learning_rate", "grokfast_lambda", "kl_coefficient")
        wrong += [f"`{n}` must be at least 0" for n in rates if not getattr(self, n) >= 0]
        if not self.temperature > 0 or not 0 < self.top_p <= 1:
            wrong.append("`temperature` must be positive and `top_p` in (0, 1]")
        if self.baseline == "leave_one_out" and self.samples < 2 and not self.supervised:
            wrong.append("`samples` must be at least 2 for the leave-one-out baseline")
        if wrong:
            raise ValueError(", ".join(wrong) + ".")

    def with_rate(self, learning_rate: float) -> "Settings":
        """The same with another learning rate."""
        return dataclasses.replace(self, learning_rate=learning_rate)

    def optimizer(self) -> optim.MuGrokConfig:
        """Preset 7 with these rates."""
        falling = optax.linear_schedule(self.learning_rate, 0.0, self.steps)
        return optim.MuGrokConfig.from_phase(
            7,
            fallback_lr=falling if self.decay else self.learning_rate,
            grokfast_lambda=self.grokfast_lambda,
            kl_coefficient=self.kl_coefficient,
        )


DEFAULTS = Settings()


def make_tx(settings: Settings) -> optax.GradientTransformation:
    """The optimizer of one expert."""
    return optim.mugrok(settings.optimizer(), diagnostics=settings.diagnostics)


def init_state(form: Form, weights: Weights, tx, experts: int, key) -> State:
    """All experts at the base model."""
    delta = form.start(weights, experts, key)
    worst, stale = jnp.full(experts, -1.0), jnp.zeros(experts, jnp.int32)
    return State(delta, jax.vmap(tx.init)(delta), delta, worst, stale)


def flat(batch: Batch) -> Batch:
    """(experts, prompts, ...) as rows."""
    return Batch(*(leaf.reshape(-1, *leaf.shape[2:]) for leaf in batch))


def expert_losses(
    model: Model,
    form: Form,
    weights: Weights,
    delta: Delta,
    batch: Batch,
    responses: Generated,
    advantage,
    kl_weight: float,
):
    """Loss and KL per token of every expert, (K,) each; see `rl.reinforce_loss`."""
    experts = advantage.shape[0]
    seen = images(weights, batch)

    def logits(delta):
        apply = form.policy(model, weights, delta)
        rows = (batch.tokens, batch.mask, responses.tokens, responses.mask)
        return response_logits(apply, model.decoder.spec, *rows, images=seen)

    now, base = logits(delta), logits(jax.tree.map(jnp.zeros_like, delta))
    kl = rl.kl_to_reference(now, jax.lax.stop_gradient(base))
    logp = rl.log_probability(now, responses.tokens)
    loss = jax.vmap(lambda *row: rl.reinforce_loss(*row, kl_coefficient=kl_weight))(
        logp, kl, responses.mask, advantage.reshape(-1)
    )
    tokens = responses.mask.reshape(experts, -1).sum(axis=1)
    kl_per_token = (kl * responses.mask).reshape(experts, -1).sum(axis=1) / tokens
    return loss.reshape(experts, -1).mean(axis=1), kl_per_token


def make_update(
    model: Model,
    form: Form,
    tx: optax.GradientTransformation,
    kl_weight: float,
    diagnostics: bool = False,
):
    """A compiled function (weights, state, batch, responses, advantage) -> state, metrics.

    `advantage` is (K, B x G), the metrics are (K,); `diagnostics` adds those kept by `tx`.
    """

    @jax.jit
    def update(weights: Weights, state: State, batch: Batch, responses: Generated, advantage):
        def total(delta):
            losses, kl = expert_losses(
                model, form, weights, delta, batch, responses, advantage, kl_weight
            )
            return losses.sum(), (losses, kl)  # no expert's loss depends on another's delta

        grads, (losses, kl) = jax.grad(total, has_aux=True)(state.delta)
        updates, opt_state = jax.vmap(tx.update)(grads, state.opt_state, state.delta)
        delta = optax.apply_updates(state.delta, updates)
        metrics = {"loss": losses, "kl_div": kl}
        metrics |= optim.diagnostics(opt_state) if diagnostics else {}
        return state._replace(delta=delta, opt_state=opt_state), metrics

    return update


def draw(tasks: Sequence[Task], prompts: int, seed: int, step: int):
    """The step's prompts of every task and the indices of their items.

    A function of seed, step and task: a ceiling sees the items that its expert sees.
    """
    streams = [np.random.default_rng((seed, step, crc32(t.name.encode()))) for t in tasks]
    indices = [
        rng.choice(len(t.items["train"]), prompts, replace=False)
        for rng, t in zip(streams, tasks, strict=True)
    ]
    batches = [select(t.batches["train"], i) for t, i in zip(tasks, indices, strict=True)]
    return flat(stack(batches)), indices


def advantages(reward, baseline: str):
    """(K, B, G) rewards less their baseline, as (K, B x G)."""
    used = rl.leave_one_out(reward) if baseline == "leave_one_out" else reward
    return used.reshape(len(reward), -1)


Step = Callable[[Weights, State, Sequence[Task], int, int], tuple[State, dict[str, Any]]]
"""(weights, state, K tasks, seed, number) -> state, metrics of (K,) arrays"""


def make_step(
    model: Model,
    form: Form,
    tx: optax.GradientTransformation,
    settings: Settings,
    max_new_tokens: int,
    mesh: Mesh | None = None,
) -> Step:
    """One update of K experts on K tasks; equal shapes compile once.

    On a mesh the rows of a step are shared out over `population` and `data`, and z over
    `population` where it divides K; what goes in may lie anywhere.
    """
    rollout = make_rollout(
        model,
        form.policy,
        max_new_tokens=max_new_tokens,
        samples=settings.samples,
        temperature=settings.temperature,
        top_p=settings.top_p,
    )
    update = make_update(model, form, tx, settings.kl_coefficient, settings.diagnostics)

    def placed(state, batch):
        stacked = parallel.fitting(mesh, parallel.CANDIDATES, len(state.stale))
        state = parallel.shard(mesh, state, stacked)
        return state, parallel.shard(mesh, batch, parallel.EXPERT_ROWS)

    def supervised_step(weights, state, tasks, seed, number):
        batch, _ = draw(tasks, settings.prompts, seed, number)
        state, batch = placed(state, batch)
        answers = Generated(jnp.asarray(batch.answers), jnp.asarray(batch.answer_mask))
        ones = np.ones((len(tasks), settings.prompts), np.float32)
        return update(weights, state, batch, answers, ones)

    def sampled_step(weights, state, tasks, seed, number):
        batch, indices = draw(tasks, settings.prompts, seed, number)
        state, batch = placed(state, batch)
        key = jax.random.fold_in(jax.random.key(seed), number)
        responses = rollout(weights, state.delta, batch, key)
        tokens, mask = (np.split(np.asarray(x), len(tasks)) for x in responses)

        def reward_of(task, chosen, tokens, mask):
            if task.is_exact:
                return exact_rewards(tokens, select(task.batches["train"], chosen))
            answers = [task.items["train"][i].answer for i in chosen]
            return rewards(model, task, tokens, mask, answers)

        rows = zip(tasks, indices, tokens, mask, strict=True)
        reward = np.stack([reward_of(*row) for row in rows])
        reward = reward.reshape(len(tasks), settings.prompts, settings.samples)
        advantage = advantages(reward, settings.baseline)
        state, metrics = update(weights, state, batch, responses, advantage)
        return state, {**metrics, "reward": reward.mean(axis=(1, 2))}

    return supervised_step if settings.supervised else sampled_step


def keep_best(state: State, accuracy) -> State:
    """Keep each expert's delta where its validation accuracy is the best so far.

    Of equals the last: where few items are soon all right, training still goes on. Only a better
    one counts as progress.
    """
    accuracy = jnp.asarray(accuracy)
    kept = accuracy >= state.best_accuracy

    def chosen(new, old):
        return jnp.where(kept.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    return state._replace(
        best=jax.tree.map(chosen, state.delta, state.best),
        best_accuracy=jnp.maximum(accuracy, state.best_accuracy),
        stale=jnp.where(accuracy > state.best_accuracy, 0, state.stale + 1),
    )


def validate(scorer, weights: Weights, delta: Delta, tasks: Sequence[Task]) -> np.ndarray:
    """Each SVF expert's greedy accuracy on its own domain's validation items, (K,)."""
    s = svf.scales(weights["factors"], z_of(delta))
    out = []
    for k, task in enumerate(tasks):
        own = {name: v[k : k + 1] for name, v in s.items()}
        answers = [i.answer for i in task.items["validation"]]
        score = scorer(weights, own, task.batches["validation"], task, answers)
        out.append(score.correct.mean())
    return np.array(out, np.float32)


def is_due(number: int, settings: Settings) -> bool:
    """Whether the experts are validated after this step."""
    return number % settings.validate_every == 0 or number == settings.steps


class Trained(NamedTuple):
    """Where `fit` stands after a step."""

    number: int
    state: State
    metrics: dict[str, Any]  # (K,) each
    accuracy: np.ndarray | None  # (K,) where the experts were validated


def fit(
    step: Callable[[State, int], tuple[State, dict[str, Any]]],
    validate: Callable[[Delta], np.ndarray],
    settings: Settings,
    number: int,
    state: State,
) -> Iterator[Trained]:
    """Train from step `number` until the steps are used up or no expert improves any more.

    The start is validated too: an expert that stays below the base is the base.
    """
    if number == 0:
        state = keep_best(state, validate(state.delta))
    while number < settings.steps and int(jnp.min(state.stale)) < settings.patience:
        state, metrics = step(state, number)
        number += 1
        accuracy = None
        if number % settings.validate_every == 0 or number == settings.steps:
            accuracy = validate(state.delta)
            state = keep_best(state, accuracy)
        yield Trained(number, state, metrics, accuracy)


def fitted(step, validate, settings: Settings, state: State) -> State:
    """The end of `fit` from its beginning."""
    for done in fit(step, validate, settings, 0, state):
        state = done.state
    return state


def train(
    run: runs.Run,
    weights: Weights,
    tasks: Sequence[Task],
    scorer,
    step: Step,
    settings: Settings,
    seed: int,
) -> dict[str, np.ndarray]:
    """Train K SVF experts; each path's best z on validation, (K, r).

    Logs every step, and checkpoints where it validates.
    """
    tx = make_tx(settings)
    state = init_state(SVF, weights, tx, len(tasks), jax.random.key(seed))
    name, shown = f"seed{seed}-experts", "loss" if settings.supervised else "reward"
    start, state = runs.restore_latest(run, state, name=name) or (0, state)
    with runs.progress(settings.steps, f"experts, seed {seed}", initial=start) as advance:
        for done in fit(
            lambda state, number: step(weights, state, tasks, seed, number),
            lambda delta: validate(scorer, weights, delta, tasks),
            settings,
            start,
            state,
        ):
            state = done.state
            row = {"step": done.number, "seed": seed}
            for k, task in enumerate(tasks):
                seen = {m: float(v[k]) for m, v in done.metrics.items()}
                if done.accuracy is not None:
                    seen |= {"accuracy": float(done.accuracy[k]), **z_statistics(state.delta, k)}
                row |= {f"svf/{task.name}/{m}": v for m, v in seen.items()}
            runs.log(run, row)
            if done.accuracy is not None:
                runs.save(run, done.number, state, name=name)
            advance(1, **{shown: float(np.mean(done.metrics[shown]))})
    return {k: np.asarray(v) for k, v in z_of(state.best).items()}
