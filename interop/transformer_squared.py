"""Expert files of the public Transformer-Squared code (Sakana AI, arXiv 2501.06252).

Such a `.pt` holds one vector p per matrix of the MLPs, bfloat16, in one of two forms: a dict from
the weight's name to p, or the state_dict of the policy, `learnable_params_module_list.<i>` in the
order of the model's own state_dict. Its model is

    m = max_mult * sigmoid(p),    W' = U diag(s m) V^T * sum(s) / sum(s m)

and experts are mixed on their masks, m = sum_k alpha_k m_k, before the sums are taken. m is our z:

    svf.materialize(factors, z, renormalize=True)
    svf.mix(experts, alpha, mode="sum")     # stacked masks; renormalize what follows as well

Deviations: the public code rounds m, U, s and V to bfloat16; here they are float32. Since W' is the
same for m and c m, no expert of this kind is the base model unless m is constant.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from forge_jax.models import DecoderSpec
from interop import formats
from interop.rules import canonical_names, leaf_path

_INDEXED = re.compile(r"(?:learnable_params_module_list\.)?(0|[1-9]\d*)")
_DTYPES = ("torch.bfloat16", "torch.float16", "torch.float32")
_LARGEST = 16.0  # |p|; beyond, the float32 sigmoid is 0 or 1 and the way back is lost

Z = dict[str, np.ndarray]


def matrices(spec: DecoderSpec) -> dict[str, tuple[str, int]]:
    """The matrices that the public code trains: torch name -> its leaf and its z's length.

    Every weight with "mlp" in its name, in the order of the state_dict.
    """
    return {
        name: (entry.path, min(entry.shape))
        for name, entry in canonical_names(spec).items()
        if "mlp" in name and len(entry.shape) == 2
    }


def load_transformer_squared(path: str | Path, spec: DecoderSpec, *, max_mult: float = 1.0) -> Z:
    """Read an expert as the z of its matrices, path to (r,) float32, all in (0, `max_mult`).

    Args:
        path: the `.pt` file.
        spec: the model it was trained on.
        max_mult: the public code's setting of that name, which the file does not hold.

    Raises:
        ValueError: the file is damaged or would run code, or naming every vector that is missing,
            unknown, misshapen, mistyped or not finite.
    """
    path = Path(path)
    _check_max_mult(max_mult)
    record = formats.read_torch(path)
    if not isinstance(record, Mapping) or not record:
        raise ValueError(f"{path} holds no expert: wanted a dict of vectors.")
    wanted = matrices(spec)
    vectors, problems = _by_leaf(record, wanted)
    lengths = dict(wanted.values())
    for leaf, (name, p) in vectors.items():
        if problem := _problem(p, lengths[leaf]):
            problems.append(f"{name}: {problem}")
    problems += [f"{name}: missing" for name, (leaf, _) in wanted.items() if leaf not in vectors]
    formats.complain(str(path), problems)
    return {leaf: _mask(formats.to_numpy(vectors[leaf][1]), max_mult) for leaf in lengths}


def _by_leaf(record: Mapping[Any, Any], wanted: dict[str, tuple[str, int]]):
    """The vectors of a file by leaf, with their own names, and the names that fit nothing."""
    order = list(wanted.values())
    leaves = {leaf for leaf, _ in order}
    vectors: dict[str, tuple[str, Any]] = {}
    problems = []
    for name, p in record.items():
        text = str(name)
        index = _INDEXED.fullmatch(text) if len(text) < 64 else None
        if index and int(index[1]) < len(order):
            leaf = order[int(index[1])][0]
        else:
            leaf = leaf_path(text)
        if leaf not in leaves:
            problems.append(f"{text[:200]}: no matrix of this model's MLPs")
        elif leaf in vectors:
            problems.append(f"{text}: the vector of this matrix is there twice")
        else:
            vectors[leaf] = (text, p)
    return vectors, problems


def _problem(p: Any, length: int) -> str | None:
    """What is wrong with one vector, judged by its header before its values."""
    dtype, layout = str(getattr(p, "dtype", "")), str(getattr(p, "layout", ""))
    if dtype not in _DTYPES or layout != "torch.strided" or p.is_meta:
        return f"have {dtype or type(p).__name__}, want a float vector"
    if tuple(p.shape) != (length,):
        return f"have {tuple(p.shape)}, want ({length},)"
    values = formats.to_numpy(p).astype(np.float64)
    if not np.isfinite(values).all():
        return "holds NaN or infinity"
    return "lies outside [-16, 16]" if np.abs(values).max() > _LARGEST else None


def _mask(p: np.ndarray, max_mult: float) -> np.ndarray:
    """max_mult * sigmoid(p) in double precision, rounded once."""
    return (max_mult / (1 + np.exp(-p.astype(np.float64)))).astype(np.float32)


def _check_max_mult(max_mult: float) -> None:
    if not 0 < max_mult < np.inf:
        raise ValueError(f"`max_mult` must be positive, got {max_mult}.")


def save_transformer_squared(
    path: str | Path,
    z: Mapping[str, Any],
    spec: DecoderSpec,
    *,
    max_mult: float = 1.0,
    form: Literal["names", "policy"] = "policy",
    dtype: str = "bfloat16",
) -> Path:
    """Write an expert as the public code does, p = logit(z / max_mult).

    `z` are masks, which mean W' with its sum of singular values kept. bfloat16, the public code's,
    gives back the very p that was read where |p| <= 4; "float32" keeps z to 1e-6.

    Raises:
        ValueError: naming every matrix that lacks its z, has another length, or a z that no p
            in [-16, 16] gives, `max_mult` and 0 among them; or the options are none of those above.
    """
    import torch

    path = Path(path)
    _check_max_mult(max_mult)
    if form not in ("names", "policy") or dtype not in ("bfloat16", "float32"):
        raise ValueError(f"`form` or `dtype` is not known, got {form!r} and {dtype!r}.")
    wanted = matrices(spec)
    arrays = {leaf: np.asarray(value, np.float64) for leaf, value in z.items()}
    leaves = {leaf for leaf, _ in wanted.values()}
    problems = [f"{leaf}: no matrix of this model's MLPs" for leaf in arrays.keys() - leaves]
    low, high = (max_mult / (1 + np.exp(-p)) for p in (-_LARGEST, _LARGEST))
    tensors = {}
    for index, (name, (leaf, length)) in enumerate(wanted.items()):
        array = arrays.get(leaf)
        if array is None or array.shape != (length,):
            have = None if array is None else array.shape
            problems.append(f"{leaf}: have {have}, want ({length},)")
            continue
        exact = _logit(array / max_mult)
        ends = np.clip(exact, -_LARGEST, _LARGEST)
        # z is rounded: that of an end may be the z of a p beyond it
        is_end = _mask(ends, max_mult) == array.astype(np.float32)
        p = torch.from_numpy(np.where(is_end, ends, exact)).to(getattr(torch, dtype))
        # judged as it will stand in the file: z is rounded, and 16 may come as 16 + 1e-7
        if not (p.abs() <= _LARGEST).all():
            problems.append(f"{leaf}: lies outside [{low:.10g}, {high:.10g}], where |p| <= 16")
        tensors[name if form == "names" else f"learnable_params_module_list.{index}"] = p
    formats.complain("`z`", problems)
    formats.write_torch(path, tensors)
    return path


def _logit(ratio: np.ndarray) -> np.ndarray:
    """Inverse of the sigmoid; infinite or NaN where there is none."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.log(ratio / (1 - ratio))
