"""Architectures from documents: check them, train them, search for better ones.

    python -m experiments.evolve validate experiments/archs/nanogpt_tiny.yaml
    python -m experiments.evolve schema --out arch.schema.json
    python -m experiments.evolve train experiments/archs/nanogpt_tiny.yaml --task recall --steps 100
    python -m experiments.evolve sweep experiments/archs --plan
    python -m experiments.evolve evolve experiments/archs/nanogpt_tiny.yaml --out runs/evolution
    python -m experiments.evolve report runs/evolution
    python -m experiments.evolve lineage runs/evolution --direction LR

`validate` ends with status 1 where a document is invalid. `train`, `sweep` (the given documents
through the ladder) and `evolve` (their children too) write a run directory: metrics.jsonl, the log
that everything follows from, gen_*/variant_*.yaml, search_report.json, lineage.json, lineage.mmd,
lineage.png and the checkpoints. `--resume` continues a killed one to the same report.
"""

import dataclasses
import functools
import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import tyro

from experiments import run as runs
from experiments.evolution import (
    candidates,
    lineage,
    plan,
    programs,
    report,
    search,
    shocks,
    shown,
    tasks,
)
from experiments.evolution.candidates import Setup, adapted, held_out
from experiments.evolution.settings import Evolve, Sweep, Train, check, settings_of
from experiments.files import read_json, write_json
from forge_jax import arch, evolve

CHUNK = 10  # steps of one call; the first call is warm-up
SEEDS = 1000  # numbers that a run's seeds are of; fresh ones come from the upper half


@dataclasses.dataclass(frozen=True)
class Validate:
    """Check documents; print fingerprint, cost and notes."""

    files: tyro.conf.Positional[tuple[Path, ...]]
    """YAML documents"""
    strict: bool = False
    """refuse fields without effect and values that would be cut"""


@dataclasses.dataclass(frozen=True)
class Schema:
    """Write the JSON Schema, for editors."""

    out: Path
    """where it goes"""


@dataclasses.dataclass(frozen=True)
class Report:
    """Write search_report.json of a run again, and print the best."""

    run: tyro.conf.Positional[Path]
    """run directory"""


@dataclasses.dataclass(frozen=True)
class Lineage:
    """Write lineage.json, lineage.mmd and lineage.png of a run again."""

    run: tyro.conf.Positional[Path]
    """run directory"""
    direction: Literal["TD", "LR", "BT", "RL"] = "TD"
    """of the Mermaid graph"""


Args = (
    Annotated[Validate, tyro.conf.subcommand("validate")]
    | Annotated[Schema, tyro.conf.subcommand("schema")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Sweep, tyro.conf.subcommand("sweep")]
    | Annotated[Evolve, tyro.conf.subcommand("evolve")]
    | Annotated[Report, tyro.conf.subcommand("report")]
    | Annotated[Lineage, tyro.conf.subcommand("lineage")]
)


def described(spec: arch.Spec) -> str:
    """What a valid document comes to."""
    spent = arch.cost(spec)
    lines = [
        f"fingerprint {arch.fingerprint(spec)}",
        f"parameters {spent.params:,}",
        f"forward FLOPs per token {spent.flops / spec.train.ctx_len:,.0f}",
        f"KV bytes per token {spent.kv_bytes:,.0f}",
        *(f"note: {note}" for note in arch.notes(spec)),
        *(f"budget, for one row: {over}" for over in over_budget(spec, spent)),
    ]
    return "\n".join(lines)


def over_budget(spec: arch.Spec, spent: arch.Cost) -> tuple[str, ...]:
    """The budgets that are exceeded; of one that another document sets, that it is not known."""
    try:
        return arch.over_budget(spec, spent)
    except ValueError as error:
        return (str(error),)


def validate(path: Path, strict: bool) -> bool:
    """Print the verdict on a file; True where it is valid."""
    try:
        spec = arch.parse(path.read_text(), strict=strict)
    except (arch.DocumentError, OSError, UnicodeDecodeError) as error:
        print(f"INVALID {path}\n{error}")
        return False
    print(f"VALID {path}\n{described(spec)}")
    return True


