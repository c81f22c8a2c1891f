"""The run directory: every run is one, and everything that is shown of it is read from it.

    config.json      the settings, fixed when the directory is made
    metrics.jsonl    the record: one JSON object a line, in the order of the run
    checkpoints/     <name>/<step>/, see checkpoints.py
    once/            values measured once and reused, such as timings

A script uses it so (`--resume` runs the same lines; what is done is restored, not done again):

    with clean_errors(), opened(args.out, config, resume=args.resume) as run:
        step, state = restore_latest(run, state) or (0, state)
        while step < args.steps:
            state, metrics = train_chunk(state)
            step += args.log_every
            log(run, {"step": step, **metrics})
            save(run, step, state)
        latency = once(run, "latency_ms", lambda: measure(state))
        write_json(run.path / "summary.json", {"seconds": seconds(run), ...})
        print(finish(run))
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import re
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any
from zlib import crc32

import jax
from jaxtyping import PyTree

from experiments import checkpoints
from experiments.files import plain, read_json, sync, sync_tree, write_atomic, write_json
from experiments.views import Row, Sink, WandbMode, progress, tensorboard_sink, wandb_sink

__all__ = [
    "Run",
    "clean_errors",
    "finish",
    "key",
    "log",
    "once",
    "opened",
    "peak_rss_gb",
    "plain",
    "progress",
    "read_json",
    "refuse_existing",
    "restore_latest",
    "rows",
    "save",
    "seconds",
    "write_atomic",
    "write_json",
]

CONFIG, METRICS, LOCK = "config.json", "metrics.jsonl", ".lock"
# Settings that say where to compute and how to show a run, not what it computes: they may change on
# resume. Another mesh adds numbers up in another order: equal to five digits, not to the bit.
FREE = ("out", "cache", "resume", "replace", "wandb", "wandb_mode", "tensorboard", "mesh")


@dataclasses.dataclass
class Run:
    """An open run directory; hand it to the functions of this module."""

    path: Path  # where the run writes
    final: Path  # where it will lie; another place than `path` only when it replaces a run
    config: dict[str, Any]
    lock: IO[str]  # held while open: a second process is refused
    began: float  # time.monotonic() of the start, earlier parts of a resumed run included
    position: int = 0  # bytes of metrics.jsonl that the script has come past
    index: int = 0  # rows of metrics.jsonl that the script has come past
    sinks: tuple[Sink, ...] = ()


@contextlib.contextmanager
def opened(
    out: str | Path,
    config: Any,
    *,
    resume: bool = False,
    replace: bool = False,
    wandb: str | None = None,
    wandb_mode: WandbMode = None,
    tensorboard: bool = False,
) -> Iterator[Run]:
    """Make the run directory `out`, or with `resume` go on in it; closed at the end of the block.

    With `replace` the run is written to `<out>.partial` and takes the place of an earlier run in
    `out` when `finish` is called, so that `out` is whole at all times. `config` is a dataclass or a
    dict. `wandb` names a W&B project.

    Raises FileExistsError if `out` is there (or is no run directory, with `replace`),
    FileNotFoundError if there is nothing to resume, ValueError if the settings are not those that
    the run was started with, and BlockingIOError if another process is writing to it.
    """
    final = Path(out)
    settings = {k: v for k, v in plain(config).items() if k not in FREE}
    path = final.with_name(final.name + ".partial") if replace else final
    if replace:
        repair(final)
    if resume:
        check_resumable(path, settings)
    else:
        create(path, final, settings, replace)
    run = Run(path, final, settings, hold(path), time.monotonic())
    try:
        cut_back(run)
        run.sinks = make_sinks(run, wandb, wandb_mode, tensorboard)
        yield run
    finally:
        close_views(run)
        run.lock.close()


def refuse_existing(out: Path, *, resumable: bool = True) -> None:
    """Raise FileExistsError if `out` holds anything: before long work that would end so."""
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        is_run = (out / CONFIG).is_file()
        more = ", go on with --resume" * (is_run and resumable)
        more += ", or take its place with --replace" * is_run
        raise FileExistsError(f"{out} already exists: choose another directory{more}.")


def create(path: Path, final: Path, settings: dict[str, Any], replace: bool) -> None:
    """Make the directory with its `config.json` in it, both at once."""
    if replace and final.exists() and not (final / CONFIG).is_file():
        raise FileExistsError(f"{final} is not a run directory and is not replaced.")
    if replace and path.exists():
        hold(path).close()  # refuses if a run is going on there
        shutil.rmtree(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        temporary.chmod(0o755)
        write_json(temporary / CONFIG, settings)
        temporary.rename(path)  # succeeds only where there is nothing, or an empty directory
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if path.exists():
            hint = "choose another directory, or go on with --resume"
            raise FileExistsError(f"{path} already exists: {hint}.") from error
        raise
    sync(path.parent)


def check_resumable(path: Path, settings: dict[str, Any]) -> None:
    """Raise unless `path` holds a run that was started with these settings."""
    if not (path / CONFIG).is_file():
        partial = path.with_name(path.name + ".partial")
        hint = f" An unfinished replacement is in {partial}: add --replace." * partial.exists()
        raise FileNotFoundError(f"There is no run to resume in {path}: it has no {CONFIG}.{hint}")
    old = read_json(path / CONFIG)
    if old == settings:
        return
    was, now = ({k: repr(v) for k, v in leaves(x).items()} for x in (old, settings))
    names = [k for k in sorted(was | now) if was.get(k) != now.get(k)]
    changed = ", ".join(
        f"{k} (was {was.get(k, 'absent')}, now {now.get(k, 'absent')})" for k in names
    )
    raise ValueError(f"{path} was started with other settings: {changed}.")


def leaves(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one flat dict, names joined by dots."""
    out: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            out |= leaves(value, f"{prefix}{name}.")
        else:
            out[prefix + name] = value
    return out


