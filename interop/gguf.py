"""GGUF files of the Llama family; weights dequantized by the gguf library, without torch."""

import re
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from interop import formats
from interop.config import Checkpoint, check_tokenizer, make_tokenizer, spec_from_config
from interop.names import convert

# GGUF name inside a block -> name inside a Hugging Face layer
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK_NAME = re.compile(r"blk\.(\d+)\.(\w+)\.weight")
_CONTROL, _USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type
# What the gguf reader raises on bytes that are no GGUF file.
_GGUF_ERRORS = (ValueError, LookupError, TypeError, OverflowError, AttributeError, OSError)


def load_gguf(file: str | Path) -> Checkpoint:
    """Read a Llama-shaped GGUF file: Q4_1, Q8_0, F32, F16, and what else gguf dequantizes.

    Weights come as float32 under Hugging Face's names, the tokenizer from `tokenizer.ggml.*`.

    Raises:
        ValueError: the file is damaged, or its architecture, rope scaling, tensor type or
            tokenizer is not supported, or its tensors do not fit its header.
    """
    path = formats.require_file(Path(file))
    reader = _open(path)
    fields = _Fields(reader, path)
    config = _config(fields)
    tensors = _dequantize(reader, path)
    config["tie_word_embeddings"] = "lm_head.weight" not in tensors
    spec = spec_from_config(config, str(path))
    for name in list(tensors):
        for part, heads in (
            ("q_proj", spec.num_attention_heads),
            ("k_proj", spec.num_key_value_heads),
        ):
            if name.endswith(f"self_attn.{part}.weight"):
                tensors[name] = _unpermute(tensors[name], heads, name, path)
    params, names = convert(tensors, spec, str(path))
    tokenizer, settings = _tokenizer(fields, config)
    check_tokenizer(tokenizer, spec, path)
    digest = formats.sha256_file(path)
    return Checkpoint(params, spec, config, tokenizer, {}, None, names, digest, path, settings)


class _Fields:
    """The header fields of a file, which names it when one is missing."""

    def __init__(self, reader: Any, path: Path):
        self.reader, self.path = reader, path

    def get(self, key: str, default: Any = None) -> Any:
        field = self.reader.get_field(key)
        try:
            return default if field is None else field.contents()
        except _GGUF_ERRORS as error:
            raise ValueError(f"{self.path} is corrupted in its field {key}: {error}.") from error

    def need(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise ValueError(f"{self.path} lacks the field {key}.")
        return value


def _open(path: Path) -> Any:
    from gguf import GGUFReader

    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"{path} is no GGUF file: it does not start with GGUF.")
    try:
        return GGUFReader(str(path))
    except _GGUF_ERRORS as error:
        raise ValueError(f"{path} is truncated or corrupted: {error}.") from error


def _config(fields: _Fields) -> dict[str, Any]:
    """LlamaConfig's fields from the header."""
    architecture = fields.need("general.architecture")
    if architecture != "llama":
        raise ValueError(
            f"{fields.path} is of architecture {architecture!r}, which is not supported; "
            "want 'llama'."
        )
    scaling = fields.get("llama.rope.scaling.type", "none")
    if scaling != "none":
        raise ValueError(f"{fields.path} has rope scaling {scaling!r}, which is not supported.")
    heads = fields.need("llama.attention.head_count")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": fields.get("llama.vocab_size", len(fields.need("tokenizer.ggml.tokens"))),
        "hidden_size": fields.need("llama.embedding_length"),
        "intermediate_size": fields.need("llama.feed_forward_length"),
        "num_hidden_layers": fields.need("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.get("llama.attention.head_count_kv", heads),
        "max_position_embeddings": fields.need("llama.context_length"),
        "rms_norm_eps": _decimal(fields.need("llama.attention.layer_norm_rms_epsilon")),
        "rope_theta": _decimal(fields.get("llama.rope.freq_base", 10000.0)),
    }
    head_dim = fields.get("llama.attention.key_length", fields.get("llama.rope.dimension_count"))
    special = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    ids = {f"{n}_token_id": fields.get(f"tokenizer.ggml.{g}_token_id") for n, g in special.items()}
    return config | {k: v for k, v in {"head_dim": head_dim, **ids}.items() if v is not None}


def _decimal(value: float) -> float:
    """The shortest decimal that is the same float32: the header rounded 1e-5 to float32."""
    return float(str(np.float32(value)))


def _hf_name(name: str) -> str:
    """Hugging Face's name of a GGUF tensor; an unknown one is its own name."""
    if match := _BLOCK_NAME.fullmatch(name):
        index, part = match.groups()
        if part in _BLOCK:
            return f"model.layers.{index}.{_BLOCK[part]}.weight"
    return _TOP.get(name, name)


def _dequantize(reader: Any, path: Path) -> dict[str, np.ndarray]:
    from gguf.quants import dequantize

    tensors, problems = {}, []
    for tensor in reader.tensors:
        try:
            values = dequantize(tensor.data, tensor.tensor_type)
        except (NotImplementedError, ValueError, TypeError) as error:
            problems.append(f"  {tensor.name}: {tensor.tensor_type.name} cannot be read: {error}")
            continue
        shape = tuple(int(n) for n in reversed(tensor.shape))
        tensors[_hf_name(tensor.name)] = np.asarray(values, np.float32).reshape(shape)
    if problems:
        raise ValueError(f"{path} does not fit:\n" + "\n".join(problems))
    return tensors


def _unpermute(weight: np.ndarray, heads: int, name: str, path: Path) -> np.ndarray:
    """Undo llama.cpp's order of the rows of q and k, which pairs neighbours in the rotation.

    Row 2 i + j of a GGUF head is row i + j head_dim / 2 of Hugging Face's.
    """
    rows = weight.shape[0]
    if weight.ndim != 2 or rows % (2 * heads):
        raise ValueError(
            f"{path}: {name} has shape {weight.shape}, which {heads} heads do not fit."
        )
    halves = weight.reshape(heads, rows // heads // 2, 2, -1)
    return halves.swapaxes(1, 2).reshape(weight.shape)


def _tokenizer(fields: _Fields, config: dict[str, Any]) -> tuple[Tokenizer, dict[str, Any]]:
    """The byte-level BPE of the header, and its tokenizer_config.json."""
    model, pre = fields.need("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre", "gpt-2")
    if model != "gpt2" or pre not in ("smollm", "gpt-2"):
        raise ValueError(
            f"{fields.path} has a tokenizer {model!r} with pre-tokenizer {pre!r}, which is not "
            "supported; want 'gpt2' with 'smollm' or 'gpt-2'."
        )
    tokens = fields.need("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ", 1)) for merge in fields.need("tokenizer.ggml.merges")]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = make_tokenizer(
        lambda: Tokenizer(models.BPE(vocab=vocab, merges=merges)), fields.path
    )
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = (
        pre_tokenizers.Sequence([digits, bytes_]) if pre == "smollm" else bytes_
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = fields.get("tokenizer.ggml.token_type", [1] * len(tokens))
    for token, kind in zip(tokens, types, strict=False):
        if kind == _CONTROL:
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif kind == _USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, normalized=False)])
    return tokenizer, _settings(fields, config, tokens)


def _settings(fields: _Fields, config: dict[str, Any], tokens: list[str]) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"],
    }
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        index = config.get(f"{name}_id")
        if index is not None and 0 <= index < len(tokens):
            settings[name] = tokens[index]
    template = fields.get("tokenizer.chat_template")
    return settings if template is None else {**settings, "chat_template": template}
