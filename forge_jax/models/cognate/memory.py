"""The two long-term memories as modules: the seed's moving average and Titans' neural memory.

Both hold a state per sequence, start afresh with every document, and hand out a carry from which a
stream goes on as if it had never been cut.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from forge_jax.models.cognate.config import CognateConfig, Controls
from forge_jax.models.cognate.recurrence import before, linear_recurrence
from forge_jax.models.cognate.titans import (
    Measures,
    Titans,
    Weights,
    Writes,
    init_titans,
    recall_chunk,
    relative_surprise,
)


class Ema(NamedTuple):
    """The state of the moving average; float32, per sequence."""

    mean: Float[Array, "batch d_mem"]
    surprise: Float[Array, " batch"]  # sum over the document's tokens
    tokens: Float[Array, " batch"]
    held: Float[Array, " batch"]


class Stream(NamedTuple):
    """The state of the neural memory between two pieces of a stream."""

    state: Titans  # at the start of the current chunk, per sequence
    pending: Float[Array, "batch rows d"]  # inputs: taps - 1 of before, then the chunk's
    pending_first: Bool[Array, "batch rows"]
    count: Int[Array, ""]  # how many of the chunk's there are


def init_ema(batch: int, d_mem: int) -> Ema:
    """Nothing remembered."""
    zeros = jnp.zeros(batch)
    return Ema(jnp.zeros((batch, d_mem)), zeros, zeros, zeros)


def init_stream(weights: Weights, batch: int, config: CognateConfig) -> Stream:
    """The initial weights in every sequence, and an empty chunk."""
    state = jax.tree.map(lambda x: jnp.broadcast_to(x, (batch, *x.shape)), init_titans(weights))
    rows = batch, config.memory_taps - 1 + config.memory_chunk
    return Stream(state, jnp.zeros((*rows, config.d_model)), jnp.zeros(rows, bool), jnp.int32(0))


def average(
    state: Ema,
    x: Float[Array, "time d_mem"],
    is_first: Bool[Array, " time"],
    decay: float,
    reads_own: bool,
) -> tuple[Float[Array, "time d_mem"], Ema, Measures]:
    r"""$m_t = \gamma m_{t-1} + (1 - \gamma) x_t$ along one sequence, and what each token reads.

    That is $m_{t-1}$, or with `reads_own`, as in the reference, $m_t$. The surprise at a token is
    how far it lies from the mean that it finds.
    """
    goes_on = jnp.where(is_first, 0.0, 1.0)
    keep = decay * goes_on
    means = linear_recurrence(keep[:, None], (1 - decay) * x, state.mean)
    found = goes_on[:, None] * before(means, state.mean)
    far = jnp.sqrt((jax.lax.stop_gradient(x - found) ** 2).sum(-1))
    relative, total, tokens = relative_surprise(far, is_first, state.surprise, state.tokens)
    held = linear_recurrence(keep, jnp.ones_like(keep), state.held)
    new = Ema(means[-1], total, tokens, held[-1])
    return (means if reads_own else found), new, Measures(far, relative, held)


class EmaMemory(nn.Module):
    """An exponential moving average of a projection; `controls` do not act on it."""

    config: CognateConfig

    @nn.compact
    def __call__(self, x, is_first, carry: Ema | None, controls: Controls):
        del controls
        config, init = self.config, nn.initializers.normal(0.02)
        down = nn.Dense(config.d_mem, use_bias=False, kernel_init=init, name="w_down")(x)
        carry = init_ema(x.shape[0], config.d_mem) if carry is None else carry

        def one(state, row, first):
            return average(state, row, first, config.memory_decay, config.is_reference)

        read, carry, measures = jax.vmap(one)(carry, down.astype(jnp.float32), is_first)
        up = nn.Dense(config.d_model, use_bias=False, kernel_init=init, name="w_up")
        return up(read.astype(x.dtype)), carry, measures


class TitansMemory(nn.Module):
    """The neural memory of `forge_jax.models.cognate.titans` between two projections.

    Each of keys, values and queries passes a depthwise convolution over the document's last
    `memory_taps` tokens and SiLU; keys and queries then have unit length (the paper's section 4.4,
    whose convolutions mix features besides). The convolution is what binds neighbours: a value
    stands behind its key. At first a query is the key that the next token would write under, but
    for that token's own part: it asks what came when the document stood here before. This start is
    ours; queries drawn on their own seldom learn to find a key (`docs/log.md`).

    The three rates are sigmoids of the token. Whatever a token forgets, capacity bounds what is
    kept: keep = (1 - alpha) exp(-1 / capacity).
    """

    config: CognateConfig

    def setup(self):
        config, init = self.config, nn.initializers.normal(0.02)

        def dense(width, init: Any = init):
            return nn.Dense(width, use_bias=False, kernel_init=init)

        def as_keys(key, shape, dtype):
            if not self.is_initializing():  # Flax asks for the shape at every call
                return init(key, shape, dtype)
            return jnp.copy(self.w_k.variables["params"]["kernel"])  # `writes` makes keys first

        self.w_k, self.w_v = dense(config.d_mem), dense(config.d_mem)
        self.w_q = dense(config.d_mem, as_keys if config.memory_taps > 1 else init)
        self.taps = (None,) * 3
        if config.memory_taps > 1:
            shape = config.memory_taps, config.d_mem
            k, v = (self.param(name, _taps_init, shape) for name in ("conv_k", "conv_v"))
            self.taps = k, v, self.param("conv_q", lambda *_: jnp.pad(k[1:], ((0, 1), (0, 0))))
        self.w_up = dense(config.d_model)
        # to begin with three quarters of the error, momentum 0.12 and nearly nothing forgotten
        self.w_rates = nn.Dense(
            3, kernel_init=init, bias_init=lambda *_: jnp.array([1.1, -2.0, -6.0])
        )
        self.initial = tuple(
            self.param(f"memory_{i}", _memory_init, (config.d_mem, config.d_mem))
            for i in range(config.memory_depth)
        )

    def writes(self, x, is_first, controls: Controls) -> tuple[Writes, Float[Array, "..."]]:
        """What the tokens bring, and their queries; `x` has `memory_taps` - 1 tokens of before.

        A step of 1/2 in all would correct a linear memory at once.
        """
        document = jnp.cumsum(is_first, axis=1)
        keys, values, queries = (
            nn.silu(convolved(w(x).astype(jnp.float32), taps, document))
            for w, taps in zip((self.w_k, self.w_v, self.w_q), self.taps, strict=True)
        )
        older = self.config.memory_taps - 1
        is_first = is_first[:, older:]
        rates = nn.sigmoid(self.w_rates(x[:, older:]).astype(jnp.float32))
        keep = (1 - rates[..., 2]) * jnp.exp(-1 / jnp.asarray(controls.capacity, jnp.float32))
        # momentum adds a step up to 1 / (1 - eta) times
        theta = rates[..., 0] * (1 - rates[..., 1]) / 2
        writes = Writes(_unit(keys), values, theta, rates[..., 1], keep, is_first)
        return writes, _unit(queries)

    def __call__(self, x, is_first, carry: Stream | None, controls: Controls):
        config = self.config
        batch, time, _ = x.shape
        chunk, older = config.memory_chunk, config.memory_taps - 1
        is_fresh = carry is None
        if is_fresh:
            carry = init_stream(self.initial, batch, config)
        # a carry may hold up to chunk - 1 tokens, behind which the new ones are put
        blocks = -(-(time + (0 if is_fresh else chunk - 1)) // chunk)
        begin = 0 if is_fresh else carry.count
        x, is_first = (
            jax.lax.dynamic_update_slice_in_dim(
                jnp.pad(old, ((0, 0), (0, blocks * chunk)) + ((0, 0),) * (old.ndim - 2)),
                new.astype(old.dtype),
                older + begin,
                axis=1,
            )
            for old, new in ((carry.pending.astype(x.dtype), x), (carry.pending_first, is_first))
        )
        used = older + blocks * chunk
        written = self.writes(x[:, :used], is_first[:, :used], controls)
        initial = tuple(w.astype(jnp.float32) for w in self.initial)

        def one(state, row_writes, row_queries):
            return recall_chunk(
                state, initial, row_writes, row_queries, controls.surprise_threshold
            )

        def body(state, inputs):
            block, *rows = inputs
            read, new, measures = jax.vmap(one)(state, *rows)
            is_full = (block + 1) * chunk <= begin + time
            state = jax.tree.map(lambda a, b: jnp.where(is_full, a, b), new, state)
            return state, (read, measures)

        rows = jax.tree.map(lambda y: _blocks(y, chunk), written)
        state, out = jax.lax.scan(body, carry.state, (jnp.arange(blocks), *rows))
        read, measures = jax.tree.map(
            lambda y: jax.lax.dynamic_slice_in_dim(_unblocks(y), begin, time, axis=1), out
        )
        end = begin + time
        left = tuple(
            jax.lax.dynamic_slice_in_dim(y, end // chunk * chunk, older + chunk, axis=1)
            for y in (x, is_first)
        )
        carry = Stream(
            state, left[0].astype(jnp.float32), left[1], jnp.asarray(end % chunk, jnp.int32)
        )
        return self.w_up(read.astype(x.dtype)), carry, measures


def _memory_init(key, shape):
    """Keys of unit length come out of the first matrix and SiLU with about unit length."""
    return jax.nn.initializers.variance_scaling(4.0, "fan_in", "normal")(key, shape)


def _taps_init(key, shape):
    """Every channel another mixture of its tokens, of about the size that one token has."""
    return jax.random.normal(key, shape) / jnp.sqrt(shape[0])


def convolved(
    x: Float[Array, "batch rows d"],
    taps: Float[Array, "taps d"] | None,
    document: Int[Array, "batch rows"],
) -> Float[Array, "batch time d"]:
    """A causal depthwise convolution within documents, of the rows after the first taps - 1.

    The first of `taps` is the token's own.
    """
    if taps is None:
        return x
    time = x.shape[1] - len(taps) + 1
    last = len(taps) - 1
    own, total = document[:, last:], taps[0] * x[:, last:]
    for back in range(1, len(taps)):
        shifted = slice(last - back, last - back + time)
        same = (document[:, shifted] == own)[..., None]
        total = total + jnp.where(same, taps[back] * x[:, shifted], 0)
    return total


def _unit(x: Float[Array, "... d"]) -> Float[Array, "... d"]:
    """Of unit length."""
    return x * jax.lax.rsqrt((x**2).sum(-1, keepdims=True) + 1e-6)


def _blocks(x: Float[Array, "batch time ..."], chunk: int):
    """(batch, time, ...) -> (blocks, batch, chunk, ...)"""
    return x.reshape(x.shape[0], -1, chunk, *x.shape[2:]).swapaxes(0, 1)


def _unblocks(x: Float[Array, "blocks batch chunk ..."]):
    """Undo `_blocks`."""
    x = x.swapaxes(0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def init_memory(config: CognateConfig, params, batch: int) -> Ema | Stream:
    """The carry before any token; `params` are the memory's own."""
    if config.memory == "ema":
        return init_ema(batch, config.d_mem)
    weights = tuple(params[f"memory_{i}"] for i in range(config.memory_depth))
    return init_stream(weights, batch, config)
