"""What every race shares: interleaved rounds, medians of ratios, floors, ceilings, the record.

A race is one task and several contenders, ours first. Before anything is timed every contender
runs once and must have computed what ours did. Then every round times each of them in turn; a
figure is the median over the rounds, a ratio the median of the rounds' ratios, so that a slow
spell of the machine falls on both sides. Compilation is timed apart, without the cache.
"""

import dataclasses
import functools
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
import tyro

from experiments.files import write_json
from experiments.run import clean_errors

OURS = "forge_jax"
PUBLIC = "public way"
TORCH = "same algebra in torch"


@dataclasses.dataclass(frozen=True)
class Args:
    out: tyro.conf.Positional[Path]
    """directory for the results"""
    rounds: int = 9
    """timed rounds; medians are over these"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """of the JAX side where it is timed; agreement is checked in float32"""


class Program(NamedTuple):
    """A compiled function of given arguments."""

    call: Any
    compile_s: float
    compile_cpu_s: float  # of this process, over all threads: other jobs do not add to it
    temporary_bytes: int | None


class Contender(NamedTuple):
    """One side of a race, ready to run."""

    run: Callable[[], Any]  # returns what it computed, once that is there
    compile_s: float | None = None
    held_bytes: int | None = None  # arrays that it keeps from run to run
    temporary_bytes: int | None = None  # as XLA counts them; torch does not count
    answer: Callable[[], Any] | None = None  # what to compare, where it is not what `run` returns

    def outcome(self) -> Any:
        """What the check compares."""
        return (self.answer or self.run)()


class Work(NamedTuple):
    """What one run of ours has to compute and to move, counted by hand."""

    flops: float
    bytes: float


class Race(NamedTuple):
    """One task, its contenders (ours first) and what is wanted of ours."""

    name: str
    title: str
    settings: Mapping[str, Any]
    entries: Mapping[str, Contender]
    difference: Callable[[Any, Any], float]  # (ours, theirs) -> 0 where they are the same
    tolerance: float
    floors: Mapping[str, float] = {}  # contender -> the least that its time / ours should be
    bounds: Mapping[str, tuple[float, float]] = {}  # what -> (measured, the most it should be)
    work: Work | None = None
    units: int = 1  # that one run does: what is reported is per unit
    unit: str = "run"
    timed: Contender | None = None  # ours in another dtype, in place of the first when timing
    summary: Callable[[], Mapping[str, Any]] = dict  # what to note once the race is over


def compiled(function: Callable[..., Any], *args: Any, donate: Sequence[int] = ()) -> Program:
    """Compile `function` for `args`, and say what that took."""
    started, spent = time.perf_counter(), time.process_time()
    call = jax.jit(function, donate_argnums=tuple(donate)).lower(*args).compile()
    took, cpu = time.perf_counter() - started, time.process_time() - spent
    memory: Any = call.memory_analysis()  # None on a backend that does not count
    return Program(call, took, cpu, None if memory is None else memory.temp_size_in_bytes)


def jax_contender(function: Callable[..., Any], *args: Any) -> Contender:
    """A contender that calls a pure function of fixed arguments."""
    program = compiled(function, *args)

    def run():
        return jax.block_until_ready(program.call(*args))

    return Contender(run, program.compile_s, size(args), program.temporary_bytes)


def size(tree: Any) -> int:
    """Bytes of all arrays and tensors in a tree."""
    return sum(x.nbytes for x in jax.tree.leaves(tree) if hasattr(x, "nbytes"))


def interleaved(runs: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Return seconds of each call in each round, after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if i:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def median_ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """Return the median of the rounds' ratios."""
    return float(np.median(np.array(over) / np.array(under)))


def as_numpy(x: Any) -> np.ndarray:
    """A NumPy array of a JAX or torch array on any device."""
    if isinstance(x, torch.Tensor):
        return x.detach().cpu().float().numpy() if x.is_floating_point() else x.cpu().numpy()
    return np.asarray(x, np.float32) if jnp.issubdtype(x.dtype, jnp.floating) else np.asarray(x)


