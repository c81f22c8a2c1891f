"""Hugging Face directories of the Llama family, in and out."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from interop import config as _config
from interop import formats
from interop.config import Checkpoint
from interop.names import Params, canonical_names, convert, leaf_path, params_to_numpy


def load_huggingface(directory: str | Path) -> Checkpoint:
    """Read config.json and the weights of a directory; safetensors, one file or shards.

    `pytorch_model.bin` is read where there is no safetensors file. Tokenizer and patch projector
    come along if they are there.

    Raises:
        ValueError: naming the file that is missing, damaged or not supported, or every key that
            does not fit.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"{directory} is no directory; wanted a Hugging Face model directory.")
    config = formats.read_json(directory / "config.json")
    files = _weight_files(directory)
    tensors: dict[str, Any] = {}
    for file in files:
        is_torch = file.suffix == ".bin"
        tensors |= formats.read_torch(file) if is_torch else formats.read_safetensors(file)
    digests = [formats.sha256_file(file) for file in files]
    whole = hashlib.sha256("".join(digests).encode()).hexdigest()
    sha256 = digests[0] if len(digests) == 1 else whole
    return build(tensors, config, {}, sha256, directory, directory, None)


def build(
    tensors: Mapping[str, Any],
    config: dict[str, Any],
    metrics: dict[str, Any],
    sha256: str,
    path: Path,
    directory: Path,
    base: str | None,
) -> Checkpoint:
    """Put a checkpoint together; `directory` and `base` say where its companions lie."""
    has_lm_head = any(isinstance(n, str) and leaf_path(n) == "lm_head/kernel" for n in tensors)
    spec = _config.spec_from_config(config, str(path), has_lm_head=has_lm_head)
    params, names = convert(tensors, spec, str(path))
    tokenizer, settings = _config.find_tokenizer(directory, base, spec)
    projector = _config.find_projector(directory, base, spec)
    return Checkpoint(
        params, spec, config, tokenizer, metrics, projector, names, sha256, path, settings
    )


def _weight_files(directory: Path) -> list[Path]:
    single = directory / "model.safetensors"
    index = directory / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        pickled = directory / "pytorch_model.bin"
        if pickled.is_file():
            return [pickled]
        raise ValueError(f"{directory} has none of {single.name}, {index.name} and {pickled.name}.")
    shards = formats.read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(s, str) for s in shards.values()):
        raise ValueError(f"{index} has no `weight_map` from names to files.")
    names = sorted(set(shards.values()))
    if strangers := [name for name in names if Path(name).name != name]:
        raise ValueError(f"{index} names files outside its directory: {', '.join(strangers)}.")
    if absent := [name for name in names if not (directory / name).is_file()]:
        raise ValueError(f"{directory} lacks the shards {', '.join(absent)} of its index.")
    return [directory / name for name in names]


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
    formats.write_json(directory / "config.json", _config.hf_config(spec, config))
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    generation = {name: config[name] for name in ids if config.get(name) is not None}
    formats.write_json(directory / "generation_config.json", {"do_sample": False, **generation})
    write_companions(directory, checkpoint)


def write_companions(directory: Path, checkpoint: Checkpoint) -> None:
    """Write tokenizer.json, tokenizer_config.json and vision.safetensors, those there are."""
    if checkpoint.tokenizer is not None:
        text = checkpoint.tokenizer.to_str(pretty=True)
        formats.write_atomic(directory / "tokenizer.json", lambda p: p.write_text(text, "utf-8"))
        formats.write_json(directory / "tokenizer_config.json", tokenizer_config(checkpoint))
    if checkpoint.projector is not None:
        formats.write_safetensors(directory / "vision.safetensors", checkpoint.projector)


def tokenizer_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The tokenizer_config.json of `checkpoint`: its own, or one made from the config's ids."""
    if checkpoint.tokenizer_config is not None:
        return checkpoint.tokenizer_config
    assert checkpoint.tokenizer is not None
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": checkpoint.spec.max_position_embeddings,
    }
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        token = checkpoint.config.get(f"{name}_id")
        token = token[0] if isinstance(token, list) and token else token
        text = checkpoint.tokenizer.id_to_token(token) if isinstance(token, int) else None
        if text is not None:
            settings[name] = text
    return settings
