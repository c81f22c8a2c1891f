"""A conversation in the terminal in which every question finds its expert."""

import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.data.batches import pad, prompt_rows
from experiments.dispatching import Ways
from experiments.model import texts
from experiments.problem import Problem
from forge_jax import adapt, svf
from forge_jax.models import generate, with_hidden

NEW = 96
"""tokens of an answer at most"""


class Reply(NamedTuple):
    """What was said, by whom, and how long each pass took."""

    text: str
    expert: str
    probability: float
    first_ms: float
    second_ms: float


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


def make_reply(problem: Problem, experts, ways: Ways) -> Callable[[str], Reply]:
    """`reply(question)`: classify, mix, answer; two compiled programs for every bucket."""
    model, factors = problem.model, problem.weights["factors"]
    names = [*(task.name for task in problem.tasks)]

    @jax.jit
    def first(factors, head: adapt.ClassifierDispatch, tokens, mask):
        return head(with_hidden(partial(model.adapted.apply, {"params": factors})), tokens, mask)

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

    def timed(function: Callable[..., Any], *args) -> tuple[Any, float]:
        began = time.perf_counter()
        out = jax.block_until_ready(function(*args))
        return out, 1e3 * (time.perf_counter() - began)

    def reply(question: str) -> Reply:
        row = prompt_rows(model.tokenizer, [question + "\n"], model.bos)
        length = bucket(len(row[0]), model.decoder.spec.max_position_embeddings)
        tokens, mask = map(jnp.asarray, pad(row, length, 0, left=True))
        choice, first_ms = timed(first, factors, ways.head, tokens, mask)
        count = len(next(iter(experts.values())))
        answer, second_ms = timed(second, factors, experts, choice.alpha(count), tokens, mask)
        expert = int(choice.expert[0])
        text = texts(model, np.asarray(answer.tokens), np.asarray(answer.mask))[0]
        said_by = "base" if expert == adapt.BASE else names[expert]
        return Reply(text, said_by, float(choice.probability.max()), first_ms, second_ms)

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
        print(
            f"  [{said.expert}, p = {said.probability:.2f}; first pass {said.first_ms:.1f} ms, "
            f"second {said.second_ms:.1f} ms]",
            flush=True,
        )
