"""Evaluate a candidate: check it without compiling, train it on from its checkpoint, score it."""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.evolution import memo, programs, tasks, training
from experiments.evolution.shocks import Shocks
from experiments.evolution.shocks import measured as shock_metrics
from forge_jax import arch, evolve


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a candidate may cost; who costs more is refused before anything is compiled."""

    max_params: float | None = None
    max_flops: float | None = None
    """of a forward pass, per token"""
    max_kv_bytes: float | None = None
    """that a token adds to the cache"""


NO_LIMITS = Limits()


class Setup(NamedTuple):
    """What is the same for all candidates of a run."""

    task: tasks.Task
    rows: int  # of a batch
    length: int  # targets of a row
    seeds: tuple[int, ...]  # of parameters, noise and training batches
    chunk: int  # steps of one call
    held_out: tasks.Batches
    unigram: float  # nats per unit of who knows only frequencies
    lr: float | None = None  # in place of the documents'
    limits: Limits = NO_LIMITS
    references: Mapping[str, arch.Cost] = {}  # what budget.flops_target may name
    step_flops: float | None = None  # FLOPs of a row that the ladder's steps are of; None: steps
    shocks: Shocks | None = None  # measured too where there are some
    memo: Path | None = None  # directory of results that are known already


class Store(NamedTuple):
    """Where a candidate's training is kept."""

    save: Callable[[str, int, Any], None]  # (name, step, tree)
    restore: Callable[[str, Any], tuple[int, Any] | None]  # (name, template)


def adapted(spec: arch.Spec, task: tasks.Task, length: int) -> arch.Spec:
    """The document for this data: its vocabulary, and rows of `length` tokens.

    Raises:
      DocumentError: the document does not fit these.
    """
    tree = arch.to_dict(spec)
    tree["train"] |= {"vocab_size": task.vocabulary, "ctx_len": length}
    for module in tree["arch"].get("modules", {}).values():  # may name another vocabulary
        module.pop("output_dim", None)
        module.get("params", {}).pop("vocab_size", None)
    return arch.from_dict(tree)


def held_out(task: tasks.Task, count: int, rows: int, length: int) -> tasks.Batches:
    """The batches that all candidates of all runs are scored on."""
    return tasks.batches(task, "held_out", 0, range(count), rows=rows, length=length)


def admitted(spec: arch.Spec, setup: Setup) -> arch.Cost:
    """The cost of a document whose network can be traced, before any rung; nothing is compiled.

    Raises:
      Refused: the document is over a budget, its own or the run's.
    """
    spent = arch.cost(spec, setup.length)
    over = list(arch.over_budget(spec, spent, dict(setup.references), rows=setup.rows))
    found = {
        "max_params": spent.params,
        "max_flops": spent.flops / setup.length,
        "max_kv_bytes": spent.kv_bytes,
    }
    for name, value in found.items():
        limit = getattr(setup.limits, name)
        if limit is not None and value > limit:
            over.append(f"{name}: {value:.4g}, over {limit:.4g}.")
    if over:
        raise evolve.Refused("Over budget: " + " ".join(over))
    rates = training.rates_of(spec, setup.lr)
    start = functools.partial(training.start, training.network_of(spec))
    jax.eval_shape(start, jax.random.key(0), rates)
    return spent


def own_steps(steps: int, spent: arch.Cost, setup: Setup) -> int:
    """A candidate's steps for so many of the ladder: as many, or those of the same FLOPs."""
    if setup.step_flops is None or steps == 0:
        return steps
    return max(1, round(steps * setup.step_flops / spent.train_flops))


def padded(found: tasks.Batches, count: int) -> tasks.Batches:
    """Empty batches behind, `count` in all: programs take chunks of one size."""
    missing = count - len(found.tokens)
    return tasks.Batches(*(np.pad(x, [(0, missing), (0, 0), (0, 0)]) for x in found))


def chunk_of(setup: Setup, seed: int, begin: int, steps: int) -> tasks.Batches:
    """The training batches from number `begin` on."""
    sizes = {"rows": setup.rows, "length": setup.length}
    numbers = range(begin, begin + steps)
    return padded(tasks.batches(setup.task, "train", seed, numbers, **sizes), setup.chunk)


class Clock(NamedTuple):
    """Time of training calls, the first of a visit left out where there are more: warm-up."""

    steps: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0


def trained(
    ready: programs.Programs,
    setup: Setup,
    state: training.State,
    seed: int,
    until: int,
    knobs: Any,
    rates: training.Rates,
) -> tuple[training.State, list[Clock]]:
    """Train one network on to `until` steps, or to where its loss is no number."""
    key, clocks, at = jax.random.key(seed), [], int(state.step)
    while at < until and (at == 0 or bool(jnp.isfinite(state.last_loss))):
        steps = min(setup.chunk, until - at)
        chunk = chunk_of(setup, seed, at, steps)
        began, cpu = time.perf_counter(), time.process_time()
        state = jax.block_until_ready(ready.train(state, chunk, steps, key, knobs, rates))
        took = time.perf_counter() - began, time.process_time() - cpu
        clocks.append(Clock(steps, *took))
        at += steps
    return state, clocks


