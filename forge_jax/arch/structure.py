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
    """which of the alternatives this is"""
    mult: PositiveFloat
    """hidden features per model feature"""
    act: Literal["relu", "gelu", "silu", "swiglu", "geglu"]
    """activation; swiglu and geglu gate"""


class MoEFFN(Node):
    """A mixture of such networks, `topk` of `experts` per token."""

    kind: Literal["moe"]
    """which of the alternatives this is"""
    mult: PositiveFloat
    """hidden features of an expert per model feature"""
    act: Literal["relu", "gelu", "silu", "swiglu", "geglu"]
    """activation; swiglu and geglu gate"""
    experts: PositiveInt
    """networks to pick from"""
    topk: PositiveInt = 1
    """networks that a token passes"""
    capacity: PositiveFloat | None = None
    """tokens an expert takes, in shares of an even load so far; None takes all"""


FFN = Annotated[DenseFFN | MoEFFN, Field(discriminator="kind")]


class LongRope(Node):
    """Shape of the per-dimension factors."""

    alpha: PositiveFloat
    """exponent of `factor` in what the wavelengths of the slowest pairs are multiplied by"""
    beta: PositiveFloat
    """exponent of a pair's place, 0 for the fastest: larger spares more pairs"""


class Scaling(Node):
    """How rotary frequencies reach contexts that are longer than those of training."""

    type: Literal["ntk", "linear", "yarn", "longrope"]
    """which law of the frequencies"""
    factor: PositiveFloat
    """context in contexts of training"""
    longrope: LongRope | None = None
    """the law's shape (longrope)"""


class Rope(Node):
    """Rotary positions."""

    theta: PositiveFloat = 10000.0
    """base of the wavelengths"""
    dims: Annotated[int, Field(ge=2, multiple_of=2)] | None = None
    """features of each head that turn, its first; None turns all"""
    scaling: Scaling | None = None
    """for contexts longer than those of training"""


class Pos(Node):
    """What tells a token where it stands."""

    kind: PositionKind
    """rotary, linear bias, learned bias by distance, learned vectors, or rotary with decay"""
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
    """features of the vector"""
    heads: PositiveInt | None = None
    """of keys and values, in place of the mixers' kv_heads"""
    update: LatentUpdate | None = None
    """how the vector follows the tokens; one for each token by default"""


class KVPolicy(Node):
    """What decoding keeps of the past."""

    cache: Literal["full", "window", "ring", "none", "latent"] = "full"
    """all keys and values, those of the last `window` tokens (window, ring), nothing, or small
    vectors that they are made from (latent)"""
    window: PositiveInt | None = None
    """tokens kept (window, ring); attention sees no more than these, in training too"""
    quant: Literal["none", "fp8", "nf4", "int8"] = "none"
    """number format of what is kept"""
    evict: str | None = None
    """refused"""
    latent: LatentCache | None = None
    """the small vector (latent)"""


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
    """a penalty for bits above `kappa`, or none"""
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
    """where it comes from"""
    reg: CondReg | None = None
    """what keeps it small"""
    ops: tuple[CondOp, ...] | None = None
    """what it does"""


class Residual(Node):
    """How a block adds to its input."""

    kind: Literal["single", "dual", "deepnet"] = "single"
    """one stream, two (ResiDual), or post-norm with scaled inputs (DeepNet)"""
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
    """which layers are coarse, and how much"""


class DepthRouter(Node):
    """Which tokens, or sequences, pass a layer by."""

    kind: Literal["token", "layer", "none"] = "none"
    """tokens that pass a layer by, whole sequences (refused), or none"""
    budget: Fraction | None = None
    """share of the tokens that a layer is to work on"""
    tau: PositiveFloat | None = None
    """temperature of the gate, 1 by default"""
    min_layers: Count = 0
    """the first so many layers work on all tokens"""


class Schedule(Node):
    """How many loops a training step takes."""

    kind: Literal["fixed", "poisson_lognormal"] = "fixed"
    """so many loops, or a number drawn anew in every step"""
    mean: PositiveFloat | None = None
    """of the Poisson rate"""
    sigma: NonNegative | None = None
    """deviation of the logarithm of the rate, 0 by default"""
    min: PositiveInt | None = None
    """least loops, 1 by default"""
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
    """loops in training, but for a schedule that draws them"""
    eval: PositiveInt | None = None
    """loops in use; `train` by default, whatever the schedule"""
    schedule: Schedule | None = None
    """how loops change in training"""


class Recurrence(Node):
    """Layers split into prelude, a body that runs again and again, and coda."""

    prelude: Count = 0
    """blocks before the loop"""
    body: PositiveInt
    """blocks of the loop"""
    coda: Count = 0
    """blocks after the loop"""
    adapter: Literal["identity", "residual", "concat_linear"] = "identity"
    """the state between loops: s, s + anchor, or W [anchor; s]"""
    noise_std: NonNegative = 0.0
    """noise added to the first state in training"""
    loops: Loops | None = None
    """how often the body runs"""
