"""Feed-forward networks: dense, and a mixture of experts."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from forge_jax.arch import sizes
from forge_jax.arch.layers import linear
from forge_jax.arch.mixers.frame import Frame
from forge_jax.arch.schema import Arch
from forge_jax.arch.structure import DenseFFN, MoEFFN
from forge_jax.models.dense import matmul

ACTIVATIONS = {
    "relu": nn.relu,
    "gelu": nn.gelu,
    "silu": nn.silu,
    "swiglu": nn.silu,
    "geglu": nn.gelu,
}
GATED = ("swiglu", "geglu")
BALANCE = 0.01  # weight of the balance loss (Fedus et al. 2021, section 2.2)


def balance_loss(
    probabilities: Float[Array, "... choices"], picked: Float[Array, "... choices"]
) -> Float[Array, ""]:
    r"""$n \sum_i f_i P_i$ (Fedus et al. 2021, eqs. 4-6): 1 where the load is even, n at most.

    f is the share of picks, P the mean probability; the gradient flows through P.
    """
    axes = tuple(range(probabilities.ndim - 1))
    share = picked.mean(axes) / picked.mean(axes).sum()
    return probabilities.shape[-1] * (jax.lax.stop_gradient(share) * probabilities.mean(axes)).sum()


def keep_largest(x: Float[Array, "... n"], k: int) -> Float[Array, "... n"]:
    """1 at the k largest of the last axis (the first of equal ones), 0 elsewhere."""
    _, index = jax.lax.top_k(x, k)
    return jax.nn.one_hot(index, x.shape[-1], dtype=x.dtype).sum(-2)


class Dense(nn.Module):
    """W2 f(W1 x), or W2 (f(Wg x) * W1 x) where f gates (Shazeer 2020, eqs. 5-6); no biases."""

    ffn: DenseFFN
    width: int
    dtype: jnp.dtype
    gain: float = 1.0

    @nn.compact
    def __call__(self, x):
        hidden, f = sizes.hidden_of(self.ffn, self.width), ACTIVATIONS[self.ffn.act]
        inner = linear("up", hidden, self.dtype, self.gain)(x)
        if self.ffn.act in GATED:
            inner = f(linear("gate", hidden, self.dtype, self.gain)(x)) * inner
        else:
            inner = f(inner)
        return linear("down", self.width, self.dtype, self.gain)(inner)


class MoE(nn.Module):
    """Sum of the `topk` most probable experts, each times its probability (Shazeer et al. 2017).

    With a `capacity` c an expert takes, of the tokens up to t, at most ceil(c topk (t + 1) /
    experts), in their order: the rule looks back only, so that decoding follows it with `taken`,
    the tokens taken so far. All experts are computed, picked or not.
    """

    ffn: MoEFFN
    width: int
    dtype: jnp.dtype
    gain: float = 1.0

    @nn.compact
    def __call__(self, x, frame: Frame, taken: Int[Array, "batch experts"] | None = None):
        ffn, hidden = self.ffn, sizes.hidden_of(self.ffn, self.width)
        logits = linear("router", ffn.experts, jnp.dtype("float32"))(x)
        probabilities = jax.nn.softmax(logits, axis=-1)
        picked = keep_largest(probabilities, ffn.topk)
        self.sow("losses", "balance", frame.live * BALANCE * balance_loss(probabilities, picked))
        before = jnp.zeros((x.shape[0], ffn.experts), jnp.int32) if taken is None else taken
        wanted = before[:, None] + jnp.cumsum(picked, axis=1).astype(jnp.int32)
        if ffn.capacity is not None:
            load = ffn.capacity * ffn.topk * (frame.positions + 1) / ffn.experts
            picked = picked * (wanted <= jnp.ceil(load)[:, None])
        inner = self.experts("up", x, hidden)
        if ffn.act in GATED:
            inner = ACTIVATIONS[ffn.act](self.experts("gate", x, hidden)) * inner
        else:
            inner = ACTIVATIONS[ffn.act](inner)
        weights = (picked * probabilities).astype(self.dtype)
        down = self.kernel("down", hidden, self.width).reshape(-1, self.width)
        y = matmul((inner * weights[..., None]).reshape(*x.shape[:2], -1), down)
        return y, None if taken is None else wanted[:, -1]

    def experts(self, name: str, x, hidden: int):
        """One linear map per expert of every token: all as one product."""
        wide = self.kernel(name, self.width, hidden).swapaxes(0, 1).reshape(self.width, -1)
        return matmul(x.astype(self.dtype), wide).reshape(*x.shape[:2], -1, hidden)

    def kernel(self, name: str, rows: int, columns: int) -> Any:
        """The maps of all experts."""
        scaled = nn.initializers.variance_scaling
        init = scaled(self.gain**2, "fan_in", "truncated_normal", batch_axis=0)
        return self.param(name, init, (self.ffn.experts, rows, columns)).astype(self.dtype)


def init_taken(arch: Arch, batch: int) -> Int[Array, "batch experts"] | None:
    """No tokens taken by any expert; None for a dense network."""
    if isinstance(arch.ffn, DenseFFN):
        return None
    return jnp.zeros((batch, arch.ffn.experts), jnp.int32)
