"""What a Cognate model is trained on: supervised answers, halting, and the gate's entropy.

Labels are the tokens that should come next: `next_token_labels` shifts once, here, and nothing
else does. Losses are means over labelled tokens, nats.
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from forge_jax.models.cognate.config import CognateConfig, Controls
from forge_jax.models.cognate.halting import (
    act_weights,
    bce_loss,
    halting_logp,
    ponder_divergence,
    realised_steps,
)
from forge_jax.models.cognate.model import Cognate, Outputs
from forge_jax.models.dense import fast_dense

IGNORED = -100
"""the label of a token from which nothing is learned"""


def next_token_labels(
    tokens: Int[Array, "batch time"],
    segments: Int[Array, "batch time"] | None = None,
    learned: Bool[Array, "batch time"] | None = None,
) -> Int[Array, "batch time"]:
    """The token after each one, `IGNORED` at the end of a row or document.

    `learned` is True at the tokens that are to be predicted, those of the answers for example.
    """
    labels = jnp.roll(tokens, -1, axis=1).at[:, -1].set(IGNORED)
    if segments is not None:
        labels = jnp.where(jnp.roll(segments, -1, axis=1) == segments, labels, IGNORED)
    if learned is not None:
        labels = jnp.where(jnp.roll(learned, -1, axis=1), labels, IGNORED)
    return labels


def token_nll(
    answers: Float[Array, "tokens d"],
    embedding: Float[Array, "vocab d"],
    labels: Int[Array, " tokens"],
    rows: int,
) -> tuple[Float[Array, " tokens"], Bool[Array, " tokens"]]:
    """Cross-entropy of the tied head and whether no logit is above the label's, `rows` at a time.

    No more than `rows` rows of logits exist at once. At an ignored label the loss is 0 and the
    answer not correct. To score: `weighted_nll` is to learn from, this keeps every row for it.
    """

    def some(piece):
        nll, correct, *_ = _judge(piece[0], embedding, piece[1])
        return nll, correct

    out = jax.lax.map(some, _pieces(rows, answers, labels))
    return tuple(x.reshape(-1)[: len(labels)] for x in out)  # type: ignore[return-value]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def weighted_nll(
    answers: Float[Array, "tokens d"],
    embedding: Float[Array, "vocab d"],
    labels: Int[Array, " tokens"],
    weights: Float[Array, " tokens"],
    rows: int,
) -> tuple[Float[Array, ""], Float[Array, " tokens"], Bool[Array, " tokens"]]:
    """The sum of weights x `token_nll`, and both that it returns, which have no gradient.

    The gradients are made in the forward pass, while the logits are there, so that these are
    computed once and no more than `rows` of them exist. Reverse mode only.
    """
    nll, correct = token_nll(answers, embedding, labels, rows)
    return (weights * nll).sum(), nll, correct


def _weighted_nll_fwd(answers, embedding, labels, weights, rows):
    wide = embedding.astype(jnp.float32)

    def some(total, piece):
        y, label, weight = piece
        nll, correct, exponentials, place = _judge(y, embedding, label)
        weight = jnp.where(label >= 0, weight, 0)
        share = weight / exponentials.sum(axis=1)
        change = (exponentials * share[:, None]).at[jnp.arange(len(y)), place].add(-weight)
        return total + y.T.astype(jnp.float32) @ change, (nll, correct, change @ wide)

    pieces = _pieces(rows, answers, labels, weights)
    kernel, out = jax.lax.scan(some, jnp.zeros_like(wide.T), pieces)
    nll, correct, back = (x.reshape(-1, *x.shape[2:])[: len(labels)] for x in out)
    saved = back.astype(answers.dtype), kernel.T.astype(embedding.dtype), nll
    return ((weights * nll).sum(), nll, correct), saved


def _weighted_nll_bwd(rows, saved, cotangents):
    del rows
    answers, embedding, nll = ((cotangents[0] * x).astype(x.dtype) for x in saved)
    return answers, embedding, None, nll


weighted_nll.defvjp(_weighted_nll_fwd, _weighted_nll_bwd)


def _pieces(rows: int, *arrays):
    """Answers, labels, weights, `rows` at a time; of what is filled up nothing is asked."""
    count = len(arrays[0])
    rows = min(rows, count)

    def cut(x):
        ends = ((0, -count % rows),) + ((0, 0),) * (x.ndim - 1)
        fill = IGNORED if jnp.issubdtype(x.dtype, jnp.integer) else 0
        return jnp.pad(x, ends, constant_values=fill).reshape(-1, rows, *x.shape[1:])

    return tuple(map(cut, arrays))


def _judge(answers, embedding, labels):
    """Loss, whether it is right, the exponentials below the largest, and the label's place."""
    logits = jnp.matmul(answers, embedding.T, preferred_element_type=jnp.float32)
    place = jnp.maximum(labels, 0)
    chosen = jnp.take_along_axis(logits, place[:, None], axis=1)[:, 0]
    top = logits.max(axis=1)
    exponentials = jnp.exp(logits - top[:, None])
    nll = top + jnp.log(exponentials.sum(axis=1)) - chosen
    # not argmax, which takes XLA's CPU backend longer than the softmax
    return jnp.where(labels >= 0, nll, 0), (labels >= 0) & (chosen >= top), exponentials, place


