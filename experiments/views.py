"""What a person sees of a run while it goes: W&B, TensorBoard, a progress bar.

All are views of `metrics.jsonl`: losing one loses nothing.
"""

import contextlib
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from experiments.files import read_json, write_json

Row = dict[str, Any]
WandbMode = Literal["online", "offline"] | None
Sink = tuple[Callable[[int, Row], None], Callable[[], None]]  # show(index, row), close()


def numbers(row: Row) -> dict[str, float]:
    """Return the entries of `row` that are numbers: what a curve can show."""
    return {k: v for k, v in row.items() if isinstance(v, int | float) and not isinstance(v, bool)}


def tensorboard_sink(directory: Path) -> Sink:
    """Write the rows as TensorBoard scalars below `directory`, one run per seed.

    What was there is removed: the caller shows the recorded rows again.
    """
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ValueError("`--tensorboard` needs the package tensorboardX: install it.") from error
    shutil.rmtree(directory, ignore_errors=True)
    writers: dict[str, Any] = {}

    def show(index: int, row: Row) -> None:
        name = f"seed{row['seed']}" if "seed" in row else "run"
        if name not in writers:
            writers[name] = SummaryWriter(str(directory / name))
        for tag, value in numbers(row).items():
            if tag not in ("step", "seed"):
                writers[name].add_scalar(tag, value, row.get("step", index))

    def close() -> None:
        for writer in writers.values():
            writer.close()

    return show, close


def wandb_sink(directory: Path, name: str, config: Any, project: str, mode: WandbMode) -> Sink:
    """Send the rows to the Weights & Biases `project`.

    `mode` is "online" or "offline" (default: the environment's WANDB_MODE, else online). The run's
    id is kept in `directory`, so that a resumed run goes on in the same W&B run.
    """
    try:
        import wandb
    except ImportError as error:
        raise ValueError("`--wandb` needs the package wandb: install it.") from error
    memory = directory / "wandb.json"
    if not memory.exists():
        write_json(memory, {"id": uuid.uuid4().hex[:12]})
    try:
        run = wandb.init(
            project=project,
            name=name,
            id=read_json(memory)["id"],
            dir=str(directory),
            config=config,
            resume="allow",
            mode=mode,
        )
    except wandb.Error as error:
        raise ValueError(f"W&B would not start for the project {project!r}: {error}.") from error
    first = run.step  # rows before this one are already on the server

    def show(index: int, row: Row) -> None:
        if index >= first:
            run.log(row, step=index)

    return show, run.finish


@contextlib.contextmanager
def progress(
    total: int, title: str, *, initial: int = 0, every: float = 10.0
) -> Iterator[Callable[..., None]]:
    """Yield `advance(n=1, **shown)`: a live bar on a terminal, a line now and then elsewhere.

    `initial` is how far a resumed run already is; `every` is the least time between two plain
    lines, in seconds. All of it goes to stderr.
    """
    if sys.stderr.isatty():
        with tqdm(total=total, initial=initial, desc=title, dynamic_ncols=True) as bar:

            def advance(n: int = 1, **shown: Any) -> None:
                bar.set_postfix_str(words(shown), refresh=False)
                bar.update(n)

            yield advance
        return
    yield plain_progress(total, title, initial, every)


def plain_progress(total: int, title: str, initial: int, every: float) -> Callable[..., None]:
    """Return `advance` that prints a line at the start, the end and every `every` seconds."""
    start = time.monotonic()
    done, last = initial, -float("inf")

    def advance(n: int = 1, **shown: Any) -> None:
        nonlocal done, last
        done += n
        now = time.monotonic()
        if now - last >= every or done >= total:
            last = now
            left = (now - start) / max(done - initial, 1) * (total - done)
            tail = f"  {words(shown)}" if shown else ""
            line = f"{title}: {done}/{total} ({done / max(total, 1):.0%}), {left:.0f} s left{tail}"
            print(line, file=sys.stderr, flush=True)

    return advance


def words(shown: dict[str, Any]) -> str:
    """Return "reward 0.25, kl 1.2e-03" for the values beside a bar."""
    parts = [f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items()]
    return ", ".join(parts)
