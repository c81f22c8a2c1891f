"""Torch parameter names and the leaves of the Flax tree: one rule table for all families.

A leaf called `kernel` is (in, out). torch's weight is (out, in), but GPT-2's, whose Conv1D keeps
(in, out) as well; all other leaves keep their layout.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from forge_jax.models import DecoderSpec

_INDEX = r"(0|[1-9]\d*)"
_WRAPPERS = r"(?:module\.|_orig_mod\.)*"  # DataParallel, torch.compile
_LAYER = rf"(?:model\.)?layers\.{_INDEX}"
_BLOCK = rf"(?:transformer\.)?h\.{_INDEX}"

# GPT-2's name of a part of its blocks -> the decoder's
_GPT2_PARTS = {
    "ln_1": "input_layernorm",
    "attn.c_attn": "self_attn/qkv_proj",
    "attn.c_proj": "self_attn/o_proj",
    "ln_2": "post_attention_layernorm",
    "mlp.c_fc": "mlp/up_proj",
    "mlp.c_proj": "mlp/down_proj",
}


def _weight_of(part: str) -> str:
    """What the decoder calls GPT-2's `weight`: its norms have a scale, the rest a kernel."""
    return "scale" if part.startswith("ln_") else "kernel"


# regex on the whole torch key -> path of the leaf, filled with the groups of the match, and whether
# torch stores it the other way round
RULES: tuple[tuple[str, str, bool], ...] = (
    (r"(?:model\.)?embed_tokens\.weight", "embed_tokens/embedding", False),
    (
        rf"{_LAYER}\.(input_layernorm|post_attention_layernorm)\.weight",
        "layers_{}/{}/scale",
        False,
    ),
    (rf"{_LAYER}\.self_attn\.([qk]_norm)\.weight", "layers_{}/self_attn/{}/scale", False),
    (rf"{_LAYER}\.self_attn\.([qkvo]_proj)\.weight", "layers_{}/self_attn/{}/kernel", True),
    (rf"{_LAYER}\.self_attn\.([qkv]_proj)\.bias", "layers_{}/self_attn/{}/bias", False),
    (rf"{_LAYER}\.mlp\.((?:gate|up|down)_proj)\.weight", "layers_{}/mlp/{}/kernel", True),
    (r"(?:model\.)?norm\.weight", "norm/scale", False),
    (r"lm_head\.weight", "lm_head/kernel", True),
    (r"(?:transformer\.)?wte\.weight", "embed_tokens/embedding", False),
    (r"(?:transformer\.)?wpe\.weight", "embed_positions/embedding", False),
    *(
        (rf"{_BLOCK}\.{re.escape(part)}\.weight", f"layers_{{}}/{ours}/{_weight_of(part)}", False)
        for part, ours in _GPT2_PARTS.items()
    ),
    *(
        (rf"{_BLOCK}\.{re.escape(part)}\.bias", f"layers_{{}}/{ours}/bias", False)
        for part, ours in _GPT2_PARTS.items()
    ),
    (r"(?:transformer\.)?ln_f\.weight", "norm/scale", False),
    (r"(?:transformer\.)?ln_f\.bias", "norm/bias", False),
)
_RULES = tuple((re.compile(_WRAPPERS + pattern), path, turned) for pattern, path, turned in RULES)
# what old files carry beside the weights: frequencies and causal masks, which the config gives
_DERIVED = re.compile(
    rf"{_WRAPPERS}(?:"
    r"(?:model\.)?(?:layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq|"
    r"(?:transformer\.)?h\.\d+\.attn\.(?:masked_)?bias)"
)


class Entry(NamedTuple):
    """Where a torch tensor lives."""

    path: str  # leaf of the Flax tree, components joined by "/"; GPT-2's c_attn is the fused leaf
    shape: tuple[int, ...]  # torch's
    dtype: str  # "float32", "float16" or "bfloat16"
    transposed: bool = False  # the leaf is the other way round

    @property
    def leaf_shape(self) -> tuple[int, ...]:
        """Shape of the leaf."""
        return self.shape[::-1] if self.transposed else self.shape


Names = dict[str, Entry]


def find_rule(name: str) -> tuple[str, bool] | None:
    """Path of the leaf of the torch key `name`, and whether torch stores it the other way round."""
    for pattern, path, turned in _RULES:
        if match := pattern.fullmatch(name):
            return path.format(*match.groups()), turned
    return None


def leaf_path(name: str) -> str | None:
    """Path of the leaf that the torch key `name` belongs to; None if no rule matches."""
    rule = find_rule(name)
    return None if rule is None else rule[0]


def is_derived(name: str) -> bool:
    """Whether the torch key `name` holds no weight but what follows from the config."""
    return _DERIVED.fullmatch(name) is not None


def _llama_shapes(spec: DecoderSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Llama's, Mistral's and Qwen's names and torch shapes."""
    d, inner = spec.hidden_size, spec.intermediate_size
    heads, kv = spec.num_attention_heads, spec.num_key_value_heads
    widths = {"q_proj": heads * spec.head_dim}
    widths |= dict.fromkeys(("k_proj", "v_proj"), kv * spec.head_dim)
    yield "model.embed_tokens.weight", (spec.vocab_size, d)
    for i in range(spec.num_hidden_layers):
        layer = f"model.layers.{i}"
        yield f"{layer}.input_layernorm.weight", (d,)
        for name, width in widths.items():
            yield f"{layer}.self_attn.{name}.weight", (width, d)
            if spec.qkv_bias:
                yield f"{layer}.self_attn.{name}.bias", (width,)
        yield f"{layer}.self_attn.o_proj.weight", (d, heads * spec.head_dim)
        if spec.qk_norm:
            yield f"{layer}.self_attn.q_norm.weight", (spec.head_dim,)
            yield f"{layer}.self_attn.k_norm.weight", (spec.head_dim,)
        yield f"{layer}.post_attention_layernorm.weight", (d,)
        yield f"{layer}.mlp.gate_proj.weight", (inner, d)
        yield f"{layer}.mlp.up_proj.weight", (inner, d)
        yield f"{layer}.mlp.down_proj.weight", (d, inner)
    yield "model.norm.weight", (d,)


def _gpt2_shapes(spec: DecoderSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    """GPT-2's names and torch shapes."""
    d, inner = spec.hidden_size, spec.intermediate_size
    parts = {
        "ln_1": (d,),
        "attn.c_attn": (d, 3 * d),
        "attn.c_proj": (d, d),
        "ln_2": (d,),
        "mlp.c_fc": (d, inner),
        "mlp.c_proj": (inner, d),
    }
    yield "transformer.wte.weight", (spec.vocab_size, d)
    yield "transformer.wpe.weight", (spec.max_position_embeddings, d)
    for i in range(spec.num_hidden_layers):
        for part, shape in parts.items():
            yield f"transformer.h.{i}.{part}.weight", shape
            yield f"transformer.h.{i}.{part}.bias", shape[-1:]
    yield "transformer.ln_f.weight", (d,)
    yield "transformer.ln_f.bias", (d,)


def canonical_names(spec: DecoderSpec) -> Names:
    """Hugging Face's names for `spec` in the order of its state_dict, all float32, no tied copy."""
    shapes = dict(_gpt2_shapes(spec) if spec.is_gpt2 else _llama_shapes(spec))
    if not spec.tie_word_embeddings:
        shapes["lm_head.weight"] = (spec.vocab_size, spec.hidden_size)
    names = {}
    for name, shape in shapes.items():
        rule = find_rule(name)
        assert rule is not None
        names[name] = Entry(rule[0], shape, "float32", rule[1])
    return names