def hold(path: Path) -> IO[str]:
    """Return the lock file of `path`, locked; the lock ends with the process, also by a kill."""
    file = open(path / LOCK, "w")  # noqa: SIM115  it stays open as long as the run
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise BlockingIOError(f"Another process is writing to {path}.") from error
    return file


def cut_back(run: Run) -> None:
    """Remove what a killed run left behind: temporary files, rows after the last checkpoint."""
    for leftover in list(run.path.rglob(".*.tmp")):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)
    folders = (run.path / "checkpoints").glob("*")
    latest = [checkpoints.steps(folder)[-1:] for folder in folders]
    notes = [read_json(path / checkpoints.RECORD) for found in latest for path in found]
    metrics = run.path / METRICS
    metrics.touch()
    kept = max((note["metrics_bytes"] for note in notes), default=0)
    if metrics.stat().st_size < kept:
        raise ValueError(f"{metrics} is shorter than at the last checkpoint ({kept} bytes).")
    os.truncate(metrics, kept)
    run.began -= max((note["seconds"] for note in notes), default=0.0)


def make_sinks(run: Run, wandb: str | None, mode: WandbMode, board: bool) -> tuple[Sink, ...]:
    """Open the views that were asked for and show them the rows recorded so far."""
    sinks = []
    if board:
        sinks.append(tensorboard_sink(run.path / "tensorboard"))
    if wandb:
        sinks.append(wandb_sink(run.path, run.final.name, run.config, wandb, mode))
    for index, row in enumerate(rows(run.path) if sinks else []):
        for show, _ in sinks:
            show(index, row)
    return tuple(sinks)


def log(run: Run, row: Row) -> Row:
    """Append `row` to `metrics.jsonl` and show it in the views; return the recorded row.

    A resumed script comes past rows that are recorded already, between the checkpoints of two
    parts of the run: they are not written again, and the recorded row is returned. RuntimeError if
    the script logs other rows there than it did before.
    """
    row = plain(row)
    with open(run.path / METRICS, "r+b") as file:
        file.seek(run.position)
        line = file.readline()
        if line:
            recorded = json.loads(line)
            if recorded.keys() != row.keys() or recorded.get("step") != row.get("step"):
                what = f"row {run.index} of {METRICS} is {recorded}, and the resumed run logs {row}"
                raise RuntimeError(f"A resumed run must log its rows in the same order, but {what}")
            row = recorded
        else:
            line = (json.dumps(row, allow_nan=False) + "\n").encode()
            file.write(line)
            file.flush()
            for show, _ in run.sinks:
                show(run.index, row)
    run.position += len(line)
    run.index += 1
    return row


