r"""Layers that work on blocks of tokens.

In the spirit of Funnel-Transformer (Dai et al. 2020) and Hourglass (Nawrot et al. 2022), this
project's own reading: every r tokens are averaged, left-aligned, into one, the layer f runs on the
averages $p_j$, and what it changed is handed to the tokens that come when block j is complete:

$$ y_t = x_t + U (f(p)_j - p_j), \quad j = \lfloor (t + 1) / r \rfloor - 1 $$

with nothing added where j < 0 and U the identity, or a learned map (`up_proj`). No token sees a
later one, and the layer costs one r-th. Positions, windows and what a cache keeps count blocks in
such a layer; a condition, and what other stages hand in, is that of a block's last token. Of a
stream of two arrays (ResiDual) each is treated so, by the same U.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from forge_jax.arch.block import Block, init_state
from forge_jax.arch.layers import linear
from forge_jax.arch.levels import Level, Run
from forge_jax.arch.mixers.frame import Frame
from forge_jax.arch.mixers.latent import latent_of
from forge_jax.arch.schema import Arch


class State(NamedTuple):
    """What one coarse layer keeps; sums and changes per array of the stream."""

    sums: tuple[Float[Array, "batch width"], ...]  # float32, of the block that is not complete
    changes: tuple[Float[Array, "batch width"], ...]  # by the last block that is
    block: Any  # of the layer itself, a block where it usually has a token


def streams_of(arch: Arch) -> int:
    """Arrays of the stream."""
    return 2 if arch.residual is not None and arch.residual.kind == "dual" else 1


def init_run(arch: Arch, run: Run, batch: int, length: int, dtype: jnp.dtype) -> Any:
    """The states of equal layers that have read nothing, with room for `length` tokens."""
    if run.level is None:
        state = init_state(arch, batch, length, dtype)
    else:
        block = init_state(arch, batch, -(-length // run.level.tokens), dtype)
        empty = jnp.zeros((batch, arch.d_model))
        streams = streams_of(arch)
        state = State((empty,) * streams, (empty.astype(dtype),) * streams, block)
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (run.layers, *x.shape)), state)


def pooled(x: Float[Array, "batch time width"], tokens: int) -> Float[Array, "batch blocks width"]:
    """Means over complete blocks."""
    batch, time, width = x.shape
    whole = x[:, : time // tokens * tokens].reshape(batch, -1, tokens, width)
    return whole.mean(2, dtype=jnp.float32).astype(x.dtype)


def handed_back(
    changes: Float[Array, "batch blocks width"], tokens: int, time: int
) -> Float[Array, "batch time width"]:
    """The change by the last complete block, at each of `time` tokens."""
    spread = jnp.repeat(changes, tokens, axis=1)
    return jnp.pad(spread, [(0, 0), (tokens - 1, 0), (0, 0)])[:, :time]


class Coarse(nn.Module):
    """A layer on blocks of tokens; `frame.turn` has the rotations of all positions.

    Losses beside are sown in the full pass only, not with a state.
    """

    arch: Arch
    dtype: jnp.dtype
    level: Level

    @nn.compact
    def __call__(self, stream, frame: Frame, state: State | None = None, always=False):
        if state is not None and not self.is_initializing():
            return self.read(stream, frame, state, always)
        tokens, short = self.level.tokens, self.level.tokens - stream[0].shape[1]
        whole = stream
        if short > 0:
            if not self.is_initializing():
                return stream, None
            # a network is initialised by a complete block, whatever it is given
            whole = tuple(jnp.pad(x, [(0, 0), (0, short), (0, 0)]) for x in stream)
        means = tuple(pooled(x, tokens) for x in whole)
        changes, _ = self.changes(means, jnp.arange(means[0].shape[1]), frame, None, always)
        pairs = zip(stream, changes, strict=True)
        return tuple(x + handed_back(c, tokens, x.shape[1]) for x, c in pairs), state

    def changes(self, means, at, frame: Frame, past, always):
        """What the layer changes in the blocks `at`, mapped, and its state with them."""
        turn = frame.turn
        if not latent_of(self.arch):  # which looks positions up by itself
            turn = jax.tree.map(lambda table: table[:, :, at], turn)
        # what comes with every token is taken at a block's last one, which is in this call
        last = (at + 1) * self.level.tokens - 1 - frame.positions[0]
        others = {n: getattr(frame, n) for n in ("condition", "kv", "mem")}
        others = {n: x if x is None else x[:, last] for n, x in others.items()}
        block = Block(self.arch, self.dtype, name="block")
        own = frame._replace(positions=at, turn=turn, **others)
        after, past = block(means, own, past, always)
        out = jax.tree.map(jnp.subtract, after, means)
        if self.level.up_proj:
            up = linear("up", self.arch.d_model, self.dtype)
            out = tuple(up(x) for x in out)
        return tuple(x.astype(self.dtype) for x in out), past

    def read(self, stream, frame: Frame, state: State, always):
        """The same of tokens that follow those of the state, whose block they may complete."""
        tokens, (batch, time, width) = self.level.tokens, stream[0].shape
        places = frame.positions[0] % tokens + jnp.arange(time)
        owner, given = places // tokens, (places + 1) // tokens
        first, least = frame.positions[0] // tokens, time // tokens
        empty = jnp.zeros((batch, least + 1, width))
        sums = tuple(
            jnp.concatenate([s[:, None], empty], axis=1).at[:, owner].add(x)
            for s, x in zip(state.sums, stream, strict=True)
        )

        def completing(blocks):
            def call(layer, past):
                known = tuple(x[:, None] for x in state.changes)
                if blocks:
                    means = tuple((s[:, :blocks] / tokens).astype(self.dtype) for s in sums)
                    at = first + jnp.arange(blocks)
                    new, past = layer.changes(means, at, frame, past, always)
                    pairs = zip(known, new, strict=True)
                    known = tuple(jnp.concatenate(pair, axis=1) for pair in pairs)
                return tuple(x[:, given] for x in known), tuple(x[:, -1] for x in known), past

            return call

        # Tokens complete as many blocks as fit into them, or one more. The losses stay outside:
        # both ways must sow the same.
        one_more, branches = given[-1] > least, (completing(least + 1), completing(least))
        added, last, past = nn.cond(one_more, *branches, self, state.block, variables="params")
        running = tuple(s[:, given[-1]] for s in sums)
        return jax.tree.map(jnp.add, stream, added), State(running, last, past)


def in_runs(runs: Sequence[Run], layers: Sequence[Callable[..., Any]], table: Any) -> Any:
    """Runs of equal layers, one after the other, called like one of them.

    `table` has the rotations of all positions, which coarse layers take their blocks' from.
    """

    def call(stream, frame: Frame, state, always):
        kept, at = [], 0
        for i, (run, layer) in enumerate(zip(runs, layers, strict=True)):
            own = frame if run.level is None else frame._replace(turn=table)
            past = None if state is None else state[i]
            stream, past = layer(stream, own, past, always[at : at + run.layers])
            kept.append(past)
            at += run.layers
        return stream, None if state is None else tuple(kept)

    return call
