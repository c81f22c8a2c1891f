"""The Cognate model: a windowed backbone, a long-term memory as a gate, recursion, halting.

    tokens -> embeddings -> layers (scanned) -> norm -> y
    y -> memory -> m;  features = gate(y, m)
    features -> recursion -> answers y_0 .. y_T, latent states z_0 .. z_T
    logits_k = y_k E^T with the tied embedding E;  halting logit_k = w . z_k + b

Everything is causal and nothing crosses from one document or sequence to another, except with
compat="reference".
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from forge_jax.models.cognate.attention import (
    EMPTY,
    KeysValues,
    Place,
    WindowAttention,
    find_place,
    turn_of,
)
from forge_jax.models.cognate.config import CognateConfig, Controls
from forge_jax.models.cognate.gate import MagGate
from forge_jax.models.cognate.halting import ActHead
from forge_jax.models.cognate.memory import Ema, EmaMemory, Stream, TitansMemory, init_memory
from forge_jax.models.cognate.recursion import Recursion
from forge_jax.models.cognate.remat import rematted
from forge_jax.models.cognate.titans import Measures


class Carry(NamedTuple):
    """What a stream of tokens leaves behind, `window - 1` slots of keys and values each."""

    layers: KeysValues  # with the layers as first axis
    features: KeysValues
    answers: KeysValues  # with the recursion steps as first axis
    memory: Ema | Stream | None  # None starts afresh
    segments: Int[Array, "batch slots"]  # the document of each slot
    last: Int[Array, " batch"]  # the document of the last token
    position: Int[Array, " batch"]  # of the next token, if it is of the same document


class Features(NamedTuple):
    """What the backbone hands to the recursion."""

    values: Float[Array, "batch time d"]
    entropy: Float[Array, "batch time"]  # of the gate, nats
    measures: Measures  # of the memory, (batch, time) each
    place: Place


class Outputs(NamedTuple):
    """What the model says of every token, after 0 .. steps recursion steps."""

    answers: Float[Array, "answers batch time d"]
    latents: Float[Array, "answers batch time d"]
    halt_logits: Float[Array, "answers batch time"]
    features: Features
    carry: Carry


def empty_carry(config: CognateConfig, batch: int, slots: int, memory) -> Carry:
    """A carry of no tokens, with room for `slots` keys."""

    def pair(heads, *stack):
        zeros = jnp.zeros((*stack, batch, heads, slots, config.d_model // heads))
        return zeros, zeros

    return Carry(
        pair(config.heads, config.layers),
        pair(config.answer_heads),
        pair(config.answer_heads, config.steps),
        memory,
        jnp.full((batch, slots), EMPTY, jnp.int32),
        jnp.full(batch, EMPTY, jnp.int32),
        jnp.zeros(batch, jnp.int32),
    )


def init_carry(config: CognateConfig, params: Any, batch: int) -> Carry:
    """The carry before any token of `batch` streams."""
    memory = init_memory(config, params["backbone"]["ltm"], batch)
    return empty_carry(config, batch, config.window - 1, memory)


class GatedMlp(nn.Module):
    """SwiGLU (Shazeer 2020, eq. 6): down(silu(gate(x)) * up(x)), no biases."""

    config: CognateConfig

    @nn.compact
    def __call__(self, x):
        def dense(name, width):
            init = nn.initializers.normal(0.02)
            return nn.Dense(width, use_bias=False, kernel_init=init, name=name)

        inner = self.config.d_ff
        h = nn.silu(dense("w_gate", inner)(x)) * dense("w_up", inner)(x)
        return dense("w_down", self.config.d_model)(h)


class Layer(nn.Module):
    """One pre-norm residual block, as the body of a scan over layers."""

    config: CognateConfig
    deterministic: bool

    @nn.compact
    def __call__(self, x, cache: KeysValues, place: Place, turn):
        config = self.config
        drop = nn.Dropout(config.dropout, deterministic=self.deterministic)
        h = nn.RMSNorm(epsilon=1e-6, name="norm1")(x)
        y, cache = WindowAttention(config, name="attention")(h, place, turn, cache)
        x = x + drop(y)
        h = nn.RMSNorm(epsilon=1e-6, name="norm2")(x)
        return x + drop(GatedMlp(config, name="mlp")(h)), cache


class Backbone(nn.Module):
    """Embeddings, layers, memory and gate."""

    config: CognateConfig

    def setup(self):
        config, init = self.config, nn.initializers.normal(0.02)
        self.token_emb = nn.Embed(config.vocab_size, config.d_model, embedding_init=init)
        if config.positions == "learned":
            self.pos_emb = nn.Embed(config.max_positions, config.d_model, embedding_init=init)
        self.norm = nn.RMSNorm(epsilon=1e-6)
        memory: Any = EmaMemory if config.memory == "ema" else TitansMemory
        self.ltm = memory(config)
        self.mag_gate = MagGate(config)

    @nn.compact
    def __call__(self, tokens, place: Place, carry: Carry, controls: Controls, deterministic: bool):
        """Features, the caches of the layers, and the memory's carry."""
        config = self.config
        x = self.token_emb(tokens)
        if config.positions == "learned":
            x = x + self.pos_emb(place.positions)
        turn = turn_of(config, config.heads, place.positions)
        stack = nn.scan(
            rematted(Layer, config.remat),
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast, nn.broadcast),  # pyright: ignore[reportArgumentType]
            length=config.layers,
        )
        x, caches = stack(config, deterministic, name="layers")(x, carry.layers, place, turn)
        y = self.norm(x)
        m, memory, measures = self.ltm(y, place.is_first, carry.memory, controls)
        mixed, entropy = self.mag_gate(y, m)
        return Features(mixed, entropy, measures, place), caches, memory


