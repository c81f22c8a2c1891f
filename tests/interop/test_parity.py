"""Logits against transformers and against glassllm's own NumPy forward."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from interop import load_phase6, params_from_torch
from interop.config import spec_from_config

SHAPES = {
    "grouped": {},
    "one kv head": {"num_key_value_heads": 1},
    "full heads": {"num_key_value_heads": 4},
    "untied": {"tie_word_embeddings": False},
    "untied full wide": {
        "tie_word_embeddings": False,
        "num_key_value_heads": 4,
        "head_dim": 6,
        "rope_theta": 10000.0,
        "num_hidden_layers": 3,
    },
}


@pytest.fixture
def load(tmp_path):
    def load(model):
        config = json.loads(model.config.to_json_string())
        record = {"model_state_dict": model.state_dict(), "config": config}
        torch.save(record, tmp_path / "m.pt")
        return load_phase6(tmp_path / "m.pt")

    return load


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_transformers(make_llama, load, torch_logits, jax_logits, shape):
    model = make_llama(**SHAPES[shape])
    tokens = np.random.default_rng(0).integers(0, 67, (3, 17))
    want = torch_logits(model, tokens)
    assert np.abs(want).max() > 1
    np.testing.assert_allclose(jax_logits(load(model), tokens), want, atol=1e-4, rtol=0)


def test_left_padded_logits_equal_transformers(llama, load, torch_logits, jax_logits):
    rng = np.random.default_rng(1)
    tokens, mask = rng.integers(3, 67, (4, 13)), np.ones((4, 13), bool)
    for row, padding in enumerate([0, 1, 5, 12]):
        mask[row, :padding] = False
    tokens = np.where(mask, tokens, 0)
    want, got = torch_logits(llama, tokens, mask), jax_logits(load(llama), tokens, mask)
    np.testing.assert_allclose(got[mask], want[mask], atol=1e-4, rtol=0)
    # and padding does change the rows that have it, so the mask is not ignored
    assert np.abs(torch_logits(llama, tokens)[2, -1] - want[2, -1]).max() > 1e-2


GLASS = {
    "norm1.gamma": "input_layernorm",
    "norm2.gamma": "post_attention_layernorm",
    "ffn.W1": "mlp.gate_proj",
    "ffn.W3": "mlp.up_proj",
    "ffn.W2": "mlp.down_proj",
}


def glass_state_dict(model):
    """glassllm's arrays as a Llama state_dict: (in, out) transposed, neighbours to halves."""
    cfg, arrays = model.cfg, {n: p.data for n, p in model.named_parameters().items()}
    parts = {"W_Q": "q_proj", "W_K": "k_proj", "W_V": "v_proj", "W_O": "o_proj"}
    heads = {"W_Q": cfg.n_heads, "W_K": cfg.n_kv_heads}
    out = {"model.embed_tokens.weight": arrays["E"], "model.norm.weight": arrays["norm_f.gamma"]}
    for i in range(cfg.n_layers):
        for ours, theirs in parts.items():
            w = arrays[f"blocks.{i}.attn.{ours}"].T
            if ours in heads:
                pairs = w.reshape(heads[ours], -1, 2, w.shape[1])
                w = pairs.swapaxes(1, 2).reshape(w.shape)
            out[f"model.layers.{i}.self_attn.{theirs}.weight"] = w
        block = {n.split(".", 2)[2]: a for n, a in arrays.items() if n.startswith(f"blocks.{i}.")}
        rest = {n: a for n, a in block.items() if not n.startswith("attn.")}
        for name, array in rest.items():
            out[f"model.layers.{i}.{GLASS[name]}.weight"] = array.T
    return {name: np.ascontiguousarray(a, np.float32) for name, a in out.items()}


def test_logits_equal_glassllm(jax_logits):
    """Real weights and a forward pass that shares no code with ours or with transformers."""
    glass = pytest.importorskip("glassllm")
    package = importlib.util.find_spec("glassllm")
    assert package is not None
    assert package.submodule_search_locations is not None
    weights = Path(package.submodule_search_locations[0]) / "weights" / "en.npz"
    model = glass.model.GlassLM.load(weights)
    cfg, state_dict = model.cfg, glass_state_dict(model)
    spec = spec_from_config(
        {
            "vocab_size": cfg.vocab_size,
            "hidden_size": cfg.d_model,
            "intermediate_size": state_dict["model.layers.0.mlp.up_proj.weight"].shape[0],
            "num_hidden_layers": cfg.n_layers,
            "num_attention_heads": cfg.n_heads,
            "num_key_value_heads": cfg.n_kv_heads,
            "rope_theta": cfg.rope_base,
            "rms_norm_eps": cfg.eps,
        },
        "glassllm",
        has_lm_head=False,
    )
    assert sum(a.size for a in state_dict.values()) == 852_608

    params = params_from_torch(state_dict, spec)
    tokens = np.random.default_rng(2).integers(4, cfg.vocab_size, (2, 48))
    want = model.forward(tokens).data
    np.testing.assert_allclose(jax_logits(spec, tokens, params=params), want, atol=1e-4, rtol=0)
