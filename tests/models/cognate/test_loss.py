"""The loss of given outputs against NumPy, in its three ways of halting; remat by its trace."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from forge_jax.models.cognate import Cognate, CognateConfig, Controls, loss, next_token_labels
from forge_jax.models.cognate.loss import loss_of
from forge_jax.models.cognate.model import Features, Outputs
from forge_jax.models.cognate.titans import Measures

CONFIG = CognateConfig(vocab_size=7, d_model=4, heads=2, answer_heads=2, halting_weight=0.3)
ANSWERS, BATCH, TIME = 4, 2, 5


def make_outputs() -> Any:
    rng = np.random.default_rng(0)
    shape = (ANSWERS, BATCH, TIME)

    def draw(*shape):
        return jnp.array(rng.standard_normal(shape), jnp.float32)

    none: Any = None
    measures = Measures(*(jnp.abs(draw(BATCH, TIME)) for _ in range(3)))
    features = Features(none, jnp.abs(draw(BATCH, TIME)), measures, none)
    return Outputs(draw(*shape, 4), none, draw(*shape), features, none)


def make_batch():
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 7, (BATCH, TIME))
    labels[0, 1:3] = -100
    return rng.standard_normal((7, 4)).astype(np.float32), labels


def log_softmax(x):
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def parts(halting):
    """Task and halting loss in NumPy, token by token."""
    outputs, (embedding, labels) = make_outputs(), make_batch()
    y, h = np.asarray(outputs.answers, np.float64), np.asarray(outputs.halt_logits, np.float64)
    h = 1 / (1 + np.exp(-h))
    tasks, halts = [], []
    for b, t in np.argwhere(labels >= 0):
        label, rates = labels[b, t], h[:, b, t]
        logits = y[:, b, t] @ embedding.T
        nll = -log_softmax(logits)[:, label]
        if halting == "trm_bce":
            tasks.append(np.dot(nll, CONFIG.step_weights) / sum(CONFIG.step_weights))
            right = logits.argmax(axis=1) == label
            halts.append(-np.log(np.where(right, rates, 1 - rates)).mean())
            continue
        p, left, cost = [], 1.0, 0.0
        for n in range(ANSWERS):
            last = n == ANSWERS - 1
            if halting == "ponder":
                p.append(left if last else rates[n] * left)
                left *= 1 - rates[n]
            elif left <= 0.01:
                p.append(0.0)
            else:
                stops = last or sum(rates[: n + 1]) >= 0.99
                p.append(left if stops else rates[n])
                cost, left = (n + 1 + left, 0.0) if stops else (cost, left - rates[n])
        if halting == "ponder":
            tasks.append(np.dot(p, nll))
            prior = 0.5 ** np.arange(1, ANSWERS + 1)
            halts.append(np.dot(p, np.log(p) - np.log(prior / prior.sum())))
        else:
            mixture = np.dot(p, y[:, b, t])
            tasks.append(-log_softmax(embedding @ mixture)[label])
            halts.append(cost)
    return np.mean(tasks), CONFIG.halting_weight * np.mean(halts)


@pytest.mark.parametrize("halting", ["trm_bce", "ponder", "act"])
def test_losses_are_those_of_the_loop_and_teach_to_halt(halting):
    config: Any = dataclasses.replace(CONFIG, halting=halting)
    outputs, (embedding, labels) = make_outputs(), make_batch()

    def total(logits):
        params = {"backbone": {"token_emb": {"embedding": embedding}}}
        return loss_of(
            config, params, outputs._replace(halt_logits=logits), jnp.array(labels), Controls()
        )

    run = jax.jit(jax.value_and_grad(total, has_aux=True))
    (value, metrics), grads = run(outputs.halt_logits)
    task, halt = parts(halting)
    np.testing.assert_allclose(metrics["loss_ce"], task, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss_act"], halt, rtol=1e-5)
    gate = -1e-3 * outputs.features.entropy.mean()
    np.testing.assert_allclose(value, task + halt + gate, rtol=1e-5)
    # of an ignored token nothing is learned, of all others when to halt
    by_token = np.abs(grads[:-1]).max(axis=0)
    assert (by_token[labels >= 0] > 1e-4).all()
    assert (by_token[labels < 0] == 0).all()


def test_a_batch_without_labels_costs_nothing():
    outputs, (embedding, labels) = make_outputs(), make_batch()
    params = {"backbone": {"token_emb": {"embedding": embedding}}}
    config = dataclasses.replace(CONFIG, gate_entropy=0.0)
    value, metrics = loss_of(
        config, params, outputs, jnp.full_like(jnp.array(labels), -100), Controls()
    )
    assert float(value) == 0
    assert int(metrics["labels"]) == 0
    with pytest.raises(ValueError, match=r"`labels` must have the tokens' shape \(2, 5\)"):
        loss_of(config, params, outputs, jnp.array(labels[:1]), Controls())


def test_remat_recomputes_layers_and_steps():
    """What is kept for the backward pass is less; the trace needs no compilation."""
    tokens = jnp.zeros((1, 8), jnp.int32)
    config = dataclasses.replace(CONFIG, layers=2, d_ff=8, d_mem=4, gate_hidden=4)

    def trace(config):
        model = Cognate(config)
        params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
        labels = next_token_labels(tokens)
        return str(jax.make_jaxpr(jax.grad(lambda p: loss(model, p, tokens, labels)[0]))(params))

    def recomputed(remat):
        text = trace(dataclasses.replace(config, remat=remat))
        return text.count("remat2[") + text.count("checkpoint["), text.count("dot_general")

    assert recomputed("none") == (0, kept := recomputed("dots")[1])
    assert recomputed("dots")[0] >= 2
    assert recomputed("full")[0] >= 2
    assert recomputed("full")[1] > kept
