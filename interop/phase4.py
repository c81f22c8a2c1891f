"""Directories that Phase 4 writes: a dequantized file that leads, and a quantized one.

    bitnet_dequantized_fp16.safetensors   float16 weights, read first
    bitnet_quantized_model.safetensors    <module>.quantized_weight int8 with <module>.scale_factor
                                          (out,), or int8 under the weight's own name; .bias and
                                          what was not quantized in floating point
    bitnet_quantized_model.json           {scale_factors: {name: number or list}, config}
    config.json, tokenizer/               Hugging Face's

The dequantized file of some runs holds only the quantized layers' weights; the rest then comes
from the other file. That file's exporter casts alpha * {-1, 0, 1} to int8, which is 0 everywhere
for alpha < 1: such weights are lost and are refused, never read as zeros.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from interop import formats
from interop.companions import write_companions
from interop.config import Checkpoint, hf_config
from interop.huggingface import build
from interop.names import Params, params_to_numpy
from interop.rules import canonical_names, find_rule

_DENSE = "bitnet_dequantized_fp16.safetensors"
_QUANTIZED = "bitnet_quantized_model.safetensors"
_SIDE_CAR = "bitnet_quantized_model.json"
_CODES, _SCALE = ".quantized_weight", ".scale_factor"
_LARGEST_CODE = 127


def is_phase4(directory: Path) -> bool:
    """Whether `directory` holds a file that only Phase 4 writes."""
    return (directory / _DENSE).is_file() or (directory / _QUANTIZED).is_file()


def load_phase4(directory: str | Path, *, fused_qkv: bool | None = None) -> Checkpoint:
    """Read a directory of Phase 4; for `fused_qkv` see `load_huggingface`.

    Raises:
        ValueError: a file is missing or damaged, int8 weights are all zero and nothing stands in
            for them, or a key does not fit.
    """
    directory = Path(directory)
    files = [directory / name for name in (_DENSE, _QUANTIZED) if (directory / name).is_file()]
    if not files:
        raise ValueError(f"{directory} has neither {_DENSE} nor {_QUANTIZED}.")
    side_car = directory / _SIDE_CAR
    record = formats.read_json(side_car) if side_car.is_file() else {}
    tensors: dict[str, np.ndarray] = {}
    for file in files:
        found = formats.read_safetensors(file)
        quantized = _dequantize(found, record.get("scale_factors") or {}, tensors, file)
        # the first file leads, and in the second what was never quantized is as good
        tensors = quantized | _floating(found) | tensors
    digest = formats.sha256_files([*files, *([side_car] if side_car.is_file() else [])])
    config = _config(directory, record)
    return build(tensors, config, {}, digest, directory, directory, None, fused_qkv=fused_qkv)


def _config(directory: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """config.json, or the model's fields in the side-car; that one may be Phase 4's own."""
    path = directory / "config.json"
    config = formats.read_json(path) if path.is_file() else record.get("config")
    if not isinstance(config, dict) or not {"hidden_size", "n_embd"} & config.keys():
        raise ValueError(f"{directory} needs the model's fields in config.json or {_SIDE_CAR}.")
    return config


def _floating(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors that are weights as they stand."""
    codes = (_CODES, _SCALE)
    return {n: a for n, a in tensors.items() if a.dtype != np.int8 and not n.endswith(codes)}


def _dequantize(
    tensors: Mapping[str, np.ndarray], scales: Any, known: Mapping[str, Any], path: Path
) -> dict[str, np.ndarray]:
    """The int8 weights of a file times their scales, float32, but those already `known`."""
    codes = {
        f"{n.removesuffix(_CODES)}.weight" if n.endswith(_CODES) else n: a
        for n, a in tensors.items()
        if a.dtype == np.int8
    }
    codes = {name: array for name, array in codes.items() if name not in known}
    if lost := sorted(name for name, array in codes.items() if not array.any()):
        raise ValueError(
            f"{path} has lost {len(lost)} weights, {lost[0]} among them: all their int8 codes are "
            "0, because the exporter cast scale * {-1, 0, 1} to int8 where it should have stored "
            f"-1, 0 and 1; give {_DENSE} beside it."
        )
    out, problems = {}, []
    for name, array in codes.items():
        stem = name.removesuffix(".weight")
        scale = tensors.get(f"{stem}{_SCALE}")
        if scale is None and isinstance(scales, dict):
            scale = scales.get(name, scales.get(stem))
        factor = _as_scale(scale, array)
        if factor is None:
            problems.append(f"{name}: int8 without a scale, or with one that does not fit")
        else:
            out[name] = array.astype(np.float32) * factor
    formats.complain(str(path), problems)
    return out


def _as_scale(scale: Any, codes: np.ndarray) -> np.ndarray | None:
    """One finite number for all codes or for each of their rows, ready to broadcast; else None."""
    try:
        values = np.asarray(scale, np.float32)
    except (TypeError, ValueError, OverflowError):
        return None
    if scale is None or codes.ndim != 2 or not np.isfinite(values).all():
        return None
    if values.size == 1:
        return values.reshape(())
    rows = codes.shape[0]
    return values.reshape(rows, 1) if values.size == rows else None


def save_phase4(directory: str | Path, params: Params, checkpoint: Checkpoint) -> Path:
    """Write a directory of Phase 4: float16 weights, and int8 ones that do not lose them.

    Matrices of the layers are quantized row by row, W = code * scale with scale = max |row| / 127
    (Phase 4 itself has -1, 0 and 1 only, too coarse for weights that SVF has changed).

    Raises:
        ValueError: `directory` exists, a leaf does not fit, or a weight overflows float16.
    """
    directory, spec = Path(directory), checkpoint.spec
    tensors = params_to_numpy(params, canonical_names(spec))
    with np.errstate(over="ignore"):
        half = {name: array.astype(np.float16) for name, array in tensors.items()}
    overflows = [n for n, a in half.items() if not np.isfinite(a).all()]
    formats.complain("params", [f"{name}: too large for float16" for name in overflows])
    config = hf_config(spec, checkpoint.config)
    coded: dict[str, np.ndarray] = {}
    for name, array in tensors.items():
        rule = find_rule(name)
        is_matrix = rule is not None and rule[0].startswith("layers_") and array.ndim == 2
        coded |= _quantize(name, array) if is_matrix else {name: half[name]}
    with formats.staged_directory(directory) as staged:
        formats.write_safetensors(staged / _DENSE, half)
        formats.write_safetensors(staged / _QUANTIZED, coded)
        scales = {n.removesuffix(_SCALE): a.tolist() for n, a in coded.items() if _SCALE in n}
        formats.write_json(staged / _SIDE_CAR, {"scale_factors": scales, "config": config})
        formats.write_json(staged / "config.json", config)
        write_companions(staged, checkpoint)
    return directory


def _quantize(name: str, array: np.ndarray) -> dict[str, np.ndarray]:
    """Codes and scales of one matrix under Phase 4's names."""
    stem = name.removesuffix(".weight")
    scale = (np.abs(array).max(axis=1) / _LARGEST_CODE).astype(np.float16)
    # a row of zeros, or one below float16, has codes 0 with any scale
    divisor = np.where(scale > 0, scale, 1).astype(np.float32)[:, None]
    codes = np.clip(np.rint(array / divisor), -_LARGEST_CODE, _LARGEST_CODE).astype(np.int8)
    return {f"{stem}{_CODES}": codes, f"{stem}{_SCALE}": scale}
