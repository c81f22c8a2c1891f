"""A Phase 6 checkpoint small enough to go through all of Phase 7 in a test."""

import json

import pytest
from safetensors.numpy import load_file, save_file

from experiments.model import NANO
from interop import load_phase6


def write_first_layers(folder, count):
    """The first layers of the shipped nano base, a Phase 6 pair of its own."""
    base = load_phase6(NANO)
    record = json.loads(NANO.read_text())
    record["config"]["num_hidden_layers"] = count
    (folder / "tiny.json").write_text(json.dumps(record))
    tensors = load_file(NANO.parent / "phase6.safetensors")
    kept = tuple(f".layers.{i}." for i in range(count))
    tensors = {k: v for k, v in tensors.items() if ".layers." not in k or any(x in k for x in kept)}
    save_file(tensors, folder / "tiny.safetensors", metadata={"format": "pt"})
    projector = load_file(NANO.parent / "phase6.vision.safetensors")
    save_file(projector, folder / "tiny.vision.safetensors", metadata={"format": "pt"})
    assert base.tokenizer is not None
    base.tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tiny.json"


@pytest.fixture(scope="session")
def first_layers():
    """`first_layers(folder, count)` writes such a checkpoint and returns its path."""
    return write_first_layers


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Of one layer."""
    return write_first_layers(tmp_path_factory.mktemp("tiny"), 1)
