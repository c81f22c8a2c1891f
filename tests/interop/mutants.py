"""Mutated checkpoint and expert files, read one by one in a forked pool; run as a script.

    python tests/interop/mutants.py WORKDIR COUNT     # WORKDIR/base holds the sound files

Prints one JSON line: how many loaded, how many were refused, and every mutant that did anything
else, ran code, took over 10 s or more than 2 GB. A process of its own, because a pool cannot be
forked from one in which JAX has started.
"""

import collections
import io
import json
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import _utils

from interop import (
    load_gguf,
    load_huggingface,
    load_low_rank,
    load_phase6,
    load_phase8,
    load_transformer_squared,
)
from interop.cognate import cognate_names, load_cognate
from interop.formats import sha256_file
from interop.names import flatten, own_names
from interop.rules import canonical_names

SECONDS, BYTES = 10, 2 * 2**30


def shapes_of(spec):
    return {path: shape for path, (_, shape) in own_names(canonical_names(spec)).items()}


def check_checkpoint(checkpoint):
    """Leaves must be finite and of the declared shapes; factors stand for their product."""
    shapes = shapes_of(checkpoint.spec)
    for path, leaf in flatten(checkpoint.params):
        parts = [leaf.u, leaf.s, leaf.vt] if hasattr(leaf, "vt") else [leaf]
        shape = (leaf.u.shape[0], leaf.vt.shape[1]) if hasattr(leaf, "vt") else leaf.shape
        assert shape == shapes[path], f"{path}: {shape}"
        assert all(np.isfinite(np.asarray(p)).all() for p in parts), f"{path}: not finite"


def check_experts(experts, shapes):
    for z in experts:
        for path, value in z.items():
            assert value.ndim == 1, path
            assert 0 < value.size <= min(shapes[path]), path
            assert np.isfinite(value).all(), path


def read_expert(path):
    spec = load_huggingface(BASE / "hf").spec
    check_experts([load_transformer_squared(path, spec)], shapes_of(spec))


def read_phase8(directory):
    found = load_phase8(directory)
    check_checkpoint(found.checkpoint)
    check_experts(found.experts.values(), shapes_of(found.checkpoint.spec))


def read_cognate(path):
    """Every leaf has the shape that the configuration gives it."""
    params, config = load_cognate(path)
    leaves = dict(flatten(params))
    for slot in cognate_names(config).values():
        leaf = leaves[slot.path] if slot.layer is None else leaves[slot.path][slot.layer]
        assert leaf.shape == (slot.shape[::-1] if slot.is_turned else slot.shape), slot.path
        assert np.isfinite(leaf).all(), slot.path


def read_checkpoint(load):
    return lambda path: check_checkpoint(load(path))


# what is read -> (its reader, the files of it that are damaged)
READERS = {
    "pair": (read_checkpoint(load_phase6), ["m.safetensors", "m.json"], "m"),
    "zip": (read_checkpoint(load_phase6), ["m.pt"], "m.pt"),
    "legacy": (read_checkpoint(load_phase6), ["m.pt"], "m.pt"),
    "hf": (read_checkpoint(load_huggingface), ["config.json", "tokenizer.json"], ""),
    "shards": (read_checkpoint(load_huggingface), None, ""),
    "phase4": (read_checkpoint(load_phase6), None, ""),
    "gguf": (read_checkpoint(load_gguf), ["m.gguf"], "m.gguf"),
    "low_rank": (read_checkpoint(load_low_rank), None, "m.safetensors"),
    "expert": (read_expert, ["expert.pt"], "expert.pt"),
    "policy": (read_expert, ["expert.pt"], "expert.pt"),
    "phase8": (read_phase8, None, ""),
    "cognate": (read_cognate, ["m.safetensors", "m.json"], "m.safetensors"),
    "cognate_pt": (read_cognate, ["m.pt"], "m.pt"),
}


def flip(data, rng):
    for _ in range(rng.integers(1, 9)):
        # half of the bits in the first kilobyte, where the headers are
        end = len(data) if rng.random() < 0.5 else min(len(data), 1024)
        data[rng.integers(end)] ^= 1 << int(rng.integers(8))
    return data


def truncate(data, rng):
    return data[: rng.integers(len(data))]