def relative(ours: Any, theirs: Any) -> float:
    """The largest difference of a leaf, in units of that leaf's largest value."""
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    arrays = [(as_numpy(a), as_numpy(b)) for a, b in pairs]
    if any(a.shape != b.shape for a, b in arrays):
        return float("inf")
    # not Python's max, which loses a NaN that is not the first
    return float(np.max([np.abs(a - b).max() / np.abs(b).max() for a, b in arrays]))


def unequal(ours: Any, theirs: Any) -> float:
    """The share of the elements that differ."""
    a, b = as_numpy(ours), as_numpy(theirs)
    return float("inf") if a.shape != b.shape else float(np.mean(a != b))


def check(race: Race) -> dict[str, float]:
    """Run every contender once; how far each is from ours. A ValueError where it is too far."""
    ours, *others = race.entries
    wanted = race.entries[ours].outcome()
    found = {}
    for name in others:
        found[name] = race.difference(wanted, race.entries[name].outcome())
        if not found[name] <= race.tolerance:  # NaN is a difference too
            raise ValueError(
                f"{race.name}: {name} computed something else than {ours}, they differ by "
                f"{found[name]:.3g} where {race.tolerance:.3g} is allowed."
            )
    return found


def verdict(what: str, got: float, wanted: float, *, at_most: bool = False) -> dict[str, Any]:
    """Whether a floor (or a bound, with `at_most`) holds, and the share by which it is missed."""
    short = got / wanted - 1 if at_most else 1 - got / wanted
    return {
        "what": what,
        "got": got,
        "wanted": wanted,
        "at_most": at_most,
        "met": short <= 0,
        "missed_by": max(short, 0.0),
    }


def measure(race: Race, rounds: int, ceilings: Callable[[], Mapping[str, float]]) -> dict[str, Any]:
    """Check a race, time it and judge it: what is written down of it.

    The ceilings are the better of two measurements, before the race and after it.
    """
    before = ceilings()
    agreement = check(race)
    ours = next(iter(race.entries))
    entries = dict(race.entries)
    if race.timed is not None:
        wanted = race.entries[ours].outcome()
        agreement[f"{ours}, as timed"] = race.difference(race.timed.outcome(), wanted)
        entries[ours] = race.timed
    seconds = interleaved({name: entry.run for name, entry in entries.items()}, rounds)
    rows = {
        name: {
            "seconds": float(np.median(seconds[name])) / race.units,
            "over_ours": median_ratio(seconds[name], seconds[ours]),
            **{k: v for k, v in entry._asdict().items() if k not in ("run", "answer")},
        }
        for name, entry in entries.items()
    }
    floors = [
        verdict(f"{n} / {ours}", rows[n]["over_ours"], least) for n, least in race.floors.items()
    ]
    floors += [verdict(n, got, most, at_most=True) for n, (got, most) in race.bounds.items()]
    rates = {name: max(rate, before[name]) for name, rate in ceilings().items()}
    flop_s, *_, byte_s = rates.values()
    roofline = None
    if race.work is not None:
        least = (race.work.flops / flop_s + race.work.bytes / byte_s) / race.units
        roofline = {**race.work._asdict(), "seconds": least}
        roofline["of_measured"] = least / rows[ours]["seconds"]
    return {
        **{name: getattr(race, name) for name in ("name", "title", "settings", "unit")},
        "notes": dict(race.summary()),
        "rounds": rounds,
        "rows": rows,
        "agreement": {"tolerance": race.tolerance, **agreement},
        "floors": floors,
        "ceilings": rates,
        "roofline": roofline,
        "all_seconds": seconds,
        "load": os.getloadavg()[0],
    }


def best(run: Callable[[], Any], repeats: int = 5) -> float:
    """Return the least seconds of a call."""
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])


