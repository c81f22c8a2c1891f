"""The low-rank twin: a checkpoint whose matrices are kept as their singular factors.

In `<file>.safetensors` a factored weight W = u diag(s) vh in torch's own layout, (out, in) or
GPT-2's (in, out), appears as `<name>.u`, `<name>.s` and `<name>.vh`; all others appear as they
are. Where GPT-2's c_attn is split its three matrices are `<name>.q`, `<name>.k`, `<name>.v`, each
whole or in factors. A tied copy of the embedding is not repeated.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from forge_jax.svf import Factors, Layout
from interop import formats
from interop.companions import find_projector, find_tokenizer
from interop.config import Checkpoint, spec_from_config
from interop.names import (
    Params,
    convert,
    flatten,
    own_names,
    params_to_numpy,
    split_paths,
    unflatten,
)
from interop.rules import Entry, Names, canonical_names, find_rule, leaf_path

_PARTS = ("u", "s", "vh")


def factor_tensors(params: Params, names: Names) -> dict[str, np.ndarray]:
    """The tensors of the file for a tree with `svf.Factors` leaves; float32, torch's layout.

    Raises:
        ValueError: a factored leaf is no plain truncated matrix, or a leaf does not fit `names`.
    """
    leaves = dict(flatten(params))
    factored = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, Factors)}
    entries = _entries(names, set(factored))
    dense = {n: e for n, e in entries.items() if e.path not in factored}
    rest = {path: leaf for path, leaf in leaves.items() if path not in factored}
    tensors = params_to_numpy(unflatten(rest), dense)
    for name in entries.keys() - dense.keys():
        parts = _split(factored[entries[name].path], name, entries[name])
        tensors |= {f"{name}.{part}": array for part, array in parts.items()}
    return {name: tensors[name] for name in sorted(tensors)}


def _entries(names: Names, factored: set[str]) -> Names:
    """The tensors to write; a fused one with factored parts as its parts."""
    own = own_names(names)
    out = {}
    for name, entry in names.items():
        if leaf_path(name) != entry.path:  # a tied copy
            continue
        parts = list(split_paths(entry.path).values())
        if factored.isdisjoint(parts):
            out[name] = entry._replace(dtype="float32")
        else:
            out |= {own[path][0]: Entry(path, own[path][1], "float32") for path in parts}
    return out


def _split(leaf: Factors, name: str, entry: Entry) -> dict[str, np.ndarray]:
    """u, s and vh of one tensor in torch's layout."""
    plain = leaf.rest is None and np.ndim(leaf.s) == 1 and leaf.layout.inputs == (0,)
    if not plain or not entry.path.endswith("/kernel"):
        raise ValueError(f"{name} must be a truncated kernel (in, out) to be written as factors.")
    if leaf.layout.shape != entry.leaf_shape:
        raise ValueError(f"{name} has factors of {leaf.layout.shape}, want {entry.leaf_shape}.")
    u, s, vh = (np.asarray(a) for a in (leaf.u, leaf.s, leaf.vt))
    if entry.transposed:
        u, vh = vh.T, u.T
    if not all(np.isfinite(a).all() for a in (u, s, vh)):
        raise ValueError(f"{name} has factors with NaN or infinity.")
    return {p: np.array(a, np.float32, order="C") for p, a in zip(_PARTS, (u, s, vh), strict=True)}


