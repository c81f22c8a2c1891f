"""Which layers of a hierarchy are coarse: the meaning of `arch.hierarchy`, without any arrays.

Layers are counted from 1 over the whole stack, prelude and coda included. A layer is coarse if its
number is a multiple of some level's `every`; of several such levels the one with the largest
decides. Its blocks have 1 / downsample tokens.
"""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

from forge_jax.arch.schema import Arch
from forge_jax.arch.structure import HierarchyLevel
from forge_jax.arch.text import Finding

DOWNSAMPLE = 0.5  # where a level does not say
MOST_LAYERS = 4096  # of a stack with levels, whose layers are counted one by one


class Level(NamedTuple):
    """What all layers of one level share."""

    tokens: int  # of a block
    up_proj: bool


class Run(NamedTuple):
    """Equal layers in a row."""

    first: int  # number of layers before, counted over the whole stack
    layers: int
    level: Level | None = None  # None where they work on tokens


def level_of(level: HierarchyLevel) -> Level:
    """What the level says."""
    return Level(round(1 / (level.downsample or DOWNSAMPLE)), level.up_proj)


def plan(arch: Arch) -> list[Level | None]:
    """The level of every layer."""
    out: list[Level | None] = [None] * arch.n_layers
    levels = arch.hierarchy.levels if arch.hierarchy else ()
    for level in sorted(levels, key=lambda level: level.every):
        _say(out, level.every, level_of(level))
    return out


def _say(out: list[Level | None], every: int, level: Level) -> bool:
    """Whether this changes the level of a layer; blocks of one token are no level."""
    old = out[every - 1 :: every]
    if level.tokens > 1:
        out[every - 1 :: every] = [level] * len(old)
    return out[every - 1 :: every] != old


def runs_of(arch: Arch, first: int, layers: int) -> list[Run]:
    """The runs of `layers` layers that follow the `first` ones of a stack."""
    if arch.hierarchy is None:
        return [Run(first, layers)]
    runs, at = [], first
    for level, group in itertools.groupby(plan(arch)[first : first + layers]):
        runs.append(Run(at, len(list(group)), level))
        at += runs[-1].layers
    return runs


def canonical_hierarchy(arch: Arch) -> dict[str, Any] | None:
    """The fewest levels, each as early as it can be, that say the same of every layer."""
    if arch.hierarchy is None:
        return None
    wanted, levels = plan(arch), []
    said: list[Level | None] = [None] * len(wanted)
    for every, level in enumerate(wanted, start=1):
        if level is not None and level != said[every - 1]:
            _say(said, every, level)
            fields = {"downsample": 1 / level.tokens, "up_proj": level.up_proj}
            levels.append({"every": every, **fields})
    return {"levels": levels} if levels else None


def problems(arch: Arch, context: int) -> Iterator[Finding]:
    """Why a hierarchy cannot be built."""
    path = ("arch", "hierarchy")
    levels = arch.hierarchy.levels if arch.hierarchy else ()
    if levels and arch.n_layers > MOST_LAYERS:
        yield path, f"goes with at most {MOST_LAYERS} layers, got {arch.n_layers}"
    seen = set()
    for i, level in enumerate(levels):
        at = (*path, "levels", i)
        tokens = 1 / (level.downsample or DOWNSAMPLE)
        if tokens > context + 0.5:
            reason = f"makes blocks longer than train.ctx_len {context}, got {level.downsample}"
            yield (*at, "downsample"), reason
        elif abs(tokens - round(tokens)) > 1e-6:
            reason = f"must be 1 over a whole number of tokens, got {level.downsample}"
            yield (*at, "downsample"), reason
        if level.every in seen:
            yield (*at, "every"), f"must differ from level to level, got {level.every} again"
        seen.add(level.every)


def notes(arch: Arch) -> Iterator[Finding]:
    """Levels without effect."""
    said: list[Level | None] = [None] * min(arch.n_layers, MOST_LAYERS)
    levels = enumerate(arch.hierarchy.levels if arch.hierarchy else ())
    for i, level in sorted(levels, key=lambda pair: pair[1].every):
        path = ("arch", "hierarchy", "levels", i)
        if level.downsample is not None and 1 / level.downsample < 1.5:
            yield path, "has no effect: its blocks have one token"
        elif level.every > arch.n_layers:
            yield path, f"has no effect on {arch.n_layers} layers"
        elif not _say(said, level.every, level_of(level)):
            yield path, "has no effect: its layers are such already"
