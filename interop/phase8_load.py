"""The artifacts of Phase 7 opened again: nothing is believed that is not checked."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from interop import formats
from interop.config import Checkpoint
from interop.huggingface import load_huggingface
from interop.lowrank import load_low_rank
from interop.names import Params, flatten, own_names
from interop.phase6 import load_phase6
from interop.phase8 import METRICS, MODEL, Z, artifact_files
from interop.rules import Names

# What is read here, or by transformers; the directory may be that of a run, whose own files
# (config.json, metrics, checkpoints) are in no manifest. The suffixes are those of `load_phase6`.
_ARTIFACT = re.compile(
    rf"huggingface/.+|(?:phase7|z_vectors_[^/]*|{MODEL}|tokenizer|tokenizer_config|[^/]*vision)"
    r"(?:_lowrank)?\.(?:json|pt|pth|bin|safetensors)"
)


class LowRank(NamedTuple):
    """The low-rank twin as `load_phase8` finds it."""

    checkpoint: Checkpoint  # params with `svf.Factors` leaves, for `svf.transform`
    rank_fraction: float
    success: bool
    metrics: dict[str, float]


class Phase8(NamedTuple):
    """What `load_phase8` returns."""

    success: bool
    experts: dict[str, Z]  # domain -> path -> (r,) float32
    alpha: np.ndarray  # (K,), in the order of `experts`
    checkpoint: Checkpoint  # the adapted model
    metrics: dict[str, float]
    metadata: dict[str, Any]
    low_rank: LowRank | None
    alpha_by_path: dict[str, np.ndarray] | None  # path -> (K,), where the mixture is per weight

    @property
    def params(self) -> Params:
        """Weights of the adapted model."""
        return self.checkpoint.params


def load_phase8(directory: str | Path) -> Phase8:
    """Open the artifacts of `write_phase8` again and check them.

    Every artifact must be in the manifest and have its hash; every .pt is compared with its
    safetensors twin, and the Hugging Face directory with the adapted model.

    Raises:
        ValueError: naming what is missing, changed, malformed or contradictory.
    """
    directory = Path(directory)
    _verify(directory)
    report = formats.read_json(directory / "phase7.json")
    _check_report(report, directory / "phase7.json")
    checkpoint = load_phase6(directory / report["adapted_model"])
    leaves = dict(flatten(checkpoint.params))
    for name, load in ((f"{MODEL}.safetensors", load_phase6), ("huggingface", load_huggingface)):
        if not _equal(leaves, dict(flatten(load(directory / name).params))):
            raise ValueError(f"{directory / name} differs from {report['adapted_model']}.")
    experts = {
        d: _read_z(directory / file, checkpoint.names) for d, file in report["experts"].items()
    }
    side_car = directory / f"{MODEL}.json"
    metadata = formats.read_json(side_car).get("metadata")
    if not isinstance(metadata, dict):
        raise ValueError(f"{side_car} has no `metadata`.")
    return Phase8(
        report["success"],
        experts,
        np.array(report["best_mixture"], float),
        checkpoint,
        report["metrics"],
        metadata,
        _read_low_rank(directory),
        _read_alpha(metadata.get("alpha_by_weight"), len(experts), checkpoint.names, side_car),
    )


def _verify(directory: Path) -> None:
    """Raise a ValueError that lists every artifact that is gone, changed or added."""
    digests = formats.read_json(directory / "manifest.json").get("sha256")
    if not isinstance(digests, dict) or "phase7.json" not in digests:
        raise ValueError(f"{directory / 'manifest.json'} lists no artifacts.")
    present = artifact_files(directory)
    problems = [f"{name} is missing" for name in digests if name not in present]
    problems += [
        f"{name} has changed"
        for name, digest in digests.items()
        if name in present and formats.sha256_file(directory / name) != digest
    ]
    problems += [
        f"{name} is not in the manifest"
        for name in present
        if name not in digests and _ARTIFACT.fullmatch(name)
    ]
    if problems:
        raise ValueError(f"{directory} is damaged: {', '.join(problems)}.")


def _check_report(report: dict[str, Any], path: Path) -> None:
    """Raise a ValueError that lists all that is malformed in the guide's JSON."""
    experts = report.get("experts")
    files = list(experts.values()) if isinstance(experts, dict) else []
    checks = {
        "success: want true or false": isinstance(report.get("success"), bool),
        "adapted_model: want the name of an artifact": _is_name(report.get("adapted_model")),
        "experts: want the name of an artifact for each": bool(files) and all(map(_is_name, files)),
        "best_mixture: want a number for each expert": _is_mixture(
            report.get("best_mixture"), len(files)
        ),
        f"metrics: want {', '.join(METRICS)}": _is_metrics(report.get("metrics")),
    }
    formats.complain(str(path), [problem for problem, holds in checks.items() if not holds])


