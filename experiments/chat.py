"""A conversation in the terminal in which every question finds its expert."""

import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.data.batches import pad, prompt_rows
from experiments.model import texts
from experiments.problem import Problem
from forge_jax import adapt, svf
from forge_jax.models import generate, with_hidden

NEW = 96
"""tokens of an answer at most"""


class Reply(NamedTuple):
    """What was said, by whom, and how long each pass took."""

    text: str
    by: str  # an expert or a mixture, with its share
    first_ms: float
    second_ms: float
    compile_s: float  # before the passes, where the question's length is new


def bucket(length: int, context: int, new_tokens: int = NEW) -> int:
    """The padded length of a prompt: the next power of two from 32 on, within the context.

    Raises:
      ValueError: prompt and answer are longer than the context.
    """
    room = context - new_tokens
    if length > room:
        raise ValueError(
            f"The question has {length} tokens; with {new_tokens} for the answer the context of "
            f"{context} has room for {max(room, 0)}."
        )
    return min(max(32, 1 << (length - 1).bit_length()), room)


def said_by(names: Sequence[str], alpha: np.ndarray) -> str:
    """Who answers with these coefficients: shares of at least one per cent, the base the rest."""
    shares = {name: float(a) for name, a in zip(names, alpha[: len(names)], strict=True)}
    shares["base"] = 1 - sum(shares.values())
    known = sorted((s for s in shares.items() if s[1] >= 0.01), key=lambda s: -s[1])
    return " + ".join(name if a > 0.99 else f"{a:.2f} {name}" for name, a in known)


def timed(function: Callable[..., Any], *args) -> tuple[Any, float]:
    """What a compiled function returns, and the seconds that it took."""
    began = time.perf_counter()
    out = jax.block_until_ready(function(*args))
    return out, time.perf_counter() - began


def make_reply(
    problem: Problem, experts, head: adapt.ClassifierDispatch, mix: bool = False
) -> Callable[[str], Reply]:
    """`reply(question)`: classify, mix, answer; two compiled programs for every bucket.

    The likeliest expert answers, or with `mix` all of them, by their probabilities.
    """
    model, factors = problem.model, problem.weights["factors"]
    names = [task.name for task in problem.tasks]
    count = len(next(iter(experts.values())))

    @jax.jit
    def first(factors, head: adapt.ClassifierDispatch, tokens, mask):
        apply = with_hidden(partial(model.adapted.apply, {"params": factors}))
        choice = head(apply, tokens, mask)
        return head.labels.mixture(choice, count) if mix else choice.alpha(count)

    @jax.jit
    def second(factors, experts, alpha, tokens, mask):
        rows = svf.row_scales(factors, experts, alpha)
        return generate(
            svf.apply_rows(model.adapted, factors, rows),
            model.decoder.spec,
            tokens,
            mask,
            jax.random.key(0),
            max_new_tokens=NEW,
            stop_tokens=model.stops,
            temperature=0.0,
        )

    programs: dict[int, tuple[Any, Any]] = {}

    def compiled(length: int) -> tuple[Any, Any]:
        row = jnp.zeros((1, length), jnp.int32), jnp.zeros((1, length), bool)
        mixture = jnp.zeros((1, count))
        one = first.lower(factors, head, *row).compile()
        two = second.lower(factors, experts, mixture, *row).compile()
        # a program's first run takes longer than the others
        timed(one, factors, head, *row)
        timed(two, factors, experts, mixture, *row)
        return one, two

    def reply(question: str) -> Reply:
        row = prompt_rows(model.tokenizer, [question + "\n"], model.bos)
        length = bucket(len(row[0]), model.decoder.spec.max_position_embeddings)
        tokens, mask = map(jnp.asarray, pad(row, length, 0, left=True))
        began, is_new = time.perf_counter(), length not in programs
        if is_new:
            programs[length] = compiled(length)
        waited, (one, two) = time.perf_counter() - began, programs[length]
        alpha, first_s = timed(one, factors, head, tokens, mask)
        answer, second_s = timed(two, factors, experts, alpha, tokens, mask)
        text = texts(model, np.asarray(answer.tokens), np.asarray(answer.mask))[0]
        by = said_by(names, np.asarray(alpha)[0])
        return Reply(text, by, 1e3 * first_s, 1e3 * second_s, waited if is_new else 0.0)

    return reply


def chat(reply: Callable[[str], Reply], lines=sys.stdin) -> None:
    """Answer line by line until an empty one; \\n in a line is a line break.

    A question that cannot be answered is told why, and the conversation goes on.
    """
    print("Ask, one question a line (\\n breaks a line, an empty line ends).", flush=True)
    for line in lines:
        question = line.rstrip("\n").replace("\\n", "\n")
        if not question.strip():
            return
        try:
            said = reply(question)
        except ValueError as error:
            print(f"  {error}", flush=True)
            continue
        print(said.text)
        waited = f"; compiled before, {said.compile_s:.1f} s" if said.compile_s else ""
        print(
            f"  [{said.by}; first pass {said.first_ms:.1f} ms, second {said.second_ms:.1f} ms"
            f"{waited}]",
            flush=True,
        )