def splice(data, rng):
    """A block of the file over another place of it: swapped and doubled parts."""
    size = int(rng.integers(1, max(2, len(data) // 4)))
    a, b = (int(rng.integers(0, max(1, len(data) - size))) for _ in range(2))
    data[a : a + size] = data[b : b + size]
    return data


DTYPES = [b'"F32"', b'"F64"', b'"I32"', b'"I8"', b'"BF16"', b'"F16"', b'"F8_E4M3"', b'"BOOL"']


def swap_dtype(data, rng):
    """Another dtype for one tensor of a safetensors header, of the same size or not."""
    places = [(d, i) for d in DTYPES for i in range(len(data)) if data.startswith(d, i)]
    if not places:
        return swap_storage(data, rng)
    old, at = places[rng.integers(len(places))]
    new = DTYPES[rng.integers(len(DTYPES))]
    body = data[8 : 8 + int.from_bytes(data[:8], "little")]
    body = body[: at - 8] + new + body[at - 8 + len(old) :]
    return len(body).to_bytes(8, "little") + body + data[8 + int.from_bytes(data[:8], "little") :]


STORAGES = [b"FloatStorage", b"ByteStorage", b"HalfStorage", b"LongStorage", b"BoolStorage"]


def swap_storage(data, rng):
    """Another storage class in a pickle; in a zip the checksum then tells."""
    old, new = (STORAGES[rng.integers(len(STORAGES))] for _ in range(2))
    return data.replace(old, new, 1) if old in data else flip(data, rng)


def huge_shape(data, rng):
    """A larger number wherever the file declares a size."""
    text = bytes(data)
    # as JSON and safetensors write them, and as pickles write numbers below 256
    numbers = [b"[24,", b"[67,", b"[40,", b"24,", b": 24", b": 2,", b": 67", b"K\x18", b"K("]
    found = [n for n in numbers if n in text]
    if not found:
        return flip(data, rng)
    old = found[rng.integers(len(found))]
    large = 10 ** int(rng.integers(3, 18))
    if old.startswith(b"K"):
        new = b"\x8a\x08" + large.to_bytes(8, "little")
    else:
        new = old.replace(old.strip(b"[:, "), str(large).encode())
    return text.replace(old, new, 1)


class Run:
    """A pickle that calls `function` with `arguments`."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def laughs():
    """A list of 2^60 entries in one kilobyte."""
    nested = ["ha"]
    for _ in range(60):
        nested = [nested, nested]
    return nested


def deep(levels):
    nested = []
    for _ in range(levels):
        nested = [nested]
    return nested


def deepest(levels=100_000):
    """A pickle of nested lists that no recursive function survives, written by hand."""
    return b"\x80\x02" + b"]" * levels + b"a" * (levels - 1) + b"."


def hostile(marker, rng):
    """A .pt file whose pickle wants to run code, or to fill the memory."""
    config = json.loads((BASE / "hf" / "config.json").read_text())
    weights = torch.load(BASE / "zip" / "m.pt", weights_only=True)["model_state_dict"]
    name = sorted(weights)[rng.integers(len(weights))]
    wide = torch.zeros(1).expand(10**10)
    payload = [
        Run(os.system, f"touch {marker}"),
        Run(eval, f"open({str(marker)!r}, 'w')"),
        Run(exec, f"open({str(marker)!r}, 'w')"),
        Run(Path(marker).touch),
        Run(bytearray, 5 * 2**30),
        Run(_utils._rebuild_device_tensor_from_cpu_tensor, wide, torch.float64, "cpu", False),
        laughs(),
        deep(100),
        deepest(),
        wide,
        wide.reshape(10**5, 10**5),
        torch.zeros(24, 24).to_sparse(),
        torch.zeros(24, 24, device="meta"),
        torch.quantize_per_tensor(torch.zeros(24, 24), 1.0, 0, torch.qint8),
        torch.zeros(24, 24, dtype=torch.complex64),
        {"a": 10**4000},
        "text",
        None,
    ]
    value = payload[rng.integers(len(payload))]
    if isinstance(value, bytes):
        return value
    record = {"model_state_dict": dict(weights), "config": dict(config)}
    where = rng.integers(4)
    if where == 0:
        record["model_state_dict"][name] = value
    elif where == 1:
        record["config"]["eos_token_id"] = value
    elif where == 2:
        record["metadata"] = {"metrics": value}
    else:
        record = value
    buffer = io.BytesIO()
    if rng.random() < 0.3 and not isinstance(value, torch.Tensor):
        pickle.dump(
            record if where == 3 else {"x": value}, buffer, protocol=int(rng.integers(2, 6))
        )
    else:
        torch.save(record, buffer, _use_new_zipfile_serialization=bool(rng.random() < 0.6))
    return buffer.getvalue()


PATHS = [
    "../secret.safetensors",
    "/etc/passwd",
    "",
    ".",
    "..",
    "a\0b",
    "x/../../y",
    "~",
    "a" * 5000,
]
VALUES = [-1, 0, 1e400, 10**30, 10**400, 2**31 - 1, "24", None, [], {}, True, 1000, 3, [24], 0.5]


def change_json(path, rng):
    """One value of a JSON file, at any depth, is another."""
    record = json.loads(path.read_text())
    node = record
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            break
        key = keys[rng.integers(len(keys))]
        if isinstance(node[key], dict | list) and node[key] and rng.random() < 0.7:
            node = node[key]
            continue
        options = PATHS if path.name in ("index", "phase7.json") or "index" in path.name else VALUES
        node[key] = options[rng.integers(len(options))]
        break
    path.write_text(json.dumps(record))


def reseal(directory):
    """Make the manifest of a Phase 8 directory agree with what was done to it."""
    manifest = directory / "manifest.json"
    record = json.loads(manifest.read_text())
    for name in record["sha256"]:
        if (directory / name).is_file():
            record["sha256"][name] = sha256_file(directory / name)
    manifest.write_text(json.dumps(record))


BYTES_ONLY = [flip, flip, truncate, splice, swap_dtype, huge_shape]


def mutate(index):
    """Lay mutant `index` out; its reader and what to read."""
    rng = np.random.default_rng(index)
    kind = list(READERS)[index % len(READERS)]
    read, files, entry = READERS[kind]
    work = WORK / f"m{index}"
    shutil.copytree(BASE / kind, work)
    names = files or sorted(p.name for p in work.iterdir() if p.is_file())
    path = work / names[rng.integers(len(names))]
    what = "json" if path.suffix == ".json" and rng.random() < 0.7 else "bytes"
    if path.suffix == ".pt" and rng.random() < 0.4:
        what = "pickle"
        path.write_bytes(hostile(WORK / "marker", rng))
    elif what == "json":
        change_json(path, rng)
    else:
        how = BYTES_ONLY[rng.integers(len(BYTES_ONLY))]
        what = how.__name__
        path.write_bytes(bytes(how(bytearray(path.read_bytes()), rng)))
    if kind == "phase8" and path.name != "manifest.json":
        reseal(work)
    return f"{index} {kind}/{path.name} {what}", read, work / entry if entry else work


def alarm(*_):
    raise TimeoutError("over 10 s")


class Ending:
    """How a block ended: it loaded, refused in a sentence, or did what no reader may do.

    It lets nothing through, a panic of Rust included: whatever else a reader raises is the finding.
    """

    ended, wrong = "", ""

    def __enter__(self):
        signal.alarm(SECONDS)
        return self

    def __exit__(self, kind, error, _):
        signal.alarm(0)
        text = str(error)
        is_sentence = bool(text.strip()) and len(text) < 20_000
        if error is None:
            self.ended = "loaded"
        elif isinstance(error, ValueError | OSError) and not isinstance(error, TimeoutError):
            self.ended = "refused"
            self.wrong = "" if is_sentence else f"a message of {len(text)} characters"
        else:
            self.wrong = f"{kind.__name__}: {text[:300]}"
        return True


def attempt(index):
    """Read one mutant: how it ended, and what is wrong with that."""
    label, read, path = mutate(index)
    started = time.monotonic()
    with Ending() as ending:
        read(path)
    seconds = time.monotonic() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    wrong = ending.wrong or (f"a peak of {peak / 2**30:.1f} GiB" if peak > BYTES else "")
    shutil.rmtree(path if path.is_dir() else path.parent)
    return ending.ended, f"{label}: {wrong}" if wrong else "", seconds, peak, label


def start():
    """Set a worker up: a second alarm for what signals cannot stop is the caller's timeout."""
    signal.signal(signal.SIGALRM, alarm)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    sys.setrecursionlimit(1000)
    # Rust panics of tokenizers print before they are raised
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def sound(kind):
    """Read the file that is not damaged; otherwise refusing its mutants would prove nothing."""
    read, _, entry = READERS[kind]
    read(BASE / kind / entry if entry else BASE / kind)
    return kind


def main(work, count):
    with multiprocessing.get_context("fork").Pool(2, start) as pool:
        read = pool.map(sound, READERS)
        rows = pool.map(attempt, range(count), chunksize=25)
    slowest = max(rows, key=lambda row: row[2])
    found = {
        "sound": read,
        "mutants": len(rows),
        **collections.Counter(ended for ended, *_ in rows if ended),
        "wrong": [wrong for _, wrong, *_ in rows if wrong],
        "ran_code": (work / "marker").exists(),
        "slowest_seconds": round(slowest[2], 2),
        "slowest": slowest[4],
        "peak_gib": round(max(row[3] for row in rows) / 2**30, 2),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    WORK = Path(sys.argv[1])
    BASE = WORK / "base"
    main(WORK, int(sys.argv[2]))
