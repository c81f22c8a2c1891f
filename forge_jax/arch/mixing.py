"""Document nodes of what mixes tokens: attention, retention, state space, convolution.

Every node is frozen and refuses unknown keys. Sizes are in tokens or features; a field that is
None takes the value that `canonical` writes in its place.
"""

from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PositionKind = Literal["rope", "alibi", "relbias", "learned", "xpos"]
# Strict types leave nothing to guess: "8" is no number and no number is true or false.
NODE = ConfigDict(
    frozen=True,
    extra="forbid",
    strict=True,
    allow_inf_nan=False,
    use_attribute_docstrings=True,
)


class Node(BaseModel):
    """A mapping of the document."""

    model_config = NODE

    def __hash__(self) -> int:
        """As pydantic's of a frozen model, and of mappings too."""
        values = self.__dict__.values()
        items = (frozenset(v.items()) if isinstance(v, dict) else v for v in values)
        return hash((type(self), *items))


def given(node: Node) -> set[str]:
    """The fields that a document gives a value."""
    return {name for name in node.model_fields_set if getattr(node, name) is not None}


class Stencil(Node):
    """Which earlier tokens a token sees; every pattern is causal (`stencils.visible`)."""

    kind: Literal["full", "local", "sliding", "dilated", "block", "ring", "hybrid", "cross"] = (
        "full"
    )
    """the pattern; cross is refused, for a stage has `kv_from`"""
    window: PositiveInt | None = None
    """tokens seen, itself among them (local, sliding, hybrid; of a dilated pattern: every hit)"""
    dilation: PositiveInt | None = None
    """distance between the tokens seen (dilated, hybrid)"""
    block: PositiveInt | None = None
    """tokens of a block (block, ring)"""
    stride: PositiveInt | None = None
    """the window moves on every `stride` tokens (sliding, 1) and so do the hops (ring, `block`)"""
    globals: Count | None = None
    """how many of the first tokens everyone sees besides"""
    query: str | None = None
    """stage that asks (cross)"""
    key: str | None = None
    """stage that is asked (cross)"""


class Kernel(Node):
    """Random features in place of the softmax (Performer)."""

    name: Literal["favor", "gaussian", "laplace"] = "favor"
    """positive features of the softmax kernel; the other two are refused"""
    features: PositiveInt | None = None
    """random features per head"""
    redraw: Count | None = None
    """training steps between two draws; 0 and None never draw again"""
    orthogonal: bool = True
    """draw the features in orthogonal blocks"""


class Softmax(Node):
    """How scores become weights."""

    type: Literal["standard", "kernel", "scaled"] = "standard"
    """a softmax, random features in its place (kernel), or scaled by `qk_scale` (scaled)"""
    qk_scale: PositiveFloat | Literal["sqrt_d"] | None = None
    """factor of the scores; "sqrt_d" and None are 1 / sqrt(head_dim)"""
    qk_norm: Literal["none", "rms", "layer"] = "none"
    """norm of every query and key head, before the positions"""
    softcap: PositiveFloat | None = None
    """scores s become c tanh(s / c)"""
    kernel: Kernel | None = None
    """the random features (kernel)"""


class Projection(Node):
    """Linformer's projection of the length, block by block."""

    type: Literal["low_rank", "none"] = "none"
    """low_rank is Linformer's, none plain attention"""
    rank: PositiveInt | None = None
    """blocks that the context is cut into; a block that has ended is one key and one value"""
    block: PositiveInt | None = None
    """tokens of a block, in place of `rank`: canonical form writes it so"""
    shared: bool = False
    """values are summed with the weights of the keys"""


def with_groups(schema: dict[str, Any]) -> None:
    """Tell editors of the older name of `kv_heads`."""
    older = {"type": "integer", "minimum": 1, "deprecated": True, "description": "kv_heads"}
    schema["properties"]["groups"] = older