def answers_nll(answers: Float[Array, "answers batch time d"], embedding, labels, rows: int):
    """`token_nll` of several answers to the same labels, (answers, batch, time) each."""
    shape = answers.shape[:-1]
    nll, correct = token_nll(*_flat(answers, embedding, labels), rows)
    return nll.reshape(shape), correct.reshape(shape)


def answers_loss(
    answers: Float[Array, "answers batch time d"],
    embedding,
    labels,
    weights: Float[Array, "answers batch time"],
    rows: int,
):
    """`weighted_nll` of several answers to the same labels."""
    shape = answers.shape[:-1]
    flat = _flat(answers, embedding, labels)
    found: Any = weighted_nll(*flat, weights.reshape(-1), rows)
    total, nll, correct = found
    return total, nll.reshape(shape), correct.reshape(shape)


def _flat(answers, embedding, labels):
    repeated = jnp.broadcast_to(labels, answers.shape[:-1]).reshape(-1)
    return answers.reshape(-1, answers.shape[-1]), embedding, repeated


def loss(
    model: Cognate,
    params: Any,
    tokens: Int[Array, "batch time"],
    labels: Int[Array, "batch time"],
    segments: Int[Array, "batch time"] | None = None,
    controls: Controls = Controls(),  # noqa: B008  a tuple of numbers
    *,
    key: Array | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The loss of one batch and what it is made of; 0 if no token is labelled.

    With `key` the model trains with dropout.
    """
    with nn.intercept_methods(fast_dense):
        outputs = model.apply(
            {"params": params},
            tokens,
            segments,
            None,
            controls,
            key is None,
            rngs=None if key is None else {"dropout": key},
        )
    assert isinstance(outputs, Outputs)
    return loss_of(model.config, params, outputs, labels, controls)


def loss_of(
    config: CognateConfig,
    params: Any,
    outputs: Outputs,
    labels: Int[Array, "batch time"],
    controls: Controls,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The loss of outputs; see `loss`."""
    if labels.shape != outputs.answers.shape[1:3]:
        raise ValueError(
            f"`labels` must have the tokens' shape {outputs.answers.shape[1:3]}, got "
            f"{labels.shape}."
        )
    embedding = params["backbone"]["token_emb"]["embedding"]
    valid = labels >= 0
    count = valid.sum()

    def mean(x):
        """Over labelled tokens; leading axes stay."""
        return jnp.where(valid, x, 0).sum((-2, -1)) / jnp.maximum(count, 1)

    logits = outputs.halt_logits
    asked = valid / jnp.maximum(count, 1)  # the weights of such a mean
    ce, nll, correct = _task_loss(config, outputs, embedding, labels, asked)
    if config.is_reference:  # an integer: it has no gradient
        probability = jax.nn.sigmoid(logits).mean(axis=2)
        halted = (probability > controls.halt_threshold).at[-1].set(True)
        cost = (jnp.argmax(halted, axis=0) + 1).astype(jnp.float32).mean()
    elif config.halting == "trm_bce":
        cost = mean(bce_loss(logits, correct))
    elif config.halting == "ponder":
        cost = mean(ponder_divergence(logits, controls.ponder_prior))
    else:
        cost = mean(act_weights(logits)[1])
    halting = config.halting_weight * cost
    gate = -config.gate_entropy * outputs.features.entropy.mean()
    probability = jax.nn.sigmoid(logits)
    taken = realised_steps(logits, controls.halt_threshold).astype(jnp.float32)
    measures = outputs.features.measures
    metrics = {
        "loss_ce": ce,
        "loss_act": halting,
        "loss_gate": gate,
        "accuracy": mean(correct[-1].astype(jnp.float32)),
        "labels": count,
        "avg_halting_steps": taken.mean(),
        "max_halting_steps": taken.max(),
        "min_halting_steps": taken.min(),
        "halting_variance": taken.var(),
        "halt_prob_mean": probability.mean(),
        "halt_prob_std": probability.std(),
        "surprise_rate": (measures.relative > controls.surprise_threshold).mean(),
        "memory_tokens": measures.held.mean(),
        **{f"loss_step_{k}": x for k, x in enumerate(mean(nll))},
    }
    return ce + halting + gate, metrics


def _task_loss(config: CognateConfig, outputs: Outputs, embedding, labels, asked):
    """Cross-entropy as the answers are weighed; per answer and token that, and if it is right."""
    rows, kind = config.loss_rows, "reference" if config.is_reference else config.halting
    if kind == "act":
        shares = act_weights(outputs.halt_logits)[0][..., None].astype(outputs.answers.dtype)
        mixture = (shares * outputs.answers).sum(0)
        ce, *_ = answers_loss(mixture[None], embedding, labels, asked[None], rows)
        shown = jax.lax.stop_gradient((outputs.answers, embedding))
        return ce, *answers_nll(*shown, labels, rows)
    shares = answer_weights(config)[:, None, None]
    if kind == "ponder":
        shares = jnp.exp(halting_logp(outputs.halt_logits))
    return answers_loss(outputs.answers, embedding, labels, shares * asked, rows)


def answer_weights(config: CognateConfig) -> Float[Array, " answers"]:
    """How much each answer's loss counts; only the last one's without deep supervision."""
    if not config.deep_supervision:
        return jnp.zeros(config.steps + 1).at[-1].set(1.0)
    weights = jnp.array(config.step_weights)
    return weights / weights.sum()


class Thought(NamedTuple):
    """Answer and latent state between two supervised steps; data, without gradient."""

    y: Float[Array, "batch time d"]
    z: Float[Array, "batch time d"]


def step_loss(
    model: Cognate,
    params: Any,
    tokens: Int[Array, "batch time"],
    labels: Int[Array, "batch time"],
    thought: Thought | None = None,
    segments: Int[Array, "batch time"] | None = None,
    controls: Controls = Controls(),  # noqa: B008
) -> tuple[Float[Array, ""], tuple[Thought, dict[str, Float[Array, ""]]]]:
    """The loss of one recursion step, for an optimizer update after each, as TRM is trained.

    The features are those of the current `params`; `thought` is what the step before returned,
    None at the first. At unchanged parameters the gradients of the steps, weighted, add up to that
    of `loss` with detached steps, but for the first answer, which no step made.

    Raises:
        ValueError: `halting` is not "trm_bce": the other losses weigh all steps at once.
    """
    config = model.config
    if config.halting != "trm_bce":
        raise ValueError(
            f'A step has a loss of its own with halting="trm_bce", got {config.halting!r}.'
        )

    def call(method, *args) -> Any:
        with nn.intercept_methods(fast_dense):
            return model.apply({"params": params}, *args, method=method)

    features, _ = call("features", tokens, segments, None, controls)
    y, z, seen, turn = call("begin", features.values, features.place.positions)
    if thought is not None:
        y, z = jax.lax.stop_gradient(thought)
    y, z = call("step", y, z, seen, call("answer_keys", y, turn), features.place, turn)
    embedding = params["backbone"]["token_emb"]["embedding"]
    valid = labels >= 0
    asked = valid / jnp.maximum(valid.sum(), 1)
    ce, _, correct = answers_loss(y[None], embedding, labels, asked[None], config.loss_rows)
    halting = bce_loss(call("halt_logits", z)[None], correct)
    act = config.halting_weight * (asked * halting).sum()
    gate = -config.gate_entropy * features.entropy.mean()
    metrics = {"loss_ce": ce, "loss_act": act, "loss_gate": gate}
    return ce + act + gate, (jax.lax.stop_gradient(Thought(y, z)), metrics)
