"""GGUF files out, through the gguf library: float32 or float16, with a byte-level tokenizer."""

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tokenizers import Tokenizer

from forge_jax.models import DecoderSpec
from forge_jax.models.attention import rotary_frequencies
from interop import formats
from interop.companions import token_id
from interop.config import Checkpoint, family_of
from interop.gguf_names import ARCHITECTURES, SPECIAL, gguf_name, to_gguf
from interop.names import Params, params_to_numpy
from interop.rules import canonical_names

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # values of tokenizer.ggml.token_type
_BYTES = {"type": "ByteLevel", "add_prefix_space": False}
_DIGITS = {"type": "Digits", "individual_digits": True}


def save_gguf(
    path: str | Path,
    params: Params,
    checkpoint: Checkpoint,
    *,
    kind: Literal["F32", "F16"] = "F32",
    with_tokenizer: bool = True,
) -> Path:
    """Write `params` as a GGUF file that llama.cpp, transformers and `load_gguf` read.

    Llama and Mistral (without a window) are GGUF's "llama", Qwen2, Qwen3 and GPT-2 their own.
    Vectors stay float32. Llama 3's rope scaling goes out as `rope_freqs`, the way of llama.cpp,
    which transformers does not read. A patch projector has no place in the format.

    Raises:
        ValueError: a leaf does not fit or overflows float16, the model has a sliding window, or
            the tokenizer is none that GGUF's "gpt-2" and "smollm" describe.
    """
    from gguf import GGUFWriter

    path, spec = Path(path), checkpoint.spec
    if kind not in ("F32", "F16"):
        raise ValueError(f"`kind` must be 'F32' or 'F16', got {kind!r}.")
    if spec.sliding_window is not None:
        raise ValueError("GGUF's architectures of these families have no sliding window.")
    family = family_of(spec, checkpoint.config)
    architecture = "llama" if family == "mistral" else family
    tensors = _tensors(params, spec, architecture, kind)
    tokenizer = checkpoint.tokenizer if with_tokenizer else None
    words = None if tokenizer is None else _words(tokenizer, spec.vocab_size)

    def write(staged: Path) -> None:
        writer = GGUFWriter(str(staged), architecture)
        _add_fields(writer, spec, architecture)
        _add_tokenizer(writer, words, checkpoint)
        for name, array in tensors.items():
            writer.add_tensor(name, array)
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()

    formats.write_atomic(path, write)
    return path


def _tensors(
    params: Params, spec: DecoderSpec, architecture: str, kind: str
) -> dict[str, np.ndarray]:
    """The tensors of the file under GGUF's names, in its layout."""
    tensors, problems = {}, []
    for name, array in params_to_numpy(params, canonical_names(spec)).items():
        array = np.ascontiguousarray(to_gguf(array, name, architecture, spec))
        if kind == "F16" and array.ndim == 2:
            with np.errstate(over="ignore"):
                array = array.astype(np.float16)
            if not np.isfinite(array).all():
                problems.append(f"{name}: too large for float16")
        tensors[gguf_name(name, architecture)] = array
    formats.complain("params", problems)
    if spec.rope_scaling is not None:
        # llama.cpp divides its frequencies by these
        plain = rotary_frequencies(spec.head_dim, spec.rope_theta)
        scaled = rotary_frequencies(spec.head_dim, spec.rope_theta, spec.rope_scaling)
        tensors["rope_freqs.weight"] = plain / scaled
    return tensors


def _add_fields(writer: Any, spec: DecoderSpec, architecture: str) -> None:
    """The header: the shape of the model."""
    writer.add_context_length(spec.max_position_embeddings)
    writer.add_embedding_length(spec.hidden_size)
    writer.add_block_count(spec.num_hidden_layers)
    writer.add_feed_forward_length(spec.intermediate_size)
    writer.add_head_count(spec.num_attention_heads)
    writer.add_vocab_size(spec.vocab_size)
    writer.add_float32(f"{architecture}.{ARCHITECTURES[architecture].eps}", spec.rms_norm_eps)
    if spec.is_gpt2:
        return
    writer.add_head_count_kv(spec.num_key_value_heads)
    writer.add_rope_freq_base(spec.rope_theta)
    writer.add_rope_dimension_count(spec.head_dim)
    writer.add_key_length(spec.head_dim)
    writer.add_value_length(spec.head_dim)
    if (scaling := spec.rope_scaling) is not None:
        # no standard field holds the last two; with them the scaling reads back as its decimals
        prefix = f"{architecture}.rope.scaling"
        writer.add_float32(f"{prefix}.factor", scaling.factor)
        length = scaling.original_max_position_embeddings
        writer.add_uint32(f"{prefix}.original_context_length", length)
        writer.add_float32(f"{prefix}.low_freq_factor", scaling.low_freq_factor)
        writer.add_float32(f"{prefix}.high_freq_factor", scaling.high_freq_factor)


def _words(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """A byte-level BPE as GGUF keeps it: pre-tokenizer, tokens, their types, merges."""
    record = json.loads(tokenizer.to_str())
    model, pre = record["model"], _pre_tokenizer(record.get("pre_tokenizer"))
    after = (record.get("post_processor") or {"type": "ByteLevel"})["type"]
    described = model["type"] == "BPE" and pre is not None and after == "ByteLevel"
    if not described or record.get("normalizer") is not None:
        raise ValueError(
            "The tokenizer is no byte-level BPE that GGUF's 'gpt-2' or 'smollm' describes; write "
            "the file without it (`with_tokenizer=False`)."
        )
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [_UNUSED] * vocab_size
    added = {a["content"]: a["special"] for a in record["added_tokens"]}
    for token, index in tokenizer.get_vocab().items():
        special = added.get(token)
        kinds = {None: _NORMAL, True: _CONTROL, False: _USER_DEFINED}
        tokens[index], types[index] = token, kinds[special]
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    return {"pre": pre, "tokens": tokens, "types": types, "merges": merges}


def _pre_tokenizer(record: Any) -> str | None:
    """GGUF's name of a pre-tokenizer; None if it has none that we know."""

    def fits(part: Any, wanted: dict[str, Any]) -> bool:
        return isinstance(part, dict) and wanted.items() <= part.items()

    if fits(record, _BYTES):
        return "gpt-2"
    parts = record.get("pretokenizers", []) if isinstance(record, dict) else []
    both = len(parts) == 2 and fits(parts[0], _DIGITS) and fits(parts[1], _BYTES)
    return "smollm" if both else None


def _add_tokenizer(writer: Any, words: dict[str, Any] | None, checkpoint: Checkpoint) -> None:
    if words is None:
        writer.add_tokenizer_model("no_vocab")
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(words["pre"])
        writer.add_token_list(words["tokens"])
        writer.add_token_types(words["types"])
        writer.add_token_merges(words["merges"])
        template = (checkpoint.tokenizer_config or {}).get("chat_template")
        if isinstance(template, str):
            writer.add_chat_template(template)
    for ours, theirs in SPECIAL.items():
        if (index := token_id(checkpoint.config, ours)) is not None:
            writer.add_uint32(f"tokenizer.ggml.{theirs}_token_id", index)
