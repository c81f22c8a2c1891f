"""Safe readers and atomic writers of the files that carry weights.

Files are data. Nothing here runs what a file says: pickles go through PyTorch's weights-only
reader, and a file that is missing, truncated or corrupted is a ValueError that names it.
"""

import contextlib
import errno
import hashlib
import io
import json
import math
import os
import pickle
import pickletools
import re
import shutil
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

# What PyTorch's reader raises on bytes that are no checkpoint, besides UnpicklingError.
_TORCH_ERRORS = (
    RuntimeError,
    ValueError,
    EOFError,
    OSError,
    LookupError,
    AttributeError,
    TypeError,
    AssertionError,
    ArithmeticError,
    MemoryError,
    struct.error,
)
# What the pickle of a state_dict imports. PyTorch's own list is longer: its `bytearray` and its
# rebuilders of other tensors let a file of 100 bytes fill the memory.
_PLAIN = re.compile(
    r"torch\._utils\._rebuild_(?:tensor|tensor_v2|parameter|parameter_with_state)|"
    r"torch\.(?:\w+Storage|Size|device|(?:b?float|u?int|complex|q?u?int)\d\w*|bool|double|half)|"
    r"torch\.storage\.(?:Typed|Untyped)Storage|torch\.serialization\._get_layout|"
    r"collections\.OrderedDict|_codecs\.encode|(?:builtins|__builtin__)\.(?:set|complex)"
)
_ZIP = b"PK\x03\x04"
_NODES, _DEPTH = 100_000, 32  # of a config
_BITS = 14_000  # of an integer; Python writes out no more than 4,300 digits
_SHOWN = 50  # problems that one error lists


def complain(source: str, problems: list[str]) -> None:
    """Raise one ValueError that lists the problems of `source`, if there are any."""
    if not problems:
        return
    shown = sorted(problems)[:_SHOWN]
    more = len(problems) - len(shown)
    lines = [*shown, *([f"and {more} more"] if more else [])]
    raise ValueError(f"{source} does not fit:\n" + "\n".join(f"  {line}" for line in lines))


def add_suffix(path: Path, suffix: str) -> Path:
    """`path` with `suffix` put behind its name; `Path.with_suffix` would cut a dotted name."""
    return path.parent / f"{path.name}{suffix}"


def is_plain_name(name: str) -> bool:
    """Whether `name` is a file's own name: no path that could leave the directory."""
    return name not in ("", ".", "..") and Path(name).name == name and "\0" not in name


def is_finite(value: Any) -> bool:
    """Whether `value` is a number, no bool, and finite as a float; JSON has larger integers."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def require_file(path: Path) -> Path:
    """`path` if it is a file, else a ValueError."""
    if not path.is_file():
        what = "is a directory" if path.is_dir() else "does not exist"
        raise ValueError(f"{path} {what}; wanted a file.")
    return path


def sha256_files(paths: Sequence[Path]) -> str:
    """Digest of several files in this order; of one file its own."""
    digests = [sha256_file(path) for path in paths]
    whole = hashlib.sha256("".join(digests).encode()).hexdigest()
    return digests[0] if len(digests) == 1 else whole


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of the content of `path`."""
    with require_file(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    text = require_file(path).read_bytes()
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON file: {error}.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}; wanted a JSON object.")
    return value


