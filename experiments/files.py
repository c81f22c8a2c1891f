"""Files that are whole or absent: atomic writes, plain JSON values."""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from interop import formats
from interop.formats import sync as sync


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write `data` to `path` so that a reader, or a kill, sees the old file or the new one.

    Missing directories are made; for the errors see `interop.formats.write_atomic`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    content = data.encode() if isinstance(data, str) else data
    formats.write_atomic(path, lambda staged: staged.write_bytes(content))


def write_json(path: Path, value: Any) -> None:
    """Write `value` atomically as indented JSON; what is allowed is said in `plain`."""
    write_atomic(path, json.dumps(plain(value), indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file; a ValueError names the file that is not JSON."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON file: {error}.") from error


def sync_tree(path: Path) -> None:
    """Force every file and directory below `path`, and `path` itself, to the disk."""
    for folder, _, names in os.walk(path):
        for name in names:
            sync(Path(folder, name))
        sync(Path(folder))


def plain(value: Any) -> Any:
    """Turn `value` into what JSON holds.

    Dataclasses and mappings become dicts, tuples and arrays lists, paths strings. NaN and the
    infinities become null, because strict readers of JSON refuse them.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return {f.name: plain(getattr(value, f.name)) for f in fields}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, np.ndarray | np.generic) or hasattr(value, "__array__"):
        return plain(np.asarray(value).tolist())
    raise TypeError(f"JSON holds no {type(value).__name__}: {value!r}.")
