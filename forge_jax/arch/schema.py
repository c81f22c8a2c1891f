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
    """What a module may cost; noted as without effect, for budgets are the document's."""

    tokens_per_step: NonNegative | None = None
    flops_per_token: NonNegative | None = None
    latency_ms: NonNegative | None = None


class Module(Node):
    """A part of a pipeline; sizes, mixers, norm and positions left open are the architecture's."""

    kind: Literal["transformer", "latent_sampler", "readout", "embedding", "custom"] = "transformer"
    """an embedding and a readout need no module; custom is refused"""
    d_model: PositiveInt | None = None
    """that of the architecture"""
    n_layers: PositiveInt | None = None
    mix_unit: MixUnit | None = None
    ffn: FFN | None = None
    norm: NormKind | None = None
    pos: Pos | None = None
    cond: Cond | None = None
    """of a latent sampler: `source.H` bits a token (8), `reg.kappa` of them free"""
    kv_policy: KVPolicy | None = None
    residual: Residual | None = None
    hierarchy: Hierarchy | None = None
    depth_router: DepthRouter | None = None
    recurrence: Recurrence | None = None
    latent: Params | None = None
    """refused: see `cond` and `params`"""
    output_dim: PositiveInt | None = None
    """of a readout: that of the vocabulary"""
    params: Params | None = None
    """of a stack `causal` (false: it sees later tokens, and latent samplers alone may read it), of
    a latent sampler `latent_dim` (features of a code), of an embedding `vocab_size`"""
    budget: ModuleBudget | None = None


class StageBudget(Node):
    """What a stage may cost, relative to its module; noted as without effect."""

    tokens_multiplier: NonNegative | None = None
    compute_multiplier: NonNegative | None = None


class Stage(Node):
    """A step of a pipeline."""

    name: Annotated[str, Field(min_length=1)]
    module: str | None = None
    """whose weights it has; stages of one module share them"""
    kind: Literal["module", "latent_sampler", "readout", "embedding", "custom"] | None = None
    """its module's; needed where it has none"""
    repeat: PositiveInt = 1
    """runs in a row, each on what the last one gave"""
    mode: Literal["all", "train", "prefill", "decode", "train_prefill", "inference"] | None = None
    """without effect: latents are inferred in training only, all else runs always"""
    inputs: tuple[str, ...] | None = None
    """earlier stages whose mean it reads; the nearest that is no latent by default"""
    kv_from: tuple[str, ...] | None = None
    """earlier stages, whose mean keys and values are made from in place of the own tokens"""
    mem_from: tuple[str, ...] | None = None
    """earlier stages, whose mean is mapped and added to what keys and values are made from"""
    train_only: bool = False
    """without effect, as `mode`"""
    prefill_only: bool = False
    """refused: a network would not be trained as it is used"""
    params: Params | None = None
    """refused: a module has them"""
    budget: StageBudget | None = None


class Arch(Node):
    """A stack of equal blocks, or a pipeline of such stacks."""

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
    """by name, for the stages of the pipeline"""
    pipeline: tuple[Stage, ...] | None = None
    """an embedding, stacks and latents, a readout"""


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