def ceilings(
    size: int | None = None, megabytes: int = 256, dtype: Any = jnp.float32
) -> dict[str, float]:
    """Measure the rates of one large product and of one large copy, and of products of 320."""
    if size is None:
        size = 1536 if jax.default_backend() == "cpu" else 8192  # large enough to fill it
    multiply = jax.jit(jnp.matmul)
    rates = {}
    for n in (size, 320):
        a = jax.random.normal(jax.random.key(0), (n, n), dtype)
        took = best(lambda: jax.block_until_ready(multiply(a, a)), 5 if n == size else 50)  # noqa: B023
        rates[f"{jnp.dtype(dtype).name} product of {n}, flop/s"] = 2 * n**3 / took
    b = torch.randn(min(size, 1536), min(size, 1536), dtype=torch.bfloat16)
    took = best(lambda: b @ b)
    rates[f"torch bfloat16 product of {len(b)}, flop/s"] = 2 * len(b) ** 3 / took
    x = jnp.zeros(megabytes * 2**18)
    copy = jax.jit(lambda x: x + 1)
    took = best(lambda: jax.block_until_ready(copy(x)))
    return rates | {"copy, bytes/s read and written": 2 * x.nbytes / took}


def installed(name: str) -> str | None:
    """The version of a package, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def processor() -> str:
    """The name of the processor, by which the ratios differ; empty where it is not told."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def provenance(dtype: str) -> dict[str, Any]:
    """Say what ran, and on what."""
    names = ("jax", "jaxlib", "flax", "torch", "transformers", "pymoo", "numpy")
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    return {
        "commit": commit,
        "versions": {name: v for name in names if (v := installed(name))},
        "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "torch_cuda": torch.cuda.is_available(),
        "dtype": dtype,
    }


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines).replace("| --- ", "|---")


def shown(value: float | None, scale: float = 1.0) -> str:
    """A number with three digits, or a dash."""
    if value is None:
        return "-"
    value = value * scale
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(result: Mapping[str, Any]) -> str:
    """The contenders of a measured race as Markdown."""
    heads = ("contender", f"ms a {result['unit']}", f"it / {OURS}", "compile s")
    heads += ("held MB", "temporary MB")
    return markdown(
        heads,
        [
            (
                name,
                shown(row["seconds"], 1e3),
                f"{row['over_ours']:.2f}",
                shown(row["compile_s"]),
                shown(row["held_bytes"], 1e-6),
                shown(row["temporary_bytes"], 1e-6),
            )
            for name, row in result["rows"].items()
        ],
    )


def judged(floor: Mapping[str, Any]) -> str:
    """One floor in words."""
    sign = "<=" if floor["at_most"] else ">="
    end = "met" if floor["met"] else f"MISSED by {100 * floor['missed_by']:.1f} %"
    return f"{floor['what']}: {shown(floor['got'])}, wanted {sign} {shown(floor['wanted'])}, {end}"


def prepare(dtype: str, threads: int | None = None) -> None:
    """Give torch the threads that JAX takes, and compile without the cache.

    Float32 products are full ones: a GPU would multiply in TF32, and on our side only.
    """
    jax.config.update("jax_enable_compilation_cache", False)
    torch.set_num_threads(threads or os.cpu_count() or 1)
    if dtype == "float32":
        jax.config.update("jax_default_matmul_precision", "highest")


@clean_errors()
def command(
    args: Args, races: Callable[[str], Iterator[Race]], threads: int | None = None
) -> dict[str, Any]:
    """Run the races of one module; write `<race>.json` of each, and print its table."""
    if args.rounds < 1:
        raise ValueError(f"`--rounds` must be at least 1, got {args.rounds}.")
    args.out.mkdir(parents=True, exist_ok=True)
    prepare(args.dtype, threads)
    rates = functools.partial(ceilings, dtype=jnp.dtype(args.dtype))
    origin = provenance(args.dtype)  # of the code that runs: the tree may move on meanwhile
    results = {}
    for race in races(args.dtype):  # one at a time: a race holds its weights
        if args.dtype != "float32" and race.timed is None:
            print(f"[bench] left out: {race.name} is in float32 alone", flush=True)
            continue
        result = measure(race, args.rounds, rates)
        result["provenance"] = origin
        write_json(args.out / f"{race.name}.json", result)
        results[race.name] = result
        print(f"\n{race.name}: {race.title}\n{table(result)}", flush=True)
        for floor in result["floors"]:
            print(judged(floor), flush=True)
        if result["roofline"]:
            print(f"{100 * result['roofline']['of_measured']:.0f} % of the ceilings", flush=True)
    return results
