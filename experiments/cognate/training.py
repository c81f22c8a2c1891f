"""One compiled update of one or several Cognate models, each with data and controls of its own.

Every leaf of the state has the models as its first axis, also for one model: one program serves
both, and training three at once is training each.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from forge_jax import optim
from forge_jax.models.cognate import Cognate, CognateConfig, Controls, loss

Batch = tuple[Int[Array, "models parts rows time"], ...]
"""tokens, labels and segments; the gradient is that of all `parts` together"""
Update = Callable[["State", Batch, Controls], tuple["State", dict[str, Array]]]


class State(NamedTuple):
    """Models in training; every leaf is (models, ...)."""

    params: Any  # float32
    average: Any  # running mean of params
    opt_state: Any
    step: Int[Array, " models"]
    best: Any  # the average at the best validation loss
    best_loss: Float[Array, " models"]
    stale: Int[Array, " models"]  # validations since the best


QUICK = {"xla_backend_optimization_level": 0}
"""compiles in half the time, to a slower program"""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How the models are trained."""

    steps: int = 10_000
    """optimizer updates"""
    batch: int = 16
    """rows whose gradients are taken at once"""
    accumulate: int = 4
    """such batches in an update; the mean is over all their labelled tokens"""
    muon_lr: float = 0.01
    """peak rate of Muon's matrices; preset 1's"""
    fallback_lr: float = 1e-4
    """peak rate of all else: embeddings, norms, biases, taps, halting head; preset 1's"""
    grokfast_lambda: float = 0.05
    """weight of the gradient's moving average; preset 1's"""
    warmup: float = 0.05
    """share of the steps in which the rates rise to their peak"""
    final_rate: float = 0.05
    """share of the peak that the rates fall to, as a cosine"""
    clip: float = 1.0
    """largest global norm of a gradient"""
    average_decay: float = 0.999
    """what the average of the weights keeps at a step; less at first, (1 + t) / (10 + t)"""
    compute: Literal["float32", "bfloat16"] = "float32"
    """of activations and products; the weights that are trained stay float32"""
    across: Literal["vmap", "map"] = "vmap"
    """several models in one product, or one after the other in one program"""
    quick_compile: bool = False
    """compile in half the time, to programs that run slower: for tiny models"""

    @property
    def compiler_options(self) -> dict[str, int] | None:
        """What every program of the run is compiled with."""
        return QUICK if self.quick_compile else None

    def problems(self) -> list[str]:
        """What is out of its range, each as a part of a sentence."""
        least = ("steps", "batch", "accumulate")
        wrong = [f"`{n}` must be at least 1" for n in least if getattr(self, n) < 1]
        rates = ("muon_lr", "fallback_lr", "grokfast_lambda")
        wrong += [f"`{n}` must be at least 0" for n in rates if not getattr(self, n) >= 0]
        unit = ("warmup", "final_rate", "average_decay")
        wrong += [f"`{n}` must lie in [0, 1)" for n in unit if not 0 <= getattr(self, n) < 1]
        return wrong + ["`clip` must be positive"] * (not self.clip > 0)


def schedule(settings: Settings, peak: float) -> optax.Schedule:
    """The rate at each step: a linear rise, then a cosine."""
    warmup = max(round(settings.warmup * settings.steps), 1)
    steps = max(settings.steps, warmup + 1)
    return optax.warmup_cosine_decay_schedule(
        peak / (warmup + 1), peak, warmup, steps, settings.final_rate * peak
    )


def is_fallback(path: str, leaf: Any) -> bool:
    """Whether a leaf is no matrix that turns features into features."""
    last = path.rpartition("/")[2]
    few = ("w_halt", "w_rates", "ltm/conv_")  # a handful of scalars for each feature or in all
    return (
        optim.is_embedding(path, leaf)
        or last in ("scale", "bias")
        or any(part in path for part in few)
    )


def make_tx(settings: Settings, config: CognateConfig) -> optax.GradientTransformation:
    """Preset 1 with these rates, behind a clip of the gradient's norm."""
    preset = optim.MuGrokConfig.from_phase(
        1,
        muon_lr=schedule(settings, settings.muon_lr),
        fallback_lr=schedule(settings, settings.fallback_lr),
        grokfast_lambda=settings.grokfast_lambda,
    )

    def queries_and_keys(path, leaf):
        if path.endswith("in_proj/kernel"):
            return slice(0, 2 * config.d_model)
        return "/attention/" in path and optim.is_qk(path, leaf)

    def heads(path, leaf):
        return 2 * config.answer_heads if path.endswith("in_proj/kernel") else config.heads

    return optax.chain(
        optax.clip_by_global_norm(settings.clip),
        optim.mugrok(
            preset,
            queries_and_keys,
            heads,
            is_fallback,
            decay_mask=lambda path, leaf: not path.endswith(("scale", "bias")),
        ),
    )


