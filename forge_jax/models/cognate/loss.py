"""What a Cognate model is trained on: supervised answers, halting, and the gate's entropy.

Labels are the tokens that should come next: `next_token_labels` shifts once, here, and nothing
else does. Losses are means over labelled tokens, nats.
"""

from typing import Any, NamedTuple

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
    """Cross-entropy of the tied head and whether the argmax is the label, `rows` tokens at a time.

    No more than `rows` rows of logits exist at once, in the backward pass neither: there they are
    computed again, unless all fit into one piece. At an ignored label the loss is 0 and the answer
    not correct.
    """
    count = answers.shape[0]
    if count <= rows:
        return _token_nll(answers, embedding, labels)
    short = -count % rows
    answers = jnp.pad(answers, ((0, short), (0, 0))).reshape(-1, rows, answers.shape[1])
    labels = jnp.pad(labels, (0, short), constant_values=IGNORED).reshape(-1, rows)

    some = jax.checkpoint(_token_nll)
    nll, correct = jax.lax.map(lambda piece: some(piece[0], embedding, piece[1]), (answers, labels))
    return nll.reshape(-1)[:count], correct.reshape(-1)[:count]


def _token_nll(answers, embedding, labels):
    logits = jnp.matmul(answers, embedding.T, preferred_element_type=jnp.float32)
    valid = labels >= 0
    chosen = jnp.take_along_axis(logits, jnp.maximum(labels, 0)[:, None], axis=1)[:, 0]
    nll = jnp.where(valid, jax.nn.logsumexp(logits, axis=1) - chosen, 0)
    return nll, valid & (jnp.argmax(logits, axis=1) == labels)


def answers_nll(answers: Float[Array, "answers batch time d"], embedding, labels, rows: int):
    """`token_nll` of several answers to the same labels, (answers, batch, time) each."""
    shape = answers.shape[:-1]
    repeated = jnp.broadcast_to(labels, shape).reshape(-1)
    nll, correct = token_nll(answers.reshape(-1, answers.shape[-1]), embedding, repeated, rows)
    return nll.reshape(shape), correct.reshape(shape)


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
    nll, correct = answers_nll(outputs.answers, embedding, labels, config.loss_rows)
    by_answer = mean(nll)
    ce = task_loss(config, by_answer)
    halting = jnp.float32(0)
    if config.is_reference:
        # an integer: it has no gradient
        probability = jax.nn.sigmoid(logits).mean(axis=2)
        halted = (probability > controls.halt_threshold).at[-1].set(True)
        steps = jnp.argmax(halted, axis=0) + 1
        halting = config.halting_weight * steps.astype(jnp.float32).mean()
    elif config.halting == "trm_bce":
        halting = config.halting_weight * mean(bce_loss(logits, correct))
    elif config.halting == "ponder":
        ce = mean((jnp.exp(halting_logp(logits)) * nll).sum(axis=0))
        halting = config.halting_weight * mean(ponder_divergence(logits, controls.ponder_prior))
    else:
        weights, cost = act_weights(logits)
        mixture = (weights[..., None].astype(outputs.answers.dtype) * outputs.answers).sum(0)
        mixed, _ = answers_nll(mixture[None], embedding, labels, config.loss_rows)
        ce, halting = mean(mixed)[0], config.halting_weight * mean(cost)
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
        **{f"loss_step_{k}": x for k, x in enumerate(by_answer)},
    }
    return ce + halting + gate, metrics


def task_loss(config: CognateConfig, by_answer: Float[Array, " answers"]):
    """Weighted mean of the answers' losses, or the last one's."""
    if not config.deep_supervision:
        return by_answer[-1]
    weights = jnp.array(config.step_weights)
    return (weights * by_answer).sum() / weights.sum()


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
        return model.apply({"params": params}, *args, method=method)

    features, _ = call("features", tokens, segments, None, controls)
    y, z, seen, turn = call("begin", features.values, features.place.positions)
    if thought is not None:
        y, z = jax.lax.stop_gradient(thought)
    y, z = call("step", y, z, seen, call("answer_keys", y, turn), features.place, turn)
    embedding = params["backbone"]["token_emb"]["embedding"]
    nll, correct = answers_nll(y[None], embedding, labels, config.loss_rows)
    valid = labels >= 0

    def mean(x):
        return jnp.where(valid, x, 0).sum() / jnp.maximum(valid.sum(), 1)

    ce = mean(nll[0])
    act = config.halting_weight * mean(bce_loss(call("halt_logits", z)[None], correct))
    gate = -config.gate_entropy * features.entropy.mean()
    metrics = {"loss_ce": ce, "loss_act": act, "loss_gate": gate}
    return ce + act + gate, (jax.lax.stop_gradient(Thought(y, z)), metrics)
