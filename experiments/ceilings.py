"""Ceilings beside the experts: full fine-tuning and LoRA of the same base, on as many samples.

Each domain's model is trained as its expert is: same loss, same draws, same optimizer chain,
best step on validation; only what is trained differs, and the learning rate that suits it. They
take all their steps, an expert may stop before. The two forms train side by side.
"""

import dataclasses
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from functools import partial
from threading import Event
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import run as runs
from experiments.data.tasks import Task
from experiments.experts import Settings, Step, fitted, init_state, make_step, make_tx
from experiments.forms import FULL, LORA, LORA_RANK, Form, full_params, lora_params
from experiments.model import Weights
from experiments.problem import Problem, answers
from forge_jax import svf


class Ceiling(NamedTuple):
    """One way to train more parameters than an expert has."""

    form: Form
    merge: Any  # (weights, delta of one model) -> params
    settings: Settings
    step: Step


FORMS = {
    "full fine-tuning": (FULL, full_params),
    f"LoRA, rank {LORA_RANK}": (LORA, lora_params),
}
RATES = {"full fine-tuning": 1e-4, f"LoRA, rank {LORA_RANK}": 3e-4}
"""the best of a few on validation items, see docs/log.md"""


def make_ceilings(
    problem: Problem, settings: Settings, rates: dict[str, float] = RATES
) -> dict[str, Ceiling]:
    """The ceilings that `rates` names, each compiled once for all domains."""
    out = {}
    for name, rate in rates.items():
        form, merge = FORMS[name]
        own = dataclasses.replace(settings.with_rate(rate), patience=settings.steps)
        tx = make_tx(own)
        step = make_step(problem.model, form, tx, own, problem.new_tokens)
        out[name] = Ceiling(form, jax.jit(merge), own, step)
    return out


def dense_weights(problem: Problem) -> Weights:
    """The base with ordinary parameters."""
    params = jax.tree.map(jnp.asarray, problem.model.checkpoint.params)
    return {"params": params, "projector": problem.weights["projector"]}


def accuracy(problem: Problem, params, task: Task, split) -> float:
    """Greedy accuracy of `params` on a split of a task."""
    projector = problem.weights["projector"]
    right = problem.params_scorer(
        params, projector, task.batches[split], task, answers(task, split)
    )
    return float(right.mean())


def train(problem: Problem, weights: Weights, ceiling: Ceiling, task: Task, seed: int, stop: Event):
    """The parameters at the best validation accuracy, that accuracy, bytes of what was trained.

    Raises:
      InterruptedError: `stop` was set before the last step.
    """
    tx = make_tx(ceiling.settings)
    state = init_state(ceiling.form, weights, tx, 1, runs.key(seed, "start"), ceiling.settings)

    def validate(delta):
        params = ceiling.merge(weights, delta)
        return np.array([accuracy(problem, params, task, "validation")], np.float32)

    def step(state, number):
        if stop.is_set():
            raise InterruptedError(f"The ceiling of {task.name} was stopped.")
        return ceiling.step(weights, state, [task], seed, number)

    state = fitted(step, validate, ceiling.settings, state)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.delta))
    return ceiling.merge(weights, state.best), float(state.best_accuracy[0]), size


def measure(
    run: runs.Run, problem: Problem, ceilings: dict[str, Ceiling], seed: int
) -> dict[str, Any]:
    """For each ceiling, test accuracy on each domain of the model trained on it, and its bytes."""
    if not ceilings:
        return {}
    weights, stop = dense_weights(problem), Event()
    shown = runs.progress(len(ceilings) * len(problem.tasks), f"ceilings, seed {seed}")
    # One form alone leaves a third of two cores idle: its products are small. Rewards that run
    # programs have wall limits, and those take turns.
    workers = len(ceilings) if all(task.is_exact for task in problem.tasks) else 1

    with shown as advance, ThreadPoolExecutor(workers) as pool:

        def one(ceiling: Ceiling, task: Task) -> dict[str, float]:
            params, _, size = train(problem, weights, ceiling, task, seed, stop)
            return {"accuracy": accuracy(problem, params, task, "test"), "bytes": size}

        def of(name: str) -> dict[str, Any]:
            found = {}
            for task in problem.tasks:
                key = f"seed{seed}-{ceiling_key(name)}-{task.name}"
                found[task.name] = runs.once(run, key, partial(one, ceilings[name], task))
                advance(1)
            scores = {domain: x["accuracy"] for domain, x in found.items()}
            return {"accuracy": scores, "bytes": max(x["bytes"] for x in found.values())}

        futures = {name: pool.submit(of, name) for name in ceilings}
        try:
            done, _ = wait(futures.values(), return_when=FIRST_EXCEPTION)
        finally:
            stop.set()  # for those that are still at it: one has failed, or Ctrl-C came
        for future in done:
            future.result()
        return {name: future.result() for name, future in futures.items()}


def ceiling_key(name: str) -> str:
    """A ceiling's name as part of a file name."""
    return name.split(",")[0].replace(" ", "-").lower()


def svf_bytes(problem: Problem) -> int:
    """Bytes of one expert's z."""
    return sum(z.size * z.dtype.itemsize for z in svf.identity(problem.weights["factors"]).values())