def init_state(model: Cognate, tx: optax.GradientTransformation, keys: Array) -> State:
    """Models at their start, one for each key."""

    def one(key):
        params = model.init(key, jnp.zeros((1, 2), jnp.int32))["params"]
        return params, tx.init(params)

    params, opt_state = jax.jit(jax.vmap(one), compiler_options=QUICK)(keys)
    count = len(keys)
    # copies: the update may reuse the memory of what it is given
    average, best = (jax.tree.map(jnp.copy, params) for _ in range(2))
    zeros = jnp.zeros(count, jnp.int32)
    worst = jnp.full(count, jnp.inf, jnp.float32)
    return State(params, average, opt_state, zeros, best, worst, jnp.copy(zeros))


def in_compute_dtype(params: Any, settings: Settings) -> Any:
    """The weights as the forward pass takes them; its gradients come back in float32."""
    return jax.tree.map(lambda p: p.astype(settings.compute), params)


def gradient(model: Cognate, settings: Settings, params, batch, controls: Controls, key):
    """Gradient and metrics of one model's batch of several parts, a mean over labelled tokens."""
    total = jnp.maximum((batch[1] >= 0).sum(), 1)
    parts = len(batch[0])
    drop = key if model.config.dropout else None

    def value(params, part, key):
        tokens, labels, segments = part
        mean, metrics = loss(
            model, in_compute_dtype(params, settings), tokens, labels, segments, controls, key=key
        )
        # the gate's term is a mean over all tokens, the others one over labelled tokens
        gate, share = metrics["loss_gate"], metrics["labels"] / total
        return share * (mean - gate) + gate / parts, (metrics, share)

    def add(grads, inputs):
        number, *part = inputs
        own = None if drop is None else jax.random.fold_in(drop, number)
        new, out = jax.grad(value, has_aux=True)(params, part, own)
        return jax.tree.map(jnp.add, grads, new), out

    zeros = jax.tree.map(jnp.zeros_like, params)
    grads, (metrics, shares) = jax.lax.scan(add, zeros, (jnp.arange(parts), *batch))
    return grads, pooled(metrics, shares)


def pooled(metrics: dict[str, Array], shares: Float[Array, " parts"]) -> dict[str, Array]:
    """The metrics of all parts as if they were one batch."""
    by_label = ("loss_ce", "loss_act", "accuracy", "loss_step")
    out = {
        k: (shares * v).sum() if k.startswith(by_label) else v.mean() for k, v in metrics.items()
    }
    out["labels"] = metrics["labels"].sum()
    out["max_halting_steps"] = metrics["max_halting_steps"].max()
    out["min_halting_steps"] = metrics["min_halting_steps"].min()

    def spread(mean, variance):
        return (variance + mean**2).mean() - mean.mean() ** 2

    out["halting_variance"] = spread(metrics["avg_halting_steps"], metrics["halting_variance"])
    deviation = metrics["halt_prob_std"]
    variance = spread(metrics["halt_prob_mean"], deviation**2)
    out["halt_prob_std"] = jnp.sqrt(jnp.maximum(variance, 0))
    return out


def make_update(
    model: Cognate, tx: optax.GradientTransformation, settings: Settings, seed: int
) -> Update:
    """The compiled update; it takes the state over, so that its memory is used again."""

    def one(trained, batch, controls):
        params, average, opt_state, step = trained
        key = jax.random.fold_in(jax.random.key(seed), step)
        grads, metrics = gradient(model, settings, params, batch, controls, key)
        leaves = jax.tree.leaves(grads)
        metrics["gradient_norm"] = optax.tree.norm(grads)
        trainable: Any = sum(g.size * (g != 0).any() for g in leaves)
        metrics["trainable_params"] = trainable
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        decay = jnp.minimum(settings.average_decay, (1.0 + step) / (10.0 + step))
        average = optax.incremental_update(params, average, 1 - decay)
        return (params, average, opt_state, step + 1), metrics

    def every(trained, batch, controls):
        if settings.across == "map":
            return jax.lax.map(lambda inputs: one(*inputs), (trained, batch, controls))
        return jax.vmap(one)(trained, batch, controls)

    options = settings.compiler_options
    compiled = jax.jit(every, donate_argnums=0, compiler_options=options)

    def update(state: State, batch: Batch, controls: Controls):
        trained, metrics = compiled(tuple(state[:4]), batch, controls)
        after: Any = (*trained, *state[4:])
        return State(*after), metrics

    return update


def keep_best(state: State, loss: Float[Any, " models"], margin: float, patience: int) -> State:
    """Keep the average of each model whose loss fell by `margin`; one out of patience is done."""
    loss = jnp.asarray(loss, jnp.float32)
    is_better = (loss < state.best_loss - margin) & (state.stale < patience)

    def chosen(new, old):
        return jnp.where(is_better.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    return state._replace(
        best=jax.tree.map(chosen, state.average, state.best),
        best_loss=jnp.where(is_better, loss, state.best_loss),
        stale=jnp.where(is_better, 0, state.stale + 1),
    )
