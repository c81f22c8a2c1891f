"""Cognate's equations in eager PyTorch, written as one writes them: the peer of the races.

With compat="reference" it is the public model, defects included; else ours with the moving average
and learned positions: causal windows, a read before the own write, attached features, a halting
loss. Layer by layer, and token by token in the memory. The tests take gradients from it too.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
import torch.nn.functional as F

from forge_jax.models.cognate import CognateConfig

Tensors = dict[str, Any]  # as the Flax tree, but the layers are a list


class Result(NamedTuple):
    """What the forward pass returns."""

    logits: list[torch.Tensor]  # of every answer, (batch, time, vocab)
    latents: list[torch.Tensor]
    memory: torch.Tensor  # (batch, d_mem), after the last token
    ces: list[torch.Tensor]  # of every answer, nats
    act: torch.Tensor  # the halting loss
    loss: torch.Tensor


def layered(params: Any, config: CognateConfig) -> Any:
    """A Flax tree with a list of layers in place of stacked ones."""
    backbone = dict(params["backbone"])
    stacked = backbone.pop("layers")
    layers = [jax.tree.map(lambda x, n=n: x[n], stacked) for n in range(config.layers)]
    return {**params, "backbone": {**backbone, "layers": layers}}


def tensors(params: Any, config: CognateConfig) -> Tensors:
    """Trainable copies of Flax parameters."""
    return jax.tree.map(
        lambda x: torch.tensor(np.array(x), requires_grad=True), layered(params, config)
    )


def linear(x: torch.Tensor, p: Tensors) -> torch.Tensor:
    """Of a Flax kernel, (inputs, outputs)."""
    return F.linear(x, p["kernel"].T, p.get("bias"))


def rms(x: torch.Tensor, p: Tensors) -> torch.Tensor:
    """RMSNorm."""
    return F.rms_norm(x, x.shape[-1:], p["scale"], 1e-6)


def layer_norm(x: torch.Tensor, p: Tensors) -> torch.Tensor:
    """LayerNorm."""
    return F.layer_norm(x, x.shape[-1:], p["scale"], p["bias"], 1e-5)


def two_layers(x: torch.Tensor, p: Tensors) -> torch.Tensor:
    """The recursion's MLPs."""
    return linear(torch.relu(linear(x, p["mlp_0"])), p["mlp_2"])


def attention(q, k, v, heads: int, mask: torch.Tensor | None) -> torch.Tensor:
    """Scores, a mask, a softmax, (batch, time, d)."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def cross(p: Tensors, x, seen, heads: int, mask: torch.Tensor | None) -> torch.Tensor:
    """The recursion's attention, its three projections in one matrix."""
    d = x.shape[-1]
    w, b = p["in_proj"]["kernel"].T, p["in_proj"]["bias"]
    q = F.linear(x, w[:d], b[:d])
    k, v = F.linear(seen, w[d:], b[d:]).chunk(2, dim=-1)
    return linear(attention(q, k, v, heads, mask), p["out_proj"])


