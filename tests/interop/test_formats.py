"""Readers that run nothing and notice damage; writers that leave nothing half-written."""

import json
import os
import pickle

import ml_dtypes
import numpy as np
import pytest
import torch

from interop import formats


class Hostile:
    """A pickle that runs a command when it is loaded the ordinary way."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def torch_zip(path, value):
    torch.save(value, path)


def torch_legacy(path, value):
    torch.save(value, path, _use_new_zipfile_serialization=False)


def raw_pickle(path, value):
    path.write_bytes(pickle.dumps(value, protocol=4))


@pytest.mark.parametrize("write", [torch_zip, torch_legacy, raw_pickle])
def test_pickle_that_runs_code_is_refused_by_name_and_not_run(tmp_path, write):
    path, marker = tmp_path / "evil.pt", tmp_path / "marker"
    write(path, {"model_state_dict": {"a.weight": np.ones(3).tolist()}, "x": Hostile(marker)})
    with pytest.raises(ValueError) as caught:
        formats.read_torch(path)
    assert str(path) in str(caught.value)
    assert f"{os.system.__module__}.system" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not marker.exists()
    if write is raw_pickle:  # the file is armed: the ordinary reader does run it
        pickle.loads(path.read_bytes())
        assert marker.exists()


def test_pickled_module_is_refused_by_its_class(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "linear.pt")
    with pytest.raises(ValueError, match=r"needs .*torch\.nn\.modules\.linear\.Linear"):
        formats.read_torch(tmp_path / "linear.pt")


def test_plain_torch_files_are_read_in_both_formats(tmp_path):
    value = {"state": {"w": torch.arange(6.0).reshape(2, 3).half()}, "n": 3, "s": "text"}
    for write in (torch_zip, torch_legacy):
        write(tmp_path / "plain.pt", value)
        got = formats.read_torch(tmp_path / "plain.pt")
        assert torch.equal(got["state"]["w"], value["state"]["w"])
        assert (got["n"], got["s"]) == (3, "text")


@pytest.mark.parametrize("kept", [0, 1, 4, 60, 0.5, -30])
def test_truncated_torch_file(tmp_path, kept):
    path = tmp_path / "cut.pt"
    torch.save({"w": torch.ones(1000)}, path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept) if kept == 0.5 else kept])
    with pytest.raises(ValueError, match=r"cut\.pt"):
        formats.read_torch(path)


def test_a_flipped_bit_anywhere_in_the_weights_is_noticed(tmp_path):
    path = tmp_path / "flipped.pt"
    torch.save({"w": torch.ones(1000)}, path)
    data = path.read_bytes()
    start = data.index(np.ones(10, np.float32).tobytes())
    for offset in (0, 1777, 3999):
        broken = bytearray(data)
        broken[start + offset] ^= 1
        path.write_bytes(broken)
        assert not torch.equal(
            torch.load(path, weights_only=True)["w"], torch.ones(1000)
        )  # torch does not notice
        with pytest.raises(ValueError, match=r"flipped\.pt is corrupted: the checksum"):
            formats.read_torch(path)


def test_random_damage_never_escapes_as_another_error(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "noise.pt"
    torch.save({"w": torch.ones(100), "config": {"a": 1}}, path)
    data = path.read_bytes()
    for _ in range(150):
        broken = bytearray(data)
        broken[rng.integers(len(data))] ^= int(rng.integers(1, 256))
        path.write_bytes(broken)
        try:
            got = formats.read_torch(path)
        except ValueError as error:
            assert "noise.pt" in str(error)  # noqa: PT017
        else:  # a byte that carries nothing, such as padding
            assert torch.equal(got["w"], torch.ones(100))


@pytest.mark.parametrize("kept", [0, 4, 20, -3])
def test_truncated_safetensors(tmp_path, kept):
    path = tmp_path / "cut.safetensors"
    formats.write_safetensors(path, {"w": np.ones(9, np.float32)})
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"cut\.safetensors cannot be read"):
        formats.read_safetensors(path)


def test_safetensors_header_of_absurd_length_allocates_nothing(tmp_path):
    path = tmp_path / "huge.safetensors"
    path.write_bytes((2**62).to_bytes(8, "little") + b"{}" * 50)
    with pytest.raises(ValueError, match=r"huge\.safetensors"):
        formats.read_safetensors(path)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\xff", '{"a": '])
def test_broken_json(tmp_path, text):
    path = tmp_path / "broken.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"broken\.json"):
        formats.read_json(path)


@pytest.mark.parametrize(
    "read", [formats.read_json, formats.read_torch, formats.read_safetensors, formats.sha256_file]
)
def test_missing_file_and_directory(tmp_path, read):
    with pytest.raises(ValueError, match="absent does not exist"):
        read(tmp_path / "absent")
    with pytest.raises(ValueError, match="is a directory"):
        read(tmp_path)


@pytest.mark.parametrize("value", [0, -1, 0.5, 10**300])
def test_finite_numbers(value):
    assert formats.is_finite(value)


@pytest.mark.parametrize(
    "value", [10**400, -(10**400), float("nan"), float("inf"), True, "1", None]
)
def test_what_is_no_finite_number(value):
    assert not formats.is_finite(value)


def test_an_integer_that_cannot_be_written_out_is_refused():
    assert formats.plain_json([10**4000], "x") == [10**4000]
    with pytest.raises(ValueError, match=r"^x is too large"):
        formats.plain_json([10**5000], "x")


def test_bfloat16_passes_through_every_door(tmp_path):
    want = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    array = formats.to_numpy(want.T)
    assert array.dtype == ml_dtypes.bfloat16
    formats.write_safetensors(tmp_path / "b.safetensors", {"w": array})
    back = formats.to_torch(formats.read_safetensors(tmp_path / "b.safetensors")["w"])
    assert back.dtype == torch.bfloat16
    assert torch.equal(back, want.T)


def test_same_value_gives_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        formats.write_torch(tmp_path / name / "x.pt", {"w": torch.ones(3)})
    assert (tmp_path / "a/x.pt").read_bytes() == (tmp_path / "b/x.pt").read_bytes()


def test_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "x.json"
    formats.write_json(path, {"b": 1, "a": 2})
    assert list(json.loads(path.read_text())) == ["b", "a"]
    with pytest.raises(ValueError, match=r"x\.json cannot be written"):
        formats.write_json(path, {"x": float("nan")})

    def explode(staged):
        staged.write_text("half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        formats.write_atomic(path, explode)
    assert json.loads(path.read_text()) == {"b": 1, "a": 2}
    assert os.listdir(tmp_path) == ["x.json"]


def test_staged_directory_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "out.v2"
    (tmp_path / ".out.v2.staged").mkdir()  # what a killed process left
    (tmp_path / ".out.v2.staged" / "stale").write_text("old")

    def fill_half():
        with formats.staged_directory(target) as staged:
            (staged / "a").write_text("half")
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        fill_half()
    assert os.listdir(tmp_path) == []
    with formats.staged_directory(target) as staged:
        (staged / "a").write_text("whole")
        assert not target.exists()
    assert os.listdir(tmp_path) == ["out.v2"]
    assert os.listdir(target) == ["a"]
    with pytest.raises(ValueError, match="already exists"), formats.staged_directory(target):
        pass


def test_every_file_can_be_read_by_whom_the_umask_says(tmp_path):
    """safetensors itself makes files that only their owner can read."""
    before = os.umask(0o022)
    try:
        formats.write_safetensors(tmp_path / "a.safetensors", {"x": np.zeros(2, np.float32)})
        formats.write_json(tmp_path / "a.json", {})
        formats.write_torch(tmp_path / "a.pt", {})
    finally:
        os.umask(before)
    assert {p.stat().st_mode & 0o777 for p in tmp_path.iterdir()} == {0o644}
