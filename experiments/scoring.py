"""Compiled scoring of candidates: is the greedy answer right, how far is it from the base?"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from experiments.data.batches import Batch
from experiments.data.tasks import Task
from experiments.model import Model, Weights, images, policy, texts
from forge_jax import parallel, rl, svf
from forge_jax.models import Questions, generate, response_logits


class Score(NamedTuple):
    """What P candidates do on N items."""

    correct: np.ndarray  # (P, N) bool
    kl: np.ndarray  # (P,) KL(candidate || base) per answer token, nats


def make_score(model: Model, chunk: int, mesh: Mesh | None = None):
    """A compiled function (weights, s (P, r), batch of N, base logits) -> Score.

    An answer counts as right where greedy decoding would write it, stop token included: the
    largest logit at every position is the answer's token given the answer's tokens before it.
    That is one pass over prompt and answer instead of a decoding loop, with the same result.
    Candidates run `chunk` at a time, on a mesh in each group along its axis `population`.
    """

    def one(s, shared):
        weights, batch, base = shared
        row = {k: v[None] for k, v in s.items()}
        logits = answer_logits(model, weights, row, batch)
        kl = rl.kl_to_reference(logits, base) * batch.answer_mask
        return is_right(logits, batch), kl.sum() / batch.answer_mask.sum()

    @jax.jit
    def score(weights: Weights, s, batch: Batch, base) -> Score:
        shared = (weights, batch, base)
        return Score(*parallel.map_candidates(one, s, shared, mesh=mesh, chunk=chunk))

    return score


def is_right(logits, batch: Batch):
    """Whether every token of an answer has the largest logit at its place, (N,)."""
    return ((logits.argmax(-1) == batch.answers) | ~batch.answer_mask).all(axis=-1)


def answer_logits(model: Model, weights: Weights, s, batch: Batch):
    """Logits from which every token of the answers would be drawn."""
    return applied_logits(policy(model, weights, s), model, images(weights, batch), batch)


def applied_logits(apply, model: Model, seen, batch: Batch):
    """The same of any `apply`, with image embeddings `seen`."""
    prompts, answers = (batch.tokens, batch.mask), (batch.answers, batch.answer_mask)
    return response_logits(apply, model.decoder.spec, *prompts, *answers, images=seen)


def make_base_logits(model: Model):
    """A compiled function (weights, batch) -> the base model's answer logits."""

    @jax.jit
    def base_logits(weights: Weights, batch: Batch):
        ones = {k: leaf.s[None] for k, leaf in svf.named_factors(weights["factors"])}
        return answer_logits(model, weights, ones, batch)

    return base_logits


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

    The same predicate as `make_score`'s. `responses` are a multiple of the batch's rows, and may be
    longer than an answer that has no stop token.
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
    """A function (weights, s (P, r), batch, task, answers) -> Score, on NumPy arrays.

    Equal shapes compile once. A task whose reward reads free text has its text generated. On a mesh
    the items are shared out over `data` where it divides them.
    """
    score, base_logits = make_score(model, chunk, mesh), make_base_logits(model)
    greedy = make_rollout(
        model, policy, max_new_tokens=max_new_tokens, samples=1, temperature=0.0, top_p=1.0
    )

    def scorer(weights: Weights, s, batch: Batch, task: Task, answers: Sequence[str]) -> Score:
        rows = parallel.fitting(mesh, parallel.ROWS, len(batch.tokens))
        batch = parallel.shard(mesh, batch, rows)
        correct, kl = map(np.array, score(weights, s, batch, base_logits(weights, batch)))
        if task.is_exact:
            return Score(correct, kl)
        for p in range(len(correct)):
            row = {k: v[p : p + 1] for k, v in s.items()}
            out = greedy(weights, row, batch, jax.random.key(0))
            correct[p] = rewards(model, task, out.tokens, out.mask, answers) > 0
        return Score(correct, kl)

    return scorer


def make_params_scorer(model: Model, max_new_tokens: int):
    """A function (params, projector, batch, task, answers) -> (N,) bool, for a model from a file.

    `params` are ordinary weights or a low-rank tree; nothing of the run that made them is used.
    """

    def apply_of(model: Model, weights: Weights, params):
        del weights
        return partial(model.adapted.apply, {"params": params})

    @jax.jit
    def correct(weights: Weights, params, batch: Batch):
        apply = apply_of(model, weights, params)
        return is_right(applied_logits(apply, model, images(weights, batch), batch), batch)

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
