"""Document nodes around the mixers: positions, caches, feed-forwards, residuals, recurrence."""

from typing import Annotated, Literal

from pydantic import Field

from forge_jax.arch.mixing import (
    Count,
    Node,
    NonNegative,
    PositionKind,
    PositiveFloat,
    PositiveInt,
)

Fraction = Annotated[float, Field(gt=0, le=1)]


class DenseFFN(Node):
    """Two layers, or three where the activation gates (swiglu, geglu)."""

    kind: Literal["dense"]
    mult: PositiveFloat
    """hidden features per model feature"""
    act: Literal["relu", "gelu", "silu", "swiglu", "geglu"]


class MoEFFN(Node):
    """A mixture of such networks, `topk` of `experts` per token."""

    kind: Literal["moe"]
    mult: PositiveFloat
    act: Literal["relu", "gelu", "silu", "swiglu", "geglu"]
    experts: PositiveInt
    topk: PositiveInt = 1
    capacity: PositiveFloat | None = None
    """tokens an expert takes, in shares of an even load so far; None takes all"""


FFN = Annotated[DenseFFN | MoEFFN, Field(discriminator="kind")]


class LongRope(Node):
    """Shape of the per-dimension factors."""

    alpha: PositiveFloat
    beta: PositiveFloat


class Scaling(Node):
    """How rotary frequencies reach contexts that are longer than those of training."""

    type: Literal["ntk", "linear", "yarn", "longrope"]
    factor: PositiveFloat
    longrope: LongRope | None = None


class Rope(Node):
    """Rotary positions."""

    theta: PositiveFloat = 10000.0
    dims: Annotated[int, Field(ge=2, multiple_of=2)] | None = None
    """features of each head that turn, its first; None turns all"""
    scaling: Scaling | None = None


class Pos(Node):
    """What tells a token where it stands."""

    kind: PositionKind
    rope: Rope | None = None
    """for rope and xpos"""


class LatentUpdate(Node):
    """How the latent follows the tokens."""

    kind: Literal["linear", "ema"] = "linear"
    """the mean of the tokens of a block, or a moving average of all"""
    freq: PositiveInt = 1
    """tokens of a block, of which one latent is kept"""
    tau: Fraction | None = None
    """weight of the new token (ema)"""


class LatentCache(Node):
    """Keys and values as linear maps of one cached vector."""

    dim: PositiveInt
    heads: PositiveInt | None = None
    """of keys and values, in place of the mixers' kv_heads"""
    update: LatentUpdate | None = None


class KVPolicy(Node):
    """What decoding keeps of the past."""

    cache: Literal["full", "window", "ring", "none", "latent"] = "full"
    window: PositiveInt | None = None
    """tokens kept (window, ring); attention sees no more than these, in training too"""
    quant: Literal["none", "fp8", "nf4", "int8"] = "none"
    evict: str | None = None
    latent: LatentCache | None = None


class CondSource(Node):
    """Where the condition comes from."""

    kind: Literal["pool-mlp", "segment"]
    """the mean of all tokens so far, or of the last segment that has ended; then two layers"""
    H: PositiveInt | None = None
    """features of the condition, 16 by default"""
    segment: PositiveInt | None = None
    """tokens of a segment (segment)"""


class CondReg(Node):
    """What keeps the condition small."""

    kind: Literal["freebits", "none"]
    kappa: NonNegative | None = None
    """bits per token that cost nothing (freebits)"""


class CondOp(Node):
    """What the condition does, and where."""

    where: Literal["pre_mixer", "post_mixer", "ln", "proj_q", "proj_v", "q", "v", "token"]
    """what the mixers read or give, the norms before both sublayers, queries, values, the input"""
    op: Literal["film", "add", "scale", "lora"]
    """y (1 + g) + b, y + b, y (1 + g), or a low-rank map beside a projection"""
    share: Literal["global", "per_channel", "per_head"] | None = None
    """which features share a number, none by default (film, add, scale)"""
    r: PositiveInt | None = None
    """rank (lora)"""


class Cond(Node):
    """A learned condition of the blocks."""

    source: CondSource | None = None
    reg: CondReg | None = None
    ops: tuple[CondOp, ...] | None = None


class Residual(Node):
    """How a block adds to its input."""

    kind: Literal["single", "dual", "deepnet"] = "single"
    pre_ln: bool | None = None
    """norm of what a sublayer reads (single, True by default)"""
    post_ln: bool | None = None
    """norm of the sum (single, False by default)"""
    scale: PositiveFloat | None = None
    """factor of the sublayer's output (single, dual), of the input (deepnet)"""


class HierarchyLevel(Node):
    """Layers that work on blocks of tokens."""

    every: PositiveInt
    """the layers whose number, from 1, is a multiple; of several levels the largest decides"""
    downsample: Fraction | None = None
    """1 over the tokens of a block, 0.5 by default"""
    up_proj: bool = False
    """map linearly what the tokens get back"""


class Hierarchy(Node):
    """Coarser levels of the stack."""

    levels: Annotated[tuple[HierarchyLevel, ...], Field(min_length=1)]


class DepthRouter(Node):
    """Which tokens, or sequences, pass a layer by."""

    kind: Literal["token", "layer", "none"] = "none"
    budget: Fraction | None = None
    """share of the tokens that a layer is to work on"""
    tau: PositiveFloat | None = None
    """temperature of the gate, 1 by default"""
    min_layers: Count = 0
    """the first so many layers work on all tokens"""


class Schedule(Node):
    """How many loops a training step takes."""

    kind: Literal["fixed", "poisson_lognormal"] = "fixed"
    mean: PositiveFloat | None = None
    """of the Poisson rate"""
    sigma: NonNegative | None = None
    """deviation of the logarithm of the rate, 0 by default"""
    min: PositiveInt | None = None
    max: PositiveInt | None = None
    """loops that are computed; 2 mean + 1 by default"""
    curriculum: Literal["none", "linear", "sqrt"] = "none"
    """the way from `min` to the full number"""
    warmup_steps: PositiveInt | None = None
    """training steps of that way"""
    backprop: PositiveInt | None = None
    """the last so many loops have a gradient"""


class Loops(Node):
    """How often the body runs."""

    train: PositiveInt = 1
    eval: PositiveInt | None = None
    schedule: Schedule | None = None


class Recurrence(Node):
    """Layers split into prelude, a body that runs again and again, and coda."""

    prelude: Count = 0
    body: PositiveInt
    coda: Count = 0
    adapter: Literal["identity", "residual", "concat_linear"] = "identity"
    """the state between loops: s, s + anchor, or W [anchor; s]"""
    noise_std: NonNegative = 0.0
    """noise added to the first state in training"""
    loops: Loops | None = None