class Cognate(nn.Module):
    """Next-token answers of token rows, with or without a carry."""

    config: CognateConfig

    def setup(self):
        self.backbone = Backbone(self.config)
        self.trm = Recursion(self.config)
        self.act_head = ActHead(self.config.d_model)

    def features(
        self,
        tokens: Int[Array, "batch time"],
        segments: Int[Array, "batch time"] | None = None,
        carry: Carry | None = None,
        controls: Controls = Controls(),  # noqa: B008  a tuple of numbers
        deterministic: bool = True,
    ) -> tuple[Features, Carry]:
        """The backbone alone; the carry's recursion part is still that of the tokens before."""
        segments = check_tokens(self.config, tokens, segments)
        if carry is None:
            carry = empty_carry(self.config, tokens.shape[0], 0, None)
        elif carry.last.shape[0] != tokens.shape[0]:
            raise ValueError(
                f"`carry` must be of {tokens.shape[0]} rows, as `tokens` are, got "
                f"{carry.last.shape[0]}."
            )
        place = find_place(segments, carry.segments, carry.last, carry.position)
        features, layers, memory = self.backbone(tokens, place, carry, controls, deterministic)
        new = carry._replace(
            layers=layers,
            memory=memory,
            segments=place.key_segments[:, tokens.shape[1] :],
            last=segments[:, -1],
            position=place.positions[:, -1] + 1,
        )
        return features, new

    def __call__(
        self,
        tokens: Int[Array, "batch time"],
        segments: Int[Array, "batch time"] | None = None,
        carry: Carry | None = None,
        controls: Controls = Controls(),  # noqa: B008
        deterministic: bool = True,
    ) -> Outputs:
        """Every answer of every token, and the carry.

        Args:
            tokens: ids; one outside the vocabulary gives NaN.
            segments: the document of each token, at least 0, equal for one run of tokens; default
                one document a row. Padding is a document of its own.
            carry: of the tokens before; without one the rows start, and the new carry has no room
                for keys: begin a stream with `init_carry`. Its tokens and these must fit into
                `max_positions`, which is known only at run time: the caller counts.
            controls: thresholds and capacity; scalars.
            deterministic: no dropout; else the rng `dropout` is needed.

        Raises:
            ValueError: shapes do not fit, or a row is longer than `max_positions`.
        """
        features, new = self.features(tokens, segments, carry, controls, deterministic)
        if carry is None:
            carry = empty_carry(self.config, tokens.shape[0], 0, None)
        turn = turn_of(self.config, self.config.answer_heads, features.place.positions)
        answers, latents, caches = self.trm(
            features.values, features.place, turn, carry.features, carry.answers
        )
        new = new._replace(features=caches[0], answers=caches[1])
        return Outputs(answers, latents, self.act_head(latents), features, new)

    def logits(self, answers: Float[Array, "... d"]) -> Float[Array, "... vocab"]:
        """Logits of answers, float32; of any number of leading axes."""
        return self.backbone.token_emb.attend(answers).astype(jnp.float32)

    def halt_logits(self, latents: Float[Array, "... d"]) -> Float[Array, "..."]:
        """Halting logits of latent states."""
        return self.act_head(latents)

    def begin(self, features: Float[Array, "batch time d"], positions: Int[Array, "batch time"]):
        """First answer and latent state, the features' keys and values, and the rotation."""
        turn = turn_of(self.config, self.config.answer_heads, positions)
        return (*self.trm.start(features), self.trm.feature_keys(features, turn), turn)

    def answer_keys(self, y, turn) -> KeysValues:
        """Keys and values of answers, as the next step sees them."""
        return self.trm.answer_keys(y, turn)

    def step(self, y, z, features: KeysValues, answers: KeysValues, place: Place, turn):
        """One recursion step."""
        return self.trm.step(y, z, features, answers, place, turn)


def check_tokens(config: CognateConfig, tokens, segments) -> Int[Array, "batch time"]:
    """The documents of `tokens`, all one if not given.

    Raises:
      ValueError: `tokens` is no table of ids, too long, or of another shape than `segments`.
    """
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer) or not tokens.size:
        raise ValueError(
            f"`tokens` must be integers of shape (batch, time), got {tokens.dtype}{tokens.shape}."
        )
    if tokens.shape[1] > config.max_positions:
        raise ValueError(
            f"`tokens` may have at most {config.max_positions} positions (`max_positions`), got "
            f"{tokens.shape[1]}."
        )
    if segments is None:
        return jnp.zeros(tokens.shape, jnp.int32)
    if segments.shape != tokens.shape:
        raise ValueError(
            f"`segments` must have the tokens' shape {tokens.shape}, got {segments.shape}."
        )
    return segments


def count_parameters(config: CognateConfig) -> int:
    """Trainable numbers of a model, without making them."""
    shapes = jax.eval_shape(Cognate(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))
