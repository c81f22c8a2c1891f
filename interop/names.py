"""Torch parameter names and the leaves of the Flax tree: one rule table, both directions.

A leaf called `kernel` is (in, out) where torch's weight is (out, in); all others keep their
layout. Weights are float32 in the tree, which float16 and bfloat16 fit into exactly, and `Names`
remembers the dtype of each, so that the way back is bit-exact.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from forge_jax.models.decoder import DecoderSpec
from interop.formats import to_numpy, to_torch

_INDEX = r"(0|[1-9]\d*)"
_WRAPPERS = r"(?:module\.|_orig_mod\.)*"  # DataParallel, torch.compile

# regex on the whole torch key -> path of the leaf, filled with the groups of the match
RULES: tuple[tuple[str, str], ...] = (
    (r"(?:model\.)?embed_tokens\.weight", "embed_tokens/embedding"),
    (
        rf"(?:model\.)?layers\.{_INDEX}\.(input_layernorm|post_attention_layernorm)\.weight",
        "layers_{}/{}/scale",
    ),
    (
        rf"(?:model\.)?layers\.{_INDEX}\.self_attn\.([qkvo]_proj)\.weight",
        "layers_{}/self_attn/{}/kernel",
    ),
    (
        rf"(?:model\.)?layers\.{_INDEX}\.mlp\.((?:gate|up|down)_proj)\.weight",
        "layers_{}/mlp/{}/kernel",
    ),
    (r"(?:model\.)?norm\.weight", "norm/scale"),
    (r"lm_head\.weight", "lm_head/kernel"),
)
# frequencies that old Llama files carry; they follow from the config
_DERIVED = re.compile(rf"{_WRAPPERS}(?:model\.)?(?:layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
_RULES = tuple((re.compile(_WRAPPERS + pattern), path) for pattern, path in RULES)
_DTYPES = {np.dtype(d).name: np.dtype(d) for d in (np.float32, np.float16, ml_dtypes.bfloat16)}


class Entry(NamedTuple):
    """Where a torch tensor lives."""

    path: str  # leaf of the Flax tree, components joined by "/"
    shape: tuple[int, ...]  # torch's
    dtype: str  # "float32", "float16" or "bfloat16"


Names = dict[str, Entry]
Params = dict[str, Any]


def is_transposed(path: str) -> bool:
    """Whether the leaf at `path` is stored the other way round in torch."""
    return path.endswith("/kernel")


def leaf_path(name: str) -> str | None:
    """Path of the leaf that the torch key `name` belongs to; None if no rule matches."""
    for pattern, path in _RULES:
        if match := pattern.fullmatch(name):
            return path.format(*match.groups())
    return None


def torch_shapes(spec: DecoderSpec) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Hugging Face's name of each weight -> its leaf and its torch shape; no tied copy."""
    d, hidden = spec.hidden_size, spec.intermediate_size
    heads = spec.num_attention_heads * spec.head_dim
    kv = spec.num_key_value_heads * spec.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (spec.vocab_size, d)}
    layer = {
        "input_layernorm": (d,),
        "self_attn.q_proj": (heads, d),
        "self_attn.k_proj": (kv, d),
        "self_attn.v_proj": (kv, d),
        "self_attn.o_proj": (d, heads),
        "post_attention_layernorm": (d,),
        "mlp.gate_proj": (hidden, d),
        "mlp.up_proj": (hidden, d),
        "mlp.down_proj": (d, hidden),
    }
    for i in range(spec.num_hidden_layers):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (d,)
    if not spec.tie_word_embeddings:
        shapes["lm_head.weight"] = (spec.vocab_size, d)
    return {name: (str(leaf_path(name)), shape) for name, shape in shapes.items()}


def canonical_names(spec: DecoderSpec) -> Names:
    """Hugging Face's names for `spec`, all float32, without a tied copy."""
    return {n: Entry(path, shape, "float32") for n, (path, shape) in torch_shapes(spec).items()}


