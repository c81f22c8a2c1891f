"""Compiled programs of candidates, kept in process by static structure and on disk by JAX.

Two documents that differ in traced scalars only (`arch.compile_key`) run in the same programs. The
directory on disk holds code that is run: it should be your own.
"""

import dataclasses
import functools
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.monitoring

from experiments.evolution import training
from experiments.evolution.tasks import Batches
from forge_jax import arch

CAPACITY = 32  # structures whose programs are kept
# Drawing parameters once is not worth optimizing.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
ON_DISK = {"/jax/compilation_cache/cache_hits": "disk_hits"}
ON_DISK |= {"/jax/compilation_cache/cache_misses": "disk_misses"}


class Programs(NamedTuple):
    """The three programs of one structure."""

    start: Any  # (key, rates) -> State
    train: Any  # (State, Batches, steps, key, knobs, rates) -> State; the state is donated
    score: Any  # (params, Batches, knobs) -> Score


@dataclasses.dataclass
class Cache:
    """Programs by structure, the last used last, and what they took."""

    kept: OrderedDict[Any, Programs] = dataclasses.field(default_factory=OrderedDict)
    hits: int = 0  # structures found in process
    misses: int = 0
    disk_hits: int = 0  # programs that came from the directory
    disk_misses: int = 0
    compile_s: float = 0.0
    known: int = 0  # results that no program had to find

    def counts(self) -> dict[str, Any]:
        """The counters."""
        names = ("hits", "misses", "disk_hits", "disk_misses", "compile_s", "known")
        return {name: getattr(self, name) for name in names}


def use_directory(path: Path | None) -> None:
    """Keep compiled programs of any size in `path`, unless the environment names a directory.

    None leaves JAX's settings as they are.
    """
    if path is None:
        return
    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore
        jax.config.update("jax_compilation_cache_dir", str(path.absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def programs_of(
    cache: Cache, spec: arch.Spec, chunk: Batches, held_out: Batches
) -> tuple[Programs, float]:
    """The programs of a document on batches of these shapes, and the seconds to compile them."""
    shapes = tuple(x.shape for x in (*chunk, *held_out))
    key = arch.compile_key(spec), shapes
    if key in cache.kept:
        cache.hits += 1
        cache.kept.move_to_end(key)
        return cache.kept[key], 0.0
    cache.misses += 1
    began = time.perf_counter()

    def count(event: str, **_: Any) -> None:
        if name := ON_DISK.get(event):
            setattr(cache, name, getattr(cache, name) + 1)

    jax.monitoring.register_event_listener(count)
    try:
        cache.kept[key] = compiled(spec, chunk, held_out)
    finally:
        jax.monitoring.unregister_event_listener(count)
        took = time.perf_counter() - began
        cache.compile_s += took
    if len(cache.kept) > CAPACITY:
        cache.kept.popitem(last=False)
    return cache.kept[key], took


def compiled(spec: arch.Spec, chunk: Batches, held_out: Batches) -> Programs:
    """Compile the programs of a document, all at once: the compiler runs outside Python's lock."""
    network, knobs = training.network_of(spec), arch.knobs(spec)
    rates, key = training.rates_of(spec), jax.random.key(0)

    def bound(f, donate: Sequence[int] = (), options: dict[str, Any] | None = None):
        return jax.jit(
            functools.partial(f, network), donate_argnums=tuple(donate), compiler_options=options
        )

    state = jax.eval_shape(functools.partial(training.start, network), key, rates)
    lowered = (
        bound(training.start, options=QUICK).lower(key, rates),
        bound(training.train, (0,)).lower(state, chunk, 1, key, knobs, rates),
        bound(training.score).lower(state.params, held_out, knobs),
    )
    with ThreadPoolExecutor(len(lowered)) as pool:
        return Programs(*pool.map(lambda x: x.compile(), lowered))
