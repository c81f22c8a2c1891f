"""Factors kept on disk: read back bit for bit, and never those of something else."""

from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from forge_jax import svf
from interop import cache


def params_of(seed, path=("mlp", "up_proj")) -> Any:
    rng = np.random.default_rng(seed)
    first, second = path
    return {first: {second: {"kernel": rng.normal(size=(6, 10)).astype(np.float32)}}}


def everything(path, leaf):
    return True


@pytest.mark.parametrize("max_full", [None, 3])
def test_read_back_bit_for_bit_without_decomposing(tmp_path, monkeypatch, max_full):
    params = params_of(0)

    def get():
        return cache.cached_factors(params, everything, tmp_path, max_full=max_full)

    made = get()
    monkeypatch.setattr(svf, "decompose", None)
    again = get()
    jax.tree.map(np.testing.assert_array_equal, made, again)
    (_, leaf) = svf.named_factors(again)[0]
    assert leaf.s.shape == (max_full or 6,)
    whole = svf.materialize(again, svf.identity(again))["mlp"]["up_proj"]["kernel"]
    np.testing.assert_allclose(whole, params["mlp"]["up_proj"]["kernel"], atol=1e-5)


def test_other_weights_paths_and_sizes_are_other_files(tmp_path):
    """GPT-2's weights are one file whether its qkv is read as one matrix or as three."""
    fused, split = params_of(0, ("self_attn", "qkv_proj")), params_of(0, ("self_attn", "q_proj"))
    cases = [(params_of(0), None), (params_of(1), None), (params_of(0), 3), (fused, 3), (split, 3)]
    for params, max_full in cases:
        before = set(tmp_path.iterdir())
        kept = cache.cached_factors(params, everything, tmp_path, max_full=max_full)
        assert len(set(tmp_path.iterdir()) - before) == 1
        key = jax.random.key(0)
        direct = svf.decompose(params, everything, max_full=max_full, key=key)[0]
        jax.tree.map(np.testing.assert_array_equal, kept, direct)


@pytest.mark.parametrize("damage", ["flip", "cut", "other"])
def test_a_damaged_file_is_made_again(tmp_path, damage):
    def get():
        return cache.cached_factors(params_of(0), everything, tmp_path)

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