def flatten(params: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Paths and leaves of a nested dict, in its order; a leaf is whatever is no mapping."""
    for key, value in params.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def unflatten(leaves: Mapping[str, Any]) -> Params:
    """The nested dict of paths and leaves."""
    tree: Params = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def _raise(problems: list[str], source: str) -> None:
    if problems:
        lines = "\n".join(f"  {problem}" for problem in sorted(problems))
        raise ValueError(f"{source} does not fit:\n{lines}")


def _tensor_problem(tensor: Any, shape: tuple[int, ...]) -> str | None:
    """What is wrong with one tensor, judged by its header before any of it is copied."""
    if not hasattr(tensor, "shape") or not hasattr(tensor, "dtype"):
        return f"have a {type(tensor).__name__}, want a tensor"
    if getattr(tensor, "is_sparse", False) or getattr(tensor, "is_meta", False):
        return "have a sparse or empty tensor, want a dense one"
    if tuple(tensor.shape) != shape:
        return f"have {tuple(tensor.shape)}, want {shape}"
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in _DTYPES:
        return f"have {dtype}, want {', '.join(_DTYPES)}"
    if not np.isfinite(to_numpy(tensor)).all():
        return "holds NaN or infinity"
    return None


def _match(state_dict: Mapping[str, Any], wanted: dict[str, tuple[int, ...]], tied: bool):
    """Names of the torch keys by leaf, and the problems that the names alone show."""
    found: dict[str, list[str]] = {}
    problems = []
    for name in state_dict:
        path = leaf_path(name) if isinstance(name, str) else None
        if path in wanted or (tied and path == "lm_head/kernel"):
            found.setdefault(path, []).append(name)
        elif not (isinstance(name, str) and _DERIVED.fullmatch(name)):
            problems.append(f"{name}: unknown key, no weight of this model has this name")
    for path, names in found.items():
        if len(names) > 1:
            problems.append(f"{path}: {len(names)} keys map to it ({', '.join(names)}), want 1")
    problems += [f"{path}: no key maps to it" for path in wanted if path not in found]
    return found, problems


def convert(
    state_dict: Mapping[str, Any], spec: DecoderSpec, source: str = "state_dict"
) -> tuple[Params, Names]:
    """Turn torch names and layouts into the Flax tree, and remember the way back.

    Args:
        state_dict: torch key -> torch or NumPy tensor of float32, float16 or bfloat16.
            `lm_head.weight` of a tied model may be absent, or present and equal.
        spec: the model that the weights must fit.
        source: what to call the weights in an error.

    Returns:
        The tree, float32 NumPy, and the torch names, shapes and dtypes in the order given.

    Raises:
        ValueError: naming every missing, unknown, doubled, misshapen, mistyped or non-finite key.
    """
    tied = spec.tie_word_embeddings
    wanted = dict(torch_shapes(spec).values())
    found, problems = _match(state_dict, wanted, tied)
    shapes = wanted | {"lm_head/kernel": wanted["embed_tokens/embedding"]}
    paths = {name: path for path, names in found.items() for name in names}
    for name, path in paths.items():
        if problem := _tensor_problem(state_dict[name], shapes[path]):
            problems.append(f"{name}: {problem}")
    _raise(problems, source)

    leaves, names = {}, {}
    for name in state_dict:
        if name not in paths:
            continue
        path, raw = paths[name], to_numpy(state_dict[name])
        if tied and path == "lm_head/kernel":
            path = "embed_tokens/embedding"
            if raw.tobytes() != to_numpy(state_dict[found[path][0]]).tobytes():
                differ = f"{name}: differs from {found[path][0]}, which the config ties it to"
                _raise([differ], source)
        names[name] = Entry(path, raw.shape, raw.dtype.name)
        leaf = raw.T if is_transposed(path) else raw
        leaves[path] = np.array(leaf, np.float32, order="C")
    return unflatten(leaves), names


def params_from_torch(state_dict: Mapping[str, Any], spec: DecoderSpec) -> Params:
    """The Flax tree of a torch `state_dict`; errors as in `convert`."""
    return convert(state_dict, spec)[0]


def params_to_numpy(params: Params, names: DecoderSpec | Names) -> dict[str, np.ndarray]:
    """`params` under torch names, in torch layout; inverse of `convert`.

    With a spec the names are Hugging Face's and all is float32; with names each tensor gets the
    dtype it came in, and a tied copy that was there is there again.

    Raises:
        ValueError: naming every leaf that is missing, left over, misshapen or non-finite.
    """
    names = canonical_names(names) if isinstance(names, DecoderSpec) else names
    leaves = dict(flatten(params))
    problems = [
        f"{path}: no torch name" for path in leaves.keys() - {e.path for e in names.values()}
    ]
    for name, entry in names.items():
        shape = entry.shape[::-1] if is_transposed(entry.path) else entry.shape
        if entry.path not in leaves:
            problems.append(f"{entry.path}: missing, {name} comes from it")
        elif not hasattr(leaves[entry.path], "dtype"):
            problems.append(
                f"{entry.path}: have a {type(leaves[entry.path]).__name__}, want a matrix"
            )
        elif np.shape(leaves[entry.path]) != tuple(shape):
            problems.append(
                f"{entry.path}: have {np.shape(leaves[entry.path])}, want {tuple(shape)}"
            )
        elif not np.isfinite(np.asarray(leaves[entry.path])).all():
            problems.append(f"{entry.path}: holds NaN or infinity")
    _raise(problems, "params")
    tensors = {}
    for name, entry in names.items():
        leaf = np.asarray(leaves[entry.path])
        leaf = leaf.T if is_transposed(entry.path) else leaf
        tensors[name] = np.array(leaf, _DTYPES[entry.dtype], order="C")
    return tensors


def params_to_torch(params: Params, names: DecoderSpec | Names) -> dict[str, Any]:
    """`params` as a torch state_dict; names and errors as in `params_to_numpy`."""
    return {name: to_torch(array) for name, array in params_to_numpy(params, names).items()}
