"""Equal layers in a row, some of them looped: what stands between embedding and head."""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from forge_jax.arch import positions, sizes
from forge_jax.arch.block import Block
from forge_jax.arch.conditioning import Condition, init_past, modulated
from forge_jax.arch.hierarchy import Coarse, in_runs, init_run
from forge_jax.arch.layers import linear, make_norm
from forge_jax.arch.levels import Level, runs_of
from forge_jax.arch.loops import loop_count
from forge_jax.arch.mixers.frame import Frame
from forge_jax.arch.mixers.latent import latent_of
from forge_jax.arch.mixing import Attention
from forge_jax.arch.schema import Arch
from forge_jax.arch.structure import Loops, Residual, Schedule

State = dict[str, tuple[Any, ...]]
"""What decoding keeps: per part, and per loop of the body, the layers' states (layers, ...).

With a hierarchy those of a part are a tuple, one entry per run of equal layers. Besides, under
"condition", what the source of the condition keeps.
"""


class Part(NamedTuple):
    """Layers of a stack that run in a row, `loops` times."""

    name: str
    layers: int
    loops: int


def parts_of(arch: Arch, train: bool) -> list[Part]:
    """The parts of a stack that have a layer."""
    r = arch.recurrence
    if r is None:
        return [Part("body", arch.n_layers, 1)]
    loops = r.loops or Loops()
    times = loops.train if train else loops.eval or loops.train
    parts = [
        Part("prelude", r.prelude, 1),
        Part("body", r.body, times),
        Part("coda", r.coda, 1),
    ]
    return [part for part in parts if part.layers]


def init_stack(arch: Arch, batch: int, length: int, dtype: jnp.dtype) -> State:
    """The states of a stack that has read nothing, with room for `length` tokens."""
    out, first = {}, 0
    for name, layers, loops in parts_of(arch, train=False):
        runs = runs_of(arch, first, layers)
        states = tuple(init_run(arch, run, batch, length, dtype) for run in runs)
        out[name] = (states if arch.hierarchy else states[0],) * loops
        first += layers
    if arch.cond is not None:
        out["condition"] = init_past(arch.cond, batch, arch.d_model)
    return out


def _call(layers, always, stream, frame: Frame, past):
    return layers(stream, frame, past, always)


def _where(condition, one, two):
    """`one` or `two`, leaf by leaf."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), one, two)


class Stack(nn.Module):
    """The layers of a canonical architecture, ending with a norm.

    Losses beside the cross entropy (balance of routers, free bits) are sown into the collection
    "losses".
    """

    arch: Arch
    context: int
    dtype: jnp.dtype
    unroll: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch time width"],
        at: Int[Array, " time"],
        knobs: dict[str, Any],
        state: State | None = None,
        *,
        sources: dict[str, Any] | None = None,
        train: bool = False,
        step: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "batch time width"], State | None]:
        """The tokens at positions `at` after all layers, and the state with them in it.

        `sources` are fields of the frame: what other stages hand in.
        """
        arch, frame = self.arch, Frame(at, self.turns(at, knobs), knobs, step, **sources or {})
        x, frame, kept = self.entered(x, frame, state, train)
        dual = arch.residual is not None and arch.residual.kind == "dual"
        stream, adapter, first = (x, x) if dual else (x,), self.adapter(), 0
        unrouted = arch.depth_router.min_layers if arch.depth_router else 0
        for part in parts_of(arch, train):
            layers = self.part(part.name, first, part.layers, knobs)
            always = jnp.arange(first, first + part.layers) < unrouted
            first += part.layers
            states = (None,) * part.loops if state is None else state[part.name]
            call = functools.partial(_call, layers, always)
            learning = train and part.name == "body"
            stream, kept[part.name] = self.looped(call, stream, frame, states, adapter, learning)
        return self.joined(stream), None if state is None else kept

    def entered(self, x, frame: Frame, state: State | None, train: bool):
        """The tokens with what is added before all layers, the frame and the first of the state."""
        arch = self.arch
        if arch.pos.kind == "learned":
            places = nn.Embed(self.context, arch.d_model, dtype=self.dtype, name="places")
            x = x + places(frame.positions)
        if arch.cond is None:
            return x, frame, {}
        past: Any = None if state is None else state["condition"]
        condition = Condition(arch.cond, self.dtype, name="condition")
        c, past = condition(x, frame, past, train)
        frame = frame._replace(condition=c)
        return modulated(arch.cond, "token", x, frame), frame, {"condition": past}

    def looped(self, call, stream, frame: Frame, states, adapter, learning: bool):
        """Layers as often as there are states; when `learning` with noise and drawn loops."""
        knobs, loops, kept = frame.knobs, len(states), []
        if learning and "noise" in knobs:
            stream = self.noisy(stream, knobs["noise"])
        anchor, count = stream, self.drawn_loops(loops, knobs, frame.step) if learning else None
        for loop, past in enumerate(states):
            before = stream
            if loop:
                stream = self.adapted(adapter, self.cut(stream, loop, count), anchor)
            if count is not None:
                frame = frame._replace(live=jnp.float32(loop < count))
            stream, past = call(stream, frame, past)
            if count is not None and loop:
                stream = _where(loop < count, stream, before)
            kept.append(past)
        return stream, tuple(kept)

    def part(self, name: str, first: int, layers: int, knobs: dict[str, Any]) -> Any:
        """The layers after the `first` ones: one scan, or one of each run in a hierarchy."""
        if self.arch.hierarchy is None:
            return self.layers(name, layers)
        runs = runs_of(self.arch, first, layers)
        scans = [self.layers(f"{name}_{run.first + 1}", run.layers, run.level) for run in runs]
        return in_runs(runs, scans, self.turns(jnp.arange(self.context), knobs))

    def layers(self, name: str, layers: int, level: Level | None = None) -> Any:
        """Equal layers as one scan, which compiles one of them."""
        scanned = nn.scan(
            Block if level is None else Coarse,
            variable_axes={"params": 0, "losses": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, 0, 0),  # pyright: ignore[reportArgumentType]
            length=layers,
            unroll=layers if self.unroll else 1,
        )
        own = () if level is None else (level,)
        return scanned(self.arch, self.dtype, *own, name=name)

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
        return linear("adapter", self.arch.d_model, self.dtype)

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
        norm = make_norm(self.arch.norm, "norm", self.dtype)
        if residual.kind == "dual":
            return stream[0] + norm(stream[1])
        return norm(stream[0])
