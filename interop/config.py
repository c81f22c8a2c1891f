"""Hugging Face's LlamaConfig fields as a `DecoderSpec`, and the checkpoint they come in."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from forge_jax.models.decoder import DecoderSpec
from interop.formats import add_suffix, read_json, read_safetensors
from interop.names import Names, Params

_COUNTS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)


class Checkpoint(NamedTuple):
    """A model as it came from a file."""

    params: Params  # nested dict, float32 NumPy, kernels (in, out)
    spec: DecoderSpec
    config: dict[str, Any]  # Hugging Face's field names
    tokenizer: Tokenizer | None
    metrics: dict[str, Any]  # as Phase 6 reports them, else empty
    projector: dict[str, np.ndarray] | None  # kernel (patch, d), bias (d,)
    names: Names  # torch key -> (path, torch shape, dtype)
    sha256: str  # of the weights file
    path: Path  # the weights file, or the directory
    tokenizer_config: dict[str, Any] | None = None  # tokenizer_config.json, with the chat template


def spec_from_config(
    config: Mapping[str, Any], source: str, *, has_lm_head: bool | None = None
) -> DecoderSpec:
    """Read the Llama fields of `config`.

    Args:
        config: fields of LlamaConfig; those it has defaults for may be absent.
        source: the file to name in an error.
        has_lm_head: whether the weights hold an `lm_head`; it decides about a config that does
            not say `tie_word_embeddings`.

    Raises:
        ValueError: naming all fields that are missing, malformed or not supported.
    """
    problems = _unsupported(config)
    problems += [_count(config, name) for name in _COUNTS]
    optional = ("num_key_value_heads", "head_dim", "max_position_embeddings", "image_token_id")
    problems += [_count(config, n, least=0) for n in optional if config.get(n) is not None]
    rope = _rope(config)
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    eps = config.get("rms_norm_eps", 1e-6)
    for name, value in (("rope_theta", theta), ("rms_norm_eps", eps)):
        if not _is_positive(value):
            problems.append(f"{name}: have {value!r}, want a positive number")
    problems = [p for p in problems if p]
    if problems:
        lines = "\n".join(f"  {problem}" for problem in sorted(problems))
        raise ValueError(f"config of {source} does not fit:\n{lines}")

    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    tied = config.get("tie_word_embeddings")
    try:
        return DecoderSpec(
            **{name: config[name] for name in _COUNTS},
            num_key_value_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or hidden // heads,
            rope_theta=float(theta),
            rms_norm_eps=float(eps),
            max_position_embeddings=config.get("max_position_embeddings") or 2048,
            tie_word_embeddings=has_lm_head is False if tied is None else bool(tied),
            image_token_id=config.get("image_token_id"),
        )
    except ValueError as error:
        raise ValueError(f"config of {source} does not fit: {error}") from error


def _is_positive(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and value > 0


def _count(config: Mapping[str, Any], name: str, least: int = 1) -> str:
    """What is wrong with a whole number of the config; empty if nothing is."""
    if name not in config:
        return f"{name}: missing"
    value = config[name]
    # a damaged number of layers must not make a list of as many names
    most = 10_000 if name == "num_hidden_layers" else 2**31 - 1
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        return f"{name}: have {value!r}, want a whole number from {least} to {most}"
    return ""


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rope parameters under either of transformers' names for them."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return dict(rope) if isinstance(rope, Mapping) else {"rope_type": rope}


def _unsupported(config: Mapping[str, Any]) -> list[str]:
    """Fields that ask for another computation than the decoder's."""
    model_type = config.get("model_type")
    architectures = config.get("architectures") or ["LlamaForCausalLM"]
    rope = _rope(config)
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    activation = config.get("hidden_act", "silu")
    checks = {
        f"model_type: {model_type!r} is not supported, want 'llama'": model_type
        not in (None, "llama"),
        f"architectures: {architectures!r} is not supported, want ['LlamaForCausalLM']": list(
            architectures
        )
        != ["LlamaForCausalLM"],
        f"rope scaling: {rope_type!r} is not supported, want 'default'": rope_type != "default",
        f"hidden_act: {activation!r} is not supported, want 'silu'": activation
        not in ("silu", "swish"),
        "attention_bias: true is not supported": bool(config.get("attention_bias")),
        "mlp_bias: true is not supported": bool(config.get("mlp_bias")),
        "quantization_config: quantized weights are not supported": bool(
            config.get("quantization_config")
        ),
        "partial_rotary_factor: only 1 is supported": rope.get(
            "partial_rotary_factor", config.get("partial_rotary_factor", 1)
        )
        != 1,
    }
    return [problem for problem, holds in checks.items() if holds]


