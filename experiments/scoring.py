"""Compiled scoring of candidates: is the greedy answer right, how far is it from the base?"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from experiments.data.batches import Batch
from experiments.data.tasks import Task
from experiments.model import Model, Weights, images, texts
from forge_jax import parallel, rl, search
from forge_jax.models import (
    DecoderSpec,
    Questions,
    Respond,
    generate,
    is_right,
    response_logits,
)


class Mixtures(NamedTuple):
    """P candidates: mixtures of K experts, each cut to a rank fraction."""

    experts: Any  # path -> z (K, r)
    alphas: Any  # (P, K), or path -> (P, K)
    ranks: Any = None  # (P,) in (0, 1]; None cuts nothing


class Score(NamedTuple):
    """What P candidates do on N items."""

    correct: Any  # (P, N) bool
    kl: Any  # (P,) KL(candidate || base) per answer token, nats


@dataclasses.dataclass(frozen=True)
class AnswerScore:
    """Of one candidate, on questions and the base's logits of their answers.

    An answer counts as right where greedy decoding would write it, stop token included: the
    largest logit at every position is the answer's token given the answer's tokens before it.
    That is one pass over prompt and answer instead of a decoding loop, with the same result.
    """

    spec: DecoderSpec

    def __call__(self, apply, given: tuple[Questions, Any]) -> Score:
        questions, base = given
        logits = answer_logits(apply, self.spec, questions)
        kl = rl.kl_to_reference(logits, base) * questions.answer_mask
        return Score(is_right(logits, questions), kl.sum() / questions.answer_mask.sum())


def answer_logits(apply, spec: DecoderSpec, asked: Questions):
    """Logits from which every token of the answers would be drawn."""
    prompts, answers = (asked.tokens, asked.mask), (asked.answers, asked.answer_mask)
    return response_logits(apply, spec, *prompts, *answers, images=asked.images)


def questions_of(weights: Weights, batch: Batch) -> Questions:
    """The batch with its images in the decoder's embedding space."""
    rows = (batch.tokens, batch.mask, batch.answers, batch.answer_mask)
    return Questions(*rows, images(weights, batch))


def make_rollout(
    model: Model,
    policy_of,
    *,
    max_new_tokens: int,
    samples: int,
    temperature: float,
    top_p: float,
):
    """A compiled function (weights, adapted, batch, key) -> sampled responses.

    `policy_of(model, weights, adapted)` is `model.policy`, or a form's: it gives P candidates equal
    shares of the rows.
    """

    @jax.jit
    def rollout(weights: Weights, adapted, batch: Batch, key):
        return generate(
            policy_of(model, weights, adapted),
            model.decoder.spec,
            batch.tokens,
            batch.mask,
            key,
            max_new_tokens=max_new_tokens,
            stop_tokens=model.stops,
            temperature=temperature,
            top_p=top_p,
            samples=samples,
            images=images(weights, batch),
        )

    return rollout


def exact_rewards(responses, batch: Batch | Questions) -> np.ndarray:
    """+1 where a response has the answer's tokens, the stop token among them, else -1.

    The same predicate as `AnswerScore`'s. `responses` are a multiple of the batch's rows, and may
    be longer than an answer that has no stop token.
    """
    samples = len(responses) // len(batch.answers)
    wanted, mask = (np.repeat(x, samples, axis=0) for x in (batch.answers, batch.answer_mask))
    equal = np.asarray(responses)[:, : wanted.shape[1]] == wanted
    return np.where((equal | ~mask).all(axis=1), 1.0, -1.0).astype(np.float32)


def rewards(model: Model, task: Task, responses, mask, answers: Sequence[str]) -> np.ndarray:
    """The task's reward of every response's text; `answers` repeat for all samples."""
    samples = len(responses) // len(answers)
    written = texts(model, np.asarray(responses), np.asarray(mask))
    wanted = [answer for answer in answers for _ in range(samples)]
    return np.array([task.reward(t, a) for t, a in zip(written, wanted, strict=True)], np.float32)


def make_scorer(model: Model, *, chunk: int, max_new_tokens: int, mesh: Mesh | None = None):
    """A function (weights, mixtures, batch, task, answers) -> Score, on NumPy arrays.

    It is `search.evaluate_population` with `chunk` candidates at a time; equal shapes compile once.
    A task whose reward reads free text has its text generated, and an answer is right where the
    reward is above 0. On a mesh the items are shared out over `data` where it divides them.
    """
    spec = model.decoder.spec
    score, respond = AnswerScore(spec), Respond(spec, max_new_tokens, model.stops)

    @jax.jit
    def prepared(weights: Weights, batch: Batch):
        asked = questions_of(weights, batch)
        base = partial(model.adapted.apply, {"params": weights["factors"]})
        return asked, answer_logits(base, spec, asked)

    def scorer(weights, mixtures: Mixtures, batch: Batch, task: Task, answers: Sequence[str]):
        rows = parallel.fitting(mesh, parallel.ROWS, len(batch.tokens))
        asked, base = prepared(weights, parallel.shard(mesh, batch, rows))
        # from the host, so that they can follow the factors to whatever devices these are on
        experts, alphas = jax.device_get((mixtures.experts, mixtures.alphas))
        evaluate = partial(
            search.evaluate_population,
            model.adapted,
            weights["factors"],
            experts,
            alphas,
            rank_fraction=mixtures.ranks,
            form="factored",
            chunk=chunk,
            mesh=mesh,
        )
        correct, kl = map(np.array, evaluate(score, (asked, base)))
        if not task.is_exact:
            written = evaluate(respond, asked)
            for p, (tokens, mask) in enumerate(zip(written.tokens, written.mask, strict=True)):
                correct[p] = rewards(model, task, tokens, mask, answers) > 0
        return Score(correct, kl)

    return scorer


def make_params_scorer(model: Model, max_new_tokens: int):
    """A function (params, projector, batch, task, answers) -> (N,) bool, for a model from a file.

    `params` are ordinary weights or a low-rank tree; nothing of the run that made them is used.
    """

    spec = model.decoder.spec

    def apply_of(model: Model, weights: Weights, params):
        del weights
        return partial(model.adapted.apply, {"params": params})

    @jax.jit
    def correct(weights: Weights, params, batch: Batch):
        asked = questions_of(weights, batch)
        return is_right(answer_logits(apply_of(model, weights, params), spec, asked), asked)

    greedy = make_rollout(
        model, apply_of, max_new_tokens=max_new_tokens, samples=1, temperature=0.0, top_p=1.0
    )

    def scorer(params, projector, batch: Batch, task: Task, answers: Sequence[str]) -> np.ndarray:
        weights = {"projector": projector}
        if task.is_exact:
            return np.asarray(correct(weights, params, batch))
        out = greedy(weights, params, batch, jax.random.key(0))
        return rewards(model, task, out.tokens, out.mask, answers) > 0

    return scorer
