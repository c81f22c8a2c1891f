"""The Free Transformer's latent: a few random bits per token, inferred while training."""

import zlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from forge_jax.arch.layers import linear, make_norm
from forge_jax.arch.pipeline import Code
from forge_jax.arch.schema import NormKind


def code_bits(bits: int) -> Float[np.ndarray, "codes bits"]:
    """The bits of every code, the lowest first."""
    return (np.arange(2**bits)[:, None] >> np.arange(bits) & 1).astype(np.float32)


def drawn(key: Array, batch: int, at: Int[Array, " time"], bits: int) -> Int[Array, "batch time"]:
    """Uniform codes, each by its position: the same whether a token is read alone or with others.

    The prior of a row does not hang on its tokens.
    """

    def one(place):
        return jax.random.randint(jax.random.fold_in(key, place), (batch,), 0, 2**bits)

    return jax.vmap(one, out_axes=1)(at)


class LatentSampler(nn.Module):
    r"""Codes of H bits per token, embedded (Fleuret 2025, "The Free Transformer", section 3).

    Training: bits are Bernoulli with the logits W norm(x); the code's row passes forward, and the
    gradient of all rows' probabilities backward, $Y + G - \mathrm{sg}(G)$ with $G_d = \prod_h P(b_h
    = d_h)$. $\frac1T \sum_t \max(0, \mathrm{KL}_t - \kappa \ln 2)$ is sown into "losses", with
    $\mathrm{KL}_t = H \ln 2 - \sum_h H_2(\sigma_h)$ nats. In use codes are uniform and nothing is
    read: what is scored never saw its own target. Deviation: the paper's one block that infers the
    bits is any stage of the pipeline, and codes may be embedded through `dim` features.
    """

    code: Code
    width: int
    norm: NormKind
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch time width"] | None, batch: int, at: Int[Array, " time"]
    ) -> Float[Array, "batch time width"]:
        """The codes' embeddings; without x they are drawn from the prior."""
        bits, dim, kappa = self.code
        table = self.param("codes", nn.initializers.normal(dim**-0.5), (2**bits, dim))
        table = table.astype(self.dtype)
        if x is None:
            # without a key always the same codes, and of every latent its own
            own = jax.random.key(zlib.crc32("/".join(self.path).encode()))
            key = self.make_rng("latent") if self.has_rng("latent") else own
            z = table[drawn(key, batch, at, bits)]
        else:
            normed = make_norm(self.norm, "norm", jnp.dtype("float32"))(x)
            logits = linear("bits", bits, jnp.dtype("float32"))(normed)
            z = self.inferred(logits, table)
            divergence = bits * np.log(2) - entropy(logits).sum(-1)
            loss = jnp.maximum(0.0, divergence - kappa * np.log(2)).mean()
            self.sow("losses", "latent", loss)
        return linear("out", self.width, self.dtype)(z) if dim != self.width else z

    def inferred(self, logits: Float[Array, "batch time bits"], table):
        """Rows of sampled codes; the gradient is that of the expected row."""
        bits = jax.random.bernoulli(self.make_rng("noise"), nn.sigmoid(logits))
        index = (bits << np.arange(bits.shape[-1])).sum(-1)
        every = code_bits(bits.shape[-1])
        log_p = nn.log_sigmoid(logits) @ every.T + nn.log_sigmoid(-logits) @ (1 - every).T
        mean = jnp.exp(log_p).astype(table.dtype) @ jax.lax.stop_gradient(table)
        return table[index] + mean - jax.lax.stop_gradient(mean)


def entropy(logits: Float[Array, "..."]) -> Float[Array, "..."]:
    """Nats of a Bernoulli variable."""
    p = nn.sigmoid(logits)
    return -(p * nn.log_sigmoid(logits) + (1 - p) * nn.log_sigmoid(-logits))
