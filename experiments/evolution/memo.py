"""Results of trainings on disk: what was trained once, with the same of everything, is looked up.

A result follows from the document, the data, the seeds, the steps, the code and the libraries. All
are in its key, so that an edit of the code forgets what an earlier one found. Its times are those
of the run that trained.
"""

import functools
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import flax
import jax
import numpy as np
import optax

import experiments.evolution
import forge_jax.arch
from experiments.files import read_json, write_json
from forge_jax import arch, evolve

if TYPE_CHECKING:
    from experiments.evolution.candidates import Setup

SOURCES = (forge_jax.arch, experiments.evolution)


@functools.cache
def code() -> str:
    """Digest of the sources and the libraries that a result follows from."""
    versions = [m.__version__ for m in (jax, flax, optax, np)]
    digest = hashlib.sha256(f"{versions} {jax.devices()[0].device_kind}".encode())
    roots = [Path(str(module.__file__)).parent for module in SOURCES]
    for path in sorted(file for root in roots for file in root.rglob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def key_of(spec: arch.Spec, setup: "Setup", steps: int) -> str:
    """Sixty-four hexadecimal digits of a training of `steps` steps and its scoring."""
    full = arch.to_dict(arch.canonical(spec))
    for tree in (full, full["train"]):
        tree.pop("budget", None)
    digest = hashlib.sha256(code().encode())
    for batches in (setup.held_out, *(setup.shocks or ())):
        for x in jax.tree.leaves(batches):
            digest.update(np.ascontiguousarray(x).tobytes() + repr(np.shape(x)).encode())
    facts = [full, setup.task.name, setup.task.digest, setup.rows, setup.length, setup.seeds]
    facts += [setup.chunk, setup.lr, setup.unigram, setup.shocks is not None, steps]
    digest.update(json.dumps(facts, sort_keys=True).encode())
    return digest.hexdigest()


def find(path: Path | None, key: str) -> evolve.Result | None:
    """The result of this key, if it is kept."""
    file = None if path is None else path / f"{key}.json"
    if file is None or not file.is_file():
        return None
    try:
        found: dict[str, Any] = read_json(file)
    except ValueError:
        return None  # a damaged file is written anew: a search must not fail for its cache
    return evolve.Result(found["score"], tuple(found["objectives"]), found["metrics"])


def keep(path: Path | None, key: str, result: evolve.Result) -> None:
    """Write a result; one that is no number is not kept."""
    if path is not None and np.isfinite(result.score):
        path.mkdir(parents=True, exist_ok=True)
        write_json(path / f"{key}.json", result._asdict())
