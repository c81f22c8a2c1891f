"""The document: an architecture, how it is trained, what it may cost."""

from typing import Annotated, Any, Literal

from pydantic import Field

from forge_jax.arch.mixing import MixUnit, Node, NonNegative, PositiveFloat, PositiveInt
from forge_jax.arch.structure import (
    FFN,
    Cond,
    DepthRouter,
    Hierarchy,
    KVPolicy,
    Pos,
    Recurrence,
    Residual,
)

NormKind = Literal["LayerNorm", "RMSNorm", "ScaleNorm"]
Params = dict[str, bool | int | float | str | None]


class ModuleBudget(Node):
    """What a module may cost."""

    tokens_per_step: NonNegative | None = None
    flops_per_token: NonNegative | None = None
    latency_ms: NonNegative | None = None


class Module(Node):
    """A part of a pipeline; what it leaves open comes from the architecture."""

    kind: Literal["transformer", "latent_sampler", "readout", "embedding", "custom"] = "transformer"
    d_model: PositiveInt | None = None
    n_layers: PositiveInt | None = None
    mix_unit: MixUnit | None = None
    ffn: FFN | None = None
    norm: NormKind | None = None
    pos: Pos | None = None
    cond: Cond | None = None
    kv_policy: KVPolicy | None = None
    residual: Residual | None = None
    hierarchy: Hierarchy | None = None
    depth_router: DepthRouter | None = None
    recurrence: Recurrence | None = None
    latent: Params | None = None
    output_dim: PositiveInt | None = None
    params: Params | None = None
    budget: ModuleBudget | None = None


class StageBudget(Node):
    """What a stage may cost, relative to its module."""

    tokens_multiplier: NonNegative | None = None
    compute_multiplier: NonNegative | None = None


class Stage(Node):
    """A step of a pipeline."""

    name: Annotated[str, Field(min_length=1)]
    module: str | None = None
    """whose weights it has; stages of one module share them"""
    kind: Literal["module", "latent_sampler", "readout", "embedding", "custom"] | None = None
    repeat: PositiveInt = 1
    mode: Literal["all", "train", "prefill", "decode", "train_prefill", "inference"] | None = None
    inputs: tuple[str, ...] | None = None
    kv_from: tuple[str, ...] | None = None
    mem_from: tuple[str, ...] | None = None
    train_only: bool = False
    prefill_only: bool = False
    params: Params | None = None
    budget: StageBudget | None = None


class Arch(Node):
    """A stack of equal blocks."""

    d_model: Annotated[int, Field(ge=8)]
    n_layers: PositiveInt
    mix_unit: MixUnit
    ffn: FFN
    norm: NormKind
    pos: Pos
    cond: Cond | None = None
    kv_policy: KVPolicy | None = None
    residual: Residual | None = None
    hierarchy: Hierarchy | None = None
    depth_router: DepthRouter | None = None
    recurrence: Recurrence | None = None
    modules: dict[str, Module] | None = None
    pipeline: tuple[Stage, ...] | None = None


class StepBudget(Node):
    """What a training run may spend."""

    tokens_per_step: NonNegative | None = None
    max_steps: PositiveInt | None = None
    flops_per_step: NonNegative | None = None


class Train(Node):
    """How the network is trained."""

    ctx_len: Annotated[int, Field(ge=8)]
    """tokens of a training row, and the most that the network reads"""
    lr: PositiveFloat | None = None
    wd: NonNegative | None = None
    betas: Annotated[tuple[float, ...], Field(min_length=2, max_length=2)] | None = None
    clip: PositiveFloat | None = None
    """largest global norm of a gradient"""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """what activations are computed in; fp16 is computed in bf16, which needs no loss scale"""
    vocab_size: PositiveInt | None = None
    """256, bytes, by default"""
    budget: StepBudget | None = None


class Budget(Node):
    """What the network may cost."""

    params_target: PositiveFloat | None = None
    flops_target: PositiveFloat | Annotated[str, Field(pattern="^match:.+")] | None = None
    """FLOPs of a training step of one row, a number or "match:NAME" of another network"""


class Spec(Node):
    """A whole document."""

    arch: Arch
    train: Train
    budget: Budget | None = None


def json_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a document, for editors."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **Spec.model_json_schema(mode="validation"),
    }