def parsed(path: Path) -> arch.Spec:
    """The document in a file; a ValueError names the file."""
    try:
        return arch.parse(path.read_text())
    except (arch.DocumentError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {error}") from error


def best_of(index: Path) -> Iterator[tuple[str, arch.Spec]]:
    """Name and document of the candidates in the report of an earlier run, the best first.

    Raises:
      ValueError: the file is no report, or a document of the run is invalid.
    """
    try:
        paths = [Path(c["cfg_path"]) for c in report.ranked(read_json(index))]
    except (KeyError, TypeError) as error:
        raise ValueError(f"`top_index` must be a search_report.json, {index} is not.") from error
    for path in paths:
        yield f"{index.parent.name}-{path.parent}-{path.stem}", parsed(index.parent / path)


def documents(files: Sequence[Path]) -> dict[str, arch.Spec]:
    """The documents by name; a directory stands for the YAML files in it.

    Raises:
      ValueError: a document is invalid, there is none, or two have one name.
    """
    found: dict[str, arch.Spec] = {}
    for file in files:
        for path in sorted(file.glob("*.yaml")) if file.is_dir() else [file]:
            if path.stem in found:
                raise ValueError(f"Two documents are called {path.stem}.")
            found[path.stem] = parsed(path)
    if not found:
        raise ValueError("There is no document: name a YAML file, or a directory with some.")
    return found


def set_up(args: Train | Sweep) -> tuple[dict[str, arch.Spec], Setup]:
    """The documents, fitted to the data, and what all candidates share."""
    task = tasks.load(args.task, args.data)
    fit = functools.partial(adapted, task=task, length=args.seq_len)
    fitted = {name: fit(spec) for name, spec in documents(args.files).items()}
    if isinstance(args, Evolve) and args.top_index is not None:
        known = {arch.fingerprint(spec) for spec in fitted.values()}
        others = ((name, fit(spec)) for name, spec in best_of(args.top_index.resolve()))
        new = (
            (name, spec)
            for name, spec in others
            if (found := arch.fingerprint(spec)) not in known and not known.add(found)
        )
        fitted |= dict(itertools.islice(new, args.top_count))
    for name, spec in fitted.items():
        if args.equal_flops and spec.train.budget and spec.train.budget.max_steps:
            raise ValueError(f"`equal_flops` contradicts train.budget.max_steps of {name}.")
    costs = {name: arch.cost(spec, args.seq_len) for name, spec in fitted.items()}
    first = next(iter(costs.values()))
    scored = held_out(task, args.held_out, args.batch_size, args.seq_len)
    setup = Setup(
        task,
        args.batch_size,
        args.seq_len,
        tuple(args.seed * SEEDS + k for k in range(args.repeats)),
        CHUNK,
        scored,
        tasks.unigram_entropy(scored, task.vocabulary),
        args.lr,
        args.limits,
        {"baseline": first, **costs},
        first.train_flops if args.equal_flops else None,
        memo=None if args.cache is None else args.cache / "results",
    )
    return fitted, setup


def fresh(args: Train | Sweep, setup: Setup) -> Setup:
    """The same with seeds that no search has seen, and with shocks."""
    first = args.seed * SEEDS + SEEDS // 2
    return setup._replace(
        seeds=tuple(first + k for k in range(args.deep_seeds)),
        shocks=shocks.make(setup.held_out, setup.task.vocabulary),
    )


def facts(args: Train | Sweep, setup: Setup) -> dict[str, Any]:
    """What the scores of a run are of."""
    task = setup.task
    return {
        "task": task.name,
        "data_digest": task.digest,
        "unit": task.unit,
        "floor": task.floor(args.seq_len) if task.floor else None,
        "unigram_entropy": setup.unigram,
        "held_out_units": int(setup.held_out.scored.sum()),
    }


# Where to compute, how to show it and when to stop: no part of what a run is.
FREE = ("plan", "time_budget", "cache", "device")


def config_of(
    args: Train | Sweep, specs: dict[str, arch.Spec], setup: Setup, settings: evolve.Settings
) -> dict[str, Any]:
    """What a resumed run must share."""
    kept = {name: value for name, value in runs.plain(args).items() if name not in FREE}
    return {
        "command": type(args).__name__.lower(),
        **kept,
        "documents": {name: arch.fingerprint(spec) for name, spec in specs.items()},
        "data_is": facts(args, setup),
        "search": settings._asdict() | {"ladder": settings.ladder._asdict()},
    }


def settings_in(config: dict[str, Any]) -> evolve.Settings:
    """The search of a run directory."""
    found = config["search"]
    return evolve.Settings(**found | {"ladder": evolve.Ladder(**found["ladder"])})


def write_report(path: Path, rest: dict[str, Any]) -> dict[str, Any]:
    """Write and print the report of the events in `path`."""
    config = read_json(path / "config.json")
    built = report.built(runs.rows(path), settings_in(config), config, rest)
    write_json(path / "search_report.json", built)
    print(report.words(built))
    return built


def write_lineage(path: Path, direction: str = "TD") -> None:
    """Write the lineage of the events in `path`."""
    config = read_json(path / "config.json")
    unit = config["data_is"]["unit"]
    settings = settings_in(config)
    births = report.births_in(config, settings)
    lineage.write(path, runs.rows(path), settings, births, unit, direction)


def use_device(name: str) -> None:
    """Compute there; a ValueError where there is no such device."""
    jax.config.update("jax_platforms", name)
    try:
        jax.devices()
    except RuntimeError as error:
        raise ValueError(f"`--device {name}` is not to be had here: {error}") from error


def train(args: Train | Sweep) -> int:
    """Search, or say what it would cost; write the run directory. 1 where nothing is trained."""
    check(args)
    if args.device:
        use_device(args.device)
    programs.use_directory(args.cache)
    specs, setup = set_up(args)
    again = fresh(args, setup) if args.deep_steps else None
    settings = settings_of(args, len(specs))
    if args.plan:
        found = plan.documents(specs, setup)
        print(plan.described(found, setup, settings))
        return int(all("refused" in row for row in found))
    if not (args.resume or args.replace):
        runs.refuse_existing(args.out)
    cache = programs.Cache()
    views = {name: getattr(args, name) for name in ("resume", "replace", "wandb", "tensorboard")}
    config = config_of(args, specs, setup, settings)
    with runs.opened(args.out, config, **views) as run:
        with shown.live(lambda: title(setup, cache)) as show:
            shared: dict[str, Any] = {"show": show, "deadline": args.time_budget}
            evaluate, seeds = evaluation(run, cache, setup), list(specs.values())
            given = {"births": report.births_in(config, settings), "seed": args.seed, **shared}
            events, late = search.search(run, evaluate, seeds, settings, **given)
            if again and not late:
                given = {"count": args.deep_top_k, "steps": args.deep_steps, **shared}
                evaluate = evaluation(run, cache, again)
                _, late = search.deepen(run, evaluate, events, seeds=again.seeds, **given)
        rest: dict[str, Any] = {"out_of_time": late, "cache": cache.counts()}
        rest |= {"seconds": runs.seconds(run), "cpu_seconds": time.process_time()}
        rest["peak_rss_gb"] = runs.peak_rss_gb()
        built = write_report(run.path, rest)
        write_lineage(run.path)
        done = runs.finish(run)
    if cache.known:
        print(
            f"{cache.known} results were known ({setup.memo}): their times are of the runs that "
            "trained them, and they left no checkpoints here; --cache None trains everything"
        )
    print(f"report: {done / 'search_report.json'}")
    if any(c["best_score"] is not None for c in built["candidates"]):
        return 0
    print("nothing was trained: every candidate was refused or failed", file=sys.stderr)
    return 1


def evaluation(run: runs.Run, cache: programs.Cache, setup: Setup) -> search.Evaluate:
    """How a run evaluates."""
    return functools.partial(candidates.evaluate, setup, cache, search.store_of(run))


def title(setup: Setup, cache: programs.Cache) -> str:
    """Over the live table."""
    return (
        f"{setup.task.name}, nats per {setup.task.unit}; structures compiled {cache.misses}, "
        f"met again {cache.hits}; programs from disk {cache.disk_hits}, new {cache.disk_misses}; "
        f"results known {cache.known}"
    )


def written_again(args: Report | Lineage) -> int:
    """Write a view of a run again."""
    if not (args.run / "config.json").is_file():
        raise ValueError(f"{args.run} is no run directory: it has no config.json.")
    if not {"search", "data_is"} <= read_json(args.run / "config.json").keys():
        raise ValueError(f"{args.run} is no run of `experiments.evolve`.")
    if isinstance(args, Lineage):
        write_lineage(args.run, args.direction)
        print(args.run / "lineage.mmd")
        return 0
    file = args.run / "search_report.json"
    old = read_json(file) if file.is_file() else {}
    names = ("out_of_time", "cache", "seconds", "cpu_seconds", "peak_rss_gb")
    write_report(args.run, {name: old.get(name) for name in names})
    return 0


@runs.clean_errors()
def main(args: Args) -> int:
    """Run a command; its exit status."""
    if isinstance(args, Schema):
        write_json(args.out, arch.json_schema())
        return 0
    if isinstance(args, Validate):
        if not args.files:
            raise ValueError("There is no document: name a YAML file.")
        return 0 if all([validate(path, args.strict) for path in args.files]) else 1
    if isinstance(args, Report | Lineage):
        return written_again(args)
    return train(args)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, prog="python -m experiments.evolve", description=__doc__)))
