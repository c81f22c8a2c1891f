"""compat="reference" against a transcription of the public model's published equations in torch.

The transcription runs layer by layer, token by token in the memory, and takes its gradients from
torch's autograd.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from forge_jax.models.cognate import Cognate, CognateConfig, Controls, init_carry
from forge_jax.models.cognate.loss import loss_of, task_loss

torch = pytest.importorskip("torch")
F = torch.nn.functional
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


def linear(x, p):
    y = x @ p["kernel"]
    return y + p["bias"] if "bias" in p else y


def rms(x, p):
    return x * torch.rsqrt((x**2).mean(-1, keepdim=True) + 1e-6) * p["scale"]


def attention(q, k, v, heads, mask=None):
    def split(x):
        return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)

    q, k, v = split(q), split(k), split(v)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).reshape(q.shape[0], q.shape[2], -1)


def cross(p, x, seen):
    d = x.shape[-1]
    w, b = p["in_proj"]["kernel"], p["in_proj"]["bias"]
    q = x @ w[:, :d] + b[:d]
    k, v = seen @ w[:, d : 2 * d] + b[d : 2 * d], seen @ w[:, 2 * d :] + b[2 * d :]
    return linear(attention(q, k, v, CONFIG.answer_heads), p["out_proj"])


def layer_norm(x, p):
    return F.layer_norm(x, x.shape[-1:], p["scale"], p["bias"], 1e-5)


def two_layers(x, p):
    return linear(torch.relu(linear(x, p["mlp_0"])), p["mlp_2"])


def oracle(params, tokens, labels, memory, threshold, deep):
    """Every number that the public forward returns."""
    backbone, trm = params["backbone"], params["trm"]
    time = tokens.shape[1]
    x = backbone["token_emb"]["embedding"][tokens] + backbone["pos_emb"]["embedding"][:time]
    i = torch.arange(time)
    mask = (i[:, None] - i).abs() <= CONFIG.window // 2
    for n in range(CONFIG.layers):
        p = jax.tree.map(lambda leaf, n=n: leaf[n], backbone["layers"])
        h, a = rms(x, p["norm1"]), p["attention"]
        q, k, v = (linear(h, a[name]) for name in ("w_q", "w_k", "w_v"))
        x = x + linear(attention(q, k, v, CONFIG.heads, mask), a["w_o"])
        h, m = rms(x, p["norm2"]), p["mlp"]
        x = x + linear(F.silu(linear(h, m["w_gate"])) * linear(h, m["w_up"]), m["w_down"])
    y = rms(x, backbone["norm"])
    state, states = memory, []
    for t in range(time):
        new = linear(y[:, t], backbone["ltm"]["w_down"])
        state = CONFIG.memory_decay * state + (1 - CONFIG.memory_decay) * new
        states.append(state)
    m = linear(torch.stack(states, 1), backbone["ltm"]["w_up"])
    p = backbone["mag_gate"]
    g = torch.sigmoid(linear(torch.relu(linear(torch.cat([y, m], -1), p["w_concat"])), p["w_gate"]))
    entropy = -(g * torch.log(g + 1e-8) + (1 - g) * torch.log(1 - g + 1e-8))
    features = g * y + (1 - g) * m

    z = linear(features, trm["z0_proj"])
    y = linear(z, trm["y0_proj"])
    ys, zs = [y], [z]
    for step in range(CONFIG.steps):
        seen = features if step == 0 else features.detach()
        for _ in range(CONFIG.micro_steps):
            p = trm["refiner"]
            u = [z, cross(p["feature_attn"], z, seen), cross(p["answer_attn"], z, y)]
            z = layer_norm(z + two_layers(torch.cat(u, -1), p), p["norm"])
        p = trm["updater"]
        y = layer_norm(y + two_layers(torch.cat([y, z], -1), p), p["norm"])
        ys.append(y)
        zs.append(z)
        y, z = y.detach(), z.detach()
    logits = [y @ backbone["token_emb"]["embedding"].T for y in ys]
    halts = [torch.sigmoid(linear(z, params["act_head"]["w_halt"]))[..., 0].mean(1) for z in zs]
    steps = [
        next((k + 1 for k, h in enumerate(halts) if h[b] > threshold), len(halts))
        for b in range(BATCH)
    ]
    ces = [F.cross_entropy(x.flatten(0, 1), labels.flatten(), ignore_index=-100) for x in logits]
    weights = CONFIG.step_weights
    ce = sum(w * x for w, x in zip(weights, ces, strict=True)) / sum(weights) if deep else ces[-1]
    act, gate = 0.01 * sum(steps) / BATCH, -1e-3 * entropy.mean()
    return {
        "logits": torch.stack(logits),
        "latents": torch.stack(zs),
        "memory": state.mean(0),
        "ces": torch.stack(ces),
        "steps": steps,
        "loss": ce + act + gate,
    }


def make_batch():
    rng = np.random.default_rng(1)
    tokens, labels = rng.integers(0, 53, (2, BATCH, TIME))
    labels[0, :4] = -100
    return tokens, labels, rng.standard_normal(CONFIG.d_mem).astype(np.float32)


@functools.partial(jax.jit, compiler_options=QUICK)
def run(params, tokens, labels, carry, threshold, shares):
    """What the model gives, and the gradient of its losses' sum by `shares`.

    The losses are those of the four answers and of the gate; the halting loss has no gradient.
    """

    def losses(params):
        outputs: Any = Cognate(CONFIG).apply({"params": params}, tokens, None, carry)
        total, metrics = loss_of(CONFIG, params, outputs, labels, Controls(threshold))
        logits = Cognate(CONFIG).apply({"params": params}, outputs.answers, method="logits")
        parts = [metrics[f"loss_step_{k}"] for k in range(4)]
        return jnp.stack([*parts, metrics["loss_gate"]]), (outputs, total, metrics, logits)

    _, back, out = jax.vjp(losses, params, has_aux=True)
    return out, back(shares)[0]


def run_model(threshold, deep, gate=1.0):
    params, (tokens, labels, memory) = draw_params(), make_batch()
    carry: Any = init_carry(dataclasses.replace(CONFIG, window=1), params, BATCH)
    # the public memory goes on from batch to batch: the rows continue a document
    state = carry.memory._replace(mean=jnp.broadcast_to(memory, (BATCH, CONFIG.d_mem)))
    carry = carry._replace(memory=state, last=jnp.zeros(BATCH, jnp.int32))
    weights = np.array(CONFIG.step_weights if deep else (0, 0, 0, 1))
    shares = np.append(weights / weights.sum(), gate).astype(np.float32)
    arrays = jnp.array(tokens), jnp.array(labels)
    return run(params, *arrays, carry, np.float32(threshold), shares)


@pytest.mark.parametrize(("deep", "threshold"), [(False, 0.95), (True, 0.5)])
def test_forward_and_gradients_are_the_public_models(deep, threshold):
    (tokens, labels, memory), leaves = make_batch(), draw_params()
    leaves = jax.tree.map(lambda x: torch.tensor(x, requires_grad=True), leaves)
    start = torch.tensor(memory).expand(BATCH, -1)
    wanted = oracle(leaves, torch.tensor(tokens), torch.tensor(labels), start, threshold, deep)
    wanted["loss"].backward()
    (outputs, total, metrics, logits), grads = run_model(threshold, deep)

    def close(got, want):
        want = want.detach().numpy()
        np.testing.assert_allclose(got, want, atol=1e-5 * max(1, np.abs(want).max()))

    close(logits, wanted["logits"])
    close(outputs.latents, wanted["latents"])
    close(outputs.carry.memory.mean.mean(0), wanted["memory"])
    by_answer = jnp.stack([metrics[f"loss_step_{k}"] for k in range(4)])
    close(by_answer, wanted["ces"])
    if not deep:
        config = dataclasses.replace(CONFIG, deep_supervision=False)
        total = total + task_loss(config, by_answer) - task_loss(CONFIG, by_answer)
    close(total, wanted["loss"])
    assert float(metrics["loss_act"]) == pytest.approx(0.01 * np.mean(wanted["steps"]))
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
    _, grads = run_model(0.5, deep=False, gate=0.0)
    for part in ("layers", "ltm", "mag_gate", "norm", "pos_emb"):
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads["backbone"][part]))
    assert np.any(grads["backbone"]["token_emb"]["embedding"])
