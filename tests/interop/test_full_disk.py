"""A disk that fills during a write: the state before stays, and the error says what happened."""

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from interop import (
    formats,
    load_phase6,
    save_gguf,
    save_huggingface,
    save_phase4,
    save_transformer_squared,
)
from interop.transformer_squared import matrices

ROOT = Path(__file__).parents[2]

# every writer of one file, with more to write than there is room; one process: torch starts slowly
WRITE = """
import json, resource, signal, sys
from pathlib import Path
import numpy as np, torch
from interop import formats
directory, limit = Path(sys.argv[1]), int(sys.argv[2])
big = np.arange(100_000, dtype=np.float32)
writers = {
    "json": lambda path: formats.write_json(path, {"x": "y" * 100_000}),
    "safetensors": lambda path: formats.write_safetensors(path, {"x": big}),
    "torch": lambda path: formats.write_torch(path, {"x": torch.from_numpy(big)}),
}
if limit:
    # the same refusal as of a full disk, with another number
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
said = {}
for kind, write in writers.items():
    try:
        write(directory / kind)
    except OSError as error:
        said[kind] = str(error)
print(json.dumps(said))
"""
KINDS = ["json", "safetensors", "torch"]


def check(directory, limit, reason):
    """Every writer fails for `reason`, says so, and leaves its old file alone."""
    for kind in KINDS:
        (directory / kind).write_text("what was there")
    command = [sys.executable, "-c", WRITE, str(directory), str(limit)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert list(said) == KINDS
    for kind in KINDS:
        assert f"{kind} was not written and is as it was before" in said[kind]
        assert reason in said[kind]
        assert (directory / kind).read_text() == "what was there"
    assert sorted(os.listdir(directory)) == KINDS


def test_a_file_that_cannot_grow_is_not_written(tmp_path):
    check(tmp_path, 20_000, "File too large")


def test_a_full_disk_leaves_what_was_there(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)]
    try:
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("no right to mount a small disk")
    try:
        check(tmp_path, 0, "No space left on device")
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.fixture
def full(monkeypatch):
    """Let the n-th fsync fail as it does when the blocks of a file find no place."""

    def fill(after):
        count = iter(range(10_000))

        def fsync(descriptor):
            if next(count) >= after:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", fsync)

    return fill


WRITERS = {
    "huggingface": lambda path, c: save_huggingface(path, c.params, c),
    "phase4": lambda path, c: save_phase4(path, c.params, c),
    "gguf": lambda path, c: save_gguf(path, c.params, c),
    "expert": lambda path, c: save_transformer_squared(
        path, {leaf: np.full(n, 0.5) for leaf, n in matrices(c.spec).values()}, c.spec
    ),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("after", [0, 2, 4])
def test_no_artifact_is_left_half_written(tmp_path, llama, full, writer, after):
    config = json.loads(llama.config.to_json_string())
    record = {"model_state_dict": llama.state_dict(), "config": config}
    torch.save(record, tmp_path / "m.pt")
    checkpoint = load_phase6(tmp_path / "m.pt")
    single = writer in ("gguf", "expert")
    full(0 if single else after)
    state = "and is as it was before" if single else "; nothing is left of it"
    said = f"{re.escape(str(tmp_path / 'out'))} was not written ?{state}: No space left on device"
    with pytest.raises(OSError, match=rf"^\[Errno {errno.ENOSPC}\] {said}$"):
        WRITERS[writer](tmp_path / "out", checkpoint)
    assert os.listdir(tmp_path) == ["m.pt"]


def test_a_file_that_may_not_survive_a_crash_is_said_to_be_written(tmp_path, full):
    path = tmp_path / "x.json"
    formats.write_json(path, {"a": 1})
    full(1)  # the file's own content is on the disk, its name is not
    said = r"x\.json is written, but may not survive a crash: No space left"
    with pytest.raises(OSError, match=said) as caught:
        formats.write_json(path, {"a": 2})
    assert caught.value.errno == errno.ENOSPC
    assert "as it was before" not in str(caught.value)
    assert formats.read_json(path) == {"a": 2}
    assert os.listdir(tmp_path) == ["x.json"]


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_directory_is_whole_and_said_to_be_or_absent(tmp_path, full, after):
    """Synced are its file, itself, and last its name."""
    target, whole = tmp_path / "out", after == 2

    def fill():
        with formats.staged_directory(target) as staged:
            (staged / "a").write_text("whole")

    full(after)
    state = "is written, but may not survive a crash" if whole else "nothing is left of it"
    with pytest.raises(OSError, match=rf"/out .*{state}: No space left on device$") as caught:
        fill()
    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == (["out"] if whole else [])


def test_what_else_fails_in_a_directory_is_named(tmp_path):
    """Not the staged place, but a file of the caller's."""
    (tmp_path / "file").write_text("no directory")
    with (
        pytest.raises(
            FileExistsError, match=r"file/out was not written; .*: File exists: .*/file$"
        ),
        formats.staged_directory(tmp_path / "file" / "out"),
    ):
        pass
    with (
        pytest.raises(FileNotFoundError, match=r"nothing is left of it: No such file .*/absent$"),
        formats.staged_directory(tmp_path / "out"),
    ):
        (tmp_path / "absent").read_text()
    assert os.listdir(tmp_path) == ["file"]


def test_the_message_keeps_the_number_of_the_error(tmp_path, full):
    formats.write_json(tmp_path / "x.json", {"a": 1})
    full(0)
    with pytest.raises(OSError, match=r"x\.json was not written.*No space left") as caught:
        formats.write_json(tmp_path / "x.json", {"a": 2})
    assert caught.value.errno == errno.ENOSPC
    assert formats.read_json(tmp_path / "x.json") == {"a": 1}
