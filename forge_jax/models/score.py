"""What a model makes of questions with known answers, as hashable `score(apply, batch)` objects.

They are the `score` of `search.evaluate_population` and run with any `apply` of a decoder.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from forge_jax.models.generate import Apply, Generated, generate, pad_right, response_logits
from forge_jax.models.spec import DecoderSpec


class Questions(NamedTuple):
    """Prompts and answers, each with its padding on either side."""

    tokens: Int[Array, "batch time"]
    mask: Bool[Array, "batch time"]
    answers: Int[Array, "batch answer_time"]
    answer_mask: Bool[Array, "batch answer_time"]
    images: Float[Array, "batch patches hidden"] | None = None


@dataclasses.dataclass(frozen=True)
class LogLikelihood:
    """Log probability of each answer given its prompt, summed over its tokens, nats."""

    spec: DecoderSpec

    def __call__(self, apply: Apply, batch: Questions) -> Float[Array, " batch"]:
        return Judge(self.spec)(apply, batch).logp


class Judged(NamedTuple):
    """What a model makes of questions."""

    correct: Bool[Array, " batch"]
    logp: Float[Array, " batch"]  # of the right answer, nats


@dataclasses.dataclass(frozen=True)
class Judge:
    """Both in one pass: would greedy decoding write the answer, and how probable is it?

    Greedy decoding writes exactly the answer if every token of it is the largest logit given those
    before it.
    """

    spec: DecoderSpec

    def __call__(self, apply: Apply, batch: Questions) -> Judged:
        batch = _answers_first(batch)
        prompts, answers = (batch.tokens, batch.mask), (batch.answers, batch.answer_mask)
        logits = response_logits(apply, self.spec, *prompts, *answers, images=batch.images)
        return Judged(is_right(logits, batch), _answer_logp(logits, batch))


def _answers_first(batch: Any) -> Any:
    """The questions with the padding of their answers behind these."""
    answers, mask = pad_right(batch.answers, batch.answer_mask.astype(bool))
    return batch._replace(answers=answers, answer_mask=mask)


def is_right(logits: Float[Array, "batch answer_time vocab"], batch: Any) -> Bool[Array, " batch"]:
    """Whether every token of an answer has the largest logit at its place.

    `batch` has right-padded `answers`, and their `answer_mask`; a token that is not in an answer
    counts for nothing.
    """
    outside = ~batch.answer_mask.astype(bool)
    return ((logits.argmax(axis=-1) == batch.answers) | outside).all(axis=-1)


def _answer_logp(logits, batch: Questions) -> Float[Array, " batch"]:
    chosen = jnp.take_along_axis(logits, batch.answers[..., None], axis=-1)[..., 0]
    logp = chosen - jax.nn.logsumexp(logits, axis=-1)
    return jnp.where(batch.answer_mask, logp, 0).sum(axis=-1)


@dataclasses.dataclass(frozen=True)
class Respond:
    """The greedy continuation of each prompt, for a reward that reads it on the host."""

    spec: DecoderSpec
    max_new_tokens: int
    stop_tokens: tuple[int, ...] = ()

    def __call__(self, apply: Apply, batch: Any) -> Generated:
        return generate(
            apply,
            self.spec,
            batch.tokens,
            batch.mask,
            jax.random.key(0),  # greedy decoding draws nothing
            max_new_tokens=self.max_new_tokens,
            stop_tokens=self.stop_tokens,
            temperature=0.0,
            images=getattr(batch, "images", None),
        )


@dataclasses.dataclass(frozen=True)
class ExactMatch:
    """Whether the greedy continuation is the answer, token by token up to the answer's end.

    To ask for the stop token too, let the answers end with it.
    """

    spec: DecoderSpec
    stop_tokens: tuple[int, ...] = ()

    def __call__(self, apply: Apply, batch: Questions) -> Bool[Array, " batch"]:
        batch = _answers_first(batch)
        written = Respond(self.spec, batch.answers.shape[1], self.stop_tokens)(apply, batch)
        return ((written.tokens == batch.answers) | ~batch.answer_mask).all(axis=-1)