def _is_name(value: Any) -> bool:
    """Whether `value` names an artifact, whose absence from the manifest `_verify` notices."""
    is_plain = isinstance(value, str) and formats.is_plain_name(value)
    return is_plain and _ARTIFACT.fullmatch(value) is not None


def _is_mixture(value: Any, experts: int) -> bool:
    return isinstance(value, list) and len(value) == experts and all(map(formats.is_finite, value))


def _is_metrics(value: Any) -> bool:
    return isinstance(value, dict) and all(formats.is_finite(value.get(name)) for name in METRICS)


def _equal(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    same = a.keys() == b.keys()
    return same and all(np.array_equal(formats.to_numpy(a[n]), formats.to_numpy(b[n])) for n in a)


def _read_z(path: Path, names: Names) -> Z:
    """One expert by path; the .pt must equal its twin."""
    record = formats.read_torch(path)
    own = {name: (leaf, shape) for leaf, (name, shape) in own_names(names).items()}
    if not isinstance(record, Mapping):
        raise ValueError(f"{path} holds a {type(record).__name__}; wanted names and z.")
    problems = [p for name, z in record.items() if (p := _z_problem(name, z, own))]
    formats.complain(str(path), problems)
    tensors = {name: formats.to_numpy(tensor) for name, tensor in record.items()}
    twin = path.parent / f"{path.name.removesuffix('.pt')}.safetensors"
    if not _equal(tensors, formats.read_safetensors(twin)):
        raise ValueError(f"{path} differs from {twin.name}.")
    return {own[name][0]: tensor for name, tensor in tensors.items()}


def _z_problem(name: Any, z: Any, own: dict[str, tuple[str, tuple[int, ...]]]) -> str | None:
    if name not in own:
        return f"{name}: the model lacks this weight"
    kind = (str(getattr(z, "dtype", "")), str(getattr(z, "layout", "")))
    if kind != ("torch.float32", "torch.strided"):
        return f"{name}: want a float32 tensor"
    full = min(own[name][1])
    if z.ndim != 1 or not 0 < z.shape[0] <= full:
        return f"{name}: have {tuple(z.shape)}, want ({full},)"
    return None if np.isfinite(formats.to_numpy(z)).all() else f"{name}: holds NaN or infinity"


def _read_alpha(
    by_weight: Any, experts: int, names: Names, path: Path
) -> dict[str, np.ndarray] | None:
    """The mixture of every weight by path; None where there is one for all."""
    if by_weight is None:
        return None
    leaf = {name: path for path, (name, _) in own_names(names).items()}
    is_map = isinstance(by_weight, dict) and all(name in leaf for name in by_weight)
    if not is_map or not all(_is_mixture(a, experts) for a in by_weight.values()):
        raise ValueError(f"{path}: `alpha_by_weight` needs {experts} numbers for each weight.")
    return {leaf[name]: np.array(a, float) for name, a in by_weight.items()}


def _read_low_rank(directory: Path) -> LowRank | None:
    path = directory / "phase7_lowrank.json"
    if not path.is_file():
        return None
    report = formats.read_json(path)
    checks = {
        "success: want true or false": isinstance(report.get("success"), bool),
        "adapted_model: want the name of an artifact": _is_name(report.get("adapted_model")),
        "rank_fraction: want a number": formats.is_finite(report.get("rank_fraction")),
        f"metrics: want {', '.join(METRICS)}": _is_metrics(report.get("metrics")),
    }
    formats.complain(str(path), [problem for problem, holds in checks.items() if not holds])
    checkpoint = load_low_rank(directory / report["adapted_model"])
    return LowRank(checkpoint, report["rank_fraction"], report["success"], report["metrics"])
