"""The low-rank twin: a checkpoint whose matrices are kept as their singular factors.

In `<file>.safetensors` a factored weight W (out, in) = u diag(s) vh appears as `<name>.u`
(out, r), `<name>.s` (r,) and `<name>.vh` (r, in), torch's order; all others appear as they are.
A tied copy of the embedding is not repeated.
"""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from forge_jax.svf import Factors, Layout
from interop import formats
from interop.config import Checkpoint, find_projector, find_tokenizer, spec_from_config
from interop.names import (
    Entry,
    Names,
    Params,
    convert,
    flatten,
    is_transposed,
    leaf_path,
    params_to_numpy,
    unflatten,
)

_PARTS = ("u", "s", "vh")


def factor_tensors(params: Params, names: Names) -> dict[str, np.ndarray]:
    """The tensors of the file for a tree with `svf.Factors` leaves; float32, torch's layout.

    Raises:
        ValueError: a factored leaf is no plain truncated matrix, or a leaf does not fit `names`.
    """
    leaves = dict(flatten(params))
    own = {n: e._replace(dtype="float32") for n, e in names.items() if leaf_path(n) == e.path}
    dense = {n: e for n, e in own.items() if not isinstance(leaves.get(e.path), Factors)}
    factored = {n: e for n, e in own.items() if n not in dense}
    rest = {p: leaf for p, leaf in leaves.items() if not isinstance(leaf, Factors)}
    tensors = params_to_numpy(unflatten(rest), dense)
    for name, entry in factored.items():
        tensors |= {f"{name}.{p}": a for p, a in _split(leaves[entry.path], name, entry).items()}
    return {name: tensors[name] for name in sorted(tensors)}


def _split(leaf: Factors, name: str, entry: Entry) -> dict[str, np.ndarray]:
    plain = leaf.rest is None and np.ndim(leaf.s) == 1 and leaf.layout.inputs == (0,)
    if not plain or not is_transposed(entry.path):
        raise ValueError(f"{name} must be a truncated kernel (in, out) to be written as factors.")
    if leaf.layout.shape != entry.shape[::-1]:
        raise ValueError(f"{name} has factors of {leaf.layout.shape}, want {entry.shape[::-1]}.")
    arrays = (np.asarray(leaf.vt).T, np.asarray(leaf.s), np.asarray(leaf.u).T)
    if not all(np.isfinite(a).all() for a in arrays):
        raise ValueError(f"{name} has factors with NaN or infinity.")
    return {p: np.array(a, np.float32, order="C") for p, a in zip(_PARTS, arrays, strict=True)}


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
    stems = [name.removesuffix(".s") for name in tensors if name.endswith(".weight.s")]
    factors = {stem: _join(tensors, stem, path) for stem in stems}
    # products in place of the factors, so that one check covers names, shapes and values
    products = {
        name: np.asarray(leaf.u * leaf.s @ leaf.vt, np.float32).T for name, leaf in factors.items()
    }
    params, names = convert(tensors | products, spec, str(path))
    leaves: dict[str, Any] = dict(flatten(params))
    leaves |= {names[name].path: leaf for name, leaf in factors.items()}
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


def _join(tensors: dict[str, np.ndarray], stem: str, path: Path) -> Factors:
    """Take the three factors of `stem` out of `tensors` and build its leaf."""
    parts = [tensors.pop(f"{stem}.{part}", None) for part in _PARTS]
    u, s, vh = parts
    if u is None or s is None or vh is None:
        raise ValueError(f"{path}: {stem} needs the factors {', '.join(_PARTS)}.")
    if u.ndim != 2 or vh.ndim != 2 or s.shape != u.shape[1:] or s.shape != vh.shape[:1]:
        shapes = f"{u.shape}, {s.shape} and {vh.shape}"
        raise ValueError(f"{path}: the factors of {stem} do not fit together: {shapes}.")
    shape = (vh.shape[1], u.shape[0])
    layout = Layout(shape, "float32", batch=(), inputs=(0,), outputs=(1,))
    return Factors(jnp.asarray(vh.T), jnp.asarray(s), jnp.asarray(u.T), layout)
