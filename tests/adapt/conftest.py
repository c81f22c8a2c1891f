"""A decoder of one layer with three experts, and questions in one batch."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from forge_jax import models, svf

SPEC = models.DecoderSpec(
    vocab_size=29,
    hidden_size=16,
    intermediate_size=40,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
)
DECODER = models.Decoder(SPEC)


class Case:
    """Weights, experts and questions."""

    experts_count = 3

    def __init__(self):
        rng = np.random.default_rng(0)
        self.spec, self.decoder, self.adapted = SPEC, DECODER, svf.transform(DECODER)
        tokens = rng.integers(0, 29, (8, 6), dtype=np.int32)
        mask = np.arange(6) >= rng.integers(0, 4, (8, 1))
        params = jax.jit(DECODER.init)(jax.random.key(0), tokens)["params"]
        params = jax.tree.map(lambda w: 3 * w if w.ndim == 2 else w, params)  # peaked, no ties
        self.factors, ones = svf.decompose(params, svf.is_attention_or_mlp)
        self.experts: Any = {
            k: jnp.asarray(1 + rng.normal(scale=0.5, size=(3, *z.shape)), jnp.float32)
            for k, z in ones.items()
        }
        self.tokens, self.mask = tokens, mask

    def params_of(self, alpha):
        """Ordinary weights of a mixture."""
        return svf.materialize(self.factors, svf.mix(self.experts, jnp.asarray(alpha, jnp.float32)))

    def base(self):
        """The base's `apply`."""
        return functools.partial(self.adapted.apply, {"params": self.factors})


@pytest.fixture(scope="session")
def case():
    return Case()
