"""Checkpoints of pytrees of arrays: Orbax for the arrays, one rename for the whole.

A checkpoint is the directory `<folder>/<step>`: `arrays/`, written by Orbax, and `checkpoint.json`
with the step, the leaves' names, shapes and dtypes, and what else the caller wants to find there.
It appears by one rename, so it is never half there.
"""

import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from experiments.files import read_json, sync, sync_tree, write_json

RECORD = "checkpoint.json"


def save(folder: Path, step: int, tree: PyTree, note: dict[str, Any], *, keep: int = 2) -> Path:
    """Write `tree` as the checkpoint of `step` and remove all but the last `keep`.

    Leaves may be JAX arrays, typed PRNG keys, NumPy arrays and Python numbers; they come back bit
    for bit. `note` is stored in `checkpoint.json`. A checkpoint of the same step is replaced.
    """
    if step < 0:
        raise ValueError(f"`step` must not be negative, got {step}.")
    folder.mkdir(parents=True, exist_ok=True)
    target, temporary = folder / f"{step:08d}", folder / f".{step:08d}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    names, leaves = flatten(tree)
    described = [{"name": n, **describe(leaf)} for n, leaf in zip(names, leaves, strict=True)]
    odd = [d["name"] for d in described if d["dtype"].startswith(("object", "<U", "|S"))]
    if odd:
        raise ValueError(f"A checkpoint holds arrays and numbers only, not: {', '.join(odd)}.")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((temporary / "arrays").absolute(), stored(leaves))
    write_json(temporary / RECORD, {"step": step, **note, "leaves": described})
    sync_tree(temporary)
    discard(target)
    temporary.rename(target)
    sync(folder)
    for old in steps(folder)[: -max(keep, 1)]:
        discard(old)
    return target


def restore_latest(folder: Path, template: PyTree) -> tuple[dict[str, Any], PyTree] | None:
    """Return (`checkpoint.json`, tree) of the last checkpoint in `folder`, None if there is none.

    The tree has the structure, the leaf types and the shardings of `template`. A ValueError lists
    every leaf whose name, shape or dtype differs from the stored one.
    """
    found = steps(folder)
    if not found:
        return None
    record = read_json(found[-1] / RECORD)
    names, leaves = flatten(template)
    wanted = [{"name": n, **describe(leaf)} for n, leaf in zip(names, leaves, strict=True)]
    if wanted != record["leaves"]:
        raise ValueError(differences(found[-1], wanted, record["leaves"]))
    target = jax.tree.map(abstract, stored(leaves))
    with ocp.StandardCheckpointer() as checkpointer:
        arrays = checkpointer.restore((found[-1] / "arrays").absolute(), target)
    back = [like(leaf, arrays.get(f"{i:05d}")) for i, leaf in enumerate(leaves)]
    return record, jax.tree.unflatten(jax.tree.structure(template), back)


def steps(folder: Path) -> list[Path]:
    """Return the directories of the whole checkpoints in `folder`, oldest first."""
    found = folder.iterdir() if folder.is_dir() else ()
    whole = [p for p in found if p.name.isdigit() and (p / RECORD).is_file()]
    return sorted(whole, key=lambda p: int(p.name))


def discard(path: Path) -> None:
    """Remove a checkpoint; a kill in between leaves no half of it under its own name."""
    if path.exists():
        trash = path.with_name(f".{path.name}.old.tmp")
        shutil.rmtree(trash, ignore_errors=True)
        path.rename(trash)
        shutil.rmtree(trash)


def flatten(tree: PyTree) -> tuple[list[str], list[Any]]:
    """Return the paths ("a/0/b") and the leaves of `tree`, in the same order."""
    pairs = jax.tree_util.tree_flatten_with_path(tree)[0]
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in pairs]
    return names, [leaf for _, leaf in pairs]


def is_key(leaf: Any) -> bool:
    """Whether `leaf` is an array of typed PRNG keys."""
    return isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def stored(leaves: list[Any]) -> dict[str, Any]:
    """Return what is given to Orbax: keys as their data, nothing of size zero (it refuses that)."""
    data = [jax.random.key_data(leaf) if is_key(leaf) else leaf for leaf in leaves]
    data = [x if isinstance(x, jax.Array) else np.asarray(x) for x in data]
    kept = {f"{i:05d}": x for i, x in enumerate(data) if x.size}
    return kept or {"empty": np.zeros(1, np.int8)}


def describe(leaf: Any) -> dict[str, Any]:
    """Return the shape and the dtype of a leaf, in words that JSON holds."""
    array = leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)
    return {"shape": list(array.shape), "dtype": str(array.dtype)}


def abstract(array: Any) -> Any:
    """Return what tells Orbax how to restore: the sharding of a JAX array, NumPy for the rest."""
    if isinstance(array, jax.Array):
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)
    return array


def like(leaf: Any, array: Any) -> Any:
    """Give a restored array the type of the template's `leaf`."""
    if array is None:  # of size zero: nothing was stored and nothing is lost
        return leaf
    if is_key(leaf):
        return jax.random.wrap_key_data(array, impl=jax.random.key_impl(leaf))
    if isinstance(leaf, bool | int | float):
        return type(leaf)(array.item())
    if isinstance(leaf, np.generic):
        return leaf.dtype.type(array)
    return array


def differences(path: Path, wanted: list[dict], found: list[dict]) -> str:
    """Return the message that lists every leaf in which the template and a checkpoint differ."""
    want = {d["name"]: f"{tuple(d['shape'])} {d['dtype']}" for d in wanted}
    have = {d["name"]: f"{tuple(d['shape'])} {d['dtype']}" for d in found}
    names = sorted(n for n in want | have if want.get(n) != have.get(n))
    lines = [f"  {n}: have {have.get(n, 'nothing')}, want {want.get(n, 'nothing')}" for n in names]
    return "\n".join([f"The checkpoint {path} does not fit:", *lines])
