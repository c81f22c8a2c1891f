"""config.json of every family as a `DecoderSpec` and back, and the checkpoint they come in."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from forge_jax.models import DecoderSpec, RopeScaling
from interop.formats import complain, is_finite
from interop.names import Params
from interop.rules import Names


class Family(NamedTuple):
    """A `model_type` of transformers: its class, and what a config of it may leave out."""

    architecture: str
    defaults: dict[str, Any]


_WINDOWED = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
FAMILIES = {
    "llama": Family("LlamaForCausalLM", {"max_position_embeddings": 2048}),
    "mistral": Family(
        "MistralForCausalLM",
        {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    ),
    "qwen2": Family("Qwen2ForCausalLM", {"max_position_embeddings": 32768, **_WINDOWED}),
    "qwen3": Family(
        "Qwen3ForCausalLM", {"max_position_embeddings": 32768, "head_dim": 128, **_WINDOWED}
    ),
    "gpt2": Family(
        "GPT2LMHeadModel",
        {
            "max_position_embeddings": 1024,
            "tie_word_embeddings": True,
            "layer_norm_epsilon": 1e-5,
            "activation_function": "gelu_new",
        },
    ),
}
_ONE_OF = ", ".join(repr(name) for name in FAMILIES)
# GPT2Config's names of what the other families call otherwise
_GPT2_FIELDS = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
    "n_inner": "intermediate_size",
    "layer_norm_epsilon": "rms_norm_eps",
    "activation_function": "hidden_act",
}
_GELU_NEW = ("gelu_new", "gelu_pytorch_tanh")  # one function under two names
_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
MOST_LAYERS = 1000  # a damaged number of layers must not make a list of as many names
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
    config: Mapping[str, Any],
    source: str,
    *,
    has_lm_head: bool | None = None,
    fused_qkv: bool | None = None,
) -> DecoderSpec:
    """Read a config of one of the `FAMILIES`; without a `model_type` it is Llama's.

    Args:
        config: fields of the family's config class; those it has defaults for may be absent.
        source: the file to name in an error.
        has_lm_head: whether the weights hold an `lm_head`; it decides about a config that does
            not say `tie_word_embeddings`.
        fused_qkv: whether GPT-2's c_attn stays one matrix; None is what the config's own
            `fused_qkv` says, else True.

    Raises:
        ValueError: naming all fields that are missing, malformed or not supported.
    """
    title, said = f"config of {source}", _family_name(config)
    name = said if said in FAMILIES else "llama"
    fields = _fields(config, name)
    window, first = _window(fields, name)
    optional = ("num_key_value_heads", "head_dim", "max_position_embeddings", "image_token_id")
    rope = _rope(fields)
    theta = rope.get("rope_theta", fields.get("rope_theta", 10000.0))
    eps = fields.get("rms_norm_eps", 1e-6)
    problems = [
        "" if said == name else f"model_type: {said!r} is not supported, want {_ONE_OF}",
        *_unsupported(fields, name, rope),
        *(_count(fields, n) for n in _COUNTS),
        *(_count(fields, n, least=0) for n in optional if fields.get(n) is not None),
        *_scaling_problems(rope),
        *(
            f"{n}: have {value!r}, want a positive number"
            for n, value in (("rope_theta", theta), ("rms_norm_eps", eps))
            if not _is_positive(value)
        ),
        *(
            _count({"sliding_window": window, "max_window_layers": first}, n, least)
            for n, least in (("sliding_window", 1), ("max_window_layers", 0))
            if window is not None
        ),
    ]
    complain(title, [p for p in problems if p])

    heads, hidden = fields["num_attention_heads"], fields["hidden_size"]
    tied = fields.get("tie_word_embeddings")
    is_gpt2 = name == "gpt2"
    fused = config.get("fused_qkv", True) if fused_qkv is None else fused_qkv
    scaled = _rope_type(rope) == "llama3"
    try:
        return DecoderSpec(
            **{n: fields[n] for n in _COUNTS},
            num_key_value_heads=(not is_gpt2 and fields.get("num_key_value_heads")) or heads,
            head_dim=(not is_gpt2 and fields.get("head_dim")) or hidden // heads,
            rope_theta=float(theta),
            rms_norm_eps=float(eps),
            max_position_embeddings=fields.get("max_position_embeddings") or 2048,
            tie_word_embeddings=has_lm_head is False if tied is None else bool(tied),
            image_token_id=fields.get("image_token_id"),
            rope_scaling=RopeScaling(**{n: rope[n] for n in _SCALING}) if scaled else None,
            sliding_window=window,
            max_window_layers=0 if window is None else first,
            qkv_bias=name == "qwen2",
            qk_norm=name == "qwen3",
            is_gpt2=is_gpt2,
            fused_qkv=is_gpt2 and bool(fused),
        )
    except ValueError as error:
        raise ValueError(f"{title} does not fit: {error}") from error


def _family_name(config: Mapping[str, Any]) -> str:
    """The `model_type`; where only the class is named, the family of the class."""
    if config.get("model_type") is not None:
        return str(config["model_type"])
    classes = {family.architecture: name for name, family in FAMILIES.items()}
    named = config.get("architectures")
    first = named[0] if isinstance(named, list) and named else None
    return classes.get(first, "llama") if isinstance(first, str) else "llama"


def _fields(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The config under the other families' names, with the defaults of its own."""
    fields = {**FAMILIES[name].defaults, **config}
    if name != "gpt2":
        return fields
    for theirs, ours in _GPT2_FIELDS.items():
        # a config in our own names comes from `dataclasses.asdict(spec)`
        if theirs in config or ours not in config:
            fields[ours] = fields.get(theirs, fields.get(ours))
    if fields["intermediate_size"] is None and isinstance(fields["hidden_size"], int):
        fields["intermediate_size"] = 4 * fields["hidden_size"]
    return fields


