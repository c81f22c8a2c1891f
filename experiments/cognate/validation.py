"""What trained models are worth on examples they never saw, and how they halt there."""

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from scipy import stats

from experiments.data.corpora import CORPORA
from experiments.data.cursor import Documents
from experiments.data.packing import Rows, pack, stack_rows
from forge_jax.models.cognate import IGNORED, Cognate, Controls, Outputs, infer
from forge_jax.models.cognate.loss import answers_nll

Options = dict[str, int] | None


class Held(NamedTuple):
    """Validation rows, and the category of each."""

    rows: Rows
    categories: list[str]


class Scores(NamedTuple):
    """What models say of rows; the first two have no meaning where no label is."""

    nll: Float[Any, "models rows time"]  # of the last answer, nats
    correct: Bool[Any, "models rows time"]
    tokens_held: Float[Any, "models rows time"]  # in memory after the token
    surprising: Bool[Any, "models rows time"]  # above the model's threshold


def pack_held(documents: Mapping[str, Documents], length: int, pad: int, multiple: int) -> Held:
    """Every validation document once, each category in rows of its own.

    Empty rows fill the last `multiple`, so that all batches have one shape.
    """
    packed, categories = [], []
    for category in dict.fromkeys(CORPORA[name].category for name in documents):
        same = [d for name, d in documents.items() if CORPORA[name].category == category]
        rows = list(pack((d.document(i) for d in same for i in range(len(d))), length, pad))
        packed += rows
        categories += [category] * len(rows)
    short = -len(packed) % multiple
    empty = Rows(*(np.full((1, length), fill, np.int32) for fill in (pad, IGNORED, 0)))
    return Held(stack_rows([*packed, *[empty] * short]), categories + [""] * short)


def unigram_entropy(held: Held) -> float:
    """Loss, nats, of who knows how often each token is asked for in these rows and nothing else."""
    labels = held.rows.labels
    return float(stats.entropy(np.bincount(labels[labels >= 0])))


def make_scorer(model: Cognate, compiler_options: Options = None) -> Callable[..., Scores]:
    """The compiled `scores(params, rows, controls)` of several models on the same rows."""

    @functools.partial(jax.jit, compiler_options=compiler_options)
    def score(params, tokens, labels, segments, controls):
        def one(params, controls):
            outputs = model.apply({"params": params}, tokens, segments, None, controls)
            assert isinstance(outputs, Outputs)
            embedding = params["backbone"]["token_emb"]["embedding"]
            last = outputs.answers[-1:]
            nll, correct = answers_nll(last, embedding, labels, model.config.loss_rows)
            measures = outputs.features.measures
            surprising = measures.relative > controls.surprise_threshold
            return Scores(nll[0], correct[0], measures.held, surprising)

        return jax.vmap(one)(params, controls)

    def scores(params: Any, rows: Rows, controls: Controls, batch: int) -> Scores:
        starts = range(0, len(rows.tokens), batch)
        found = [score(params, *(r[i : i + batch] for r in rows), controls) for i in starts]
        return Scores(*(np.concatenate(leaves, axis=1) for leaves in zip(*found, strict=True)))

    return scores


def summarize(scores: Scores, held: Held) -> list[dict[str, float]]:
    """Loss over all labelled tokens, accuracy in each category, and memory, of every model.

    A question counts as right if every token of its answer, the end included, is the most likely
    one; in `language`, where there is no answer, each token counts.
    """
    labelled, real = held.rows.labels >= 0, held.rows.segments > 0
    out: list[dict[str, float]] = []
    for nll, correct, tokens_held, surprising in zip(*scores, strict=True):
        found = {
            "loss": float(nll[labelled].mean(dtype=np.float64)),
            "tokens_held": float(tokens_held[real].mean(dtype=np.float64)),
            "surprise_rate": float(surprising[real].mean()),
        }
        for category in dict.fromkeys(c for c in held.categories if c):
            own = np.array([c == category for c in held.categories])
            parts = (x[own] for x in (correct, labelled, held.rows.segments))
            right = by_token(*parts) if category == "language" else by_document(*parts)
            found[category] = float(right.mean())
        out.append(found)
    return out


def by_token(correct, labelled, segments) -> np.ndarray:
    """Whether each labelled token was right."""
    del segments
    return correct[labelled]


def by_document(correct, labelled, segments) -> np.ndarray:
    """Whether all labelled tokens of each document were right."""
    names = np.arange(len(segments))[:, None] * (segments.max() + 1) + segments
    _, index = np.unique(names[labelled], return_inverse=True)
    wrong = np.bincount(index, weights=~correct[labelled])
    return wrong == 0


def some_rows(held: Held, count: int) -> Rows:
    """At most `count` rows that hold something, spread over the categories."""
    filled = [i for i, category in enumerate(held.categories) if category]
    chosen = [
        filled[i] for i in np.linspace(0, len(filled) - 1, min(count, len(filled))).astype(int)
    ]
    return Rows(*(leaf[chosen] for leaf in held.rows))


class Stopped(NamedTuple):
    """What one model says of each token where its threshold stops it."""

    answers: Int[Array, "rows time"]  # made, from 1
    nll: Float[Array, "rows time"]  # nats
    correct: Bool[Array, "rows time"]


def make_stopper(
    model: Cognate, rows: Rows, compiler_options: Options = None
) -> Callable[[Any, Controls], Stopped]:
    """The compiled `stopped(params, controls)` of one model on these rows."""
    tokens, labels, segments = (jnp.asarray(r) for r in rows)

    @functools.partial(jax.jit, compiler_options=compiler_options)
    def stopped(params: Any, controls: Controls) -> Stopped:
        found = infer(model, params, tokens, segments, None, controls)
        logp = jax.nn.log_softmax(found.logits)
        nll = -jnp.take_along_axis(logp, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
        chosen = logp.max(-1) + nll  # 0 where no token is more probable
        return Stopped(found.answers, nll, (labels >= 0) & (chosen <= 0))

    return stopped


class Halting(NamedTuple):
    """What one model does where its threshold stops it."""

    answers: float  # made by a token on average, from 1; padding does not count
    halted_loss: float  # nats per labelled token
    halted_accuracy: float  # of labelled tokens
    tokens_per_second: float


def make_halting(
    model: Cognate, rows: Rows, compiler_options: Options = None
) -> Callable[[Any, Controls], Halting]:
    """`measure(params, controls)` of one model on a few rows."""
    stopped = make_stopper(model, rows, compiler_options)
    labelled, real = rows.labels >= 0, rows.segments > 0

    def measure(params: Any, controls: Controls) -> Halting:
        found = jax.device_get(stopped(params, controls))
        spent = []
        for _ in range(3):  # the fastest: the others waited for something
            began = time.perf_counter()
            jax.block_until_ready(stopped(params, controls))
            spent.append(time.perf_counter() - began)
        means = found.answers[real], found.nll[labelled], found.correct[labelled]
        answers, nll, correct = (float(x.mean()) for x in means)
        return Halting(answers, nll, correct, int(real.sum()) / min(spent))

    return measure
