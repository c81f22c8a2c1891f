"""From a document to a Flax Linen module of tokens to logits."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from forge_jax.arch import positions, sizes
from forge_jax.arch.block import Block, init_state
from forge_jax.arch.canonical import canonical
from forge_jax.arch.knobs import arch_knobs
from forge_jax.arch.layers import linear, make_norm
from forge_jax.arch.loops import loop_count
from forge_jax.arch.mixers.frame import Frame
from forge_jax.arch.mixers.latent import latent_of
from forge_jax.arch.mixing import Attention
from forge_jax.arch.schema import Arch, Spec
from forge_jax.arch.structure import Loops, Residual, Schedule

DTYPES = {"fp32": jnp.float32, "bf16": jnp.bfloat16, "fp16": jnp.bfloat16}


class Cache(NamedTuple):
    """What decoding keeps: per part of the stack, and per loop of its body, the layers' states."""

    parts: dict[str, tuple[Any, ...]]  # every leaf (layers, ...)
    index: Int[Array, ""]  # tokens read so far


def build(spec: Spec, *, unroll: bool = False) -> "Network":
    """The module of a document; `unroll` writes every layer out, for counts and short stacks."""
    full = canonical(spec)
    return Network(
        full.arch, sizes.vocabulary_of(full), full.train.ctx_len, full.train.dtype, unroll
    )


def init_cache(spec: Spec, batch: int, length: int) -> Cache:
    """An empty cache for `length` tokens in each of `batch` rows.

    Raises:
      ValueError: the document keeps no cache, or the context is shorter than `length`.
    """
    full = canonical(spec)
    arch, context = full.arch, full.train.ctx_len
    if arch.kv_policy and arch.kv_policy.cache == "none":
        raise ValueError("`spec` keeps no cache (arch.kv_policy.cache is none): read all at once.")
    if length > context:
        raise ValueError(f"`length` must be at most train.ctx_len {context}, got {length}.")
    state = init_state(arch, batch, length, DTYPES[full.train.dtype])
    parts = {}
    for name, layers, loops in parts_of(arch, train=False):
        stack = jax.tree.map(lambda x, n=layers: jnp.broadcast_to(x, (n, *x.shape)), state)
        parts[name] = (stack,) * loops
    return Cache(parts, jnp.int32(0))


