"""Directories of Phase 4: what leads, what stands in, and the defect of its int8 file."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from interop import load_phase4, load_phase6, params_to_torch, save_phase4

DENSE = "bitnet_dequantized_fp16.safetensors"
QUANTIZED = "bitnet_quantized_model.safetensors"
SIDE_CAR = "bitnet_quantized_model.json"


@pytest.fixture
def half(state_dict):
    return {name: weight.half() for name, weight in state_dict.items()}


def quantize(weights, codes=None):
    """Matrices of the layers as BitLinear: codes -1, 0, 1 and a scale for each row."""
    out, dense = {}, {}
    for name, weight in weights.items():
        if "layers" not in name or weight.ndim != 2:
            out[name] = weight
            continue
        scale = weight.float().abs().mean(dim=1).half()
        ternary = (weight.float() / scale.float()[:, None]).round().clamp(-1, 1)
        stem = name.removesuffix(".weight")
        # the exporter's defect: it stores scale * {-1, 0, 1}, which int8 cuts to 0
        stored = ternary if codes is None else codes(ternary, scale)
        out[f"{stem}.quantized_weight"] = stored.to(torch.int8)
        out[f"{stem}.scale_factor"] = scale
        dense[name] = ternary * scale.float()[:, None]
    return out, dense


def defective(ternary, scale):
    return ternary * scale.float()[:, None] * 0.1


def lay(directory, config, **files):
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    for name, tensors in files.items():
        save_file(tensors, directory / {"dense": DENSE, "quantized": QUANTIZED}[name])


def test_dequantized_file_leads_and_comes_back_bit_exact(tmp_path, half, config):
    """The int8 file beside it is all zero, which hurts nobody here."""
    quantized, _ = quantize(half, defective)
    lay(tmp_path, config, dense=half, quantized=quantized)
    for load in (load_phase4, load_phase6):
        checkpoint = load(tmp_path)
        back = params_to_torch(checkpoint.params, checkpoint.names)
        assert back.keys() == half.keys()
        assert all(torch.equal(back[n], half[n]) for n in half)
        assert back["model.norm.weight"].dtype == torch.float16


def test_dequantized_file_may_hold_only_the_quantized_layers(tmp_path, half, config):
    layers = {n: w for n, w in half.items() if "layers" in n and w.ndim == 2}
    quantized, _ = quantize(half, defective)
    lay(tmp_path, config, dense=layers, quantized=quantized)
    checkpoint = load_phase4(tmp_path)
    back = params_to_torch(checkpoint.params, checkpoint.names)
    assert all(torch.equal(back[n], half[n]) for n in half)


def test_sound_codes_are_multiplied_by_their_scales(tmp_path, half, config):
    quantized, dense = quantize(half)
    lay(tmp_path, config, quantized=quantized)
    checkpoint = load_phase4(tmp_path)
    back = params_to_torch(checkpoint.params, checkpoint.names)
    assert all(torch.equal(back[n], dense[n]) for n in dense)
    assert torch.equal(back["model.norm.weight"], half["model.norm.weight"])


@pytest.mark.parametrize("per_row", [True, False])
def test_legacy_names_have_their_scales_in_the_json(tmp_path, half, config, per_row):
    name = "model.layers.0.mlp.up_proj.weight"
    scale = [0.5 + i for i in range(40)] if per_row else 0.25
    codes = torch.arange(40 * 24).reshape(40, 24).remainder(3).sub(1).to(torch.int8)
    lay(tmp_path, config, quantized={**half, name: codes})
    (tmp_path / SIDE_CAR).write_text(json.dumps({"scale_factors": {name: scale}}))
    checkpoint = load_phase4(tmp_path)
    want = codes.float() * torch.tensor(scale).reshape(-1, 1)
    assert torch.equal(params_to_torch(checkpoint.params, checkpoint.names)[name], want)
    (tmp_path / SIDE_CAR).write_text(json.dumps({"scale_factors": {name: 0.125}}))
    assert load_phase4(tmp_path).sha256 != checkpoint.sha256  # other weights, another base


def test_all_zero_codes_are_explained_in_one_sentence(tmp_path, half, config):
    quantized, _ = quantize(half, defective)
    lay(tmp_path, config, quantized=quantized)
    with pytest.raises(ValueError) as caught:
        load_phase6(tmp_path)
    message = str(caught.value)
    assert "has lost 14 weights, model.layers.0.mlp.down_proj.weight among them" in message
    assert "all their int8 codes are 0" in message
    assert f"give {DENSE} beside it" in message
    assert "\n" not in message


@pytest.mark.parametrize("scale", [None, "x", [1.0, 2.0], float("inf"), 10**400])
def test_scales_that_do_not_fit_are_named(tmp_path, half, config, scale):
    name = "model.layers.0.mlp.up_proj.weight"
    lay(tmp_path, config, quantized={**half, name: torch.ones(40, 24, dtype=torch.int8)})
    (tmp_path / SIDE_CAR).write_text(json.dumps({"scale_factors": {name: scale}}))
    with pytest.raises(ValueError, match=f"{name}: int8 without a scale, or with one"):
        load_phase4(tmp_path)


def test_config_may_lie_in_the_side_car(tmp_path, half, config):
    lay(tmp_path, config, dense=half)
    (tmp_path / "config.json").unlink()
    for record in ({}, {"config": {"target_compression_ratio": 8.0}}):
        (tmp_path / SIDE_CAR).write_text(json.dumps(record))
        with pytest.raises(ValueError, match=r"needs the model's fields in config\.json or"):
            load_phase4(tmp_path)
    (tmp_path / SIDE_CAR).write_text(json.dumps({"config": config}))
    assert load_phase4(tmp_path).spec.hidden_size == 24


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_directory_out_is_read_by_torch_and_by_us(tmp_path, make_family, torch_logits, family):
    """Float16 weights go there and back unchanged; the codes are within half a step of them."""
    model = make_family(family)
    model.save_pretrained(tmp_path / "in")
    checkpoint = load_phase6(tmp_path / "in")
    params = {n: w.half() for n, w in params_to_torch(checkpoint.params, checkpoint.spec).items()}
    save_file(params, tmp_path / "in" / DENSE)
    checkpoint = load_phase4(tmp_path / "in")
    out = save_phase4(tmp_path / "out", checkpoint.params, checkpoint)
    again = load_phase4(out)
    back = params_to_torch(again.params, again.names)
    assert all(torch.equal(back[n], params[n]) for n in params)

    twin = AutoModelForCausalLM.from_config(model.config).eval()
    twin.load_state_dict(load_file(out / DENSE), strict=False)
    want = AutoModelForCausalLM.from_config(model.config).eval()
    want.load_state_dict({n: w.float() for n, w in params.items()}, strict=False)
    tokens = np.random.default_rng(0).integers(3, 67, (2, 9))
    error = np.abs(torch_logits(twin, tokens) - torch_logits(want, tokens)).max()
    print(f"Phase 4 directory, {family}: {error:.1e} when re-opened in torch")
    assert error <= 1e-4

    (out / DENSE).unlink()
    coded = load_phase4(out)
    for name, weight in params_to_torch(coded.params, coded.spec).items():
        step = params[name].float().abs().max() / 127
        assert (weight - params[name].float()).abs().max() <= 0.51 * step + 1e-3, name
