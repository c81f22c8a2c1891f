"""Race a training step of Cognate against the same in eager PyTorch, and three models against one.

    python -m experiments.bench.cognate_step runs/bench

The model is the seed's, 26,974,561 parameters, with deep supervision; a step is the loss, its
gradient, a clip and AdamW, MuGrok beside it. Ours keeps the products of layers and recursion steps
for the backward pass, as by default (fast); the other settings keep nothing of their inside
(frugal), or all. Peak memory is that of a process of its own that makes two steps.
"""

import dataclasses
import functools
import multiprocessing
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from experiments import run as runs
from experiments.bench import eager_cognate, race
from experiments.bench.four_experts import WAYS, after_another
from experiments.bench.race import OURS
from experiments.cognate.training import Settings, make_tx
from forge_jax.models.cognate import (
    Cognate,
    CognateConfig,
    count_parameters,
    loss,
    next_token_labels,
)

EAGER = "eager PyTorch"
FRUGAL, KEEPING, MUGROK = (f"{OURS}, {how}" for how in ("full remat", "no remat", "MuGrok"))
REMAT: dict[str, Any] = {FRUGAL: "full", KEEPING: "none"}
SEED = CognateConfig(memory="ema", positions="learned")
RATE = 1e-3


class Shape(NamedTuple):
    """A batch, and the model that learns from it."""

    rows: int
    time: int
    config: CognateConfig = SEED


SMALL, LARGE = Shape(2, 64), Shape(16, 256)


def variant(shape: Shape, name: str) -> tuple[CognateConfig, optax.GradientTransformation]:
    """Model and optimizer of one of our contenders."""
    config = dataclasses.replace(shape.config, remat=REMAT.get(name, shape.config.remat))
    if name == MUGROK:
        return config, make_tx(Settings(), config)
    adamw = optax.adamw(RATE, weight_decay=0.01)
    return config, optax.chain(optax.clip_by_global_norm(1.0), adamw)


def make_step(model: Cognate, tx: optax.GradientTransformation):
    """One update, (params, opt_state, tokens, labels) -> (params, opt_state, loss before it)."""

    def step(params, state, tokens, labels):
        def value(params):
            return loss(model, params, tokens, labels)[0]

        before, grads = jax.value_and_grad(value)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, before

    return step