def windows(config: CognateConfig, time: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What backbone and recursion see: in the public model both ways, and everything."""
    i = torch.arange(time)
    back = i[:, None] - i
    if config.is_reference:
        return back.abs() <= config.window // 2, None
    causal = (back >= 0) & (back < config.window)
    return causal, causal


def average(p: Tensors, y: torch.Tensor, state: torch.Tensor, config: CognateConfig):
    """What each token reads of the moving average, and the average after the last."""
    new, reads = linear(y, p["w_down"]), []
    for t in range(y.shape[1]):
        after = config.memory_decay * state + (1 - config.memory_decay) * new[:, t]
        reads.append(after if config.is_reference else state)
        state = after
    return linear(torch.stack(reads, 1), p["w_up"]), state


def features(p: Tensors, tokens: torch.Tensor, memory: torch.Tensor, config: CognateConfig):
    """The backbone's features, the gate's entropy and the memory's state."""
    x = F.embedding(tokens, p["token_emb"]["embedding"])
    x = x + p["pos_emb"]["embedding"][: tokens.shape[1]]
    mask, _ = windows(config, tokens.shape[1])
    for layer in p["layers"]:
        h, a = rms(x, layer["norm1"]), layer["attention"]
        q, k, v = (linear(h, a[name]) for name in ("w_q", "w_k", "w_v"))
        x = x + linear(attention(q, k, v, config.heads, mask), a["w_o"])
        h, m = rms(x, layer["norm2"]), layer["mlp"]
        x = x + linear(F.silu(linear(h, m["w_gate"])) * linear(h, m["w_up"]), m["w_down"])
    y = rms(x, p["norm"])
    m, state = average(p["ltm"], y, memory, config)
    gate = p["mag_gate"]
    hidden = torch.relu(linear(torch.cat([y, m], -1), gate["w_concat"]))
    g = torch.sigmoid(linear(hidden, gate["w_gate"]))
    entropy = -(g * torch.log(g + 1e-8) + (1 - g) * torch.log(1 - g + 1e-8))
    return g * y + (1 - g) * m, entropy.mean(), state


def recursion(p: Tensors, seen: torch.Tensor, config: CognateConfig):
    """Answers and latent states of the start and of every step."""
    z = linear(seen, p["z0_proj"])
    y = linear(z, p["y0_proj"])
    ys, zs, heads = [y], [z], config.answer_heads
    _, mask = windows(config, seen.shape[1])
    refiner, updater = p["refiner"], p["updater"]
    for step in range(config.steps):
        if step:
            y, z = y.detach(), z.detach()
            seen = seen.detach() if config.is_reference else seen
        for _ in range(config.micro_steps):
            attended = [
                cross(refiner["feature_attn"], z, seen, heads, mask),
                cross(refiner["answer_attn"], z, y, heads, mask),
            ]
            z = z + two_layers(torch.cat([z, *attended], -1), refiner)
            z = layer_norm(z, refiner["norm"])
        y = layer_norm(y + two_layers(torch.cat([y, z], -1), updater), updater["norm"])
        ys.append(y)
        zs.append(z)
    return ys, zs


def forward(
    p: Tensors,
    tokens: torch.Tensor,
    labels: torch.Tensor,
    config: CognateConfig,
    memory: torch.Tensor | None = None,
    threshold: float = 0.5,
) -> Result:
    """The whole forward pass; `labels` are next tokens already, -100 for none."""
    if memory is None:
        memory = torch.zeros(len(tokens), config.d_mem)
    seen, entropy, state = features(p["backbone"], tokens, memory, config)
    ys, zs = recursion(p["trm"], seen, config)
    logits = [y @ p["backbone"]["token_emb"]["embedding"].T for y in ys]
    ces = [F.cross_entropy(x.flatten(0, 1), labels.flatten()) for x in logits]
    halts = [linear(z, p["act_head"]["w_halt"])[..., 0] for z in zs]
    if config.is_reference:
        act = torch.tensor(steps_taken(halts, threshold)).mean()
    else:
        act = halting(logits, halts, labels)
    act = config.halting_weight * act
    weights = config.step_weights
    ce = sum(w * x for w, x in zip(weights, ces, strict=True)) / sum(weights)
    loss = (ce if config.deep_supervision else ces[-1]) + act - config.gate_entropy * entropy
    return Result(logits, zs, state, ces, act, loss)


def steps_taken(halts: list[torch.Tensor], threshold: float) -> list[float]:
    """Answers of every row until its mean probability is above the threshold: the public rule."""
    rows = [torch.sigmoid(h).mean(1).tolist() for h in halts]
    taken = [[k + 1.0 for k, h in enumerate(rows) if h[b] > threshold] for b in range(len(rows[0]))]
    return [found[0] if found else float(len(rows)) for found in taken]


def halting(logits, halts, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of "this answer is right" over labelled tokens, averaged over answers."""
    asked, places, losses = labels >= 0, labels.clamp(min=0)[..., None], []
    for x, h in zip(logits, halts, strict=True):
        with torch.no_grad():
            right = x.gather(-1, places)[..., 0] >= x.amax(-1)
        losses.append(F.binary_cross_entropy_with_logits(h[asked], right[asked].float()))
    return torch.stack(losses).mean()


def trainer(
    params: Any, config: CognateConfig, tokens: np.ndarray, labels: np.ndarray, lr: float
) -> Callable[[], float]:
    """A function that makes a clipped step of AdamW and returns the loss before it."""
    p = tensors(params, config)
    given = torch.tensor(tokens).long(), torch.tensor(labels).long()
    leaves = jax.tree.leaves(p)
    tx = torch.optim.AdamW(leaves, lr=lr, weight_decay=0.01, fused=True)

    def run() -> float:
        tx.zero_grad()
        loss = forward(p, *given, config).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(leaves, 1.0)
        tx.step()
        return float(loss.detach())

    return run