def hf_config(spec: DecoderSpec, config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` as transformers opens it: Llama's class, the fields of `spec`, float32 weights."""
    dropped = ("rope_scaling", "rope_parameters", "torch_dtype", "transformers_version")
    kept = {name: value for name, value in config.items() if name not in dropped}
    fields = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_hidden_layers,
        "num_attention_heads": spec.num_attention_heads,
        "num_key_value_heads": spec.num_key_value_heads,
        "head_dim": spec.head_dim,
        "max_position_embeddings": spec.max_position_embeddings,
        "rms_norm_eps": spec.rms_norm_eps,
        # both spellings: transformers 4 reads the first, 5 the second
        "rope_theta": spec.rope_theta,
        "rope_parameters": {"rope_theta": spec.rope_theta, "rope_type": "default"},
        "tie_word_embeddings": spec.tie_word_embeddings,
        "dtype": "float32",
    }
    if spec.image_token_id is not None:
        fields["image_token_id"] = spec.image_token_id
    return kept | fields


def find_tokenizer(
    directory: Path, base: str | None, spec: DecoderSpec
) -> tuple[Tokenizer | None, dict[str, Any] | None]:
    """The tokenizer beside the weights, and its tokenizer_config.json, where there are any.

    Looks for `<base>.tokenizer.json`, `tokenizer.json` and `tokenizer/tokenizer.json`.
    """
    candidates = [directory / "tokenizer.json", directory / "tokenizer" / "tokenizer.json"]
    if base is not None:
        candidates.insert(0, add_suffix(directory / base, ".tokenizer.json"))
    path = next((c for c in candidates if c.is_file()), None)
    if path is None:
        return None, None
    text = json.dumps(read_json(path))
    tokenizer = make_tokenizer(lambda: Tokenizer.from_str(text), path)
    check_tokenizer(tokenizer, spec, path)
    settings = path.parent / "tokenizer_config.json"
    return tokenizer, read_json(settings) if settings.is_file() else None


def make_tokenizer(make: Callable[[], Tokenizer], source: Path) -> Tokenizer:
    """The tokenizer that `make` builds; a ValueError naming `source` if it cannot."""
    try:
        return make()
    except Exception as error:  # tokenizers raises bare Exception, nothing narrower
        raise ValueError(f"{source} holds no usable tokenizer: {error}.") from error


def check_tokenizer(tokenizer: Tokenizer, spec: DecoderSpec, path: Path) -> None:
    """Raise a ValueError if the tokenizer has ids that the embedding lacks."""
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= spec.vocab_size:
        raise ValueError(
            f"{path} has token ids up to {largest}, but the model has {spec.vocab_size} tokens."
        )


def find_projector(
    directory: Path, base: str | None, spec: DecoderSpec
) -> dict[str, np.ndarray] | None:
    """The patch projector in `<base>.vision.safetensors` or `vision.safetensors`, float32."""
    candidates = [directory / "vision.safetensors"]
    if base is not None:
        candidates.insert(0, add_suffix(directory / base, ".vision.safetensors"))
    path = next((c for c in candidates if c.is_file()), None)
    if path is None:
        return None
    tensors = read_safetensors(path)
    kernel, bias = tensors.get("kernel"), tensors.get("bias")
    width = spec.hidden_size
    if kernel is None or kernel.ndim != 2 or kernel.shape[1] != width:
        have = None if kernel is None else kernel.shape
        raise ValueError(f"{path} needs a kernel of shape (patch, {width}), got {have}.")
    if bias is None or bias.shape != (width,):
        have = None if bias is None else bias.shape
        raise ValueError(f"{path} needs a bias of shape ({width},), got {have}.")
    for name, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            raise ValueError(f"{path} holds NaN or infinity in {name}.")
    return {name: tensor.astype(np.float32) for name, tensor in tensors.items()}
