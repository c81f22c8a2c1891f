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

    tokens_per_step: PositiveInt | None = None
    """most tokens of a training step, all rows"""
    flops_per_token: NonNegative | None = None
    """of an embedding 0, what it costs; elsewhere refused: see `train.budget.flops_per_step`"""
    latency_ms: NonNegative | None = None
    """refused: it depends on the machine"""


class Module(Node):
    """A part of a pipeline; sizes, mixers, norm and positions left open are the architecture's."""

    kind: Literal["transformer", "latent_sampler", "readout", "embedding", "custom"] = "transformer"
    """an embedding and a readout need no module; custom is refused"""
    d_model: PositiveInt | None = None
    """that of the architecture"""
    n_layers: PositiveInt | None = None
    """blocks of its stack"""
    mix_unit: MixUnit | None = None
    """what mixes its tokens"""
    ffn: FFN | None = None
    """feed-forward network of its blocks"""
    norm: NormKind | None = None
    """norm of its blocks"""
    pos: Pos | None = None
    """where a token stands, as in `arch.pos`"""
    cond: Cond | None = None
    """of a stack as in `arch.cond`; of a latent sampler `source.H` bits a token (8), `reg.kappa` of
    them free"""
    kv_policy: KVPolicy | None = None
    """what its decoding keeps of the past"""
    residual: Residual | None = None
    """how its blocks add to their input"""
    hierarchy: Hierarchy | None = None
    """its coarser layers"""
    depth_router: DepthRouter | None = None
    """which tokens pass its layers by"""
    recurrence: Recurrence | None = None
    """its loop"""
    latent: Params | None = None
    """refused: see `cond` and `params`"""
    output_dim: PositiveInt | None = None
    """of a readout: that of the vocabulary"""
    params: Params | None = None
    """of a stack `causal` (false: it sees later tokens, and latent samplers alone may read it), of
    a latent sampler `latent_dim` (features of a code), of an embedding `vocab_size`"""
    budget: ModuleBudget | None = None
    """what it may cost"""


class Stage(Node):
    """A step of a pipeline."""

    name: Annotated[str, Field(min_length=1)]
    """what other stages call it"""
    module: str | None = None
    """whose weights it has; stages of one module share them"""
    kind: Literal["module", "latent_sampler", "readout", "embedding", "custom"] | None = None
    """its module's; needed where it has none"""
    repeat: PositiveInt = 1
    """runs in a row, each on what the last one gave"""
    mode: Literal["all", "train", "prefill", "decode", "train_prefill", "inference"] | None = None
    """when it runs: `train` where only latents need it, else `all`; `train_prefill` is read as the
    one that is true, with a note, and others are refused"""
    inputs: tuple[str, ...] | None = None
    """earlier stages whose mean it reads; the nearest that is no latent by default"""
    kv_from: tuple[str, ...] | None = None
    """earlier stages, whose mean keys and values are made from in place of the own tokens"""
    mem_from: tuple[str, ...] | None = None
    """earlier stages, whose mean is mapped and added to what keys and values are made from"""
    train_only: bool = False
    """as `mode: train`"""
    prefill_only: bool = False
    """refused: a network would not be trained as it is used"""
    params: Params | None = None
    """refused: a module has them"""
    budget: Params | None = None
    """refused: modules and training have one"""


class Arch(Node):
    """A stack of equal blocks, or a pipeline of such stacks."""

    d_model: Annotated[int, Field(ge=8)]
    """features of a token between blocks"""
    n_layers: PositiveInt
    """blocks of the stack"""
    mix_unit: MixUnit
    """what mixes the tokens of a block"""
    ffn: FFN
    """feed-forward network of a block"""
    norm: NormKind
    """norm of the blocks, and before the readout"""
    pos: Pos
    """where a token stands: added to the tokens (learned), or inside all attentions"""
    cond: Cond | None = None
    """a learned condition that acts on the blocks"""
    kv_policy: KVPolicy | None = None
    """what decoding keeps of the past"""
    residual: Residual | None = None
    """how a block adds to its input; norms before the sublayers by default"""
    hierarchy: Hierarchy | None = None
    """layers that work on blocks of tokens"""
    depth_router: DepthRouter | None = None
    """which tokens pass a layer by"""
    recurrence: Recurrence | None = None
    """a part of the stack that runs several times"""
    modules: dict[str, Module] | None = None
    """by name, for the stages of the pipeline"""
    pipeline: tuple[Stage, ...] | None = None
    """an embedding, stacks and latents, a readout"""


class StepBudget(Node):
    """What a training run may spend."""

    tokens_per_step: PositiveInt | None = None
    """most tokens of a training step, all rows"""
    max_steps: PositiveInt | None = None
    """steps after which training ends"""
    flops_per_step: NonNegative | None = None
    """most FLOPs of a training step, all rows"""


class Train(Node):
    """How the network is trained."""

    ctx_len: Annotated[int, Field(ge=8)]
    """tokens of a training row, and the most that the network reads"""
    lr: PositiveFloat | None = None
    """learning rate, 1e-3 by default"""
    wd: NonNegative | None = None
    """decoupled weight decay of kernels and embeddings, 0.01 by default"""
    betas: Annotated[tuple[float, ...], Field(min_length=2, max_length=2)] | None = None
    """what Adam's two moments keep of their past, 0.9 and 0.95 by default"""
    clip: PositiveFloat | None = None
    """largest global norm of a gradient, 1 by default"""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """what activations are computed in; fp16 is computed in bf16, which needs no loss scale"""
    vocab_size: PositiveInt | None = None
    """256, bytes, by default"""
    budget: StepBudget | None = None
    """what a run may spend"""


class Budget(Node):
    """What the network may cost."""

    params_target: PositiveFloat | None = None
    """most parameters"""
    flops_target: PositiveFloat | Annotated[str, Field(pattern="^match:.+")] | None = None
    """most FLOPs of a training step of one row, a number or "match:NAME" of another network"""


class Spec(Node):
    """A whole document."""

    arch: Arch
    """the network"""
    train: Train
    """how it is trained"""
    budget: Budget | None = None
    """what it may cost"""


def json_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a document, for editors."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **Spec.model_json_schema(mode="validation"),
    }
