"""Two passes measured: right answers against the oracle's, and milliseconds."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import dispatching, measure
from experiments.chat import NEW
from experiments.dispatching import ROOM, Ways
from experiments.problem import Problem
from experiments.questions import Asked
from experiments.scoring import exact_rewards
from forge_jax import adapt, svf
from forge_jax.models import Respond

ALONE = 4
"""questions that are also answered in batches of one"""
ROUNDS = 15
"""timings of each pass"""


def accuracy(
    made: Problem, z, ways: Ways, way: str, sets: dict[str, Asked]
) -> dict[str, dict[str, Any]]:
    """For each set accuracies of two passes, of the oracle that knows the domain, of the base.

    All domains are rows of one step. The rows of the oracle are also run one domain at a time, and
    `ALONE` of them in batches of one. All sets have the same shape.
    """
    adapted, factors = made.model.adapted, made.weights["factors"]
    respond = Respond(made.model.decoder.spec, made.new_tokens, made.model.stops)
    count = len(made.tasks)
    padded = svf.pad_experts(z, count + ROOM)
    fewer = svf.pad_experts({k: v[:-1] for k, v in z.items()}, count + ROOM)

    def answer(apply, batch: Asked):
        return respond(apply, batch.plain)

    @jax.jit
    def served(factors, experts, ways, batch: Asked):
        choose = partial(dispatching.classify, way, factors, ways)
        return adapt.two_pass(adapted, factors, experts, choose, answer, batch)

    @jax.jit
    def told(factors, experts, expert, batch: Asked):
        given = adapt.Choice(expert, jnp.zeros((len(expert), 1)))
        return adapt.two_pass(adapted, factors, experts, lambda *_: given, answer, batch).answer

    def by(expert, asked: Asked) -> np.ndarray:
        return np.asarray(told(factors, padded, jnp.asarray(expert), asked).tokens)

    def measured(asked: Asked) -> dict[str, Any]:
        def share(tokens) -> float:
            return float((exact_rewards(tokens, asked.plain) > 0).mean())

        own = served(factors, padded, ways, asked)
        oracle = by(asked.label, asked)
        # each expert over the whole batch: what its rows get must not depend on their neighbours
        each = [by(np.full_like(asked.label, k), asked) for k in range(count)]
        alone = [by(asked.label[i : i + 1], asked.rows(slice(i, i + 1))) for i in range(ALONE)]
        served(factors, fewer, ways, asked)  # an expert less, or one more: the same program
        return {
            "two_pass": share(own.answer.tokens),
            "oracle": share(oracle),
            "base": share(by(np.full_like(asked.label, adapt.BASE), asked)),
            "of_oracle": share(own.answer.tokens) / share(oracle) if share(oracle) else None,
            "dispatched_right": float((np.asarray(own.choice.expert) == asked.label).mean()),
            "rows_equal_one_expert_alone": bool(
                (np.stack(each)[asked.label, np.arange(len(asked.label))] == oracle).all()
            ),
            "rows_equal_one_by_one": bool((np.concatenate(alone) == oracle[:ALONE]).all()),
            "recompiles_for_a_new_expert": served._cache_size() - 1,  # pyright: ignore
        }

    return {name: measured(asked) for name, asked in sets.items()}


def costs(made: Problem, z, ways: Ways, way: str, asked: Asked) -> dict[str, float]:
    """Milliseconds, batch 1: a prefill, the first pass, the second one with 96 new tokens."""
    adapted, factors = made.model.adapted, made.weights["factors"]
    one = asked.rows(slice(0, 1))
    padded = svf.pad_experts(z, len(made.tasks) + ROOM)
    alpha = jax.nn.one_hot(one.label, len(made.tasks) + ROOM)
    respond = Respond(made.model.decoder.spec, NEW)

    def base(factors, **given):
        return partial(adapted.apply, {"params": factors}, **given)

    @jax.jit
    def prefill(factors, part: Asked):
        plain = part.plain if way == "head" else part.asking
        given = {"images": plain.images, "logits_from": -1}
        return base(factors)(plain.tokens, plain.mask, **given)[0]

    @jax.jit
    def first(factors, ways, part: Asked):
        return dispatching.classify(way, factors, ways, base(factors), part)

    @jax.jit
    def second(factors, experts, alpha, part: Asked):
        rows = svf.row_scales(factors, experts, alpha)
        return respond(svf.apply_rows(adapted, factors, rows), part.plain)

    programs = {
        "prefill": lambda: prefill(factors, one),
        "first": lambda: first(factors, ways, one),
        "second": lambda: second(factors, padded, alpha, one),
    }
    # in turn, so that what the machine does besides meets all three alike
    for run in programs.values():
        jax.block_until_ready(run())
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(ROUNDS):
        for name, run in programs.items():
            seconds[name].append(measure.once(run))
    medians = {name: 1e3 * float(np.median(taken)) for name, taken in seconds.items()}
    beyond = 1e3 * float(np.median(np.subtract(seconds["first"], seconds["prefill"])))
    return {
        **{f"{name}_ms": value for name, value in medians.items()},
        "beyond_prefill_ms": beyond,
        "first_of_second": medians["first"] / medians["second"],
        "beyond_prefill_of_second": beyond / medians["second"],
    }
