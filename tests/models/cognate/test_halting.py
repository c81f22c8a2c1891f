"""Halting losses against loops in NumPy, and their gradients; the chunked cross-entropy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from forge_jax.models.cognate.gate import binary_entropy
from forge_jax.models.cognate.halting import (
    act_weights,
    bce_loss,
    geometric_logp,
    halting_logp,
    ponder_divergence,
    realised_steps,
)
from forge_jax.models.cognate.loss import token_nll, weighted_nll


def draw(answers=4, tokens=6, scale=1.0) -> Any:
    rng = np.random.default_rng(0)
    return (scale * rng.standard_normal((answers, tokens))).astype(np.float32)


def sigmoid(x):
    return 1 / (1 + np.exp(-x.astype(np.float64)))


def test_ponder_distribution():
    logits = draw()
    rates, left, want = sigmoid(logits), np.ones(6), []
    for n in range(3):
        want.append(rates[n] * left)
        left = left * (1 - rates[n])
    want.append(left)
    got = np.exp(halting_logp(logits))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    np.testing.assert_allclose(got.sum(axis=0), 1, rtol=1e-5)


def test_ponder_divergence():
    prior = 0.3
    q = np.array([prior * (1 - prior) ** n for n in range(4)])
    q /= q.sum()
    np.testing.assert_allclose(np.exp(geometric_logp(4, prior)), q, rtol=1e-5)
    p = np.exp(np.asarray(halting_logp(draw()), np.float64))
    want = (p * np.log(p / q[:, None])).sum(axis=0)
    np.testing.assert_allclose(ponder_divergence(draw(), prior), want, rtol=1e-4)
    # the logits whose distribution is the prior
    rates = [q[n] / q[n:].sum() for n in range(3)]
    same = jnp.array([np.log(r / (1 - r)) for r in rates] + [0.0])[:, None]
    np.testing.assert_allclose(ponder_divergence(same, prior), 0, atol=1e-6)


@pytest.mark.parametrize("scale", [0.3, 3.0])
def test_adaptive_computation_time(scale):
    logits = draw(scale=scale)
    h = sigmoid(logits)
    want, costs = np.zeros_like(h), []
    for b in range(6):
        total = 0.0
        for n in range(4):
            if total + h[n, b] >= 0.99 or n == 3:
                want[n, b] = 1 - total
                costs.append(n + 1 + 1 - total)
                break
            want[n, b] = h[n, b]
            total += h[n, b]
    weights, cost = act_weights(logits)
    np.testing.assert_allclose(weights, want, atol=1e-5)
    np.testing.assert_allclose(cost, costs, atol=1e-5)
    np.testing.assert_allclose(weights.sum(axis=0), 1, rtol=1e-5)


def test_every_loss_teaches():
    correct = draw() > 0.3
    losses = {
        "bce": lambda x: bce_loss(x, correct).sum(),
        "ponder": lambda x: ponder_divergence(x, 0.4).sum(),
        "act": lambda x: act_weights(x)[1].sum(),
    }
    for name, function in losses.items():
        check_grads(jax.jit(function), (draw(scale=0.4),), order=1, modes=["rev"], rtol=1e-2)
        slope = jax.grad(function)(jnp.asarray(draw(scale=0.4)))
        assert (jnp.abs(slope).sum(axis=1)[:2] > 1e-3).all(), name
    # a longer remainder costs: to halt earlier is cheaper
    assert (jax.grad(losses["act"])(jnp.full((4, 6), -1.0))[:2] < 0).all()
    h = sigmoid(draw())
    want = -(correct * np.log(h) + ~correct * np.log(1 - h)).mean(axis=0)
    np.testing.assert_allclose(bce_loss(draw(), correct), want, rtol=1e-5)


def test_steps_fall_with_the_threshold():
    logits = draw(scale=2.0)
    np.testing.assert_array_equal(realised_steps(logits, 1.0), 4)
    np.testing.assert_array_equal(realised_steps(logits, 0.0), 1)
    h = sigmoid(logits)
    want = [next((n + 1 for n in range(4) if h[n, b] > 0.6), 4) for b in range(6)]
    np.testing.assert_array_equal(realised_steps(logits, 0.6), want)
    assert len(set(want)) > 1
    steps = [np.asarray(realised_steps(logits, t)) for t in (0.2, 0.5, 0.8)]
    assert (steps[0] <= steps[1]).all()
    assert (steps[1] <= steps[2]).all()
    assert steps[0].mean() < steps[2].mean()


def test_entropy_is_largest_when_undecided():
    logits = jnp.array([-200.0, -1.0, 0.0, 1.0, 200.0])
    p = 1 / (1 + np.exp(1.0))
    middle = -p * np.log(p) - (1 - p) * np.log(1 - p)
    np.testing.assert_allclose(binary_entropy(logits), [0, middle, np.log(2), middle, 0], atol=1e-6)
    assert np.isfinite(jax.grad(lambda x: binary_entropy(x).sum())(logits)).all()


@pytest.mark.parametrize("rows", [1, 4, 100])
def test_cross_entropy_in_chunks(rows):
    rng = np.random.default_rng(1)
    y: Any = rng.standard_normal((10, 5)).astype(np.float32)
    e: Any = rng.standard_normal((7, 5)).astype(np.float32)
    labels = rng.integers(0, 7, 10)
    labels[3] = -100

    def whole(y, e):
        logp = jax.nn.log_softmax(y @ e.T)
        return jnp.where(labels >= 0, -logp[jnp.arange(10), labels], 0)

    nll, correct = token_nll(y, e, jnp.array(labels), rows)
    np.testing.assert_allclose(nll, whole(y, e), atol=1e-5)
    np.testing.assert_array_equal(correct, (y @ e.T).argmax(1) == labels)
    # no full table of logits is ever there
    text = jax.jit(lambda y, e: token_nll(y, e, jnp.array(labels), rows)[0]).lower(y, e).as_text()
    assert ("tensor<10x7xf32>" in text) == (rows == 100)
    weights = jnp.asarray(rng.standard_normal(10), jnp.float32)

    def ours(y, e, weights):
        found: Any = weighted_nll(y, e, jnp.array(labels), weights, rows)
        return 3 * found[0]

    def theirs(y, e, weights):
        return 3 * (weights * whole(y, e)).sum()

    compiled = jax.jit(jax.value_and_grad(ours, (0, 1, 2)))
    got, wanted = compiled(y, e, weights), jax.value_and_grad(theirs, (0, 1, 2))(y, e, weights)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, wanted)
    assert ("tensor<10x7xf32>" in compiled.lower(y, e, weights).as_text()) == (rows == 100)


def test_the_heads_gradient_of_models_side_by_side_in_short_numbers():
    """Under `vmap`, with bfloat16 weights, and where one model has no label at all."""
    rng = np.random.default_rng(3)
    y = jnp.asarray(rng.standard_normal((2, 6, 5)), jnp.bfloat16)
    e = jnp.asarray(rng.standard_normal((2, 7, 5)), jnp.bfloat16)
    labels = jnp.asarray([rng.integers(0, 7, 6), [-100] * 6])
    weights = jnp.asarray(rng.random((2, 6)), jnp.float32)

    def ours(y, e, labels, weights):
        found: Any = weighted_nll(y, e, labels, weights, 4)
        return found[0]

    def theirs(y, e, labels, weights):
        logp = jax.nn.log_softmax(y @ e.T)
        picked = -jnp.take_along_axis(logp, jnp.maximum(labels, 0)[:, None], 1)[:, 0]
        return jnp.where(labels >= 0, weights * picked, 0).sum()

    got = jax.vmap(jax.grad(ours, (0, 1)))(y, e, labels, weights)
    long = [x.astype(jnp.float32) for x in (y, e)]
    wanted = jax.vmap(jax.grad(theirs, (0, 1)))(*long, labels, weights)
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(a.astype(jnp.float32), b, atol=2e-2)
        np.testing.assert_array_equal(a[1].astype(jnp.float32), 0)
    tie = jnp.zeros((1, 5)), jnp.ones((7, 5)), jnp.array([3])
    assert token_nll(*tie, 4)[1].all()  # no other is larger
