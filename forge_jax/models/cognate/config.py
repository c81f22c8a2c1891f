"""The shape of a Cognate model, and what its three specializations change."""

import dataclasses
import math
from typing import Literal, NamedTuple, get_args

import jax.numpy as jnp
from jaxtyping import Array, Float

from forge_jax.models.cognate.remat import Remat


@dataclasses.dataclass(frozen=True)
class CognateConfig:
    """Widths, depths and modes.

    The seed's model, 26,974,561 parameters, is `CognateConfig(memory="ema", positions="learned")`.
    """

    vocab_size: int = 32768
    d_model: int = 320
    layers: int = 8
    heads: int = 5
    d_ff: int = 1280
    max_positions: int = 2048
    """tokens that a document may have"""
    window: int = 1024
    """tokens that a token sees, itself among them, in every attention"""
    positions: Literal["learned", "rope"] = "rope"
    rope_theta: float = 10000.0
    memory: Literal["ema", "titans"] = "titans"
    d_mem: int = 160
    memory_decay: float = 0.99
    """what the moving average keeps per token"""
    memory_depth: int = 2
    """matrices of the neural memory"""
    memory_chunk: int = 16
    """tokens whose gradients are taken at the same weights of the neural memory"""
    memory_taps: int = 4
    """tokens, the present one and those before it, that its keys, values and queries are made from;
    1: itself alone, and queries that begin on their own"""
    gate_hidden: int = 160
    gate_entropy: float = 1e-3
    """weight of the gate's entropy, which is rewarded so that the gate does not saturate"""
    steps: int = 3
    """recursion steps after the first answer"""
    micro_steps: int = 2
    """refinements of the latent state per recursion step"""
    answer_heads: int = 8
    """heads of the recursion's two attentions"""
    deep_supervision: bool = True
    step_weights: tuple[float, ...] = (0.33, 0.5, 0.75, 1.0)
    """weights of the first answer and of every step's"""
    detach_steps: bool = True
    """no gradient flows from one recursion step into the one before; the features stay attached"""
    halting: Literal["trm_bce", "ponder", "act"] = "trm_bce"
    halting_weight: float = 0.01
    """of the halting loss: of the BCE, of PonderNet's divergence, or ACT's time penalty"""
    dropout: float = 0.0
    """of the attention's and the MLP's output in the backbone"""
    remat: Remat = "dots"
    """what of layers and recursion steps the backward pass computes again: all (`full`, least
    memory), all but the products (`dots`, fastest on a CPU), nothing (`none`, most memory)"""
    loss_rows: int = 512
    """rows of logits that exist at a time"""
    compat: Literal["corrected", "reference"] = "corrected"
    """`reference` repeats the public model, future attention and lost gradients included"""

    def __post_init__(self):
        choices = {
            "positions": ("learned", "rope"),
            "memory": ("ema", "titans"),
            "halting": ("trm_bce", "ponder", "act"),
            "compat": ("corrected", "reference"),
            "remat": get_args(Remat),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                got = getattr(self, name)
                raise ValueError(f"`{name}` must be one of {', '.join(known)}, got {got!r}.")
        least_one = (
            "vocab_size d_model layers heads d_ff max_positions window d_mem memory_depth "
            "memory_chunk memory_taps gate_hidden steps micro_steps answer_heads loss_rows"
        ).split()
        for name in least_one:
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        for name in ("heads", "answer_heads"):
            count = getattr(self, name)
            if self.d_model % count:
                raise ValueError(
                    f"`d_model` must be a multiple of `{name}`, got {self.d_model} and {count}."
                )
            if self.positions == "rope" and self.d_model // count % 2:
                raise ValueError(
                    f"Rotary positions need an even width per head, got {self.d_model // count} "
                    f"from `d_model` and `{name}`."
                )
        if len(self.step_weights) != self.steps + 1 or min(self.step_weights) < 0:
            raise ValueError(
                f"`step_weights` must be {self.steps + 1} weights of at least 0, one for the "
                f"first answer and one for each of `steps`, got {self.step_weights}."
            )
        if not self.step_weights[-1] > 0:
            raise ValueError(
                f"The last of `step_weights` must be positive, got {self.step_weights}."
            )
        if not 0 <= self.memory_decay < 1 or not 0 <= self.dropout < 1:
            raise ValueError(
                "`memory_decay` and `dropout` must lie in [0, 1), got "
                f"{self.memory_decay} and {self.dropout}."
            )
        if self.is_reference and (self.memory, self.positions) != ("ema", "learned"):
            raise ValueError(
                'compat="reference" has memory="ema" and positions="learned" only, got '
                f"{self.memory!r} and {self.positions!r}."
            )

    @property
    def is_reference(self) -> bool:
        """Whether the public model is repeated, defects included."""
        return self.compat == "reference"


class Controls(NamedTuple):
    """What may differ between models of one program: scalars, arrays under `vmap`."""

    halt_threshold: Float[Array, ""] | float = 0.5
    """a token halts once its halting probability is above this"""
    surprise_threshold: Float[Array, ""] | float = 0.5
    """tokens whose relative surprise is below this are hardly written to memory; in (0, 1)"""
    capacity: Float[Array, ""] | float = 4096.0
    """tokens after which what the memory holds has faded to 1/e at the latest"""
    ponder_prior: Float[Array, ""] | float = 0.5
    """PonderNet's prior probability of halting at a step"""


@dataclasses.dataclass(frozen=True)
class Specialization:
    """One of the three models, by the numbers of its documents."""

    name: str
    confidence: float
    """the documents' ACT threshold, see `halt_threshold`"""
    capacity: int
    surprise: float
    seed: int
    ponder_prior: float
    mix: tuple[tuple[str, float], ...]
    """categories of the data and their shares"""

    @property
    def controls(self) -> Controls:
        """The scalars that the model takes."""
        threshold = halt_threshold(self.confidence)
        return Controls(threshold, self.surprise, float(self.capacity), self.ponder_prior)


def halt_threshold(confidence: float) -> float:
    r"""The halting probability above which a token halts, from the documents' ACT threshold c.

    $$ \mathrm{logit}\,h = \mathrm{logit}\,0.95 - \mathrm{logit}\,c $$

    The documents call .99 the fast model and .90 and .95 slower ones, which under "halt when
    q > c" is the wrong way round: .99 would halt last. Here c counts against the .95 of the
    reasoning model, which halts at even odds as TRM does; a higher c halts sooner.

    Raises:
      ValueError: `confidence` lies outside (0, 1).
    """
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence` must lie in (0, 1), got {confidence}.")
    logit = math.log(0.95 / 0.05) - math.log(confidence / (1 - confidence))
    return 1 / (1 + math.exp(-logit))


SPECIALIZATIONS: dict[str, Specialization] = {
    s.name: s
    for s in (
        Specialization(
            *("reasoning", 0.95, 4096, 0.7, 42, 0.3),
            mix=(
                ("math", 0.4),
                ("qa", 0.3),
                ("code", 0.1),
                ("commonsense", 0.1),
                ("language", 0.1),
            ),
        ),
        Specialization(
            *("memory", 0.90, 8192, 0.5, 1337, 0.25),
            mix=(
                ("language", 0.4),
                ("qa", 0.3),
                ("math", 0.1),
                ("code", 0.1),
                ("commonsense", 0.1),
            ),
        ),
        Specialization(
            *("speed", 0.99, 2048, 0.3, 2023, 0.6),
            mix=(
                ("commonsense", 0.4),
                ("math", 0.3),
                ("code", 0.1),
                ("qa", 0.1),
                ("language", 0.1),
            ),
        ),
    )
}
"""thresholds, capacities, seeds and data shares are the documents'; the priors are ours"""


def stack_controls(specializations: list[Specialization]) -> Controls:
    """The controls of several models along a first axis, for `vmap`."""
    columns = zip(*(s.controls for s in specializations), strict=True)
    return Controls(*(jnp.asarray(column, jnp.float32) for column in columns))
