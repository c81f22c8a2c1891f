"""The run directory: atomic files, kill -9, bit-identical resume, one-sentence errors."""

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import run as runs
from experiments.files import plain, read_json, write_atomic, write_json
from experiments.run import clean_errors, log, once, opened, restore_latest, rows, save

ROOT = Path(__file__).resolve().parents[2]

# A random walk in two parts with checkpoints every third step, and rows between the parts. It dies
# by SIGKILL at the moment that its third argument names.
WALK = textwrap.dedent(
    """
    import os, signal, sys
    from pathlib import Path
    import jax, numpy as np
    from experiments import checkpoints
    from experiments.run import *

    out, resume, moment = sys.argv[1], sys.argv[2] == "resume", sys.argv[3]

    def die(here):
        if here == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    def dying(function, here, after=False):
        def wrapped(*args, **kwargs):
            if not after:
                die(here())
            result = function(*args, **kwargs)
            if after:
                die(here())
            return result
        return wrapped

    now = ["start"]
    # The arrays are written and not yet in place; the checkpoint is in place and the old ones too.
    checkpoints.sync_tree = dying(checkpoints.sync_tree, lambda: "before rename of " + now[0])
    checkpoints.sync = dying(checkpoints.sync, lambda: "after rename of " + now[0], after=True)

    def part(run, name, key, steps=7):
        state = {"key": key, "x": np.zeros(3)}
        step, state = restore_latest(run, state, name=name) or (0, state)
        while step < steps:
            key, use = jax.random.split(state["key"])
            state = {"key": key, "x": state["x"] + np.asarray(jax.random.normal(use, 3), float)}
            step += 1
            log(run, {"step": step, f"{name}/x": state["x"][0]})
            now[0] = f"{name} {step}"
            die("row of " + now[0])
            if step % 3 == 0 or step == steps:
                save(run, step, state, name=name)
                die("checkpoint of " + now[0])
        return state

    with opened(out, {"steps": 7}, resume=resume) as run:
        a = part(run, "a", jax.random.key(1))
        log(run, {"step": 7, "between": float(a["x"].sum())})
        timing = once(run, "timing", lambda: {"ns": int.from_bytes(os.urandom(4), "big")})
        b = part(run, "b", a["key"])
        log(run, {"step": 7, "end": float(b["x"].sum()), "ns": timing["ns"]})
        np.save(run.path / "x.npy", b["x"])
    """
)


def walk(out, resume="new", moment="never", check=True):
    code = [sys.executable, "-c", WALK, str(out), resume, moment]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(code, env=env, capture_output=True, text=True, timeout=120)
    assert not check or done.returncode == 0, done.stderr
    return done


def content(out):
    """Return the record, without the one random timing, and the result."""
    text = (out / "metrics.jsonl").read_text()
    record = [
        {k: v for k, v in row.items() if k != "ns"}
        for row in map(json.loads, text.split("\n")[:-1])
    ]
    return record, (out / "x.npy").read_bytes()


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    out = tmp_path_factory.mktemp("walk") / "run"
    walk(out)
    return out


@pytest.mark.parametrize(
    "moment",
    [
        "row of a 2",  # nothing saved yet
        "before rename of a 6",  # in the middle of writing a checkpoint
        "after rename of b 3",  # the next part has begun, rows lie between the parts
        "row of b 5",  # rows after the last checkpoint
    ],
)
def test_killed_and_resumed_equals_unbroken(tmp_path, unbroken, moment):
    out = tmp_path / "run"
    assert walk(out, moment=moment, check=False).returncode == -signal.SIGKILL
    timing = out / "once" / "timing.json"
    before = timing.read_bytes() if timing.exists() else None
    walk(out, "resume")
    assert content(out) == content(unbroken)
    assert before in (None, timing.read_bytes())
    assert not list(out.rglob("*.tmp"))


def test_resuming_a_finished_run_changes_nothing(tmp_path, unbroken):
    out = shutil.copytree(unbroken, tmp_path / "run")
    walk(out, "resume")
    for name in ("metrics.jsonl", "x.npy", "once/timing.json"):
        assert (out / name).read_bytes() == (unbroken / name).read_bytes()