def load_low_rank(path: str | Path) -> Checkpoint:
    """Read a low-rank file that `write_phase8` wrote; `svf.transform` runs its params.

    Factored matrices come as `svf.Factors`, the others as arrays; the config comes from
    `<base>.json`, tokenizer and projector lie beside it.

    Raises:
        ValueError: a file is missing or damaged, or a key does not fit.
    """
    path = Path(path)
    tensors = formats.read_safetensors(path)
    base = path.name.removesuffix(".safetensors")
    config = formats.read_json(path.parent / f"{base}.json").get("config")
    if not isinstance(config, dict):
        raise ValueError(f"{path} needs its config in {base}.json.")
    spec = spec_from_config(config, str(path), has_lm_head="lm_head.weight" in tensors)
    shapes = {path: shape for path, (_, shape) in own_names(canonical_names(spec)).items()}
    stems = [name.removesuffix(".s") for name in tensors if name.endswith(".s")]
    places = {stem: _place(stem, shapes, path) for stem in stems}
    factors = {stem: _take(tensors, stem, places[stem], path) for stem in stems}
    # products in place of the factors, so that one check covers names, shapes and values
    products = {stem: np.asarray(u * s @ vh, np.float32) for stem, (u, s, vh) in factors.items()}
    params, names = convert(_fuse_parts(tensors | products, path), spec, str(path))
    leaves: dict[str, Any] = dict(flatten(params))
    leaves |= {places[stem].path: _join(parts, places[stem]) for stem, parts in factors.items()}
    tokenizer, settings = find_tokenizer(path.parent, base, spec)
    return Checkpoint(
        unflatten(leaves),
        spec,
        config,
        tokenizer,
        {},
        find_projector(path.parent, base, spec),
        names,
        formats.sha256_file(path),
        path,
        settings,
    )


def _place(stem: str, shapes: Mapping[str, tuple[int, ...]], path: Path) -> Entry:
    """Where the matrix of three factors goes, known before they are multiplied."""
    whole, _, part = stem.rpartition(".")
    rule = find_rule(stem) or find_rule(whole)
    leaf = "" if rule is None else split_paths(rule[0]).get(part, rule[0])
    if rule is None or leaf not in shapes or not leaf.endswith("/kernel"):
        raise ValueError(f"{path}: {stem} is no matrix of this model, but has factors.")
    shape = shapes[leaf]
    return Entry(leaf, shape[::-1] if rule[1] else shape, "float32", rule[1])


def _take(
    tensors: dict[str, np.ndarray], stem: str, place: Entry, path: Path
) -> tuple[np.ndarray, ...]:
    """Take the three factors of `stem` out of `tensors`."""
    u, s, vh = (tensors.pop(f"{stem}.{part}", None) for part in _PARTS)
    if u is None or s is None or vh is None:
        raise ValueError(f"{path}: {stem} needs the factors {', '.join(_PARTS)}.")
    if u.ndim != 2 or vh.ndim != 2 or s.shape != u.shape[1:] or s.shape != vh.shape[:1]:
        shapes = f"{u.shape}, {s.shape} and {vh.shape}"
        raise ValueError(f"{path}: the factors of {stem} do not fit together: {shapes}.")
    if (u.shape[0], vh.shape[1]) != place.shape:
        have = (u.shape[0], vh.shape[1])
        raise ValueError(f"{path}: the factors of {stem} give {have}, want {place.shape}.")
    if {str(a.dtype) for a in (u, s, vh)} != {"float32"}:
        raise ValueError(f"{path}: the factors of {stem} must be float32.")
    return u, s, vh


def _fuse_parts(tensors: Mapping[str, np.ndarray], path: Path) -> dict[str, np.ndarray]:
    """Tensors in which the parts q, k and v of a weight are one again."""
    out = {n: a for n, a in tensors.items() if not n.endswith((".q", ".k", ".v"))}
    for stem in {n[:-2] for n in tensors.keys() - out.keys()}:
        found = [tensors.get(f"{stem}.{part}") for part in ("q", "k", "v")]
        parts = [p for p in found if p is not None and p.ndim == 2]
        if len(parts) < 3 or len({p.shape for p in parts}) > 1:
            raise ValueError(f"{path}: {stem} needs its parts q, k and v, all of one shape.")
        out[stem] = np.concatenate(parts, axis=1)
    return out


def _join(parts: tuple[np.ndarray, ...], place: Entry) -> Factors:
    """The leaf of factors in torch's layout."""
    u, s, vh = parts
    if place.transposed:
        u, vh = vh.T, u.T
    layout = Layout(place.leaf_shape, "float32", batch=(), inputs=(0,), outputs=(1,))
    return Factors(jnp.asarray(u), jnp.asarray(s), jnp.asarray(vh), layout)
