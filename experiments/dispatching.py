"""The ways to find the right expert for a question, fitted and measured."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.model import texts
from experiments.problem import Problem
from experiments.questions import Asked
from forge_jax import adapt, svf
from forge_jax.models import Questions, Respond, with_hidden

ROOM = 2
"""experts and labels that may still come before anything is compiled again"""
WAYS = ("labels", "calibrated", "boxed", "expert", "head")
"""label logits, the same less their mean, a written label, a z for the task, a linear head"""


class Ways(NamedTuple):
    """Every dispatcher, fitted; a pytree, the argument of compiled functions."""

    labels: adapt.PromptDispatch
    calibrated: adapt.PromptDispatch
    expert: adapt.PromptDispatch
    z: dict[str, jax.Array]  # of the classification expert
    head: adapt.ClassifierDispatch


def in_chunks(function: Callable[[Any], Any], asked: Asked, size: int = 64) -> Any:
    """`function` of `size` rows at a time, the last ones padded, so that it compiles once.

    Small sets on a large model would spend most of a larger `size` on padding.
    """
    count = len(asked.label)
    index = np.minimum(np.arange(-(-count // size) * size), count - 1)
    parts = [function(asked.rows(part)) for part in index.reshape(-1, size)]
    return jax.tree.map(lambda *x: np.concatenate(x)[:count], *parts)


def scales_of(factors, z):
    """One z for all rows, as `scales=` takes it."""
    return {name: s[None, None] for name, s in svf.scales(factors, z).items()}


def classify(way: str, factors, ways: Ways, apply, batch: Asked) -> adapt.Choice:
    """The choice of a way that needs no text, for `adapt.two_pass`."""
    if way == "head":
        plain = batch.plain
        return ways.head(with_hidden(apply), plain.tokens, plain.mask, images=plain.images)
    asked = batch.asking
    given: dict[str, Any] = {"images": asked.images}
    if way == "expert":
        given["scales"] = scales_of(factors, ways.z)
    return getattr(ways, way)(apply, asked.tokens, asked.mask, **given)


def label_tokens(problem: Problem) -> list[list[int]]:
    """How the tokenizer writes every label at the start of a line; the last is "other"."""
    names = [*(task.name for task in problem.tasks), "other"]
    return [problem.model.tokenizer.encode(n, add_special_tokens=False).ids for n in names]


def fit_head(problem: Problem, asked: Asked) -> adapt.ClassifierDispatch:
    """A linear head on the mean hidden state, fitted on these questions.

    Its labels are the experts alone: "other" has no examples, and every question gets an expert.
    """
    adapted, factors = problem.model.adapted, problem.weights["factors"]
    labels = adapt.make_labels(range(len(problem.tasks)), room=room_of(problem))

    @jax.jit
    def features(factors, plain: Questions):
        apply = with_hidden(partial(adapted.apply, {"params": factors}))
        (_, hidden), _ = apply(plain.tokens, plain.mask, images=plain.images)
        return adapt.pool(hidden, plain.mask)

    hidden = in_chunks(lambda part: np.asarray(features(factors, part.plain)), asked)
    fitted = jax.jit(lambda x, y: adapt.fit_classifier(x, y, labels))
    return fitted(jnp.asarray(hidden), jnp.asarray(asked.label))


def room_of(problem: Problem) -> int:
    """Labels that there is room for: the experts', "other", and some to come."""
    return len(problem.tasks) + 1 + ROOM


def fit(problem: Problem, sets: dict[str, Asked], steps: int, seed: int) -> Ways:
    """Fit every way on the set "fit"; what is calibrated sees its questions, not their labels."""
    adapted, factors = problem.model.adapted, problem.weights["factors"]
    experts = [*range(len(problem.tasks)), adapt.BASE]
    prompt = adapt.PromptDispatch.of(label_tokens(problem), experts, room=room_of(problem))
    asked = sets["fit"]

    @jax.jit
    def scores(factors, asking: Questions):
        apply = partial(adapted.apply, {"params": factors})
        return prompt.scores(apply, asking.tokens, asking.mask, images=asking.images)

    said = in_chunks(lambda part: np.asarray(scores(factors, part.asking)), asked)
    calibrated = prompt.calibrate(jnp.asarray(said))
    z = train_expert(problem, prompt, asked, steps, seed)
    return Ways(prompt, calibrated, prompt, z, fit_head(problem, asked))


def train_expert(
    problem: Problem, prompt: adapt.PromptDispatch, asked: Asked, steps: int, seed: int
) -> dict[str, jax.Array]:
    """A z for the classification task, by cross-entropy among the labels.

    The published expert is trained by REINFORCE; a base that never writes a label earns nothing.
    """
    adapted, factors = problem.model.adapted, problem.weights["factors"]
    tx = optax.adam(1e-2)

    @jax.jit
    def step(factors, delta, state, part: Asked):
        def loss(delta):
            z = jax.tree.map(lambda d: 1 + d, delta)
            apply = partial(adapted.apply, {"params": factors}, scales=scales_of(factors, z))
            asking = part.asking
            said = prompt.scores(apply, asking.tokens, asking.mask, images=asking.images)
            return adapt.classification_loss(said, jnp.asarray(part.label), prompt.labels)

        updates, state = tx.update(jax.grad(loss)(delta), state)
        return optax.apply_updates(delta, updates), state

    delta = jax.tree.map(jnp.zeros_like, svf.identity(factors))
    state, rng = tx.init(delta), np.random.default_rng(seed)
    for _ in range(steps):
        part = asked.rows(rng.choice(len(asked.label), min(32, len(asked.label)), replace=False))
        delta, state = step(factors, delta, state, part)
    return jax.tree.map(lambda d: 1 + d, delta)


def make_choosers(problem: Problem) -> dict[str, Callable[[Ways, Asked], Any]]:
    """For each way, (ways, set) -> the expert of every question, (N,)."""
    factors, model = problem.weights["factors"], problem.model

    def compiled(way: str):
        @jax.jit
        def run(factors, ways: Ways, part: Asked):
            apply = partial(model.adapted.apply, {"params": factors})
            return classify(way, factors, ways, apply, part).expert

        return lambda ways, asked: in_chunks(lambda p: np.asarray(run(factors, ways, p)), asked)

    out = {way: compiled(way) for way in WAYS if way != "boxed"}
    names = [task.name for task in problem.tasks]
    respond = jax.jit(
        lambda factors, boxing: Respond(model.decoder.spec, 12, model.stops)(
            partial(model.adapted.apply, {"params": factors}), boxing
        )
    )

    def written(ways: Ways, asked: Asked):
        """What the base writes after the question; where no box is opened it is the base."""

        def one(part: Asked):
            out = respond(factors, part.boxing)
            said = texts(model, np.asarray(out.tokens), np.asarray(out.mask))
            said = ["\\boxed{" + text for text in said]
            return np.asarray(adapt.from_text(said, names, ways.head.labels)[0].expert)

        return in_chunks(one, asked)

    out["boxed"] = written
    return out


def measure(
    choosers: dict[str, Callable[[Ways, Asked], Any]],
    ways: Ways,
    sets: dict[str, Asked],
    names: Sequence[str],
) -> dict[str, dict[str, float]]:
    """way -> set -> share of questions that go to the right expert."""
    return {
        way: {
            name: float((choosers[way](ways, sets[name]) == sets[name].label).mean())
            for name in names
        }
        for way in WAYS
    }
