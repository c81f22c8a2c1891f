"""Tiny models from transformers, and the files that Phase 6 would write of them."""

import functools
import json

import jax
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from forge_jax.models import Decoder

TINY = {
    "vocab_size": 67,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rope_theta": 500.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


# what each family adds to `COMMON`: a window shorter than the rows, a rope scaling that bends most
# frequencies within them
COMMON = {
    "vocab_size": 67,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}
LLAMA_SHAPE = {n: TINY[n] for n in TINY if n.startswith(("hidden", "inter", "num", "max", "rms"))}
SCALING = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
WINDOW = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
FAMILY_CONFIGS = {
    "llama": (LlamaConfig, {**LLAMA_SHAPE, "tie_word_embeddings": True}),
    "llama3": (LlamaConfig, {**LLAMA_SHAPE, "rope_parameters": SCALING}),
    "mistral": (MistralConfig, {**LLAMA_SHAPE, "sliding_window": 4}),
    "qwen2": (Qwen2Config, {**LLAMA_SHAPE, "tie_word_embeddings": True}),
    "qwen2 window": (Qwen2Config, {**LLAMA_SHAPE, **WINDOW}),
    "qwen3": (Qwen3Config, {**LLAMA_SHAPE, "head_dim": 10}),
    "gpt2": (GPT2Config, {"n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 40}),
}


@pytest.fixture(scope="session")
def make_family():
    """Return a function: a random float32 model of a family; no bias is zero and no norm one."""

    @functools.cache
    def make(name):
        kind, fields = FAMILY_CONFIGS[name]
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(kind(**COMMON, **fields))
        for weight_name, weight in model.named_parameters():
            if weight_name.endswith("bias"):
                torch.nn.init.uniform_(weight, -0.5, 0.5)
            elif weight.ndim == 1:
                torch.nn.init.uniform_(weight, 0.5, 1.5)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def make_llama():
    """Return a function that builds a random float32 Llama whose norms are not all one."""

    def make(**fields):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**{**TINY, "initializer_range": 0.3, **fields}))
        for name, weight in model.named_parameters():
            if "norm" in name:
                torch.nn.init.uniform_(weight, 0.5, 1.5)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def llama(make_llama):
    """One tied Llama with grouped queries; tests must not change it."""
    return make_llama()


@pytest.fixture(scope="session")
def config(llama):
    """Its config as transformers writes it."""
    return json.loads(llama.config.to_json_string())


@pytest.fixture
def state_dict(llama):
    """Its weights, copied, without the tied copy."""
    weights = llama.state_dict()
    return {name: weights[name].clone() for name in weights if name != "lm_head.weight"}


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level tokenizer of 64 tokens over lower-case words."""
    alphabet = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())[:61]]
    made = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


@pytest.fixture(scope="session")
def torch_logits():
    """Return a function: logits of a transformers model, NumPy."""

    def logits(model, tokens, mask=None):
        tokens = torch.as_tensor(np.asarray(tokens, np.int64))
        mask = torch.ones_like(tokens) if mask is None else torch.as_tensor(mask).long()
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            out = model(input_ids=tokens, attention_mask=mask, position_ids=positions)
        return out.logits.numpy()

    return logits


@pytest.fixture(scope="session")
def jax_logits():
    """Return a function: logits of a checkpoint, or of the params given with it."""

    def logits(checkpoint, tokens, mask=None, params=None):
        tokens = np.asarray(tokens, np.int32)
        params = checkpoint.params if params is None else params
        apply = jax.jit(Decoder(getattr(checkpoint, "spec", checkpoint)).apply)
        return np.asarray(apply({"params": params}, tokens, mask)[0])

    return logits
