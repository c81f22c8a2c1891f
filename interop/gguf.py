"""GGUF files in; weights dequantized by the gguf library, without torch."""

from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from forge_jax.models import DecoderSpec
from forge_jax.models.attention import rotary_frequencies
from interop import formats
from interop.companions import check_tokenizer, make_settings, make_tokenizer
from interop.config import FAMILIES, Checkpoint, spec_from_config
from interop.gguf_names import ARCHITECTURES, SPECIAL, from_gguf, hf_name
from interop.names import convert

_CONTROL, _USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type
# What the gguf reader raises on bytes that are no GGUF file.
_GGUF_ERRORS = (
    ValueError,
    LookupError,
    TypeError,
    ArithmeticError,
    AttributeError,
    OSError,
    MemoryError,
)


def load_gguf(file: str | Path) -> Checkpoint:
    """Read a GGUF file of an architecture in `ARCHITECTURES`, of any type that gguf dequantizes.

    Weights come as float32 under Hugging Face's names, the tokenizer from `tokenizer.ggml.*`.

    Raises:
        ValueError: the file is damaged, or its architecture, rope scaling, tensor type or
            tokenizer is not supported, or its tensors do not fit its header.
    """
    path = formats.require_file(Path(file))
    reader = _open(path)
    fields = _Fields(reader, path)
    architecture = _architecture(fields)
    config = _config(fields, architecture)
    found = {t.name: t for t in reader.tensors}
    config["tie_word_embeddings"] = "output.weight" not in found
    frequencies = found.pop("rope_freqs.weight", None)
    if frequencies is not None:
        config["rope_scaling"] = _scaling(fields, frequencies, architecture)
    spec = spec_from_config(config, str(path))
    if frequencies is not None:
        _check_scaling(spec, frequencies, path)
    tensors = _dequantize(found, architecture, spec, path)
    params, names = convert(tensors, spec, str(path))
    tokenizer, settings = _tokenizer(fields, config)
    if tokenizer is not None:
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


def _architecture(fields: _Fields) -> str:
    name = fields.need("general.architecture")
    if name not in ARCHITECTURES:
        raise ValueError(
            f"{fields.path} is of architecture {name!r}, which is not supported; "
            f"want one of {', '.join(ARCHITECTURES)}."
        )
    scaling = fields.get(f"{name}.rope.scaling.type", "none")
    if scaling != "none":
        raise ValueError(f"{fields.path} has rope scaling {scaling!r}, which is not supported.")
    return name


def _config(fields: _Fields, architecture: str) -> dict[str, Any]:
    """The fields of Hugging Face's config from the header."""

    def need(key: str) -> Any:
        return fields.need(f"{architecture}.{key}")

    def get(key: str, default: Any = None) -> Any:
        return fields.get(f"{architecture}.{key}", default)

    family, heads = ARCHITECTURES[architecture], need("attention.head_count")
    eps = _decimal(need(family.eps))
    config = {
        "architectures": [FAMILIES[family.family].architecture],
        "model_type": family.family,
        "vocab_size": get("vocab_size") or len(fields.need("tokenizer.ggml.tokens")),
        "hidden_size": need("embedding_length"),
        "intermediate_size": need("feed_forward_length"),
        "num_hidden_layers": need("block_count"),
        "num_attention_heads": heads,
        "max_position_embeddings": need("context_length"),
        "rms_norm_eps": eps,
    }
    if architecture != "gpt2":
        config |= {
            "hidden_act": "silu",
            "num_key_value_heads": get("attention.head_count_kv", heads),
            "rope_theta": _decimal(get("rope.freq_base", 10000.0)),
            "head_dim": get("attention.key_length", get("rope.dimension_count")),
        }
    ids = {f"{n}_token_id": fields.get(f"tokenizer.ggml.{g}_token_id") for n, g in SPECIAL.items()}
    return {k: v for k, v in {**config, **ids}.items() if v is not None}


def _scaling(fields: _Fields, frequencies: Any, architecture: str) -> dict[str, Any]:
    """Llama 3's rope scaling behind `rope_freqs`, which holds only what it comes to.

    The largest of the divisors is the factor; the rest is in fields of ours, or as Llama 3 has it.
    """
    values = np.asarray(frequencies.data, np.float32)
    prefix = f"{architecture}.rope.scaling"
    known = {
        "factor": ("factor", float(values.max(initial=1.0))),
        "low_freq_factor": ("low_freq_factor", 1.0),
        "high_freq_factor": ("high_freq_factor", 4.0),
        "original_max_position_embeddings": ("original_context_length", 8192),
    }
    found = {
        ours: _decimal(fields.get(f"{prefix}.{theirs}", usual))
        for ours, (theirs, usual) in known.items()
    }
    return {"rope_type": "llama3", **found}


def _check_scaling(spec: DecoderSpec, frequencies: Any, path: Path) -> None:
    """Compare the divisors of the file with those of the scaling that was read out of them."""
    plain = rotary_frequencies(spec.head_dim, spec.rope_theta)
    scaled = rotary_frequencies(spec.head_dim, spec.rope_theta, spec.rope_scaling)
    values = np.asarray(frequencies.data, np.float32)
    if values.shape != plain.shape or not np.allclose(values, plain / scaled, rtol=1e-4):
        raise ValueError(f"{path} has rope_freqs of another rule than Llama 3's.")


def _decimal(value: Any) -> Any:
    """The shortest decimal that is the same float32: the header rounded 1e-5 to float32."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _dequantize(
    found: dict[str, Any], architecture: str, spec: DecoderSpec, path: Path
) -> dict[str, np.ndarray]:
    """The tensors under Hugging Face's names, in its layout."""
    from gguf.quants import dequantize

    tensors, problems = {}, []
    for tensor in found.values():
        name = hf_name(tensor.name, architecture)
        try:
            values = dequantize(tensor.data, tensor.tensor_type)
            shape = tuple(int(n) for n in reversed(tensor.shape))
            values = np.asarray(values, np.float32).reshape(shape)
            tensors[name] = from_gguf(values, name, architecture, spec)
        except (NotImplementedError, ValueError, TypeError) as error:
            problems.append(f"{tensor.name}: {tensor.tensor_type.name} cannot be read: {error}")
    formats.complain(str(path), problems)
    return tensors


def _tokenizer(
    fields: _Fields, config: dict[str, Any]
) -> tuple[Tokenizer | None, dict[str, Any] | None]:
    """The byte-level BPE of the header and its tokenizer_config.json; None without words."""
    model, pre = fields.need("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre", "gpt-2")
    if model == "no_vocab":
        return None, None
    if model != "gpt2" or pre not in ("smollm", "gpt-2"):
        raise ValueError(
            f"{fields.path} has a tokenizer {model!r} with pre-tokenizer {pre!r}, which is not "
            "supported; want 'gpt2' with 'smollm' or 'gpt-2'."
        )
    tokens = fields.need("tokenizer.ggml.tokens")
    # the writer leaves an empty list out
    merges = [tuple(m.split(" ", 1)) for m in fields.get("tokenizer.ggml.merges", [])]
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
    settings = make_settings(tokenizer, config, config["max_position_embeddings"])
    template = fields.get("tokenizer.chat_template")
    return tokenizer, settings if template is None else {**settings, "chat_template": template}
