"""Torch state dicts and Flax trees, both directions, by the table in `interop.rules`.

Weights are float32 in the tree, which float16 and bfloat16 fit into exactly, and `Names`
remembers the dtype of each, so that the way back is bit-exact.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from forge_jax.models import DecoderSpec
from interop.formats import complain, to_numpy, to_torch
from interop.rules import Entry, Names, canonical_names, find_rule, is_derived, leaf_path

_DTYPES = {np.dtype(d).name: np.dtype(d) for d in (np.float32, np.float16, ml_dtypes.bfloat16)}
_PARTS = ("q", "k", "v")
_FUSED = "/qkv_proj/"

Params = dict[str, Any]


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


def split_paths(path: str) -> dict[str, str]:
    """q, k and v -> the path of that part of a fused leaf; empty for any other leaf."""
    if _FUSED not in path:
        return {}
    return {part: path.replace(_FUSED, f"/{part}_proj/") for part in _PARTS}


def own_names(names: Names) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Path of every leaf there may be -> its torch name and its shape; tied copies left out.

    GPT-2's c_attn is there as one leaf and as three: the parts of a split one are called
    `<torch name>.q`, `.k` and `.v`.
    """
    out = {}
    for name, entry in names.items():
        if leaf_path(name) != entry.path:
            continue
        out[entry.path] = (name, entry.leaf_shape)
        third = (*entry.leaf_shape[:-1], entry.leaf_shape[-1] // 3)
        for part, path in split_paths(entry.path).items():
            out[path] = (f"{name}.{part}", third)
    return out


def split_qkv(leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every fused leaf as its three parts, which follow one another on its last axis."""
    out = {}
    for path, leaf in leaves.items():
        paths = split_paths(path)
        if not paths:
            out[path] = leaf
            continue
        for part, array in zip(paths.values(), np.split(leaf, 3, axis=-1), strict=True):
            out[part] = np.ascontiguousarray(array)
    return out


def fuse_qkv(leaves: Mapping[str, Any], names: Names) -> dict[str, Any]:
    """Undo `split_qkv` where `names` want the fused leaf and all its parts are there."""
    out = dict(leaves)
    for entry in names.values():
        paths = list(split_paths(entry.path).values())
        parts = [out[path] for path in paths if path in out]
        if entry.path in out or len(parts) != 3:
            continue
        third = (*entry.shape[:-1], entry.shape[-1] // 3)
        if all(np.shape(part) == third for part in parts):
            out = {path: leaf for path, leaf in out.items() if path not in paths}
            out[entry.path] = np.concatenate([np.asarray(p) for p in parts], axis=-1)
    return out


def tensor_problem(tensor: Any, shape: tuple[int, ...]) -> str | None:
    """What is wrong with one tensor, judged by its header before any of it is copied."""
    if not hasattr(tensor, "shape") or not hasattr(tensor, "dtype"):
        return f"have a {type(tensor).__name__}, want a tensor"
    # what has no strided storage (sparse, meta, nested, quantized) cannot be read as an array
    if getattr(tensor, "is_meta", False) or not _is_plain(tensor):
        return "have a sparse, quantized or empty tensor, want a dense one"
    if tuple(tensor.shape) != shape:
        return f"have {tuple(tensor.shape)}, want {shape}"
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in _DTYPES:
        return f"have {dtype}, want {', '.join(_DTYPES)}"
    if not np.isfinite(to_numpy(tensor)).all():
        return "holds NaN or infinity"
    return None


def _is_plain(tensor: Any) -> bool:
    """Whether a tensor is dense; arrays that are not torch's always are."""
    layout = getattr(tensor, "layout", None)
    quantized = getattr(tensor, "is_quantized", False) or getattr(tensor, "is_nested", False)
    return not quantized and (layout is None or str(layout) == "torch.strided")


def _match(state_dict: Mapping[str, Any], wanted: set[str], tied: bool):
    """Names of the torch keys by leaf, and the problems that the names alone show."""
    found: dict[str, list[str]] = {}
    problems = []
    for name in state_dict:
        path = leaf_path(name) if isinstance(name, str) else None
        if path in wanted or (tied and path == "lm_head/kernel"):
            found.setdefault(path, []).append(name)
        elif not (isinstance(name, str) and is_derived(name)):
            problems.append(f"{name}: unknown key, no weight of this model has this name")
    for path, names in found.items():
        if len(names) > 1:
            problems.append(f"{path}: {len(names)} keys map to it ({', '.join(names)}), want 1")
    problems += [f"{path}: no key maps to it" for path in wanted if path not in found]
    return found, problems


def _layout(name: str, spec: DecoderSpec, path: str, entries: dict[str, Entry]) -> Entry:
    """Where the tensor `name` goes and the shape that it must have."""
    if path == "lm_head/kernel" and spec.tie_word_embeddings:
        return Entry(path, entries["embed_tokens/embedding"].shape, "float32")
    rule = find_rule(name)
    assert rule is not None
    # (out, in) or (in, out) is a matter of the name; the leaf is the same
    shape = entries[path].leaf_shape
    return Entry(path, shape[::-1] if rule[1] else shape, "float32", rule[1])


def convert(
    state_dict: Mapping[str, Any], spec: DecoderSpec, source: str = "state_dict"
) -> tuple[Params, Names]:
    """Turn torch names and layouts into the Flax tree, and remember the way back.

    Args:
        state_dict: torch key -> torch or NumPy tensor of float32, float16 or bfloat16.
            `lm_head.weight` of a tied model may be absent, or present and equal.
        spec: the model that the weights must fit; it says whether GPT-2's c_attn is split.
        source: what to call the weights in an error.

    Returns:
        The tree, float32 NumPy, and the torch names, shapes and dtypes in the order given.

    Raises:
        ValueError: naming every missing, unknown, doubled, misshapen, mistyped or non-finite key.
    """
    tied = spec.tie_word_embeddings
    wanted = {entry.path: entry for entry in canonical_names(spec).values()}
    found, problems = _match(state_dict, set(wanted), tied)
    entries = {
        name: _layout(name, spec, path, wanted) for path, names in found.items() for name in names
    }
    for name, entry in entries.items():
        if problem := tensor_problem(state_dict[name], entry.shape):
            problems.append(f"{name}: {problem}")
    complain(source, problems)

    leaves, names = {}, {}
    for name in state_dict:
        if name not in entries:
            continue
        entry, raw = entries[name], to_numpy(state_dict[name])
        if tied and entry.path == "lm_head/kernel":
            entry = entry._replace(path="embed_tokens/embedding")
            if raw.tobytes() != to_numpy(state_dict[found[entry.path][0]]).tobytes():
                differ = f"{name}: differs from {found[entry.path][0]}, which the config ties it to"
                complain(source, [differ])
        names[name] = entry._replace(dtype=raw.dtype.name)
        leaves[entry.path] = np.array(raw.T if entry.transposed else raw, np.float32, order="C")
    if spec.is_gpt2 and not spec.fused_qkv:
        leaves = split_qkv(leaves)
    return unflatten(leaves), names


def params_from_torch(state_dict: Mapping[str, Any], spec: DecoderSpec) -> Params:
    """The Flax tree of a torch `state_dict`; errors as in `convert`."""
    return convert(state_dict, spec)[0]


def params_to_numpy(params: Params, names: DecoderSpec | Names) -> dict[str, np.ndarray]:
    """`params` under torch names, in torch layout; inverse of `convert`.

    With a spec the names are Hugging Face's and all is float32; with names each tensor gets the
    dtype it came in, and a tied copy that was there is there again. Split queries, keys and values
    are fused where the names want them so.

    Raises:
        ValueError: naming every leaf that is missing, left over, misshapen or non-finite.
    """
    names = canonical_names(names) if isinstance(names, DecoderSpec) else names
    leaves = fuse_qkv(dict(flatten(params)), names)
    wanted = {entry.path for entry in names.values()}
    problems = [f"{path}: no torch name" for path in leaves.keys() - wanted]
    problems += [p for n, e in names.items() if (p := _leaf_problem(leaves.get(e.path), n, e))]
    complain("params", problems)
    tensors = {}
    for name, entry in names.items():
        leaf = np.asarray(leaves[entry.path])
        leaf = leaf.T if entry.transposed else leaf
        tensors[name] = np.array(leaf, _DTYPES[entry.dtype], order="C")
    return tensors


def _leaf_problem(leaf: Any, name: str, entry: Entry) -> str | None:
    """What keeps a leaf from becoming the torch tensor `name`."""
    shape = tuple(entry.leaf_shape)
    if leaf is None:
        return f"{entry.path}: missing, {name} comes from it"
    if not hasattr(leaf, "dtype"):
        return f"{entry.path}: have a {type(leaf).__name__}, want a matrix"
    if np.shape(leaf) != shape:
        return f"{entry.path}: have {np.shape(leaf)}, want {shape}"
    return None if np.isfinite(np.asarray(leaf)).all() else f"{entry.path}: holds NaN or infinity"


def params_to_torch(params: Params, names: DecoderSpec | Names) -> dict[str, Any]:
    """`params` as a torch state_dict; names and errors as in `params_to_numpy`."""
    return {name: to_torch(array) for name, array in params_to_numpy(params, names).items()}