class Attention(Node):
    """Softmax attention; `kv_heads` 1 is multi-query, `heads` (and None) multi-head."""

    model_config = NODE | ConfigDict(json_schema_extra=with_groups)

    kind: Literal["Attention"]
    """which of the alternatives this is"""
    heads: PositiveInt | None = None
    """query heads; by default d_model / head_dim, or parts of at least 64 features"""
    kv_heads: PositiveInt | None = Field(
        None, validation_alias=AliasChoices("kv_heads", "groups"), serialization_alias="kv_heads"
    )
    """heads of keys and values, each shared by heads / kv_heads queries; `groups` is accepted"""
    head_dim: Annotated[int, Field(ge=2)] | None = None
    """features of a head, d_model / heads by default"""
    stencil: Stencil | None = None
    """which earlier tokens are seen, all by default"""
    softmax: Softmax | None = None
    """how scores become weights"""
    projection: Projection | None = None
    """keys and values of whole blocks"""
    pos: PositionKind | Literal["none"] | None = None
    """"none" leaves this mixer without the positions of `arch.pos`"""
    mode: Literal["parallel"] | None = None
    """without effect"""
    value_glu: bool = False
    """the output is gated by sigmoid(W x)"""


class Retention(Node):
    """Multi-scale retention (RetNet)."""

    kind: Literal["Retention"]
    """which of the alternatives this is"""
    heads: PositiveInt | None = None
    """heads; by default d_model / head_dim, or parts of at least 64 features"""
    head_dim: Annotated[int, Field(ge=2)] | None = None
    """features of a head, d_model / heads by default"""
    chunk: PositiveInt | None = None
    """tokens per chunk of the chunkwise form; None is one chunk, the parallel form"""
    mode: Literal["parallel", "recurrent"] | None = None
    """how outputs are computed, all at once or token by token: the same up to rounding"""


class SSM(Node):
    """Selective state space with one decay per head (Mamba-2)."""

    kind: Literal["SSM"]
    """which of the alternatives this is"""
    d_state: PositiveInt | None = None
    """size of the state per feature, 16 by default"""
    expand: PositiveFloat | None = None
    """inner features per model feature, 2 by default"""
    heads: PositiveInt | None = None
    """heads; parts of at least 64 inner features by default"""
    chunk: PositiveInt | None = None
    """tokens per chunk of the chunkwise form; None is one chunk"""
    mode: Literal["parallel", "recurrent"] | None = None
    """how outputs are computed, all at once or token by token: the same up to rounding"""


class LongConv(Node):
    """Gated depthwise causal convolution."""

    kind: Literal["LongConv"]
    """which of the alternatives this is"""
    kernel_len: PositiveInt | None = None
    """taps, the present token among them, 16 by default"""


Mixer = Annotated[Attention | Retention | SSM | LongConv, Field(discriminator="kind")]


class Router(Node):
    """Softmax gate over the choices, per token."""

    topk: PositiveInt | None = None
    """choices kept per token; None keeps all"""
    temp: PositiveFloat = 1.0
    """temperature of the softmax"""
    balance: NonNegative = 0.0
    """weight of the balance loss"""


class SingleUnit(Node):
    """One mixer."""

    kind: Literal["single"]
    """which of the alternatives this is"""
    mixer: Mixer
    """the mixer"""


class ParUnit(Node):
    """Several mixers side by side."""

    kind: Literal["par"]
    """which of the alternatives this is"""
    choices: Annotated[tuple[Mixer, ...], Field(min_length=1)]
    """the mixers"""
    merge: Literal["Add", "WeightedAdd", "Concat"]
    """sum, softmax-weighted mean, or a linear map of all"""


class RouteUnit(Node):
    """Several mixers of which the router picks, token by token."""

    kind: Literal["route"]
    """which of the alternatives this is"""
    choices: Annotated[tuple[Mixer, ...], Field(min_length=1)]
    """the mixers that can be picked"""
    router: Router
    """who picks"""
    merge: Literal["Add", "WeightedAdd", "Concat"] = "WeightedAdd"
    """WeightedAdd sums by gate, Add sums what was picked, Concat maps the gated outputs"""


MixUnit = Annotated[SingleUnit | ParUnit | RouteUnit, Field(discriminator="kind")]
