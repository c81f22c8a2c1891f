"""How experts are trained, and where their training stands."""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from experiments.forms import Delta, Form
from experiments.model import Weights
from forge_jax import optim


class State(NamedTuple):
    """K experts in training; every leaf of the trees is (K, ...)."""

    delta: Delta
    opt_state: Any  # one per expert, stacked
    best: Delta  # delta at the best validation accuracy
    best_accuracy: jax.Array  # (K,)
    stale: jax.Array  # (K,) int32, validations since the best
    kl_coefficient: jax.Array  # (K,)
    critic: Any = ()  # PPO's value heads and their optimizer; no part of an expert


@dataclasses.dataclass(frozen=True)
class Settings:
    """How experts are trained."""

    algorithm: Literal["reinforce", "ppo", "grpo", "supervised"] = "reinforce"
    """supervised: fit the answers by cross-entropy (plus the KL term) instead of sampling"""
    steps: int = 50
    """rounds of responses (or answers) at most"""
    prompts: int = 16
    """of each expert in a step"""
    samples: int = 8
    """responses to each prompt"""
    temperature: float = 1.0
    """of the sampled responses; 1 samples from the model itself"""
    top_p: float = 1.0
    """total probability of the tokens that are sampled from; 1 keeps all"""
    learning_rate: float = 1e-2
    """of z; preset 7's `fallback_lr` is 2e-3, for runs of hundreds of steps"""
    decay: bool = False
    """let the learning rate fall linearly, to nothing after the last of `steps`"""
    grokfast_lambda: float = 0.05
    """weight of the gradient's moving average"""
    kl_coefficient: float = 0.2
    """weight of KL(expert || base)"""
    kl_target: float | None = None
    """nats per token at which the weight of the KL is made to hold it"""
    kl_as: Literal["loss", "reward"] = "loss"
    """ppo: exact in the loss, or sampled in every token's reward"""
    baseline: Literal["leave_one_out", "none"] = "leave_one_out"
    """reinforce; none: the guide's plain rewards"""
    epochs: int = 2
    """ppo, grpo: times that the responses of a step are gone through"""
    minibatches: int = 2
    """ppo, grpo: updates in an epoch"""
    clip: float = 0.2
    """ppo, grpo: how far a token's probability ratio may go and still earn more"""
    value_clip: float = 0.2
    """ppo: how far a value may go from the one before the step"""
    value_coefficient: float = 0.1
    """ppo: weight of the value loss; it reaches the value head only"""
    value_rate: float = 3e-3
    """ppo: learning rate of the value head"""
    entropy_coefficient: float = 0.0
    """ppo, grpo: reward of the entropy of every next token"""
    discount: float = 1.0
    """ppo: per token"""
    gae_lambda: float = 0.95
    """ppo: 1 takes the response's reward for every token, 0 the value after it"""
    validate_every: int = 10
    """steps from one validation to the next"""
    patience: int = 3
    """training stops when no expert has improved for so many validations"""
    diagnostics: bool = False
    """log the optimizer's measurements at each step, see `optim.diagnostics`"""

    @property
    def is_clipped(self) -> bool:
        """Whether a step makes several updates, held near the policy that drew the responses."""
        return self.algorithm in ("ppo", "grpo")

    def check(self) -> None:
        """Raise a ValueError that lists every setting out of its range."""
        counts = ("steps", "prompts", "samples", "validate_every", "patience")
        counts += ("epochs", "minibatches")
        wrong = [f"`{n}` must be at least 1" for n in counts if getattr(self, n) < 1]
        rates = ("learning_rate", "grokfast_lambda", "kl_coefficient")
        rates += ("value_coefficient", "value_rate", "entropy_coefficient")
        wrong += [f"`{n}` must be at least 0" for n in rates if not getattr(self, n) >= 0]
        wrong += [
            f"`{n}` must be positive" for n in ("clip", "value_clip") if not getattr(self, n) > 0
        ]
        wrong += [
            f"`{n}` must lie in [0, 1]"
            for n in ("discount", "gae_lambda")
            if not 0 <= getattr(self, n) <= 1
        ]
        if self.kl_target is not None and not self.kl_target > 0:
            wrong.append("`kl_target` must be positive")
        if not self.temperature > 0 or not 0 < self.top_p <= 1:
            wrong.append("`temperature` must be positive and `top_p` in (0, 1]")
        wrong += self._contradictions()
        if wrong:
            raise ValueError(", ".join(wrong) + ".")

    def _contradictions(self) -> list[str]:
        """What does not go together, each as a part of a sentence."""
        wrong = []
        if self.samples < 2 and self.algorithm == "reinforce" and self.baseline != "none":
            wrong.append("`samples` must be at least 2 for the leave-one-out baseline")
        if self.samples < 2 and self.algorithm == "grpo":
            wrong.append("`samples` must be at least 2 for a group's advantages")
        if self.is_clipped and self.minibatches >= 1 and self.prompts % self.minibatches:
            wrong.append("`prompts` must be a multiple of `minibatches`")
        if self.kl_as == "reward" and self.algorithm != "ppo":
            wrong.append("`kl_as` reward needs the algorithm ppo")
        return wrong

    def with_rate(self, learning_rate: float) -> "Settings":
        """The same with another learning rate."""
        return dataclasses.replace(self, learning_rate=learning_rate)

    def optimizer(self) -> optim.MuGrokConfig:
        """Preset 7 with these rates."""
        updates = self.steps * (self.epochs * self.minibatches if self.is_clipped else 1)
        falling = optax.linear_schedule(self.learning_rate, 0.0, updates)
        return optim.MuGrokConfig.from_phase(
            7,
            fallback_lr=falling if self.decay else self.learning_rate,
            grokfast_lambda=self.grokfast_lambda,
            kl_coefficient=self.kl_coefficient,
        )

    def critic_optimizer(self) -> optax.GradientTransformation:
        """That of the value heads."""
        return optax.adam(self.value_rate)


DEFAULTS = Settings()


def make_tx(settings: Settings) -> optax.GradientTransformation:
    """The optimizer of one expert."""
    return optim.mugrok(settings.optimizer(), diagnostics=settings.diagnostics)


class Critic(NamedTuple):
    """K value heads on the last hidden state: V = hidden . kernel + bias."""

    kernel: jax.Array  # (K, hidden)
    bias: jax.Array  # (K,)


def init_critic(weights: Weights, settings: Settings, experts: int) -> Any:
    """Value heads that say 0, and their optimizer; nothing where no values are needed."""
    if settings.algorithm != "ppo":
        return ()
    tree = weights["factors"] if "factors" in weights else weights["params"]
    heads = Critic(jnp.zeros((experts, *tree["norm"]["scale"].shape)), jnp.zeros(experts))
    return heads, settings.critic_optimizer().init(heads)


def init_state(
    form: Form,
    weights: Weights,
    tx: optax.GradientTransformation,
    experts: int,
    key: jax.Array,
    settings: Settings,
) -> State:
    """All experts at the base model."""
    delta = form.start(weights, experts, key)
    worst, stale = jnp.full(experts, -1.0), jnp.zeros(experts, jnp.int32)
    coefficient = jnp.full(experts, settings.kl_coefficient, jnp.float32)  # not weakly typed
    critic = init_critic(weights, settings, experts)
    return State(delta, jax.vmap(tx.init)(delta), delta, worst, stale, coefficient, critic)
