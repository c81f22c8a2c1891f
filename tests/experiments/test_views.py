"""What a person sees of a run: the progress line, TensorBoard, W&B."""

import sys
import time
import types

import pytest

from experiments import run as runs
from experiments.run import log, opened, restore_latest, rows, save


def test_progress_prints_plain_lines_off_a_terminal(capsys):
    with runs.progress(4, "search", initial=1, every=0.0) as advance:
        for _ in range(3):
            advance(accuracy=0.12345)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("search: 2/4 (50%)")
    assert lines[-1] == "search: 4/4 (100%), 0 s left  accuracy 0.123"


def test_tensorboard_shows_the_record_after_a_resume(tmp_path):
    pytest.importorskip("tensorboardX")
    with opened(tmp_path / "run", {}, tensorboard=True) as run:
        log(run, {"step": 1, "seed": 0, "svf/math/loss": 0.5})
        save(run, 1, {"x": 1})
        log(run, {"step": 2, "seed": 0, "svf/math/loss": 99.0})
    with opened(tmp_path / "run", {}, tensorboard=True, resume=True) as run:
        restore_latest(run, {"x": 0})
        log(run, {"step": 2, "seed": 0, "svf/math/loss": 0.25, "text": "not a curve"})
    assert scalars(run.path / "tensorboard" / "seed0") == [
        ("svf/math/loss", 1, 0.5),
        ("svf/math/loss", 2, 0.25),
    ]


def scalars(directory):
    """Read TensorBoard's files with the record format's own rules: length, crc, event, crc."""
    from tensorboardX.proto import event_pb2

    found = []
    for path in sorted(directory.iterdir()):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            event = event_pb2.Event.FromString(  # pyright: ignore[reportAttributeAccessIssue]
                data[12 : 12 + size]
            )
            found += [(v.tag, event.step, v.simple_value) for v in event.summary.value]
            data = data[16 + size :]
    return found


def test_wandb_follows_the_record(tmp_path, monkeypatch):
    """A stand-in for the service: what is asked of it, and that nothing is sent twice."""
    seen, started = {}, []

    class Service:
        step = 0

        def log(self, row, step):
            assert step not in seen
            seen[step] = row

        def finish(self):
            Service.step = max(seen) + 1

    def init(**settings):
        started.append(settings)
        return Service()

    module = types.SimpleNamespace(init=init, Error=RuntimeError)
    monkeypatch.setitem(sys.modules, "wandb", module)
    with opened(tmp_path / "run", {"steps": 2}, wandb="forge", wandb_mode="offline") as run:
        log(run, {"step": 1, "loss": 0.5})
        save(run, 1, {"x": 1})
    with opened(tmp_path / "run", {"steps": 2}, wandb="forge", resume=True) as run:
        restore_latest(run, {"x": 0})
        log(run, {"step": 2, "loss": 0.25})
    assert (
        list(seen.values())
        == rows(run.path)
        == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]
    )
    assert started[0]["id"] == started[1]["id"]
    assert started[0]["project"] == "forge"
    assert started[0]["mode"] == "offline"


def test_wandb_offline_for_real(tmp_path):
    pytest.importorskip("wandb")
    with opened(tmp_path / "run", {}, wandb="forge", wandb_mode="offline") as run:
        log(run, {"step": 1, "loss": 0.5})
    [record] = (run.path / "wandb").glob("offline-run-*/*.wandb")
    deadline = time.monotonic() + 30  # W&B's own process writes the file, also after `finish`
    while b"loss" not in record.read_bytes() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert b"loss" in record.read_bytes()


@pytest.mark.parametrize("package", ["wandb", "tensorboardX"])
def test_a_missing_view_is_one_sentence(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    project = "forge" if package == "wandb" else None
    with pytest.raises(ValueError, match=f"needs the package {package}"):
        with opened(tmp_path / "run", {}, wandb=project, tensorboard=not project):
            pass
