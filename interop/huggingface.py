"""Hugging Face directories of every family in `config.FAMILIES`, in and out."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from interop import formats
from interop.companions import find_projector, find_tokenizer, write_companions
from interop.config import Checkpoint, hf_config, spec_from_config
from interop.names import Params, convert, params_to_numpy
from interop.rules import canonical_names, leaf_path

# where the weights may be; the first that is there is read
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def load_huggingface(directory: str | Path, *, fused_qkv: bool | None = None) -> Checkpoint:
    """Read config.json and the weights of a directory, in one file or in shards.

    safetensors files win over `pytorch_model.bin` and its shards. Tokenizer and patch projector
    come along if they are there.

    Args:
        directory: with config.json in it.
        fused_qkv: GPT-2's c_attn as one matrix (True) or as three, which have other singular
            values; None is the choice in the config, else one matrix as in the file.

    Raises:
        ValueError: naming the file that is missing, damaged or not supported, or every key that
            does not fit.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"{directory} is no directory; wanted a Hugging Face model directory.")
    config = formats.read_json(directory / "config.json")
    files, index = _weight_files(directory)
    tensors = _read_shards(files, index, directory)
    sha256 = formats.sha256_files(files)
    return build(tensors, config, {}, sha256, directory, directory, None, fused_qkv=fused_qkv)


def build(
    tensors: Mapping[str, Any],
    config: dict[str, Any],
    metrics: dict[str, Any],
    sha256: str,
    path: Path,
    directory: Path,
    base: str | None,
    *,
    fused_qkv: bool | None = None,
) -> Checkpoint:
    """Put a checkpoint together; `directory` and `base` say where its companions lie.

    The choice about GPT-2's c_attn is stored in the config.
    """
    has_lm_head = any(isinstance(n, str) and leaf_path(n) == "lm_head/kernel" for n in tensors)
    spec = spec_from_config(config, str(path), has_lm_head=has_lm_head, fused_qkv=fused_qkv)
    params, names = convert(tensors, spec, str(path))
    tokenizer, settings = find_tokenizer(directory, base, spec)
    projector = find_projector(directory, base, spec)
    if spec.is_gpt2:
        config = {**config, "fused_qkv": spec.fused_qkv}
    return Checkpoint(
        params, spec, config, tokenizer, metrics, projector, names, sha256, path, settings
    )


def _weight_files(directory: Path) -> tuple[list[Path], dict[str, str]]:
    """The files of weights, and in which of them the index says that each tensor is."""
    found = next((directory / n for n in _WEIGHTS if (directory / n).is_file()), None)
    if found is None:
        raise ValueError(f"{directory} has none of {', '.join(_WEIGHTS)}.")
    return _indexed_files(found) if found.suffix == ".json" else ([found], {})


def _indexed_files(index: Path) -> tuple[list[Path], dict[str, str]]:
    """The shards that `index` names, and in which of them it says that each tensor is."""
    directory = index.parent
    shards = formats.read_json(index).get("weight_map")
    is_map = isinstance(shards, dict) and all(isinstance(s, str) for s in shards.values())
    if not is_map or not shards:
        raise ValueError(f"{index} has no `weight_map` from names to files.")
    names = sorted(set(shards.values()))
    if strangers := [name for name in names if not formats.is_plain_name(name)]:
        raise ValueError(f"{index} names files outside its directory: {', '.join(strangers)}.")
    if absent := [name for name in names if not (directory / name).is_file()]:
        raise ValueError(f"{directory} lacks the shards {', '.join(absent)} of its index.")
    return [directory / name for name in names], shards


def _read_shards(files: list[Path], index: dict[str, str], directory: Path) -> dict[str, Any]:
    """The tensors of all files, each from the file that the index names for it."""
    tensors: dict[str, Any] = {}
    problems = []
    for file in files:
        is_torch = file.suffix == ".bin"
        found = formats.read_torch(file) if is_torch else formats.read_safetensors(file)
        if not isinstance(found, Mapping):
            raise ValueError(f"{file} holds a {type(found).__name__}; wanted a state_dict.")
        if index:
            problems += [
                f"{name}: in {file.name}, but the index says {index.get(name, 'nothing of it')}"
                for name in found
                if index.get(name) != file.name
            ]
        tensors |= found
    problems += [f"{name}: not in {index[name]}" for name in index if name not in tensors]
    formats.complain(str(directory), problems)
    return tensors


def save_huggingface(directory: str | Path, params: Params, checkpoint: Checkpoint) -> Path:
    """Write a directory that `AutoModelForCausalLM.from_pretrained` opens, weights in float32.

    `checkpoint` gives config, tokenizer and projector. The directory appears whole or not at
    all; one that exists is a ValueError.
    """
    directory = Path(directory)
    with formats.staged_directory(directory) as staged:
        fill_huggingface(staged, params, checkpoint)
    return directory


def fill_huggingface(directory: Path, params: Params, checkpoint: Checkpoint) -> None:
    """Write the files of `save_huggingface` into a directory that exists."""
    spec, config = checkpoint.spec, checkpoint.config
    tensors = params_to_numpy(params, canonical_names(spec))
    formats.write_safetensors(directory / "model.safetensors", tensors)
    formats.write_json(directory / "config.json", hf_config(spec, config))
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    generation = {name: config[name] for name in ids if config.get(name) is not None}
    formats.write_json(directory / "generation_config.json", {"do_sample": False, **generation})
    write_companions(directory, checkpoint)
