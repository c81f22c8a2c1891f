"""Which expert a question is for: by the labels' logits, by what the model writes, by a head.

Every dispatcher is a pytree of arrays, so that it is an argument of a compiled function, and has
room for labels to come: a new one changes arrays, not shapes, and nothing is compiled again.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from forge_jax.models import pad_left

Apply = Callable[..., Any]
"""`apply(tokens, mask, logits_from=-1, ...) -> (logits, cache)` of a decoder, left-padded rows"""

BASE = -1
"""the expert of the label "other": none, the base model"""


class Choice(NamedTuple):
    """Which expert answers each question."""

    expert: Int[Array, " batch"]  # BASE for the base model
    probability: Float[Array, "batch labels"]  # 0 where there is no label yet

    def alpha(self, experts: int) -> Float[Array, "batch experts"]:
        """Mixture coefficients, one row a question: a unit vector, or zeros for the base."""
        return jax.nn.one_hot(self.expert, experts)


class Labels(NamedTuple):
    """What the labels stand for."""

    expert: Int[Array, " labels"]  # BASE for "other"
    live: Bool[Array, " labels"]  # False where there is room for a label to come
    threshold: Float[Array, ""]  # a probability below it goes to the base

    def choose(self, scores: Float[Array, "batch labels"]) -> Choice:
        """The most probable label's expert, of scores in nats."""
        probability = jax.nn.softmax(jnp.where(self.live, scores, -jnp.inf), axis=-1)
        best = probability.argmax(axis=-1)
        known = probability.max(axis=-1) >= self.threshold
        return Choice(jnp.where(known, self.expert[best], BASE), probability)

    def mixture(self, choice: Choice, experts: int) -> Float[Array, "batch experts"]:
        """Mixture coefficients by the labels' probabilities; the share of "other" is the base's."""
        return choice.probability @ jax.nn.one_hot(self.expert, experts)


def make_labels(experts: Sequence[int], room: int | None = None, threshold: float = 0.0) -> Labels:
    """Labels for these experts (`BASE` for "other"), with `room` for that many in all.

    Raises:
        ValueError: there is no label, too little room, or the threshold is no probability.
    """
    room = len(experts) if room is None else room
    if not 0 < len(experts) <= room:
        raise ValueError(f"Wanted 1 to {room} labels, got {len(experts)}.")
    if not 0 <= threshold <= 1:
        raise ValueError(f"`threshold` must lie in [0, 1], got {threshold}.")
    padded = [*experts, *[BASE] * (room - len(experts))]
    live = np.arange(room) < len(experts)
    return Labels(jnp.asarray(padded, jnp.int32), jnp.asarray(live), jnp.float32(threshold))


class PromptDispatch(NamedTuple):
    """The model itself says what kind of question it is: the logits of the labels, one prefill.

    With the `apply` of an expert trained on this very task it is Transformer-Squared's
    classification expert (arXiv 2501.06252, section 3.2); `classification_loss` trains it.
    """

    first_token: Int[Array, " labels"]
    bias: Float[Array, " labels"]  # added to the labels' log probabilities, see `calibrate`
    labels: Labels

    @classmethod
    def of(
        cls,
        tokens: Sequence[Sequence[int]],
        experts: Sequence[int],
        *,
        room: int | None = None,
        threshold: float = 0.0,
    ) -> "PromptDispatch":
        """For labels that the tokenizer writes as `tokens`, each standing for one of `experts`.

        Raises:
            ValueError: a label has no token, or two begin with the same one.
        """
        if len(tokens) != len(experts) or not all(len(row) for row in tokens):
            raise ValueError(f"Wanted tokens for {len(experts)} labels, got {list(tokens)}.")
        first = [int(row[0]) for row in tokens]
        if len(set(first)) < len(first):
            raise ValueError(f"Labels must differ in their first token, got {list(tokens)}.")
        labels = make_labels(experts, room, threshold)
        count = len(labels.live)
        padded = jnp.asarray([*first, *[0] * (count - len(first))], jnp.int32)
        return cls(padded, jnp.zeros(count), labels)

    def scores(
        self,
        apply: Apply,
        tokens: Int[Array, "batch time"],
        mask: Bool[Array, "batch time"],
        **inputs,
    ) -> Float[Array, "batch labels"]:
        """Log probability of each label's first token after the prompt, nats, and the bias."""
        logits, _ = apply(*pad_left(tokens, mask), logits_from=-1, **inputs)
        return jax.nn.log_softmax(logits[:, -1])[:, self.first_token] + self.bias

    def __call__(
        self,
        apply: Apply,
        tokens: Int[Array, "batch time"],
        mask: Bool[Array, "batch time"],
        **inputs,
    ) -> Choice:
        """Classify the questions in `tokens`, whose prompts ask for the label."""
        return self.labels.choose(self.scores(apply, tokens, mask, **inputs))

    def calibrate(self, scores: Float[Array, "batch labels"]) -> "PromptDispatch":
        """Take away what the model thinks of the labels whatever the question.

        The bias becomes minus each label's mean over unlabelled questions, as in batch calibration
        (Zhou et al. 2023, arXiv 2309.17249, eq. 4; there the mean of probabilities).
        """
        return self._replace(bias=self.bias - scores.mean(axis=0))