def batch_of(shape: Shape, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Random tokens and their labels."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(shape.config.vocab_size, size=(shape.rows, shape.time), dtype=np.int32)
    return tokens, np.array(next_token_labels(jnp.asarray(tokens)))


def start(config: CognateConfig, seed: int = 0) -> Any:
    """Weights at their start."""
    init = jax.jit(Cognate(config).init)
    return init(jax.random.key(seed), jnp.zeros((1, 2), jnp.int32))["params"]


def stepping(program: race.Program, params: Any, state: Any, batch: Any) -> race.Contender:
    """A contender that goes on training from step to step; its answer is the first loss."""
    # copies: the step takes over what it is given
    carry = jax.tree.map(jnp.copy, [params, state])
    held = race.size(carry)

    def run():
        carry[0], carry[1], value = jax.block_until_ready(program.call(*carry, *batch))
        return value

    first = np.asarray(run())
    return race.Contender(
        run, program.compile_s, held, program.temporary_bytes, answer=lambda: first
    )


def program_of(step: Callable, params: Any, state: Any, batch: Any) -> race.Program:
    """The compiled step, which takes weights and state over."""
    return race.compiled(step, params, state, *batch, donate=(0, 1))


def ours(shape: Shape, name: str, params: Any) -> race.Contender:
    """One of our settings."""
    config, tx = variant(shape, name)
    given = params, tx.init(params), batch_of(shape)
    return stepping(program_of(make_step(Cognate(config), tx), *given), *given)


def eager(shape: Shape, params: Any) -> race.Contender:
    """The same in PyTorch."""
    batch = batch_of(shape)
    run = eager_cognate.trainer(params, shape.config, *batch, RATE)
    held = 3 * race.size(params)  # and two moments
    first = np.float32(run())
    return race.Contender(run, held_bytes=held, answer=lambda: first)


def contender(shape: Shape, name: str) -> race.Contender:
    """One side, by its name."""
    params = start(shape.config)
    return eager(shape, params) if name == EAGER else ours(shape, name, params)


def peak_gb(shape: Shape, name: str) -> float:
    """Peak memory of a process that makes two steps, GB; to be called in a process of its own."""
    race.prepare("float32")
    contender(shape, name).run()
    return runs.peak_rss_gb()


def peaks(shape: Shape, names: tuple[str, ...]) -> dict[str, float]:
    """`peak_gb` of each, one process after another."""
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(1, maxtasksperchild=1) as pool:
        return {name: pool.apply(peak_gb, (shape, name)) for name in names}


def compile_cpu_s(shape: Shape, layers: int) -> float:
    """CPU seconds to compile the step of a model of so many layers."""
    config = dataclasses.replace(shape.config, layers=layers)
    config, tx = variant(shape._replace(config=config), OURS)
    params = jax.eval_shape(lambda: start(config))
    given = params, jax.eval_shape(tx.init, params), batch_of(shape)
    return program_of(make_step(Cognate(config), tx), *given).compile_cpu_s


def settings(shape: Shape) -> dict[str, Any]:
    """What the record says of a shape."""
    kept = ("d_model", "layers", "vocab_size", "memory", "positions", "remat")
    named = {n: getattr(shape.config, n) for n in kept}
    return {"rows": shape.rows, "time": shape.time, **named}


def work(shape: Shape) -> race.Work:
    """Products with weights, forward and twice backward, and AdamW's passes over the parameters.

    Not counted: attention's scores, and what is computed again.
    """
    c = shape.config
    d, h = c.d_model, c.gate_hidden
    backbone = c.layers * (4 * d * d + 3 * d * c.d_ff) + 2 * d * c.d_mem + 3 * d * h
    refinements = c.steps * c.micro_steps * (2 * d * d + 2 * d * d + 3 * d * 2 * d + 2 * d * d)
    updates = c.steps * (2 * d * d + 2 * d * 2 * d + 2 * d * d)
    recursion = 2 * d * d + 2 * d * d + refinements + updates
    head = (c.steps + 1) * d * c.vocab_size
    tokens = shape.rows * shape.time
    moved = 7 * 4 * count_parameters(c)
    return race.Work(6.0 * tokens * (backbone + recursion + head), moved)


def make(
    shape: Shape, floor: float, memory: dict[str, float], limit_gb: float | None = None
) -> race.Race:
    """One step, ours in all settings against eager PyTorch's; `memory` is what `peaks` found."""
    few, many = (compile_cpu_s(shape, n) for n in (shape.config.layers, 2 * shape.config.layers))
    entries = {name: contender(shape, name) for name in (OURS, FRUGAL, KEEPING, MUGROK, EAGER)}
    bounds = {
        "compile, s": (entries[OURS].compile_s or 0.0, 30.0),
        "CPU time to compile, twice the layers / once": (many / few, 1.15),
    }
    if limit_gb:
        bounds["peak of a process, GB"] = (memory[FRUGAL], limit_gb)
    return race.Race(
        name=f"cognate_step_{shape.rows}x{shape.time}",
        title=f"one training step of {shape.rows} rows of {shape.time} tokens",
        settings=settings(shape),
        entries=entries,
        difference=race.relative,
        tolerance=1e-4,
        floors={EAGER: floor},
        bounds=bounds,
        work=work(shape),
        unit="step",
        summary=lambda: {"peak_gb": memory},
    )


def three(shape: Shape, count: int = 3) -> race.Race:
    """`count` models in one program against one after another; the floor is 3.3 times one."""
    config, tx = variant(shape, OURS)
    step = make_step(Cognate(config), tx)

    def given(seed):
        params = start(config, seed)
        return params, tx.init(params), batch_of(shape, seed)

    each = [given(seed) for seed in range(count)]
    several = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)

    def at_once(over, *args):
        return over(lambda _, *own: step(*own), None, *args)

    ways = {
        name: stepping(program_of(functools.partial(at_once, over), *several), *several)
        for name, over in WAYS.items()
    }
    single = program_of(step, *each[0])
    apart = after_another([stepping(single, *own) for own in each])
    taken = race.interleaved({name: way.run for name, way in ways.items()}, 3)
    faster, slower = sorted(WAYS, key=lambda name: min(taken[name]))
    after = f"{OURS}, one after another"
    return race.Race(
        name=f"cognate_three_{config.memory}_{shape.rows}x{shape.time}",
        title=(
            f"a step of {count} models, each on {shape.rows} rows of {shape.time} tokens; "
            f"{OURS} is {faster}"
        ),
        settings=settings(shape) | {"models": count},
        entries={OURS: ways[faster], f"{OURS}, {slower}": ways[slower], after: apart},
        difference=race.relative,
        tolerance=1e-5,
        floors={after: 3 / 3.3},
        work=race.Work(*(count * x for x in work(shape))),
        unit="step",
        summary=lambda: {"faster": faster},
    )


def races(dtype: str) -> Iterator[race.Race]:
    """Both shapes, and three models at once with either memory."""
    del dtype  # float32 on both sides
    for shape, floor, limit in ((SMALL, 1 / 0.6, None), (LARGE, 1 / 0.9, 3.0)):
        yield make(shape, floor, peaks(shape, (OURS, FRUGAL, KEEPING, EAGER)), limit)
    yield three(SMALL)
    yield three(SMALL._replace(config=CognateConfig()))


if __name__ == "__main__":
    args = tyro.cli(race.Args, prog="python -m experiments.bench.cognate_step", description=__doc__)
    race.command(args, races)