def _window(fields: Mapping[str, Any], name: str) -> tuple[Any, Any]:
    """Size of the sliding window, None without one, and the first layer that has it."""
    window = fields.get("sliding_window")
    if name == "mistral":
        return window, 0
    if name not in ("qwen2", "qwen3") or not fields["use_sliding_window"] or window is None:
        return None, 0
    kinds = fields.get("layer_types")
    first = kinds.count("full_attention") if isinstance(kinds, list) else None
    first = fields["max_window_layers"] if first is None else first
    return (None, 0) if isinstance(kinds, list) and first == len(kinds) else (window, first)


def _layer_types(layers: int, window: int | None, first: int) -> list[str]:
    """The kind of attention of every layer, in transformers' words."""
    full = layers if window is None else min(first, layers)
    return ["full_attention"] * full + ["sliding_attention"] * (layers - full)


def _is_positive(value: Any) -> bool:
    return is_finite(value) and value > 0


def _count(config: Mapping[str, Any], name: str, least: int = 1) -> str:
    """What is wrong with a whole number of the config; empty if nothing is."""
    if config.get(name) is None:
        return f"{name}: missing"
    most = MOST_LAYERS if name == "num_hidden_layers" else 2**31 - 1
    return whole_problem(name, config[name], least, most)


def whole_problem(name: str, value: Any, least: int, most: int) -> str:
    """What keeps `value` from being a whole number from `least` to `most`; empty if nothing."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        return f"{name}: have {value!r}, want a whole number from {least} to {most}"
    return ""


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rope parameters under either of transformers' names for them."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return dict(rope) if isinstance(rope, Mapping) else {"rope_type": rope}


def _rope_type(rope: Mapping[str, Any]) -> Any:
    """Which rule stretches the frequencies; a factor without a rule is no rule we know."""
    return rope.get("rope_type", rope.get("type", "unnamed" if "factor" in rope else "default"))


def _scaling_problems(rope: Mapping[str, Any]) -> list[str]:
    if _rope_type(rope) != "llama3":
        return []
    return [
        f"rope scaling: {n} is {rope.get(n)!r}, want a positive number"
        for n in _SCALING
        if not _is_positive(rope.get(n))
    ]


def _unsupported(fields: Mapping[str, Any], name: str, rope: Mapping[str, Any]) -> list[str]:
    """Fields that ask for another computation than the decoder's."""
    architecture = FAMILIES[name].architecture
    architectures = fields.get("architectures") or [architecture]
    wanted = _GELU_NEW if name == "gpt2" else ("silu", "swish")
    activation = fields.get("hidden_act") or wanted[0]
    rope_type = _rope_type(rope)
    kinds = fields.get("layer_types")
    partial = rope.get("partial_rotary_factor", fields.get("partial_rotary_factor", 1))
    checks = {
        f"architectures: {architectures!r} is not supported, want [{architecture!r}]": (
            architectures != [architecture]
        ),
        f"rope scaling: {rope_type!r} is not supported, want 'default' or 'llama3'": (
            rope_type not in ("default", "llama3")
        ),
        f"hidden_act: {activation!r} is not supported, want {wanted[0]!r}": (
            activation not in wanted
        ),
        "attention_bias: true is not supported": fields.get("attention_bias"),
        "mlp_bias: true is not supported": fields.get("mlp_bias"),
        "quantization_config: quantized weights are not supported": (
            fields.get("quantization_config")
        ),
        "partial_rotary_factor: only 1 is supported": partial != 1,
        f"layer_types: {kinds!r} is not supported, want full before sliding attention": (
            name in ("qwen2", "qwen3") and kinds is not None and not _is_full_first(fields)
        ),
        "n_head: must divide n_embd": name == "gpt2" and not _divides(fields),
        "scale_attn_weights: false is not supported": fields.get("scale_attn_weights") is False,
        "scale_attn_by_inverse_layer_idx: true is not supported": (
            fields.get("scale_attn_by_inverse_layer_idx")
        ),
        "add_cross_attention: true is not supported": fields.get("add_cross_attention"),
    }
    return [problem for problem, holds in checks.items() if holds]