def rows(path: Path) -> list[Row]:
    """Return the rows of a run directory's `metrics.jsonl`, without a half-written last one."""
    file = path / METRICS
    text = file.read_text() if file.exists() else ""
    found = []
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        if line.endswith("\n"):
            try:
                found.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"Line {number} of {file} is not JSON: {error}.") from error
    return found


def save(run: Run, step: int, tree: PyTree, *, name: str = "state", keep: int = 2) -> None:
    """Write `tree` as the checkpoint of `step`; `name` tells the parts of a run apart.

    The rows logged so far belong to it: a resumed run keeps them and computes the later ones again.
    """
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(f"`name` must be one plain file name, got {name!r}.")
    sync(run.path / METRICS)
    note = {"metrics_bytes": run.position, "metrics_rows": run.index, "seconds": seconds(run)}
    checkpoints.save(run.path / "checkpoints" / name, step, tree, note, keep=keep)


def restore_latest(run: Run, template: PyTree, *, name: str = "state") -> tuple[int, PyTree] | None:
    """Return (step, tree) of the last checkpoint of this part of the run, None if there is none.

    Parts must be restored in the order in which they were run. ValueError lists the leaves of
    `template` that differ from the stored ones in name, shape or dtype.
    """
    found = checkpoints.restore_latest(run.path / "checkpoints" / name, template)
    if found is None:
        return None
    note, tree = found
    run.position, run.index = note["metrics_bytes"], note["metrics_rows"]
    return note["step"], tree


def once(run: Run, name: str, function: Callable[[], Any]) -> Any:
    """Return `function()`, computed once in the life of the run and kept in `once/<name>.json`.

    Timings differ from call to call; a run that reuses the first one can be resumed bit for bit.
    The value is what JSON holds; `function` must not log rows.
    """
    path = run.path / "once" / f"{name}.json"
    if not path.exists():
        write_json(path, function())
    return read_json(path)


def finish(run: Run) -> Path:
    """Put a run that replaces another in its place; return where the run now lies."""
    close_views(run)
    if run.path != run.final:
        sync_tree(run.path)
        if run.final.exists():
            run.final.rename(older(run.final))
        run.path.rename(run.final)
        sync(run.final.parent)
        shutil.rmtree(older(run.final), ignore_errors=True)
        run.path = run.final
    return run.path


def close_views(run: Run) -> None:
    """Close the views, which may hold files open below `run.path`."""
    for _, close in run.sinks:
        close()
    run.sinks = ()


def older(final: Path) -> Path:
    """Return where the earlier run waits while the next one takes its place."""
    return final.with_name(f".{final.name}.old")


def repair(final: Path) -> None:
    """Undo, or complete, a replacement that was killed between its two renames."""
    old = older(final)
    if old.exists() and not final.exists():
        old.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def key(seed: int, purpose: str) -> jax.Array:
    """Return the random key of one purpose in a run: no two purposes share a draw."""
    return jax.random.fold_in(jax.random.key(seed), crc32(purpose.encode()))


def seconds(run: Run) -> float:
    """Return the time spent on this run in seconds, the parts before a resume included."""
    return time.monotonic() - run.began


def peak_rss_gb() -> float:
    """Return the largest resident size of this process so far, in GB (1e9 bytes).

    Linux hands `ru_maxrss` on from the parent through fork and exec, so its own record is read.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024 / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


@contextlib.contextmanager
def clean_errors() -> Iterator[None]:
    """Turn an error of the user or of the machine into one sentence on stderr and exit code 2.

    Catches ValueError and OSError (a missing file, an existing directory, a full disk); every other
    error is a bug and keeps its traceback. With FORGE_DEBUG=1 in the environment nothing is caught.
    Works around a block (`with clean_errors():`) and as a decorator (`@clean_errors()`).
    """
    try:
        yield
    except (ValueError, OSError) as error:
        if os.environ.get("FORGE_DEBUG"):
            raise
        print(f"error: {sentence(error)}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        raise SystemExit(130) from None


def sentence(error: BaseException) -> str:
    """Return the message of `error`; for the system's own errors, what failed and which file."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return str(error) or type(error).__name__
