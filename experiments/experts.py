"""Training K experts at once: sampled rollouts, rewards, one compiled update.

A step is: rollout (compiled, all experts in one batch), reward (Python, any function of the
text), update (compiled, all experts). What is trained is a `forms.Form`: z - 1 for the experts
of Phase 7, dense or LoRA weights for the ceilings beside them.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
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
from experiments.model import Model, Weights
from experiments.problem import answers
from experiments.scoring import Mixtures, exact_rewards, make_rollout, rewards
from experiments.training import DEFAULTS as DEFAULTS
from experiments.training import Settings as Settings
from experiments.training import State as State
from experiments.training import init_state as init_state
from experiments.training import make_tx as make_tx
from experiments.updates import make_update
from forge_jax import parallel
from forge_jax.models import Generated


def flat(batch: Batch) -> Batch:
    """(experts, prompts, ...) as rows."""
    return Batch(*(leaf.reshape(-1, *leaf.shape[2:]) for leaf in batch))


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
    update = make_update(model, form, tx, settings)

    def placed(state, batch):
        stacked = parallel.fitting(mesh, parallel.CANDIDATES, len(state.stale))
        state = parallel.shard(mesh, state, stacked)
        return state, parallel.shard(mesh, batch, parallel.EXPERT_ROWS)

    def supervised_step(weights, state, tasks, seed, number):
        batch, _ = draw(tasks, settings.prompts, seed, number)
        state, batch = placed(state, batch)
        written = Generated(jnp.asarray(batch.answers), jnp.asarray(batch.answer_mask))
        ones = np.ones((len(tasks), settings.prompts, 1), np.float32)
        return update(weights, state, batch, written, ones, jax.random.key(0))

    def sampled_step(weights, state, tasks, seed, number):
        batch, indices = draw(tasks, settings.prompts, seed, number)
        state, batch = placed(state, batch)
        key, order = jax.random.split(jax.random.fold_in(runs.key(seed, "rollout"), number))
        responses = rollout(weights, state.delta, batch, key)
        tokens, mask = (np.split(np.asarray(x), len(tasks)) for x in responses)

        def reward_of(task, chosen, tokens, mask):
            if task.is_exact:
                return exact_rewards(tokens, select(task.batches["train"], chosen))
            wanted = [task.items["train"][i].answer for i in chosen]
            return rewards(model, task, tokens, mask, wanted)

        rows = zip(tasks, indices, tokens, mask, strict=True)
        reward = np.stack([reward_of(*row) for row in rows])
        reward = reward.reshape(len(tasks), settings.prompts, settings.samples)
        state, metrics = update(weights, state, batch, responses, reward, order)
        return state, {**metrics, "reward": reward.mean(axis=(1, 2))}

    return supervised_step if settings.algorithm == "supervised" else sampled_step


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
    out = []
    for task, alone in zip(tasks, np.eye(len(tasks)), strict=True):
        own, wanted = Mixtures(z_of(delta), alone[None]), answers(task, "validation")
        score = scorer(weights, own, task.batches["validation"], task, wanted)
        out.append(score.correct.mean())
    return np.array(out, np.float32)


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
    state = init_state(SVF, weights, tx, len(tasks), runs.key(seed, "start"), settings)
    name, shown = f"seed{seed}-experts", "loss" if settings.algorithm == "supervised" else "reward"
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