def plain_json(value: Any, source: str) -> Any:
    """`value` out of a pickle as JSON's values; what JSON lacks becomes its text.

    A pickle of 1 kB can name one list a million times over, which JSON would write out: more than
    `_NODES` values, nesting deeper than `_DEPTH`, or an integer of over `_BITS` is a ValueError.
    """
    left = _NODES

    def convert(value: Any, depth: int) -> Any:
        nonlocal left
        left -= 1
        endless = isinstance(value, int) and value.bit_length() > _BITS
        if left < 0 or depth > _DEPTH or endless:
            raise ValueError(f"{source} is too large or too deep to be plain values.")
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, Mapping):
            return {str(k): convert(v, depth + 1) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [convert(v, depth + 1) for v in value]
        # the text of a tensor would be computed from all its values
        return type(value).__name__ if hasattr(value, "shape") else str(value)

    return convert(value, 0)


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Tensors of a safetensors file; bfloat16 comes as ml_dtypes' bfloat16."""
    try:
        with safe_open(str(require_file(path)), framework="np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, AttributeError, TypeError) as error:
        # an AttributeError is a dtype that NumPy lacks, such as float8
        raise ValueError(f"{path} cannot be read as safetensors: {error}.") from error


def _pickles(path: Path) -> Iterator[IO[bytes]]:
    """Streams of the pickles in a .pt file; PyTorch tells the formats apart by the same bytes."""
    with path.open("rb") as file:
        if file.read(4) != _ZIP:
            file.seek(0)
            yield file
            return
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith("data.pkl"):
                yield io.BytesIO(archive.read(name))


def _pickled_names(path: Path) -> set[str]:
    """Dotted names that the pickles in a .pt file import and a state_dict does not need.

    They are read off the opcodes, which runs nothing.
    """
    names, strings = set(), []
    for stream in _pickles(path):
        # PyTorch's old format is several pickles in a row and raw bytes; genops ends with each
        with contextlib.suppress(*_TORCH_ERRORS):
            while True:
                for opcode, arg, _ in pickletools.genops(stream):
                    if opcode.name in ("GLOBAL", "INST"):
                        names.add(str(arg).replace(" ", "."))
                    elif opcode.name == "STACK_GLOBAL":
                        names.add(".".join(strings[-2:]))
                    elif isinstance(arg, str):
                        strings.append(arg)
    return {name for name in names if not _PLAIN.fullmatch(name)}


def _refusal(path: Path, names: set[str]) -> ValueError:
    """The error for a pickle that is not run: it needs `names`, or is damaged."""
    if not names:
        return ValueError(f"{path} is no readable PyTorch file: its pickle is damaged.")
    shown = sorted(names)[:_SHOWN]
    return ValueError(
        f"{path} was refused and not run: its pickle needs {', '.join(shown)}, and only "
        "tensors and plain values are read (save a state_dict)."
    )


def _check_archive(path: Path) -> None:
    """Verify the checksums of a zipped PyTorch file, which `torch.load` does not.

    Without it 7 of 10 flipped bytes change weights in silence (measured on a 1,000 float file).
    """
    try:
        with zipfile.ZipFile(path) as archive:
            # PyTorch never compresses, so a compressed member is a stranger's, or a zip bomb
            packed = [m.filename for m in archive.infolist() if m.compress_type]
            broken = packed[0] if packed else archive.testzip()
    except (zipfile.BadZipFile, *_TORCH_ERRORS) as error:
        raise ValueError(f"{path} is truncated or corrupted: {error}.") from error
    if broken:
        raise ValueError(f"{path} is corrupted: the checksum of its member {broken} is wrong.")


def read_torch(path: Path) -> Any:
    """The tensors and plain values of a .pt file, on the CPU, by the weights-only reader.

    Raises ValueError for a damaged file, and for a pickle that needs a class or a function,
    which it names and does not run.
    """
    import torch

    with require_file(path).open("rb") as file:
        is_zip = file.read(4) == _ZIP
    if is_zip:
        _check_archive(path)
    names = _pickled_names(path)
    if names:
        raise _refusal(path, names)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice about pickle protocols
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        needed = set(re.findall(r"GLOBAL (\w+\.[\w.]*\w)", str(error)))
        raise _refusal(path, needed) from error
    except _TORCH_ERRORS as error:
        reason = str(error).splitlines()[0] if str(error) else "it ends too early"
        raise ValueError(f"{path} is no readable PyTorch file: {reason.rstrip('.')}.") from error


def to_numpy(tensor: Any) -> np.ndarray:
    """A torch, NumPy or JAX array as NumPy, bit for bit; bfloat16 as ml_dtypes' bfloat16."""
    if not hasattr(tensor, "detach"):
        return np.asarray(tensor)
    import torch

    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def to_torch(array: np.ndarray) -> Any:
    """A NumPy array as a torch tensor, bit for bit; it shares the memory where it can."""
    import torch

    array = np.require(array, requirements=["C", "W"])
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def sync(path: Path) -> None:
    """Force `path`, a file or a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_name(path: Path) -> None:
    """Force the name of `path`, which was renamed into place, to the disk."""
    try:
        sync(path.parent)
    except OSError as error:
        said = f"{path} is written, but may not survive a crash: {_reason(error, path)}"
        raise OSError(error.errno or errno.EIO, said) from error


def _reason(error: OSError, hidden: Path) -> str:
    """What the system said first, and of which file; what lies at or in `hidden` goes unnamed."""
    first = error.__cause__ if isinstance(error.__cause__, OSError) else error
    named = "" if first.filename is None else str(first.filename)
    said = first.strerror or str(first)
    return f"{said}: {named}" if named and not named.startswith(str(hidden)) else said


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary sibling, fsync it, and rename it to `path`.

    Raises:
        OSError: the disk is full, or there is no right to write; `path` is as it was before. Where
            only the directory could not be synced, the message says that `path` is written.
    """
    staged = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        write(staged)
        sync(staged)
        staged.replace(path)
    except OSError as error:
        said = f"{path} was not written and is as it was before: {_reason(error, staged)}"
        raise OSError(error.errno or errno.EIO, said) from error
    finally:
        staged.unlink(missing_ok=True)
    _sync_name(path)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write `value` as JSON in its own key order; NaN, which JSON lacks, is a ValueError."""
    try:
        text = json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path.name} cannot be written as JSON: {error}.") from error
    write_atomic(path, lambda staged: staged.write_text(text + "\n", "utf-8"))


def write_safetensors(
    path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Write `tensors`; the format tag is PyTorch's, which transformers asks for."""
    plain = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    tags = {"format": "pt", **(metadata or {})}

    def save(staged: Path) -> None:
        try:
            save_file(plain, str(staged), metadata=tags)
        except SafetensorError as error:  # its name for an error of the operating system
            raise OSError(str(error)) from error
        staged.chmod(0o666 & ~_umask())  # safetensors lets the owner alone read

    write_atomic(path, save)


def _umask() -> int:
    """What the user's new files leave out; it can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def write_torch(path: Path, value: Any) -> None:
    """Write tensors and plain values so that the weights-only reader reads them."""
    import torch

    def save(staged: Path) -> None:
        # given a path, torch would put the temporary name into the archive
        try:
            with staged.open("wb") as file:
                torch.save(value, file)
        except RuntimeError as error:  # the archive could not be finished: the disk is full
            raise OSError(str(error.__context__ or error).splitlines()[0]) from error

    write_atomic(path, save)


@contextlib.contextmanager
def staged_directory(directory: Path) -> Iterator[Path]:
    """A hidden sibling to fill, renamed to `directory` when the block ends without an error.

    Nothing is left when the block raises; the system's OSError is then one of `directory`. What a
    killed process left is cleared by the next one, so a directory has one writer at a time. An
    existing `directory` is a ValueError.
    """
    if directory.exists():
        raise ValueError(f"{directory} already exists and is not overwritten.")
    staged = directory.parent / f".{directory.name}.staged"
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        if staged.exists():
            shutil.rmtree(staged)
        staged.mkdir()
        yield staged
        for path in [*staged.rglob("*"), staged]:
            sync(path)
        if directory.exists():
            raise ValueError(f"{directory} already exists and is not overwritten.")
        staged.rename(directory)
    except OSError as error:
        if error.errno is None:  # of the block, not of the system
            raise
        said = f"{directory} was not written; nothing is left of it: {_reason(error, staged)}"
        raise OSError(error.errno, said) from error
    finally:
        if staged.exists():
            shutil.rmtree(staged)
    _sync_name(directory)