def _where(condition, one, two):
    """`one` or `two`, leaf by leaf."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), one, two)


def parts_of(arch: Arch, train: bool) -> list[tuple[str, int, int]]:
    """Name, layers and loops of each part of the stack that has a layer."""
    r = arch.recurrence
    if r is None:
        return [("body", arch.n_layers, 1)]
    loops = r.loops or Loops()
    times = loops.train if train else loops.eval or loops.train
    parts = [("prelude", r.prelude, 1), ("body", r.body, times), ("coda", r.coda, 1)]
    return [part for part in parts if part[1]]


class Network(nn.Module):
    """Next-token logits; take it from `build`, which brings the document to canonical form.

    Losses beside the cross entropy (balance of routers) are sown into the collection "losses".
    """

    arch: Arch
    vocabulary: int
    context: int
    precision: str = "fp32"
    unroll: bool = False

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "batch time"],
        cache: Cache | None = None,
        *,
        knobs: dict[str, Any] | None = None,
        train: bool = False,
        step: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "batch time vocab"], Cache | None]:
        """Logits, and the cache with these tokens in it.

        `knobs` replaces the document's scalars (`knobs(spec)` gives them); `train` takes the
        training loops, as many as their schedule draws, and adds the recurrence's noise: for both
        `rngs={"noise": key}` is needed; `step` counts training steps.

        Raises:
          ValueError: there are more tokens than the context holds.
        """
        arch, dtype, time = self.arch, DTYPES[self.precision], tokens.shape[1]
        if time > self.context:
            raise ValueError(f"Wanted at most train.ctx_len {self.context} tokens, got {time}.")
        knobs = arch_knobs(arch) if knobs is None else knobs
        at = jnp.arange(time) + (0 if cache is None else cache.index)
        x = nn.Embed(self.vocabulary, arch.d_model, dtype=dtype, name="embed")(tokens)
        if arch.pos.kind == "learned":
            x = x + nn.Embed(self.context, arch.d_model, dtype=dtype, name="places")(at)
        frame = Frame(at, self.turns(at, knobs), knobs, step)
        dual = arch.residual is not None and arch.residual.kind == "dual"
        stream, kept = (x, x) if dual else (x,), {}
        adapter, first = self.adapter(), 0
        unrouted = arch.depth_router.min_layers if arch.depth_router else 0
        for name, layers, loops in parts_of(arch, train):
            stack, always = self.stack(name, layers), jnp.arange(first, first + layers) < unrouted
            first += layers
            if name == "body" and train and "noise" in knobs:
                stream = self.noisy(stream, knobs["noise"])
            anchor, states = stream, []
            count = self.drawn_loops(loops, knobs, step) if name == "body" and train else None
            for loop in range(loops):
                before = stream
                if loop:
                    stream = self.adapted(adapter, self.cut(stream, loop, count), anchor)
                state = None if cache is None else cache.parts[name][loop]
                if count is not None:
                    frame = frame._replace(live=jnp.float32(loop < count))
                stream, state = stack(stream, frame, state, always)
                if count is not None and loop:
                    stream = _where(loop < count, stream, before)
                states.append(state)
            kept[name], frame = tuple(states), frame._replace(live=1.0)
        logits = linear("head", self.vocabulary, dtype)(self.joined(stream)).astype(jnp.float32)
        return logits, None if cache is None else Cache(kept, cache.index + time)

    def stack(self, name: str, layers: int) -> Any:
        """Equal layers as one scan, which compiles one of them."""
        scanned = nn.scan(
            Block,
            variable_axes={"params": 0, "losses": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, 0, 0),  # pyright: ignore[reportArgumentType]
            length=layers,
            unroll=layers if self.unroll else 1,
        )
        return scanned(self.arch, DTYPES[self.precision], name=name)

    def turns(self, at, knobs) -> Any:
        """Per mixer the rotations of its heads, or None; of all positions for a latent cache."""
        arch = self.arch
        if arch.pos.rope is None:
            return None
        if latent_of(arch):
            at = jnp.arange(self.context)
        return tuple(
            positions.turns(arch.pos, at, sizes.turned(m, arch), knobs, self.context)
            if isinstance(m, Attention) and m.pos != "none"
            else None
            for m in sizes.mixers(arch.mix_unit)
        )

    def noisy(self, stream, deviation):
        """Normal noise on the state that enters the body."""
        key = self.make_rng("noise")
        return tuple(x + deviation * jax.random.normal(key, x.shape, x.dtype) for x in stream)

    def drawn_loops(self, loops: int, knobs: dict[str, Any], step) -> Int[Array, ""] | None:
        """Loops of this training step, where a schedule decides; all are computed."""
        schedule = self.schedule()
        if schedule is None:
            return None
        return loop_count(schedule, loops, knobs, step, self.make_rng("noise"))

    def schedule(self) -> Schedule | None:
        """The schedule of the training loops, if there is one."""
        recurrence = self.arch.recurrence
        return recurrence.loops.schedule if recurrence and recurrence.loops else None

    def cut(self, stream, loop: int, count):
        """The stream without gradient before the last `backprop` loops."""
        schedule = self.schedule()
        if count is None or schedule is None or schedule.backprop is None:
            return stream
        return _where(loop == count - schedule.backprop, jax.lax.stop_gradient(stream), stream)

    def adapter(self) -> nn.Module | None:
        """The linear map between loops; all loops and both streams share it."""
        recurrence = self.arch.recurrence
        if recurrence is None or recurrence.adapter != "concat_linear":
            return None
        return linear("adapter", self.arch.d_model, DTYPES[self.precision])

    def adapted(self, adapter, stream, anchor):
        """What the body reads in its next loop."""
        if adapter is not None:
            pairs = zip(anchor, stream, strict=True)
            return tuple(adapter(jnp.concatenate(pair, axis=-1)) for pair in pairs)
        recurrence = self.arch.recurrence
        if recurrence is not None and recurrence.adapter == "residual":
            return jax.tree.map(jnp.add, stream, anchor)
        return stream

    def joined(self, stream):
        """The end of the stack: a norm, or ResiDual's x + LN(d); DeepNet ends normed already."""
        residual = self.arch.residual or Residual()
        if residual.kind == "deepnet":
            return stream[0]
        norm = make_norm(self.arch.norm, "norm", DTYPES[self.precision])
        if residual.kind == "dual":
            return stream[0] + norm(stream[1])
        return norm(stream[0])
