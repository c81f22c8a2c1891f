"""A candidate in training: pure functions of arrays, compiled in `programs`.

Everything that does not shape the program is an argument: the document's scalars (knobs), the
rates of the optimizer, the number of steps. AdamW with the learning rate constant after a short
warm-up: what a rung leaves is what a longer run has at that step.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from experiments.evolution.tasks import Batches
from forge_jax import arch
from forge_jax.arch.pipeline import active
from forge_jax.arch.stack import parts_of

BINS = 15  # of confidence, equally wide
WARM_UP = 10.0  # steps
FLAT = 8  # layers, loops counted, up to which a stack is written out: 30 % faster on a CPU


class Rates(NamedTuple):
    """Scalars of the optimizer."""

    lr: float
    wd: float
    b1: float
    b2: float
    clip: float  # largest global norm of a gradient


class State(NamedTuple):
    """Training of one network with one seed."""

    params: Any
    opt_state: Any
    step: Int[Array, ""]
    # cross entropies of training: with latents those given what was inferred
    first_loss: Float[Array, ""]  # of the first batch, before any update
    last_loss: Float[Array, ""]  # mean of the last chunk


class Score(NamedTuple):
    """What the held-out batches say, one number per batch or per bin of confidence."""

    nats: Float[Array, " batches"]  # sum over the scored targets
    count: Float[Array, " batches"]  # scored targets
    in_bin: Float[Array, " bins"]
    confidence: Float[Array, " bins"]  # sums
    correct: Float[Array, " bins"]


def network_of(spec: arch.Spec) -> arch.Network:
    """The network of a document; a deep stack is a loop, so that one layer is compiled."""
    steps = [step for step in active(arch.canonical(spec).arch, train=True) if step.code is None]
    parts = [(part, step.repeat) for step in steps for part in parts_of(step.arch, train=True)]
    deep = sum(part.layers * part.loops * repeat for part, repeat in parts)
    return arch.build(spec, unroll=deep <= FLAT)


def rates_of(spec: arch.Spec, lr: float | None = None) -> Rates:
    """The document's rates; `lr` replaces its learning rate."""
    train = spec.train
    b1, b2 = train.betas or (0.9, 0.95)
    rate = lr or train.lr or 1e-3
    wd = 0.01 if train.wd is None else train.wd
    return Rates(rate, wd, b1, b2, train.clip or 1.0)


def steps_of(spec: arch.Spec, steps: int) -> int:
    """So many steps, or those after which the document ends training."""
    budget = spec.train.budget
    return min(steps, (budget and budget.max_steps) or steps)


def optimizer(rates: Rates) -> optax.GradientTransformation:
    """AdamW behind a clip; only kernels and embeddings decay."""

    def rate(count):
        return rates.lr * jnp.minimum(1.0, (count + 1) / WARM_UP)

    def decays(params):
        decaying = ("kernel", "embedding", "codes")
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in decaying, params)

    adamw = optax.adamw(rate, rates.b1, rates.b2, weight_decay=rates.wd, mask=decays)
    return optax.chain(optax.clip_by_global_norm(rates.clip), adamw)


def start(network: arch.Network, key: jax.Array, rates: Rates) -> State:
    """Fresh parameters."""
    tokens = jnp.zeros((1, min(8, network.context)), jnp.int32)
    params = network.init(key, tokens)["params"]
    opt_state = optimizer(rates).init(params)
    return State(params, opt_state, jnp.int32(0), jnp.float32(jnp.nan), jnp.float32(jnp.nan))


def loss(
    network: arch.Network, params: Any, batch: Batches, knobs: Any, key: jax.Array, step: Any
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Cross entropy of the scored targets with the networks' own losses, and without them."""
    (logits, _), sown = network.apply(
        {"params": params},
        batch.tokens[:, :-1],
        knobs=knobs,
        train=True,
        step=step,
        rngs={"noise": key},
        mutable=["losses"],
    )
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, batch.tokens[:, 1:])
    mean = (nats * batch.scored).sum() / jnp.maximum(batch.scored.sum(), 1)
    priced = batch.scored.size / jnp.maximum(batch.scored.sum(), 1)
    leaves = jax.tree_util.tree_leaves_with_path(sown)
    aux = sum((x.sum() * (priced if PRICED & names(path) else 1.0) for path, x in leaves), 0.0)
    return mean + aux, mean


# Nats of all tokens, which count as much as those of the scored targets.
PRICED = {"latent", "condition"}


def names(path: Any) -> set[str]:
    """The keys of a path in a tree."""
    return {part.key for part in path if hasattr(part, "key")}


def train(
    network: arch.Network,
    state: State,
    chunk: Batches,
    steps: Int[Array, ""],
    key: jax.Array,
    knobs: Any,
    rates: Rates,
) -> State:
    """Take `steps` steps on the first so many batches of a chunk."""
    tx = optimizer(rates)

    def update(i, carry):
        state, total = carry
        batch = jax.tree.map(lambda x: x[i], chunk)
        at = jax.random.fold_in(key, state.step)
        grad = jax.grad(lambda p: loss(network, p, batch, knobs, at, state.step), has_aux=True)
        grads, mean = grad(state.params)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        first = jnp.where(state.step == 0, mean, state.first_loss)
        return State(params, opt_state, state.step + 1, first, state.last_loss), total + mean

    state, total = jax.lax.fori_loop(0, steps, update, (state, jnp.float32(0)))
    return state._replace(last_loss=total / steps)


def score(network: arch.Network, params: Any, held_out: Batches, knobs: Any) -> Score:
    """Cross entropy and calibration on held-out batches."""

    def one(numbered):
        number, batch = numbered
        # every batch has its own draw of latents, the same for all networks and seeds
        rngs = {"latent": jax.random.fold_in(jax.random.key(0), number)}
        given = {"knobs": knobs, "rngs": rngs}
        logits, _ = network.apply({"params": params}, batch.tokens[:, :-1], **given)
        target = batch.tokens[:, 1:]
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, target)
        confidence = jax.nn.softmax(logits).max(-1)
        right = logits.argmax(-1) == target
        place = jnp.clip((confidence * BINS).astype(jnp.int32), 0, BINS - 1)
        inside = jax.nn.one_hot(place, BINS) * batch.scored[..., None]
        sums = [jnp.einsum("btn,bt->n", inside, x * 1.0) for x in (confidence, right)]
        totals = (nats * batch.scored).sum(), batch.scored.sum().astype(jnp.float32)
        return *totals, inside.sum((0, 1)), *sums

    nats, count, *bins = jax.lax.map(one, (jnp.arange(len(held_out.tokens)), held_out))
    return Score(nats, count, *(x.sum(0) for x in bins))


def calibration_error(found: Score) -> float:
    """Expected calibration error: mean gap of confidence and accuracy, bins by their share."""
    return float(abs(found.confidence - found.correct).sum() / found.in_bin.sum())
