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


def accuracy(made: Problem, z, ways: Ways, way: str, asked: Asked) -> dict[str, Any]:
    """Accuracy of two passes, of the oracle that knows the domain, and of the base, on one batch.

    All domains are rows of one step. The rows of the oracle are also run one domain at a time.
    """
    adapted, factors = made.model.adapted, made.weights["factors"]
    respond = Respond(made.model.decoder.spec, made.new_tokens, made.model.stops)

    def answer(apply, batch: Asked):
        return respond(apply, batch.plain)

    @jax.jit
    def served(factors, experts, ways, batch: Asked):
        choose = partial(dispatching.classify, way, factors, ways)
        return adapt.two_pass(adapted, factors, experts, choose, answer, batch)

    @jax.jit
    def told(factors, experts, expert, batch: Asked):
        given = adapt.Choice(expert, jnp.zeros((len(expert), 1)))
        return adapt.two_pass(adapted, factors, experts, lambda *_: given, answer, batch)

    def scored(out: adapt.Answered) -> np.ndarray:
        return exact_rewards(out.answer.tokens, asked.plain) > 0

    count = len(made.tasks)
    padded = svf.pad_experts(z, count + ROOM)
    fewer = svf.pad_experts({k: v[:-1] for k, v in z.items()}, count + ROOM)
    own = served(factors, padded, ways, asked)
    oracle = told(factors, padded, jnp.asarray(asked.label), asked)
    right, known = scored(own), scored(oracle)
    base = scored(told(factors, padded, jnp.full_like(asked.label, adapt.BASE), asked))
    # each expert over the whole batch: what its own rows get must not depend on their neighbours
    same = []
    for k in range(count):
        alone = told(factors, padded, jnp.full_like(asked.label, k), asked).answer.tokens
        rows = asked.label == k
        same.append(bool((alone[rows] == oracle.answer.tokens[rows]).all()))
    served(factors, fewer, ways, asked)  # an expert less, or one more: the same program
    return {
        "way": way,
        "two_pass": float(right.mean()),
        "oracle": float(known.mean()),
        "base": float(base.mean()),
        "of_oracle": float(right.mean() / max(known.mean(), 1e-9)),
        "dispatched_right": float((np.asarray(own.choice.expert) == asked.label).mean()),
        "by_domain": {
            task.name: float(right[asked.label == k].mean()) for k, task in enumerate(made.tasks)
        },
        "rows_equal_one_expert_alone": all(same),
        "recompiles_for_a_new_expert": served._cache_size() - 1,  # pyright: ignore
    }


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

    def median(function) -> float:
        return 1e3 * float(np.median(measure.seconds(function)))

    out = {
        "prefill_ms": median(lambda: prefill(factors, one)),
        "first_ms": median(lambda: first(factors, ways, one)),
        "second_ms": median(lambda: second(factors, padded, alpha, one)),
    }
    return {
        **out,
        "first_of_second": out["first_ms"] / out["second_ms"],
        "beyond_prefill_of_second": (out["first_ms"] - out["prefill_ms"]) / out["second_ms"],
    }
