"""Tiny recursion (Jolicoeur-Martineau 2025, arXiv 2510.04871): an answer improved step by step.

A latent state z is refined a few times from the features, the answer y and itself, then the answer
is updated from z; one set of weights serves every step. Supervision can stop after any step. As in
the paper the features stay attached in every step, and by default y and z are detached between
steps.

Deviations: the seed's refiner and updater take the place of the paper's single two-layer net, and
attention is causal, because every position predicts the next token instead of filling a grid.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from forge_jax.models.cognate.attention import (
    CrossAttention,
    KeysValues,
    Place,
    behind,
    torch_uniform,
)
from forge_jax.models.cognate.config import CognateConfig
from forge_jax.models.cognate.remat import rematted


def _norm(name: str) -> nn.LayerNorm:
    # the fast variance, E[x^2] - E[x]^2, cancels where the mean is large
    return nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, name=name)


def _dense(width: int, fan_in: int, name: str | None = None) -> nn.Dense:
    start = torch_uniform(fan_in)
    return nn.Dense(width, kernel_init=start, bias_init=start, name=name)


class Refiner(nn.Module):
    """z <- norm(z + W_2 relu(W_1 [z; attention to the features; attention to the answer]))."""

    config: CognateConfig

    def setup(self):
        d = self.config.d_model
        self.feature_attn, self.answer_attn = (
            CrossAttention(self.config),
            CrossAttention(self.config),
        )
        self.mlp_0, self.mlp_2 = _dense(2 * d, 3 * d), _dense(d, 2 * d)
        self.norm = _norm("norm")

    def __call__(self, z, features: KeysValues, answers: KeysValues, place: Place, turn):
        seen = (
            self.feature_attn(z, features, place, turn),
            self.answer_attn(z, answers, place, turn),
        )
        inner = nn.relu(self.mlp_0(jnp.concatenate([z, *seen], axis=-1)))
        return self.norm(z + self.mlp_2(inner))


class Updater(nn.Module):
    """y <- norm(y + V_2 relu(V_1 [y; z]))."""

    config: CognateConfig

    @nn.compact
    def __call__(self, y, z):
        d = self.config.d_model
        inner = nn.relu(_dense(2 * d, 2 * d, "mlp_0")(jnp.concatenate([y, z], axis=-1)))
        return _norm("norm")(y + _dense(d, 2 * d, "mlp_2")(inner))


class Recursion(nn.Module):
    """All steps of the recursion over features (batch, time, d)."""

    config: CognateConfig

    def setup(self):
        d = self.config.d_model
        self.refiner, self.updater = Refiner(self.config), Updater(self.config)
        self.z0_proj, self.y0_proj = _dense(d, d), _dense(d, d)

    def start(self, features):
        """The answer and the latent state before any step."""
        z = self.z0_proj(features)
        return self.y0_proj(z), z

    def feature_keys(self, features, turn) -> KeysValues:
        """What every step attends to."""
        return self.refiner.feature_attn.keys_values(features, turn)

    def answer_keys(self, y, turn) -> KeysValues:
        """What one step attends to: the answers it begins with."""
        return self.refiner.answer_attn.keys_values(y, turn)

    def step(self, y, z, features: KeysValues, answers: KeysValues, place: Place, turn):
        """One recursion step: refine z, then update y."""
        for _ in range(self.config.micro_steps):
            z = self.refiner(z, features, answers, place, turn)
        return self.updater(y, z), z

    def __call__(
        self,
        features: Float[Array, "batch time d"],
        place: Place,
        turn,
        feature_cache: KeysValues,
        answer_caches: KeysValues,
    ):
        """Answers and latent states of the start and of every step, and the new caches.

        `answer_caches` have the steps as their first axis.
        """
        config, time = self.config, features.shape[1]
        y, z = self.start(features)
        attached = self.feature_keys(features, turn)
        # in the reference the later steps send no gradient to the features
        detached = attached
        if config.is_reference:
            detached = self.feature_keys(jax.lax.stop_gradient(features), turn)

        def body(module, state, inputs):
            step, cache = inputs

            def later(after, first):
                return jax.tree.map(lambda a, b: jnp.where(step > 0, a, b), after, first)

            y, z = later(jax.lax.stop_gradient(state), state) if config.detach_steps else state
            seen = behind(feature_cache, later(detached, attached))
            answers = behind(cache, module.answer_keys(y, turn))
            y, z = module.step(y, z, seen, answers, place, turn)
            return (y, z), (y, z, tuple(a[:, :, time:] for a in answers))

        body = rematted(body, config.remat)
        scan = nn.scan(body, variable_broadcast="params", split_rngs={"params": False})
        _, (ys, zs, caches) = scan(self, (y, z), (jnp.arange(config.steps), answer_caches))
        kept = tuple(k[:, :, time:] for k in behind(feature_cache, attached))
        answers, latents = (jnp.concatenate([a[None], b]) for a, b in ((y, ys), (z, zs)))
        return answers, latents, (kept, caches)