def classification_loss(
    scores: Float[Array, "batch labels"], label: Int[Array, " batch"], labels: Labels
) -> Float[Array, ""]:
    """Cross-entropy of the right label among all labels, nats; for `PromptDispatch.scores`."""
    logp = jax.nn.log_softmax(jnp.where(labels.live, scores, -jnp.inf), axis=-1)
    return -jnp.take_along_axis(logp, label[:, None], axis=-1).mean()


BOXED = re.compile(r"\\boxed\{\s*([^{}]*?)\s*\}")


def boxed(text: str) -> str | None:
    """What the last \\boxed{...} of a text holds, in lower case; None without one."""
    found = BOXED.findall(text)
    return found[-1].lower() if found else None


def from_text(
    texts: Sequence[str], names: Sequence[str], labels: Labels
) -> tuple[Choice, list[str | None]]:
    """The choice that the model wrote as \\boxed{label}, and what it wrote.

    A label that is none of `names`, or no label at all, goes to the base: in the published code the
    last loaded expert answered it.

    Raises:
        ValueError: there are more names than labels.
    """
    if len(names) > len(labels.live):
        raise ValueError(f"Wanted names for {len(labels.live)} labels, got {list(names)}.")
    written = [boxed(text) for text in texts]
    lower = [name.lower() for name in names]
    rows = np.zeros((len(texts), len(labels.live)), np.float32)
    expert = np.full(len(texts), BASE, np.int32)
    for i, label in enumerate(written):
        if label in lower:
            rows[i, lower.index(label)] = 1.0
            expert[i] = int(labels.expert[lower.index(label)])
    return Choice(jnp.asarray(expert), jnp.asarray(rows)), written


class ClassifierDispatch(NamedTuple):
    """A linear head on the mean hidden state of the question, of a prefill of the question alone.

    The mean, not the last token: what stands last is the wording's, and a head on it knows only
    wordings that it was fitted on.
    """

    kernel: Float[Array, "hidden labels"]
    bias: Float[Array, " labels"]
    labels: Labels

    def scores(self, features: Float[Array, "batch hidden"]) -> Float[Array, "batch labels"]:
        """Unnormalised log probabilities of the labels, nats."""
        return features @ self.kernel + self.bias

    def __call__(
        self,
        apply: Apply,
        tokens: Int[Array, "batch time"],
        mask: Bool[Array, "batch time"],
        **inputs,
    ) -> Choice:
        """Classify questions; `apply` returns ((logits, hidden), cache).

        Compiled, the logits cost nothing: no one reads them.
        """
        (_, hidden), _ = apply(tokens, mask, **inputs)
        return self.labels.choose(self.scores(pool(hidden, mask)))


def pool(
    hidden: Float[Array, "batch time hidden"], mask: Bool[Array, "batch time"]
) -> Float[Array, "batch hidden"]:
    """Mean of the unmasked hidden states, float32: the features of `ClassifierDispatch`."""
    total = jnp.sum(hidden.astype(jnp.float32), axis=1, where=mask[..., None])
    return total / jnp.maximum(mask.sum(axis=1, keepdims=True), 1)


def fit_classifier(
    features: Float[Array, "items hidden"],
    label: Int[Array, " items"],
    labels: Labels,
    *,
    ridge: ArrayLike = 1e-3,
    steps: int = 300,
) -> ClassifierDispatch:
    r"""Multinomial logistic regression of the labels on pooled hidden states.

    $$ \min_{W, b} \; \mathrm{mean}_i (-\log p(y_i | x_i)) + \tfrac{ridge}{2} \|W\|^2 $$

    On features scaled to variance 1 (W is of the scaled ones), by Nesterov's accelerated gradient
    with restarts (O'Donoghue and Candes 2015, arXiv 1204.3982); the step is 1 over Boehning's bound
    of the curvature (1992): half the largest eigenvalue of the features' second moments.
    """
    mean, std = features.mean(axis=0), features.std(axis=0) + 1e-6
    x = jnp.concatenate([(features - mean) / std, jnp.ones((len(features), 1))], axis=1)
    wanted = jax.nn.one_hot(label, len(labels.live))
    penalised = jnp.ones((x.shape[1], 1)).at[-1].set(0.0)

    def gradient(w):
        p = jax.nn.softmax(jnp.where(labels.live, x @ w, -jnp.inf), axis=-1)
        return x.T @ (p - wanted) / len(x) + ridge * penalised * w

    curvature = 0.5 * jnp.linalg.eigvalsh(x.T @ x / len(x))[-1] + ridge

    def step(_, carry):
        w, ahead, momentum = carry
        g = gradient(ahead)
        new = ahead - g / curvature
        # moving against the gradient: the momentum has overshot
        momentum = jnp.where(jnp.sum(g * (new - w)) > 0, 0.0, momentum)
        return new, new + momentum / (momentum + 3.0) * (new - w), momentum + 1.0

    start = jnp.zeros((x.shape[1], len(labels.live)))
    w, _, _ = jax.lax.fori_loop(0, steps, step, (start, start, jnp.float32(0.0)))
    kernel = w[:-1] / std[:, None]
    return ClassifierDispatch(kernel, w[-1] - mean @ kernel, labels)