def evaluate(
    setup: Setup,
    cache: programs.Cache,
    store: Store,
    spec: arch.Spec,
    trial: str,
    done: int,
    steps: int,
) -> evolve.Result:
    """Train a trial from `done` to `steps` steps of the ladder with every seed; its score.

    The score is in nats per unit of the task on held-out batches, the mean over seeds. Where the
    document ends its training, further rungs train it no more.

    What `setup.memo` knows is not trained. Where a result at `done` came from there, and so left no
    checkpoint, training begins anew: the result is the same.

    Raises:
      Refused: the document is over a budget.
      ValueError: the checkpoint at `done` is gone.
    """
    spent = admitted(spec, setup)
    until = training.steps_of(spec, own_steps(steps, spent, setup))
    key = memo.key_of(spec, setup, until)
    if (known := memo.find(setup.memo, key)) is not None:
        cache.known += 1
        return known
    knobs, rates = arch.knobs(spec), training.rates_of(spec, setup.lr)
    chunk = chunk_of(setup, setup.seeds[0], 0, 1)
    ready, compile_s = programs.programs_of(cache, spec, chunk, setup.held_out)
    states = tuple(ready.start(jax.random.key(seed), rates) for seed in setup.seeds)
    found = store.restore(trial, states)
    if found is None and done and setup.memo is None:
        raise ValueError(f"The checkpoint of {trial} at {done} steps is gone.")
    at, states = found or (0, states)
    clocks: list[Clock] = []
    if at < until:
        pairs = []
        for state, seed in zip(states, setup.seeds, strict=True):
            state, more = trained(ready, setup, state, seed, until, knobs, rates)
            pairs.append(state)
            clocks += more
        states = tuple(pairs)
        store.save(trial, until, states)
    scores = [ready.score(state.params, setup.held_out, knobs) for state in states]
    metrics = {"steps": until, "compile_s": compile_s, **speed(clocks, setup)}
    metrics |= measured(states, scores, setup)
    metrics |= cost_metrics(spent, setup, until, metrics["score"])
    metrics |= shocked(ready, states, knobs, setup)
    objectives = (spent.train_flops / setup.length, float(spent.params), spent.kv_bytes)
    result = evolve.Result(metrics["score"], objectives, metrics)
    memo.keep(setup.memo, key, result)
    return result


def speed(clocks: list[Clock], setup: Setup) -> dict[str, float | None]:
    """Tokens per second of training, warm; none where no step was taken."""
    warm = clocks[1:] if len(clocks) > 1 else clocks
    steps, seconds, cpu = (sum(x) for x in zip(*warm, strict=True)) if warm else (0, 0, 0)
    tokens = steps * setup.rows * setup.length
    return {
        "tokens_per_sec": tokens / seconds if tokens else None,
        "tokens_per_cpu_sec": tokens / cpu if tokens and cpu else None,
    }


def measured(
    states: tuple[training.State, ...], scores: list[training.Score], setup: Setup
) -> dict[str, Any]:
    """What training and the held-out batches say, means over the seeds."""
    nats = [float(s.nats.sum() / s.count.sum()) for s in scores]
    total = jax.tree.map(lambda *x: np.sum([np.asarray(v) for v in x], axis=0), *scores)
    # of the batches' means: how well the held-out data is sampled, whatever the seeds
    batch = np.mean([s.nats / np.maximum(s.count, 1) for s in scores], axis=0)
    first, last = (np.mean([float(getattr(s, n)) for s in states]) for n in LOSSES)
    return {
        "score": float(np.mean(nats)),
        "score_by_seed": nats,
        "score_se": standard_error(nats),
        "held_out_se": standard_error(batch),
        "loss_start": float(first),
        "loss_final": float(last),
        "loss_delta": float(first - last),
        "ece": training.calibration_error(total),
        "avg_confidence": float(total.confidence.sum() / total.in_bin.sum()),
        "accuracy": float(total.correct.sum() / total.in_bin.sum()),
    }


def shocked(
    ready: programs.Programs, states: tuple[training.State, ...], knobs: Any, setup: Setup
) -> dict[str, float]:
    """What the run's shocks do to the networks, means over the seeds; empty without shocks."""
    if setup.shocks is None:
        return {}

    def nats(state: training.State, found: tasks.Batches) -> float:
        score = ready.score(state.params, found, knobs)
        return float(score.nats.sum() / score.count.sum())

    rows = [shock_metrics(functools.partial(nats, state), setup.shocks) for state in states]
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


LOSSES = ("first_loss", "last_loss")


def standard_error(values: Any) -> float | None:
    """Standard error of a mean; None of a single value."""
    values = np.asarray(values, float)
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else None


def cost_metrics(spent: arch.Cost, setup: Setup, steps: int, score: float) -> dict[str, Any]:
    """Counted costs of one seed's training, and the quality that they bought."""
    flops = spent.train_flops * setup.rows * steps
    return {
        "total_tokens": steps * setup.rows * setup.length,
        "total_flops": flops,
        "qpc": (setup.unigram - score) / flops,
        "params": spent.params,
        "flops_per_token": spent.flops / setup.length,
        "kv_bytes_per_token": spent.kv_bytes,
    }
