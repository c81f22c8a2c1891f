"""The model against a transcription of its equations in torch, public and corrected.

The transcription (`experiments.bench.eager_cognate`) runs layer by layer, token by token in the
memory, and takes its gradients from torch's autograd.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from forge_jax.models.cognate import Cognate, CognateConfig, Controls, init_carry, loss
from forge_jax.models.cognate.loss import loss_of

torch = pytest.importorskip("torch")
from experiments.bench import eager_cognate  # noqa: E402

pytestmark = pytest.mark.torch

CONFIG = CognateConfig(
    vocab_size=53,
    d_model=16,
    layers=2,
    heads=2,
    d_ff=20,
    max_positions=16,
    window=6,
    positions="learned",
    memory="ema",
    d_mem=6,
    gate_hidden=5,
    loss_rows=17,
    compat="reference",
)
BATCH, TIME = 3, 12
QUICK = {"xla_backend_optimization_level": 0}  # half the time to compile


def draw_params():
    """Random values in every leaf, so that no bias or norm is at a value that hides it."""
    shapes = jax.eval_shape(Cognate(CONFIG).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))[
        "params"
    ]
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        middle = 1.0 if path[-1].key == "scale" else 0.0
        return (middle + 0.3 * rng.standard_normal(leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def make_batch():
    rng = np.random.default_rng(1)
    tokens, labels = rng.integers(0, 53, (2, BATCH, TIME))
    labels[0, :4] = -100
    return tokens, labels, rng.standard_normal(CONFIG.d_mem).astype(np.float32)


@functools.partial(jax.jit, static_argnames="config", compiler_options=QUICK)
def run(config, params, tokens, labels, carry, threshold):
    """What the model gives, and the gradient of its loss."""

    def total(params):
        outputs: Any = Cognate(config).apply({"params": params}, tokens, None, carry)
        total, metrics = loss_of(config, params, outputs, labels, Controls(threshold))
        logits = Cognate(config).apply({"params": params}, outputs.answers, method="logits")
        return total, (outputs, total, metrics, logits)

    grads, out = jax.grad(total, has_aux=True)(params)
    return out, grads


def run_model(threshold, **changes):
    config = dataclasses.replace(CONFIG, **changes)
    params, (tokens, labels, memory) = draw_params(), make_batch()
    carry: Any = init_carry(dataclasses.replace(CONFIG, window=1), params, BATCH)
    # the public memory goes on from batch to batch: the rows continue a document
    state = carry.memory._replace(mean=jnp.broadcast_to(memory, (BATCH, CONFIG.d_mem)))
    carry = carry._replace(memory=state, last=jnp.zeros(BATCH, jnp.int32))
    return run(config, params, jnp.array(tokens), jnp.array(labels), carry, np.float32(threshold))


@pytest.mark.parametrize(("deep", "threshold"), [(False, 0.95), (True, 0.5)])
def test_forward_and_gradients_are_the_public_models(deep, threshold):
    tokens, labels, memory = (torch.tensor(x) for x in make_batch())
    config = dataclasses.replace(CONFIG, deep_supervision=deep)
    leaves, start = eager_cognate.tensors(draw_params(), config), memory.expand(BATCH, -1)
    wanted = eager_cognate.forward(leaves, tokens, labels, config, start, threshold)
    wanted.loss.backward()
    (outputs, total, metrics, logits), grads = run_model(threshold, deep_supervision=deep)

    def close(got, want):
        want = want.detach().numpy()
        np.testing.assert_allclose(got, want, atol=1e-5 * max(1, np.abs(want).max()))

    close(logits, torch.stack(wanted.logits))
    close(outputs.latents, torch.stack(wanted.latents))
    close(outputs.carry.memory.mean, wanted.memory)
    by_answer = jnp.stack([metrics[f"loss_step_{k}"] for k in range(4)])
    close(by_answer, torch.stack(wanted.ces))
    close(total, wanted.loss)
    assert float(metrics["loss_act"]) == pytest.approx(wanted.act.item())
    same_gradients(grads, leaves, config)


def same_gradients(grads, leaves, config):
    grads = eager_cognate.layered(grads, config)
    for (path, got), want in zip(
        jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(leaves), strict=True
    ):
        if want.grad is None:
            np.testing.assert_array_equal(got, 0, err_msg=str(path))
        else:
            scale = max(float(want.grad.abs().max()), 1e-4)
            np.testing.assert_allclose(got / scale, want.grad / scale, atol=1e-5, err_msg=str(path))


def test_the_defect_is_there_too():
    """Without deep supervision the public backbone learns from the gate's entropy alone."""
    _, grads = run_model(0.5, deep_supervision=False, gate_entropy=0.0)
    for part in ("layers", "ltm", "mag_gate", "norm", "pos_emb"):
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads["backbone"][part]))
    assert np.any(grads["backbone"]["token_emb"]["embedding"])


def test_the_corrected_model_is_its_transcription_too():
    """Causal windows, a read before the own write, attached features, a halting loss."""
    config = dataclasses.replace(CONFIG, compat="corrected", window=4)
    tokens, labels, _ = make_batch()
    params = draw_params()
    leaves = eager_cognate.tensors(params, config)
    wanted = eager_cognate.forward(leaves, torch.tensor(tokens), torch.tensor(labels), config)
    wanted.loss.backward()
    value = functools.partial(loss, Cognate(config))

    @functools.partial(jax.jit, compiler_options=QUICK)
    def ours(params):
        return jax.value_and_grad(value, has_aux=True)(params, jnp.array(tokens), jnp.array(labels))

    (total, metrics), grads = ours(params)
    np.testing.assert_allclose(total, wanted.loss.item(), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss_act"], wanted.act.item(), rtol=1e-5)
    same_gradients(grads, leaves, config)
