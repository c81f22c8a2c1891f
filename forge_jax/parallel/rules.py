"""Which axis of which parameter the `model` axis of a mesh splits."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import PyTree

from forge_jax import svf
from forge_jax.parallel.placement import REPLICATED, indivisible, shard

Rules = Sequence[tuple[str, PartitionSpec]]
"""pattern found in the path -> spec of the leaf's last axes; the first that is found counts"""

DECODER_RULES: Rules = (
    (r"\b(q|k|v|qkv|gate|up)_proj/kernel$", PartitionSpec(None, "model")),
    (r"\b(q|k|v|qkv|gate|up)_proj/bias$", PartitionSpec("model")),
    (r"\b(o|down)_proj/kernel$", PartitionSpec("model", None)),
    (r"\bembed_tokens/embedding$", PartitionSpec("model", None)),
    (r"\blm_head/kernel$", PartitionSpec(None, "model")),
)
"""those of `models.Decoder`, as in Megatron-LM (Shoeybi et al. 2019, arXiv 1909.08053, section 3):
the first matrices of a block by columns, its last by rows, embeddings by vocabulary"""

_VOCABULARY = re.compile(r"\b(embed_tokens/embedding|lm_head/kernel)$")


def param_specs(
    mesh: Mesh, params: PyTree[Any], rules: Rules = DECODER_RULES
) -> PyTree[PartitionSpec]:
    """Return the spec of every leaf of a tree of parameters or factors.

    What no rule names is replicated. So is a vocabulary that the mesh does not divide (GPT-2's
    50,257): padding it would change the model.

    `Factors` in place of a kernel: U, Vt and the rest are split as the kernel is, by columns or by
    rows, and s is whole. Each device then holds 1/n of U and of Vt and does 1/n of the work. By
    columns, x U is gathered (r numbers a token) and the product leaves by columns, as Megatron's
    does; by rows, x comes by rows, x U is summed over devices and y once more. To split r instead
    (U by columns, Vt by rows) is even too, but sums all n outputs of every matrix over the devices:
    of an up-projection eight times the traffic of the gathering.

    Args:
        mesh: from `make_mesh`.
        params: (inputs, outputs) kernels or their factors, from `svf.decompose`; stacked layers
            stand before.
        rules: for parameters with other names.

    Raises:
        ValueError: the mesh has a `model` axis, and no rule matches.
    """
    matched = []

    def spec_of(name, leaf):
        wanted = next((spec for pattern, spec in rules if re.search(pattern, name)), None)
        if wanted is None:
            return _whole(leaf)
        matched.append(name)
        if svf.is_factors(leaf):
            return dataclasses.replace(
                leaf,
                u=_last(wanted, leaf.u),
                s=REPLICATED,
                vt=_last(wanted, leaf.vt),
                rest=None if leaf.rest is None else _last(wanted, leaf.rest),
            )
        spec = _last(wanted, leaf)
        if _VOCABULARY.search(name) and indivisible(mesh, name, leaf.shape, spec):
            return REPLICATED
        return spec

    specs = jax.tree_util.tree_map_with_path(
        lambda path, leaf: spec_of(svf.path_name(path), leaf), params, is_leaf=svf.is_factors
    )
    size = mesh.shape["model"]
    if size > 1 and not matched:
        raise ValueError(f"None of the `rules` matches a path, so model={size} splits nothing.")
    return specs


def shard_params(
    mesh: Mesh | None, params: PyTree[Any], rules: Rules = DECODER_RULES
) -> PyTree[Any]:
    """Put parameters or factors on the mesh by `param_specs`.

    Raises:
        ValueError: as `param_specs` and `shard`.
    """
    return params if mesh is None else shard(mesh, params, param_specs(mesh, params, rules))


def _last(spec: PartitionSpec, leaf: Any) -> PartitionSpec:
    """The spec of the last axes, with whole axes before them (stacked layers)."""
    return PartitionSpec(*[None] * (leaf.ndim - len(spec)), *spec)


def _whole(leaf: Any) -> Any:
    """The specs of a leaf, or of factors, that every device holds whole."""
    return jax.tree.map(lambda _: REPLICATED, leaf)
