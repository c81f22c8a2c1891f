"""Factors kept on disk: read back bit for bit, and never those of something else."""

from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from forge_jax import svf
from interop import cache


def checkpoint_of(seed) -> Any:
    rng = np.random.default_rng(seed)
    layers = {"up_proj": {"kernel": rng.normal(size=(6, 10)).astype(np.float32)}}
    return SimpleNamespace(params={"mlp": layers}, sha256=f"hash {seed}")


def everything(path, leaf):
    return True


@pytest.mark.parametrize("max_full", [None, 3])
def test_read_back_bit_for_bit_without_decomposing(tmp_path, monkeypatch, max_full):
    checkpoint = checkpoint_of(0)

    def get():
        return cache.cached_factors(checkpoint, everything, "all", tmp_path, max_full=max_full)

    made = get()
    monkeypatch.setattr(svf, "decompose", None)
    again = get()
    jax.tree.map(np.testing.assert_array_equal, made, again)
    (_, leaf) = svf.named_factors(again)[0]
    assert leaf.s.shape == (max_full or 6,)
    whole = svf.materialize(again, svf.identity(again))["mlp"]["up_proj"]["kernel"]
    np.testing.assert_allclose(whole, checkpoint.params["mlp"]["up_proj"]["kernel"], atol=1e-5)


def test_other_weights_selections_and_sizes_are_other_files(tmp_path):
    for seed, name, max_full in [
        (0, "all", None),
        (1, "all", None),
        (0, "mlp", None),
        (0, "all", 3),
    ]:
        before = set(tmp_path.iterdir())
        kept = cache.cached_factors(
            checkpoint_of(seed), everything, name, tmp_path, max_full=max_full
        )
        assert len(set(tmp_path.iterdir()) - before) == 1
        direct = svf.decompose(
            checkpoint_of(seed).params, everything, max_full=max_full, key=jax.random.key(0)
        )[0]
        jax.tree.map(np.testing.assert_array_equal, kept, direct)


@pytest.mark.parametrize("damage", ["flip", "cut", "other"])
def test_a_damaged_file_is_made_again(tmp_path, damage):
    def get():
        return cache.cached_factors(checkpoint_of(0), everything, "all", tmp_path)

    made = get()
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[-5] ^= 16
    path.write_bytes(bytes(content[:-40] if damage == "cut" else content))
    if damage == "other":
        save_file({"x": np.zeros(3, np.float32)}, path)
    jax.tree.map(np.testing.assert_array_equal, made, get())
    whole = path.read_bytes()
    jax.tree.map(np.testing.assert_array_equal, made, get())
    assert path.read_bytes() == whole