def _divides(fields: Mapping[str, Any]) -> bool:
    """Whether GPT-2's heads share its width evenly; what is no number is named elsewhere."""
    width, heads = fields.get("hidden_size"), fields.get("num_attention_heads")
    if not isinstance(width, int) or not isinstance(heads, int) or heads < 1:
        return True
    return width % heads == 0


def _is_full_first(fields: Mapping[str, Any]) -> bool:
    """Whether `layer_types` is what a single `max_window_layers` can say."""
    kinds, layers = fields["layer_types"], fields.get("num_hidden_layers")
    if not isinstance(kinds, list) or not isinstance(layers, int) or len(kinds) != layers:
        return False
    return kinds == _layer_types(layers, 1, kinds.count("full_attention"))


def family_of(spec: DecoderSpec, config: Mapping[str, Any]) -> str:
    """The `model_type` that computes what `spec` does; the config's own where several do."""
    if spec.is_gpt2:
        return "gpt2"
    if spec.qk_norm:
        return "qwen3"
    if spec.qkv_bias:
        return "qwen2"
    own_mistral = config.get("model_type") == "mistral"
    return "mistral" if own_mistral or spec.sliding_window is not None else "llama"


def hf_config(spec: DecoderSpec, config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` as transformers opens it: its family's class and fields, float32 weights."""
    name = family_of(spec, config)
    # transformers derives these or spells them otherwise, or they come from a dataclass of ours
    dropped = {"rope_scaling", "rope_parameters", "torch_dtype", "transformers_version"}
    dropped |= {"layer_types", "qkv_bias", "qk_norm", "is_gpt2", "fused_qkv"}
    if name == "gpt2":
        dropped |= {*_GPT2_FIELDS.values(), "rope_theta", "head_dim", "num_key_value_heads"}
    if name == "llama" or name == "gpt2":
        dropped |= {"sliding_window", "max_window_layers"}
    kept = {n: value for n, value in config.items() if n not in dropped}
    fields = {
        "architectures": [FAMILIES[name].architecture],
        "model_type": name,
        "vocab_size": spec.vocab_size,
        "tie_word_embeddings": spec.tie_word_embeddings,
        "dtype": "float32",
        **(_gpt2_config(spec) if name == "gpt2" else _llama_config(spec)),
    }
    if name == "mistral":
        fields["sliding_window"] = spec.sliding_window
    elif name in ("qwen2", "qwen3"):
        fields |= _qwen_window(spec)
    if spec.image_token_id is not None:
        fields["image_token_id"] = spec.image_token_id
    return kept | fields


def _gpt2_config(spec: DecoderSpec) -> dict[str, Any]:
    return {
        "n_embd": spec.hidden_size,
        "n_layer": spec.num_hidden_layers,
        "n_head": spec.num_attention_heads,
        "n_positions": spec.max_position_embeddings,
        "n_inner": spec.intermediate_size,
        "layer_norm_epsilon": spec.rms_norm_eps,
        "activation_function": "gelu_new",
        # ours: transformers ignores it, the readers here choose the same matrices again
        "fused_qkv": spec.fused_qkv,
    }


def _llama_config(spec: DecoderSpec) -> dict[str, Any]:
    scaling: dict[str, Any] = {"rope_type": "default"}
    if spec.rope_scaling is not None:
        scaling = {"rope_type": "llama3"}
        scaling |= {name: getattr(spec.rope_scaling, name) for name in _SCALING}
    fields = {
        "hidden_act": "silu",
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
        "rope_parameters": {"rope_theta": spec.rope_theta, **scaling},
    }
    return fields if spec.rope_scaling is None else {**fields, "rope_scaling": scaling}


def _qwen_window(spec: DecoderSpec) -> dict[str, Any]:
    layers, window = spec.num_hidden_layers, spec.sliding_window
    return {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": layers if window is None else spec.max_window_layers,
        "layer_types": _layer_types(layers, window, spec.max_window_layers),
    }
