"""Torch names and layouts to the Flax tree and back."""

import ml_dtypes
import numpy as np
import pytest
import torch

from interop import params_from_torch, params_to_torch
from interop.config import spec_from_config
from interop.names import convert, flatten, leaf_path


@pytest.fixture
def spec(config):
    return spec_from_config(config, "config")


def bits(tensor):
    """Raw bytes and dtype, so that -0.0 and subnormals count."""
    return tensor.dtype, tensor.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_there_and_back_is_bit_exact(state_dict, spec, dtype):
    state_dict = {name: t.to(dtype) for name, t in state_dict.items()}
    q_proj = state_dict["model.layers.0.self_attn.q_proj.weight"]
    q_proj[0, :3] = torch.tensor([-0.0, torch.finfo(dtype).smallest_normal / 4, 1.0], dtype=dtype)
    params, names = convert(state_dict, spec)
    back = params_to_torch(params, names)
    assert list(back) == list(state_dict)
    assert {n: bits(t) for n, t in back.items()} == {n: bits(t) for n, t in state_dict.items()}


def test_mixed_dtypes_are_remembered_one_by_one(state_dict, spec):
    state_dict["model.norm.weight"] = state_dict["model.norm.weight"].to(torch.bfloat16)
    params, names = convert(state_dict, spec)
    assert params["norm"]["scale"].dtype == np.float32
    back = params_to_torch(params, names)
    assert back["model.norm.weight"].dtype == torch.bfloat16
    assert back["model.embed_tokens.weight"].dtype == torch.float32


def test_kernels_are_in_by_out_and_embeddings_are_not(state_dict, spec):
    params = params_from_torch(state_dict, spec)
    want = state_dict["model.layers.1.mlp.up_proj.weight"].numpy().T
    np.testing.assert_array_equal(params["layers_1"]["mlp"]["up_proj"]["kernel"], want)
    assert want.shape == (24, 40)
    embedding = state_dict["model.embed_tokens.weight"].numpy()
    np.testing.assert_array_equal(params["embed_tokens"]["embedding"], embedding)


def test_numpy_tensors_give_the_same_params(state_dict, spec):
    arrays = {name: t.numpy().astype(ml_dtypes.bfloat16) for name, t in state_dict.items()}
    tensors = {name: t.to(torch.bfloat16) for name, t in state_dict.items()}
    a, b = (dict(flatten(params_from_torch(d, spec))) for d in (arrays, tensors))
    assert a.keys() == b.keys()
    assert all(np.array_equal(a[path], b[path]) for path in a)


def test_tied_copy_that_was_there_is_there_again(llama, spec):
    weights = llama.state_dict()
    params, names = convert(weights, spec)
    assert "lm_head" not in params
    back = params_to_torch(params, names)
    assert list(back) == list(weights)
    assert torch.equal(back["lm_head.weight"], weights["lm_head.weight"])
    assert back["lm_head.weight"].data_ptr() != back["model.embed_tokens.weight"].data_ptr()


def test_tied_copy_that_differs_is_refused(llama, spec):
    weights = {n: t.clone() for n, t in llama.state_dict().items()}
    weights["lm_head.weight"][3, 3] += 1e-3
    with pytest.raises(ValueError, match=r"lm_head\.weight: differs from model\.embed_tokens"):
        convert(weights, spec)


def test_wrapped_and_bare_names_keep_their_names(state_dict, spec):
    bare = {n.removeprefix("model."): t for n, t in state_dict.items()}
    wrapped = {f"module._orig_mod.{n}": t for n, t in state_dict.items()}
    want = dict(flatten(params_from_torch(state_dict, spec)))
    for other in (bare, wrapped):
        params, names = convert(other, spec)
        assert all(np.array_equal(want[p], leaf) for p, leaf in flatten(params))
        assert list(params_to_torch(params, names)) == list(other)


def test_rotary_frequencies_of_old_files_are_no_weights(state_dict, spec):
    state_dict["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    _, names = convert(state_dict, spec)
    assert "model.layers.0.self_attn.rotary_emb.inv_freq" not in names


def test_all_problems_are_listed_at_once(state_dict, spec):
    layer = "model.layers.0"
    del state_dict[f"{layer}.mlp.up_proj.weight"]
    state_dict["model.layers.7.mlp.up_proj.weight"] = torch.ones(40, 24)
    state_dict["extra"] = torch.ones(1)
    state_dict[f"{layer}.self_attn.q_proj.weight"] = torch.ones(24, 32)
    state_dict[f"{layer}.self_attn.k_proj.weight"] = torch.ones(16, 24, dtype=torch.int8)
    state_dict[f"{layer}.self_attn.v_proj.weight"][2, 2] = torch.nan
    state_dict[f"{layer}.input_layernorm.weight"][0] = torch.inf
    state_dict["norm.weight"] = torch.ones(24)
    state_dict[f"{layer}.mlp.gate_proj.weight"] = "a string"
    with pytest.raises(ValueError) as caught:
        params_from_torch(state_dict, spec)
    lines = str(caught.value).splitlines()
    assert lines[0] == "state_dict does not fit:"
    assert [line.strip() for line in lines[1:]] == sorted(
        [
            "layers_0/mlp/up_proj/kernel: no key maps to it",
            "model.layers.7.mlp.up_proj.weight: unknown key, no weight of this model has this name",
            "extra: unknown key, no weight of this model has this name",
            f"{layer}.self_attn.q_proj.weight: have (24, 32), want (32, 24)",
            f"{layer}.self_attn.k_proj.weight: have int8, want float32, float16, bfloat16",
            f"{layer}.self_attn.v_proj.weight: holds NaN or infinity",
            f"{layer}.input_layernorm.weight: holds NaN or infinity",
            "norm/scale: 2 keys map to it (model.norm.weight, norm.weight), want 1",
            f"{layer}.mlp.gate_proj.weight: have a str, want a tensor",
        ]
    )


def test_a_tensor_of_stride_zero_is_judged_by_its_shape(state_dict, spec):
    """Such a tensor is small in the file and would fill the memory if it were copied."""
    huge = torch.zeros(1).expand(10**12)
    state_dict["model.norm.weight"] = huge
    with pytest.raises(ValueError, match="want \\(24,\\)"):
        params_from_torch(state_dict, spec)


def test_params_that_do_not_fit_are_listed_on_the_way_back(state_dict, spec):
    params, names = convert(state_dict, spec)
    del params["norm"]
    params["stray"] = {"kernel": np.ones((2, 2))}
    params["layers_0"]["mlp"]["up_proj"]["kernel"] = np.ones((40, 24))
    params["layers_1"]["mlp"]["up_proj"]["kernel"][0, 0] = np.nan
    with pytest.raises(ValueError) as caught:
        params_to_torch(params, names)
    message = str(caught.value)
    assert "norm/scale: missing, model.norm.weight comes from it" in message
    assert "stray/kernel: no torch name" in message
    assert "layers_0/mlp/up_proj/kernel: have (40, 24), want (24, 40)" in message
    assert "layers_1/mlp/up_proj/kernel: holds NaN or infinity" in message


def test_spec_gives_hugging_face_names(llama, state_dict, spec):
    back = params_to_torch(params_from_torch(state_dict, spec), spec)
    assert set(back) == {name for name, _ in llama.named_parameters()}


@pytest.mark.parametrize("name", ["model.layers.01.mlp.up_proj.weight", "lm_head.weight\n", "wpe"])
def test_names_must_match_as_a_whole(name):
    assert leaf_path(name) is None
