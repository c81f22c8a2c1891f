"""Names and layouts of the tensors in GGUF files, as llama.cpp's converter writes them."""

import re
from typing import NamedTuple

import numpy as np

from forge_jax.models import DecoderSpec


class Architecture(NamedTuple):
    """How GGUF writes one family."""

    family: str  # Hugging Face's model_type
    eps: str  # the field of the norms' epsilon
    block: dict[str, str]  # GGUF name inside a block -> name inside a Hugging Face layer
    top: dict[str, str]  # whole names
    layer: str  # Hugging Face's prefix of a layer


_LLAMA_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LLAMA_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_GPT2_BLOCK = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
_GPT2_TOP = {
    "token_embd.weight": "transformer.wte.weight",
    "position_embd.weight": "transformer.wpe.weight",
    "output_norm.weight": "transformer.ln_f.weight",
    "output_norm.bias": "transformer.ln_f.bias",
    "output.weight": "lm_head.weight",
}
_RMS, _LAYER = "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"
ARCHITECTURES = {
    **{
        family: Architecture(family, _RMS, _LLAMA_BLOCK, _LLAMA_TOP, "model.layers")
        for family in ("llama", "qwen2", "qwen3")
    },
    "gpt2": Architecture("gpt2", _LAYER, _GPT2_BLOCK, _GPT2_TOP, "transformer.h"),
}
# the special tokens: Hugging Face's `<key>_token_id`, GGUF's `tokenizer.ggml.<value>_token_id`
SPECIAL = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
_BLOCK_NAME = re.compile(r"blk\.(0|[1-9]\d*)\.(\w+)\.(weight|bias)")
_LAYER_NAME = re.compile(r"(?:model\.layers|transformer\.h)\.(\d+)\.([\w.]+)\.(weight|bias)")


def hf_name(name: str, architecture: str) -> str:
    """Hugging Face's name of a GGUF tensor; an unknown one is its own name."""
    table = ARCHITECTURES[architecture]
    if match := _BLOCK_NAME.fullmatch(name):
        index, part, kind = match.groups()
        if part in table.block:
            return f"{table.layer}.{index}.{table.block[part]}.{kind}"
    return table.top.get(name, name)


def gguf_name(name: str, architecture: str) -> str:
    """GGUF's name of a Hugging Face tensor."""
    table = ARCHITECTURES[architecture]
    if match := _LAYER_NAME.fullmatch(name):
        index, part, kind = match.groups()
        return f"blk.{index}.{ {v: k for k, v in table.block.items()}[part] }.{kind}"
    return {v: k for k, v in table.top.items()}[name]


def from_gguf(array: np.ndarray, name: str, architecture: str, spec: DecoderSpec) -> np.ndarray:
    """A tensor of a GGUF file in Hugging Face's layout; `name` is Hugging Face's.

    llama.cpp orders the rows of a Llama's q and k so that the rotation pairs neighbours: row
    2 i + j of a GGUF head is row i + j head_dim / 2 of Hugging Face's. GPT-2's matrices are
    (out, in), where Hugging Face's Conv1D has (in, out).

    Raises:
        ValueError: the heads do not fit the rows.
    """
    heads = _turned_heads(name, architecture, spec)
    if heads:
        rows = array.shape[0] if array.ndim == 2 else 1
        if rows % (2 * heads):
            raise ValueError(f"{name} has shape {array.shape}, which {heads} heads do not fit.")
        halves = array.reshape(heads, rows // heads // 2, 2, -1)
        return halves.swapaxes(1, 2).reshape(array.shape)
    return array.T if _is_conv(name, architecture, array) else array


def to_gguf(array: np.ndarray, name: str, architecture: str, spec: DecoderSpec) -> np.ndarray:
    """Inverse of `from_gguf`."""
    if heads := _turned_heads(name, architecture, spec):
        halves = array.reshape(heads, 2, array.shape[0] // heads // 2, -1)
        return halves.swapaxes(1, 2).reshape(array.shape)
    return array.T if _is_conv(name, architecture, array) else array


def _turned_heads(name: str, architecture: str, spec: DecoderSpec) -> int:
    """How many heads of a matrix have their rows in another order; 0 if none."""
    if architecture != "llama":
        return 0
    heads = {"q": spec.num_attention_heads, "k": spec.num_key_value_heads}
    match = re.search(r"self_attn\.([qk])_proj\.weight$", name)
    return heads[match[1]] if match else 0


def _is_conv(name: str, architecture: str, array: np.ndarray) -> bool:
    return architecture == "gpt2" and ".c_" in name and array.ndim == 2
