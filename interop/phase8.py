"""The artifacts that Phase 7 hands to Phase 8, written whole or not at all.

phase7.json                      the guide's JSON: success, experts, mixture, model, metrics
z_vectors_<domain>.pt            torch parameter name -> 1-D float32 tensor, one per expert
svf_adapted_model.pt             model_state_dict (Phase 6 keys and shapes), config, metadata
*.safetensors, *.json            twins of the above, with a side-car that holds the metadata
huggingface/                     what AutoModelForCausalLM.from_pretrained opens
vision.safetensors               the patch projector, if the checkpoint has one
svf_adapted_model_lowrank.*, phase7_lowrank.json   the low-rank twin and its own entry
manifest.json                    SHA-256 of every other file
"""

import importlib.metadata
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from interop import formats
from interop.companions import write_companions
from interop.config import Checkpoint, hf_config
from interop.huggingface import fill_huggingface
from interop.lowrank import factor_tensors
from interop.names import Params, own_names, params_to_numpy
from interop.rules import Names

METRICS = ("latency_ms", "accuracy", "vram_gb", "throughput_tps")  # the guide's order
FORMAT_VERSION = 1
Z_SEMANTICS = (
    "W' = U diag(s z) V^T with z = 1 + sum_k alpha_k (z_k - 1); alpha is alpha_by_weight[name] "
    "where the metadata has it, else best_mixture; W = U diag(s) V^T is the float32 singular value "
    "decomposition of the base weight, s descending; z = 1 is the base model"
)
MODEL = "svf_adapted_model"
_LIBRARIES = ("jax", "flax", "numpy", "torch", "safetensors")
_DOMAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")

Z = dict[str, np.ndarray]
Measure = Callable[[Path], Mapping[str, float]]