def test_half_a_line_is_cut_off(tmp_path):
    with opened(tmp_path / "run", {}) as run:
        log(run, {"step": 1})
        save(run, 1, {"x": 1})
    with open(run.path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2}\n{"ste')  # what a kill in the middle of an append leaves
    assert rows(run.path) == [{"step": 1}, {"step": 2}]
    with opened(tmp_path / "run", {}, resume=True) as run:
        assert restore_latest(run, {"x": 0}) == (1, {"x": 1})
        log(run, {"step": 2, "again": True})
    assert rows(run.path) == [{"step": 1}, {"step": 2, "again": True}]


def test_a_metrics_file_shorter_than_its_checkpoint_is_refused(tmp_path):
    with opened(tmp_path / "run", {}) as run:
        log(run, {"step": 1})
        save(run, 1, {"x": 1})
    os.truncate(run.path / "metrics.jsonl", 3)
    with pytest.raises(ValueError, match="shorter than at the last checkpoint"):
        with opened(tmp_path / "run", {}, resume=True):
            pass


def test_rows_out_of_order_are_a_bug(tmp_path):
    with opened(tmp_path / "run", {}) as run:
        log(run, {"step": 1, "loss": 1.0})
        save(run, 1, {"x": 1})
    with opened(tmp_path / "run", {}, resume=True) as run:
        with pytest.raises(RuntimeError, match="same order"):
            log(run, {"step": 2, "loss": 1.0})
        assert log(run, {"step": 1, "loss": 7.0}) == {"step": 1, "loss": 1.0}  # the record stays


def test_existing_directory_is_refused_and_untouched(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for out, replace in [("run", False), ("run", True), ("file", False), ("file", True)]:
        with pytest.raises(FileExistsError, match=r"already exists|is not a run directory"):
            with opened(tmp_path / out, {}, replace=replace):
                pass
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "run", "thesis.tex"]


@dataclasses.dataclass(frozen=True)
class Args:
    out: Path
    steps: int = 40
    domains: tuple[str, ...] = ("math", "code")
    rates: dict[str, float] = dataclasses.field(default_factory=lambda: {"z": 0.1, "kl": 0.2})
    resume: bool = False


def test_resume_needs_the_same_settings(tmp_path):
    args = Args(tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="no run to resume"):
        with opened(args.out, args, resume=True):
            pass
    with opened(args.out, args):
        pass
    assert read_json(args.out / "config.json") == {
        "steps": 40,
        "domains": ["math", "code"],
        "rates": {"z": 0.1, "kl": 0.2},
    }
    with opened(args.out, dataclasses.replace(args, resume=True), resume=True):
        pass
    changed = dataclasses.replace(args, steps=60, rates={"z": 0.1, "kl": 0.3})
    both = r"other settings: rates.kl \(was 0.2, now 0.3\), steps \(was 40, now 60\)\.$"
    with pytest.raises(ValueError, match=both):
        with opened(args.out, changed, resume=True):
            pass
    older = read_json(args.out / "config.json")
    del older["steps"]
    (args.out / "config.json").write_text(json.dumps(older))
    with pytest.raises(ValueError, match=r"steps \(was absent, now 40\)\.$"):
        with opened(args.out, args, resume=True):
            pass


def test_two_processes_do_not_write_one_run(tmp_path):
    with opened(tmp_path / "run", {}, replace=True):
        for resume in (False, True):
            with pytest.raises(BlockingIOError, match="Another process"):
                with opened(tmp_path / "run", {}, replace=True, resume=resume):
                    pass


def test_replace_keeps_the_old_run_until_the_new_one_is_whole(tmp_path):
    out = tmp_path / "demo"

    def result():
        return (out / "result").read_text()

    for number in "12":
        with opened(out, {}, replace=True) as run:
            write_atomic(run.path / "result", number)
            assert number == "1" or result() == "1"
            assert runs.finish(run) == out
        assert result() == number
    with opened(out, {}, replace=True) as run:  # dies before it is whole
        write_atomic(run.path / "result", "3")
    assert result() == "2"
    with opened(out, {}, replace=True, resume=True) as run:
        assert (run.path / "result").read_text() == "3"
        # A kill between the two renames of `finish`:
        out.rename(runs.older(out))
    with opened(out, {}, replace=True) as run:
        assert result() == "2"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["demo", "demo.partial"]


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, capsys):
    path = tmp_path / "summary.json"
    write_json(path, {"a": 1})

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit) as stop, clean_errors():
        write_json(path, {"a": 2})
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert (
        said == f"error: {path} was not written and is as it was before: No space left on device\n"
    )
    assert read_json(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("`alpha` must have 4 entries, got 3."), "`alpha` must have 4 entries, got 3."),
        (
            FileNotFoundError(2, "No such file or directory", "m.pt"),
            "No such file or directory: m.pt",
        ),
        (FileExistsError("runs/a already exists."), "runs/a already exists."),
    ],
)
def test_user_errors_are_one_sentence(error, said, capsys, monkeypatch):
    monkeypatch.delenv("FORGE_DEBUG", raising=False)

    @clean_errors()
    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: {said}\n"
    monkeypatch.setenv("FORGE_DEBUG", "1")
    with pytest.raises(type(error)):
        main()


def test_bugs_keep_their_traceback():
    with pytest.raises(KeyError), clean_errors():
        raise KeyError("z")


def test_once_measures_once(tmp_path):
    calls = []
    with opened(tmp_path / "run", {}) as run:
        first = once(
            run, "latency", lambda: calls.append(1) or {"ms": np.float32(1.5), "n": (1, 2)}
        )
    with opened(tmp_path / "run", {}, resume=True) as run:
        again = once(run, "latency", lambda: calls.append(1))
    assert first == again == {"ms": 1.5, "n": [1, 2]}
    assert len(calls) == 1


def test_seconds_go_on_over_a_resume(tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(runs.time, "monotonic", lambda: clock[0])
    with opened(tmp_path / "run", {}) as run:
        clock[0] += 60
        save(run, 1, {"x": 1})
    clock[0] = 5000.0
    with opened(tmp_path / "run", {}, resume=True) as run:
        clock[0] += 7
        assert runs.seconds(run) == pytest.approx(67)


def test_plain_json_has_no_nan(tmp_path):
    row = {"loss": float("nan"), "z": jnp.array([1.0, jnp.inf]), "n": np.int64(3), "out": tmp_path}
    assert plain(row) == {"loss": None, "z": [1.0, None], "n": 3, "out": str(tmp_path)}
    with pytest.raises(TypeError, match="JSON holds no set"):
        plain({1, 2})


def test_peak_memory_grows_with_an_array():
    """In a process of its own: a peak is the whole process's, other tests included."""
    code = (
        "import numpy as np; from experiments.run import peak_rss_gb as peak; a = peak(); "
        "x = np.ones(100_000_000); print(a, peak())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    before, after = map(float, done.stdout.split())
    assert 0.05 < before < before + 0.4 < after < 64  # the array has 0.8 GB
