"""Phase 6 checkpoints: safetensors with a JSON beside it, .pt files, and the guide's JSON."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from interop import formats
from interop.config import Checkpoint
from interop.huggingface import build, load_huggingface
from interop.phase4 import is_phase4, load_phase4

_TORCH_SUFFIXES = (".pt", ".pth", ".bin")
_SUFFIXES = (".safetensors", *_TORCH_SUFFIXES)


def load_phase6(path: str | Path, *, fused_qkv: bool | None = None) -> Checkpoint:
    """Read a Phase 6 checkpoint of one of the families in `config.FAMILIES`.

    `path` may be
    - the guide's JSON, {"model": name, "metrics": {...}}; the name is resolved beside the JSON as
      that file, with .safetensors, .pt, .pth or .bin behind it, or as a Hugging Face directory;
    - `<base>.safetensors` (a flat state_dict) or its `<base>.json` (config, metadata);
    - a .pt, .pth or .bin file: a dict with `model_state_dict` or `state_dict`, or a bare
      state_dict; the config in the dict, in `<base>.json` or in config.json beside it;
    - a Hugging Face directory, or one that Phase 4 wrote (see `interop.phase4`);
    - any of these without its suffix.

    `tokenizer.json` and `vision.safetensors` beside the weights come along, `<base>.` before
    their names wins. `metrics` are the JSON's, else those in the checkpoint's metadata. For
    `fused_qkv` see `load_huggingface`.

    Raises:
        ValueError: in one sentence naming the file, or listing every key that does not fit.
    """
    path = Path(path)
    if path.suffix == ".json" and path.is_file():
        record = formats.read_json(path)
        if "model" in record:
            return _load_record(record, path, fused_qkv)
        if isinstance(record.get("config"), Mapping):
            base = path.name.removesuffix(".json")
            return _load_file(path.parent / f"{base}.safetensors", fused_qkv)
        raise ValueError(f"{path} has neither a `model` nor a `config`; it is no Phase 6 JSON.")
    if not path.exists() and formats.add_suffix(path, ".json").is_file():
        return load_phase6(formats.add_suffix(path, ".json"), fused_qkv=fused_qkv)
    return _load_weights(_resolve(path), fused_qkv)


def _load_record(record: dict[str, Any], path: Path, fused_qkv: bool | None) -> Checkpoint:
    model, metrics = record["model"], record.get("metrics", {})
    if not isinstance(model, str) or not model or "\0" in model:
        raise ValueError(f"{path} needs the name of a file in `model`, got {model!r}.")
    if Path(model).is_absolute() or ".." in Path(model).parts:
        raise ValueError(f"{path} names a model outside its directory: {model!r}.")
    if not isinstance(metrics, dict):
        raise ValueError(f"{path} needs an object in `metrics`, got {metrics!r}.")
    checkpoint = _load_weights(_resolve(path.parent / model), fused_qkv)
    return checkpoint._replace(metrics=metrics)


def _resolve(path: Path) -> Path:
    """`path`, or the first file that is `path` with a suffix of weights behind it."""
    candidates = [path, *(formats.add_suffix(path, suffix) for suffix in _SUFFIXES)]
    found = next((c for c in candidates if c.exists()), None)
    if found is None:
        tried = ", ".join(c.name for c in candidates[1:])
        raise ValueError(f"{path} does not exist, nor does any of {tried} beside it.")
    return found


def _load_weights(path: Path, fused_qkv: bool | None) -> Checkpoint:
    if not path.is_dir():
        return _load_file(path, fused_qkv)
    load = load_phase4 if is_phase4(path) else load_huggingface
    return load(path, fused_qkv=fused_qkv)


def _load_file(path: Path, fused_qkv: bool | None) -> Checkpoint:
    if path.suffix == ".safetensors":
        tensors, config, metadata = _read_pair(path)
    elif path.suffix in _TORCH_SUFFIXES:
        tensors, config, metadata = _read_pickle(path)
    else:
        other = "; `load_gguf` reads it" if path.suffix == ".gguf" else ""
        raise ValueError(f"{path} must end in one of {', '.join(_SUFFIXES)} or .json{other}.")
    metrics = metadata.get("metrics", {})
    return build(
        tensors,
        config,
        metrics if isinstance(metrics, dict) else {},
        formats.sha256_file(path),
        path,
        path.parent,
        _base(path),
        fused_qkv=fused_qkv,
    )


def _base(path: Path) -> str:
    """The name of a weights file without its last suffix; dots inside it stay."""
    return path.name.removesuffix(path.suffix)


def _side_car(path: Path) -> dict[str, Any] | None:
    """`<base>.json` beside the weights; else config.json, put into the same form; else None."""
    own, shared = path.parent / f"{_base(path)}.json", path.parent / "config.json"
    if own.is_file():
        record = formats.read_json(own)
        # the guide's JSON may share the base name; it says nothing about the shape of the model
        if "config" in record or "model" not in record:
            return record
    return {"config": formats.read_json(shared)} if shared.is_file() else None


def _read_pair(path: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Form A: the state_dict in safetensors, {config, metadata, extra_tensor_keys} in JSON."""
    tensors: dict[str, Any] = dict(formats.read_safetensors(path))
    record = _side_car(path)
    if record is None:
        raise ValueError(f"{path} needs its config in {_base(path)}.json or config.json beside it.")
    extra = record.get("extra_tensor_keys") or []
    for key in extra if isinstance(extra, list) else []:
        tensors.pop(f"extra_{key}", None)
        tensors.pop(str(key), None)
    return tensors, _require_config(record.get("config"), path), _dict(record.get("metadata"), path)


def _read_pickle(path: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Form B: a pickled dict around the state_dict, or the state_dict itself."""
    record = formats.read_torch(path)
    if not isinstance(record, Mapping):
        raise ValueError(
            f"{path} holds a {type(record).__name__}; wanted a dict with a state_dict."
        )
    wrappers = ("model_state_dict", "state_dict")
    key = next((k for k in wrappers if isinstance(record.get(k), Mapping)), None)
    is_bare = any(isinstance(k, str) and k.endswith(".weight") for k in record)
    if key is None and not is_bare:
        raise ValueError(f"{path} holds neither {' nor '.join(wrappers)} nor any weight.")
    tensors = record if key is None else record[key]
    config, metadata = (
        (None, None) if key is None else (record.get("config"), record.get("metadata"))
    )
    if config is None:
        side_car = _side_car(path) or {}
        config, metadata = side_car.get("config"), metadata or side_car.get("metadata")
    return dict(tensors), _require_config(config, path), _dict(metadata, path)


def _require_config(config: Any, path: Path) -> dict[str, Any]:
    if not isinstance(config, Mapping):
        raise ValueError(f"{path} comes without a config (Hugging Face's fields).")
    # a config may hold a torch.dtype, which no other format can carry
    return formats.plain_json(config, f"the config of {path}")


def _dict(metadata: Any, path: Path) -> dict[str, Any]:
    source = f"the metadata of {path}"
    return formats.plain_json(metadata, source) if isinstance(metadata, Mapping) else {}