def write_phase8(
    directory: str | Path,
    checkpoint: Checkpoint,
    experts: Mapping[str, Mapping[str, Any]],
    alpha: Sequence[float],
    *,
    adapted_params: Params,
    measure: Measure,
    succeeded: Callable[[dict[str, float], Path], bool],
    alpha_by_path: Mapping[str, Any] | None = None,
    low_rank_params: Params | None = None,
    rank_fraction: float = 1.0,
    extra_metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Write the artifacts to `directory`, which appears only when all is written and measured.

    Args:
        directory: must not exist.
        checkpoint: the base model, as it was loaded.
        experts: domain -> path of a matrix -> its (r,) z, of all domains the same paths and
            lengths; the order names the experts.
        alpha: the K weights of the mixture, in that order.
        adapted_params: the dense weights of the mixture, `svf.materialize` of `svf.mix`; taken as
            given.
        measure: called with the path of the finished svf_adapted_model.pt (and then of the
            low-rank file, see `load_low_rank`); returns the four `METRICS` of that file:
            milliseconds, a fraction, 10^9 bytes, tokens per second. Tokenizer and projector
            lie beside the file, so `load_phase6` opens it.
        succeeded: whether such metrics of the file at that path keep the constraints.
        alpha_by_path: path -> (K,), if the mixture differs from weight to weight; `alpha` is then
            its summary for the guide's JSON.
        low_rank_params: a tree of `svf.truncate` for the low-rank twin.
        rank_fraction: the fraction it was truncated at.
        extra_metadata: JSON values to keep in the metadata.

    Raises:
        ValueError: `directory` exists, or an argument does not fit; nothing is left behind,
            also when `measure` raises.
    """
    directory = Path(directory)
    names = {n: e._replace(dtype="float32") for n, e in checkpoint.names.items()}
    mixture = _check_alpha(alpha, experts)
    z_tensors = _name_experts(experts, names)
    metadata = _metadata(checkpoint, mixture, list(experts), extra_metadata)
    if alpha_by_path is not None:
        metadata["alpha_by_weight"] = _name_alpha(alpha_by_path, experts, names)
    config = hf_config(checkpoint.spec, checkpoint.config)
    with formats.staged_directory(directory) as staged:
        tensors = params_to_numpy(adapted_params, names)
        _write_pair(staged / MODEL, tensors, config, metadata)
        write_companions(staged, checkpoint)
        (staged / "huggingface").mkdir()
        fill_huggingface(staged / "huggingface", adapted_params, checkpoint)
        for domain, z in z_tensors.items():
            _write_z(staged / f"z_vectors_{domain}", z, {**metadata, "expert": domain})
        metrics = _measured(measure, staged / f"{MODEL}.pt")
        report = {
            "success": bool(succeeded(metrics, staged / f"{MODEL}.pt")),
            "experts": {domain: f"z_vectors_{domain}.pt" for domain in experts},
            "best_mixture": mixture,
            "adapted_model": f"{MODEL}.pt",
            "metrics": metrics,
        }
        formats.write_json(staged / "phase7.json", report)
        if low_rank_params is not None:
            facts = {**metadata, "rank_fraction": float(rank_fraction)}
            tensors = factor_tensors(low_rank_params, names)
            _write_low_rank(staged, tensors, config, facts, measure, succeeded)
        _write_manifest(staged)
    return directory


def _check_alpha(alpha: Sequence[float], experts: Mapping[str, Any]) -> list[float]:
    if bad := [domain for domain in experts if not _DOMAIN.fullmatch(domain)]:
        raise ValueError(f"The domain {bad[0]!r} cannot be part of a file name.")
    mixture = [float(a) for a in np.asarray(alpha).tolist()] if np.ndim(alpha) == 1 else None
    if not experts or mixture is None or len(mixture) != len(experts):
        raise ValueError(
            f"`alpha` must hold one number for each of {len(experts)} experts, got shape "
            f"{np.shape(alpha)}."
        )
    if not all(math.isfinite(a) for a in mixture):
        raise ValueError(f"`alpha` must be finite, got {mixture}.")
    return mixture


def _name_experts(experts: Mapping[str, Mapping[str, Any]], names: Names) -> dict[str, Z]:
    """The z of every expert under torch names, float32; all that does not fit in one error."""
    own = {path: entry for path, entry in own_names(names).items() if len(entry[1]) == 2}
    problems, found = [], {}
    paths = {path: None for z in experts.values() for path in z if path in own}
    lengths: dict[str, int] = {}  # of the first expert that has the path
    for domain, z in experts.items():
        found[domain] = {}
        if not z:
            problems.append(f"{domain}: has no z")
        problems += [
            f"{domain}: {path}: missing, others have it" for path in paths if path not in z
        ]
        for path, value in z.items():
            array = np.asarray(value, np.float32)
            if path not in own:
                problems.append(f"{domain}: {path} is no matrix of the checkpoint")
                continue
            name, shape = own[path]
            full = min(shape)
            if array.ndim != 1 or not 0 < array.size <= full:
                problems.append(f"{domain}: {path}: have {array.shape}, want ({full},)")
            elif array.size != lengths.setdefault(path, array.size):
                problems.append(f"{domain}: {path}: have {array.shape}, another ({lengths[path]},)")
            elif not np.isfinite(array).all():
                problems.append(f"{domain}: {path}: holds NaN or infinity")
            found[domain][name] = array
    if problems:
        raise ValueError("`experts` do not fit:\n" + "\n".join(f"  {p}" for p in problems))
    return found


def _name_alpha(
    alpha_by_path: Mapping[str, Any], experts: Mapping[str, Mapping[str, Any]], names: Names
) -> dict[str, list[float]]:
    """The mixture of every weight under its torch name."""
    own = own_names(names)
    scaled = {path for z in experts.values() for path in z}
    if alpha_by_path.keys() != scaled:
        paths = ", ".join(sorted(alpha_by_path.keys() ^ scaled))
        raise ValueError(
            f"`alpha_by_path` must name the weights of the experts; differs in {paths}."
        )
    return {own[p][0]: _check_alpha(a, experts) for p, a in alpha_by_path.items()}


def _metadata(
    checkpoint: Checkpoint, mixture: list[float], order: list[str], extra: Mapping[str, Any] | None
) -> dict[str, Any]:
    try:
        plain = json.loads(json.dumps(dict(extra or {}), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"`extra_metadata` must hold JSON values: {error}.") from error
    return {
        **plain,
        "phase": 7,
        "best_mixture": mixture,
        "expert_order": order,
        "z_semantics": Z_SEMANTICS,
        "base_sha256": checkpoint.sha256,
        "format_version": FORMAT_VERSION,
        "versions": {name: importlib.metadata.version(name) for name in _LIBRARIES},
    }


def _measured(measure: Measure, path: Path) -> dict[str, float]:
    """The four metrics of `path` in the guide's order."""
    got = measure(path)
    if set(got) != set(METRICS):
        raise ValueError(f"`measure` must return {', '.join(METRICS)}, got {', '.join(got)}.")
    metrics = {name: float(got[name]) for name in METRICS}
    if bad := [name for name, value in metrics.items() if not math.isfinite(value)]:
        raise ValueError(f"`measure` gave {bad[0]} = {metrics[bad[0]]}; want a finite number.")
    return metrics


def _write_pair(
    base: Path, tensors: Mapping[str, np.ndarray], config: dict[str, Any], metadata: dict[str, Any]
) -> None:
    """The model as .pt (form B of Phase 6) and as .safetensors with .json (form A)."""
    state_dict = {name: formats.to_torch(tensor) for name, tensor in tensors.items()}
    record = {"model_state_dict": state_dict, "config": config, "metadata": metadata}
    formats.write_torch(formats.add_suffix(base, ".pt"), record)
    formats.write_safetensors(formats.add_suffix(base, ".safetensors"), tensors)
    formats.write_json(formats.add_suffix(base, ".json"), _side_car(config, metadata))


def _side_car(config: dict[str, Any], metadata: dict[str, Any]) -> dict[str, Any]:
    return {
        "config": config,
        "metadata": metadata,
        "has_optimizer": False,
        "has_extra_tensors": False,
        "extra_tensor_keys": [],
    }


def _write_z(base: Path, z: Z, metadata: dict[str, Any]) -> None:
    """One expert as .pt and .safetensors; what it means stands in the .json."""
    tensors = {name: formats.to_torch(array.copy()) for name, array in z.items()}
    formats.write_torch(formats.add_suffix(base, ".pt"), tensors)
    formats.write_safetensors(formats.add_suffix(base, ".safetensors"), z)
    formats.write_json(formats.add_suffix(base, ".json"), {"metadata": metadata})


def _write_low_rank(
    directory: Path,
    tensors: dict[str, np.ndarray],
    config: dict[str, Any],
    metadata: dict[str, Any],
    measure: Measure,
    succeeded: Callable[[dict[str, float], Path], bool],
) -> None:
    """The low-rank twin with its own entry, measured on its own file."""
    path = directory / f"{MODEL}_lowrank.safetensors"
    formats.write_safetensors(path, tensors)
    formats.write_json(directory / f"{MODEL}_lowrank.json", _side_car(config, metadata))
    metrics = _measured(measure, path)
    report = {
        "success": bool(succeeded(metrics, path)),
        "best_mixture": metadata["best_mixture"],
        "rank_fraction": metadata["rank_fraction"],
        "adapted_model": path.name,
        "bytes": path.stat().st_size,
        "metrics": metrics,
    }
    formats.write_json(directory / "phase7_lowrank.json", report)


def artifact_files(directory: Path) -> list[str]:
    """All files below `directory` but the manifest, as sorted relative names."""
    paths = [p for p in directory.rglob("*") if p.is_file() and p.name != "manifest.json"]
    return sorted(p.relative_to(directory).as_posix() for p in paths)


def _write_manifest(directory: Path) -> None:
    digests = {name: formats.sha256_file(directory / name) for name in artifact_files(directory)}
    manifest = {"format_version": FORMAT_VERSION, "sha256": digests}
    formats.write_json(directory / "manifest.json", manifest)
