"""Cognate models as PyTorch files, under the reference's names and in its layouts.

The tree stacks the layers on a first axis and keeps kernels (in, out); torch has one tensor a layer
and (out, in). The head is tied: files of the reference carry it twice, as `lm_head.weight`, and
buffers besides, which hold no weight.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from forge_jax.models.cognate import Cognate, CognateConfig
from interop.config import MOST_LAYERS, whole_problem
from interop.formats import (
    add_suffix,
    complain,
    is_finite,
    plain_json,
    read_json,
    read_safetensors,
    read_torch,
    to_numpy,
    to_torch,
    write_json,
    write_safetensors,
    write_torch,
)
from interop.names import Params, flatten, tensor_problem, unflatten

EMBEDDING, HEAD = "backbone.token_emb.weight", "lm_head.weight"
_LAYERS = "backbone/layers/"
_BUFFERS = re.compile(r"backbone\.ltm\.memory_state|act_head\.(?:ema_step_acc|step_count)")
_WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.)+")  # DataParallel, torch.compile
# what a file may ask for of the parts that are made one by one
_MOST = {
    "layers": MOST_LAYERS,
    "steps": 1000,
    "micro_steps": 1000,
    "memory_taps": 1000,
    "memory_depth": 100,
}
_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}


class Slot(NamedTuple):
    """Where the torch tensor lives."""

    path: str  # leaf of the tree
    layer: int | None  # its index on the leaf's first axis
    shape: tuple[int, ...]  # torch's

    @property
    def is_turned(self) -> bool:
        """Whether torch stores the matrix the other way round."""
        return self.path.endswith("/kernel")


def cognate_names(config: CognateConfig) -> dict[str, Slot]:
    """Torch name -> slot, of every trainable tensor of the model.

    The seed's configuration has the reference's 107. Titans' tensors, which the reference lacks,
    are named in the same way.
    """
    return dict(_names(config))


@functools.cache
def _names(config: CognateConfig) -> dict[str, Slot]:
    """The table, which takes a trace of the model to make."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    # neither refinements nor a table of rotary positions hold a weight, but they can take minutes
    # and gigabytes to trace
    positions = 1 if config.positions == "rope" else config.max_positions
    small = dataclasses.replace(config, micro_steps=1, max_positions=positions)
    tree = jax.eval_shape(Cognate(small).init, jax.random.key(0), tokens)["params"]
    names = {}
    for path, leaf in flatten(tree):
        stacked = path.startswith(_LAYERS)
        shape = leaf.shape[1:] if stacked else leaf.shape
        shape = shape[::-1] if path.endswith("/kernel") else shape
        for layer in range(config.layers) if stacked else (None,):
            names[_torch_name(path, layer)] = Slot(path, layer, shape)
    return names


def _torch_name(path: str, layer: int | None) -> str:
    """The reference's name of a leaf, or of one layer of a stacked one."""
    *parents, last = path.split("/")
    last = _LEAVES.get(last, last)
    if parents[-1] == "in_proj":  # torch's multi-head attention has no submodule for it
        return ".".join([*parents[:-1], f"in_proj_{last}"])
    if layer is not None:
        parents.insert(2, str(layer))
    # the two layers of torch.nn.Sequential(Linear, activation, Linear)
    return ".".join([*(re.sub(r"^mlp_([02])$", r"mlp.\1", part) for part in parents), last])


def cognate_from_torch(
    state_dict: Mapping[str, Any], config: CognateConfig, source: str = "state_dict"
) -> Params:
    """The tree, float32 NumPy, of a state dict of torch or NumPy tensors.

    `lm_head.weight` may be there if it equals the embedding; buffers are passed over.

    Raises:
        ValueError: naming every missing, unknown, misshapen, mistyped or non-finite tensor.
    """
    names, problems, found = cognate_names(config), [], {}
    for key, tensor in state_dict.items():
        name = _WRAPPERS.sub("", str(key))
        if _BUFFERS.fullmatch(name):
            continue
        slot = names.get(EMBEDDING if name == HEAD else name)
        if slot is None:
            problems.append(f"{key}: unknown key, no weight of this model has this name")
        elif name in found:
            problems.append(f"{key}: a second key for {name}")
        elif problem := tensor_problem(tensor, slot.shape):
            problems.append(f"{key}: {problem}")
        found[name] = tensor
    problems += [f"{name}: missing" for name in names if name not in found]
    complain(source, problems)
    if HEAD in found and not np.array_equal(to_numpy(found[HEAD]), to_numpy(found[EMBEDDING])):
        complain(source, [f"{HEAD}: differs from {EMBEDDING}, to which it is tied"])
    leaves: dict[str, Any] = {}
    for name, slot in names.items():
        array = to_numpy(found[name]).astype(np.float32)
        array = array.T if slot.is_turned else array
        if slot.layer is None:
            leaves[slot.path] = np.ascontiguousarray(array)
        else:
            leaves.setdefault(slot.path, []).append(array)
    return unflatten({p: np.stack(x) if isinstance(x, list) else x for p, x in leaves.items()})


