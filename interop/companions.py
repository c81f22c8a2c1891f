"""What lies beside the weights: the tokenizer and the patch projector."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from forge_jax.models import DecoderSpec
from interop import formats
from interop.config import Checkpoint
from interop.formats import add_suffix, read_json, read_safetensors


def find_tokenizer(
    directory: Path, base: str | None, spec: DecoderSpec
) -> tuple[Tokenizer | None, dict[str, Any] | None]:
    """The tokenizer beside the weights, and its tokenizer_config.json, where there are any.

    Looks for `<base>.tokenizer.json`, `tokenizer.json` and `tokenizer/tokenizer.json`.
    """
    candidates = [directory / "tokenizer.json", directory / "tokenizer" / "tokenizer.json"]
    if base is not None:
        candidates.insert(0, add_suffix(directory / base, ".tokenizer.json"))
    path = next((c for c in candidates if c.is_file()), None)
    if path is None:
        return None, None
    text = json.dumps(read_json(path))
    tokenizer = make_tokenizer(lambda: Tokenizer.from_str(text), path)
    check_tokenizer(tokenizer, spec, path)
    settings = path.parent / "tokenizer_config.json"
    return tokenizer, read_json(settings) if settings.is_file() else None


def make_tokenizer(make: Callable[[], Tokenizer], source: Path) -> Tokenizer:
    """The tokenizer that `make` builds; a ValueError naming `source` if it cannot."""
    try:
        return make()
    except Exception as error:  # tokenizers raises bare Exception, nothing narrower
        raise ValueError(f"{source} holds no usable tokenizer: {error}.") from error


def check_tokenizer(tokenizer: Tokenizer, spec: DecoderSpec, path: Path) -> None:
    """Raise a ValueError if the tokenizer has ids that the embedding lacks."""
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= spec.vocab_size:
        raise ValueError(
            f"{path} has token ids up to {largest}, but the model has {spec.vocab_size} tokens."
        )


def find_projector(
    directory: Path, base: str | None, spec: DecoderSpec
) -> dict[str, np.ndarray] | None:
    """The patch projector in `<base>.vision.safetensors` or `vision.safetensors`, float32."""
    candidates = [directory / "vision.safetensors"]
    if base is not None:
        candidates.insert(0, add_suffix(directory / base, ".vision.safetensors"))
    path = next((c for c in candidates if c.is_file()), None)
    if path is None:
        return None
    tensors = read_safetensors(path)
    kernel, bias = tensors.get("kernel"), tensors.get("bias")
    width = spec.hidden_size
    if kernel is None or kernel.ndim != 2 or kernel.shape[1] != width:
        have = None if kernel is None else kernel.shape
        raise ValueError(f"{path} needs a kernel of shape (patch, {width}), got {have}.")
    if bias is None or bias.shape != (width,):
        have = None if bias is None else bias.shape
        raise ValueError(f"{path} needs a bias of shape ({width},), got {have}.")
    for name, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            raise ValueError(f"{path} holds NaN or infinity in {name}.")
    return {name: tensor.astype(np.float32) for name, tensor in tensors.items()}


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
    positions = checkpoint.spec.max_position_embeddings
    return make_settings(checkpoint.tokenizer, checkpoint.config, positions)


def make_settings(
    tokenizer: Tokenizer, config: Mapping[str, Any], positions: int
) -> dict[str, Any]:
    """A tokenizer_config.json for a tokenizer that came without one."""
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": positions,
    }
    for kind in ("bos", "eos", "pad", "unk"):
        index = token_id(config, kind)
        text = None if index is None else tokenizer.id_to_token(index)
        if text is not None:
            settings[f"{kind}_token"] = text
    return settings


def token_id(config: Mapping[str, Any], kind: str) -> int | None:
    """The config's first id of a special token; None without one, or where it can be none."""
    index = config.get(f"{kind}_token_id")
    index = index[0] if isinstance(index, list) and index else index
    # some configs say -1 for "none"; the tokenizer and GGUF take 32 bits without a sign
    return index if type(index) is int and 0 <= index < 2**32 else None