def cognate_to_numpy(params: Params, config: CognateConfig) -> dict[str, np.ndarray]:
    """`params` under torch names and in torch layout, their dtypes kept; without the tied head.

    Raises:
        ValueError: naming every leaf that is missing, left over, misshapen or non-finite.
    """
    names, leaves = cognate_names(config), dict(flatten(params))
    problems = [f"{p}: no torch name" for p in leaves.keys() - {s.path for s in names.values()}]
    tensors = {}
    for name, slot in names.items():
        want = slot.shape[::-1] if slot.is_turned else slot.shape
        want = want if slot.layer is None else (config.layers, *want)
        if slot.path not in leaves or np.shape(leaves[slot.path]) != want:
            have = np.shape(leaves[slot.path]) if slot.path in leaves else "nothing"
            problems.append(f"{slot.path}: have {have}, want {want}")
            continue
        array = np.asarray(leaves[slot.path])
        array = array if slot.layer is None else array[slot.layer]
        if not np.isfinite(array.astype(np.float32)).all():
            problems.append(f"{slot.path}: holds NaN or infinity")
        tensors[name] = np.array(array.T if slot.is_turned else array, order="C")
    complain("params", sorted(set(problems)))
    return tensors


def cognate_to_torch(params: Params, config: CognateConfig) -> dict[str, Any]:
    """`params` as a torch state dict, the tied head under both its names."""
    tensors = {name: to_torch(x) for name, x in cognate_to_numpy(params, config).items()}
    return {**tensors, HEAD: tensors[EMBEDDING]}


def save_cognate(path: str | Path, params: Params, config: CognateConfig) -> None:
    """Write `<path>.safetensors` with `<path>.json`, and `<path>.pt`.

    The JSON holds the configuration; the .pt holds it too, beside `model_state_dict`. safetensors
    refuses tensors that share memory and has the embedding once.
    """
    path, record = Path(path), {"config": dataclasses.asdict(config)}
    tensors = cognate_to_numpy(params, config)
    write_safetensors(add_suffix(path, ".safetensors"), tensors)
    state = cognate_to_torch(params, config)
    write_torch(add_suffix(path, ".pt"), {"model_state_dict": state, **record})
    write_json(add_suffix(path, ".json"), record)  # last: with it the export is whole


def load_cognate(
    path: str | Path, config: CognateConfig | None = None
) -> tuple[Params, CognateConfig]:
    """Parameters and configuration of a .safetensors or .pt file.

    Without `config` the file's own is taken, from the .json beside it or from inside the .pt;
    a bare state dict needs one.

    Raises:
        ValueError: the file is unreadable, has no configuration, or does not fit it.
    """
    path = Path(path)
    record: Mapping[str, Any] = {}
    if path.suffix == ".safetensors":
        state, beside = read_safetensors(path), path.with_suffix(".json")
        record = read_json(beside) if beside.is_file() else {}
    else:
        state = read_torch(path)
        if isinstance(state, Mapping) and "model_state_dict" in state:
            record, state = state, state["model_state_dict"]
    if not isinstance(state, Mapping):
        raise ValueError(f"{path} holds a {type(state).__name__}; wanted a state dict.")
    if config is None:
        config = _config_of(record.get("config"), path)
    return cognate_from_torch(state, config, str(path)), config


def _config_of(record: Any, path: Path) -> CognateConfig:
    """The configuration that a file carries."""
    if not isinstance(record, Mapping):
        raise ValueError(f"{path} carries no configuration; wanted `config` to be given.")
    title = f"configuration of {path}"
    record = plain_json(record, title)
    known = {field.name: field.default for field in dataclasses.fields(CognateConfig)}
    problems = [
        _setting_problem(name, value, known[name]) if name in known else f"{name}: unknown setting"
        for name, value in record.items()
    ]
    complain(title, [p for p in problems if p])
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in record.items()}
    try:
        return CognateConfig(**values)
    except ValueError as error:
        raise ValueError(f"{title} does not fit: {error}") from error


def _setting_problem(name: str, value: Any, default: Any) -> str:
    """What is wrong with one setting, judged by the type of its default; empty if nothing."""
    if isinstance(default, bool | str):
        want = "true or false" if isinstance(default, bool) else "a word"
        return "" if type(value) is type(default) else f"{name}: have {value!r}, want {want}"
    if isinstance(default, int):
        return whole_problem(name, value, 1, _MOST.get(name, 2**31 - 1))
    is_list = isinstance(default, tuple)
    numbers = value if is_list and isinstance(value, list) else [value]
    if all(map(is_finite, numbers)) and is_list == isinstance(value, list):
        return ""
    return f"{name}: have {value!r}, want {'a list of numbers' if is_list else 'a number'}"
