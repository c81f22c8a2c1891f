"""Children: documents that are valid and mean another network than their parents."""

import copy
import random
from collections.abc import Callable, Collection
from functools import partial
from typing import NamedTuple

from forge_jax import arch
from forge_jax.evolve.operators import EDITS
from forge_jax.evolve.rewiring import REWIRINGS
from forge_jax.evolve.tree import Edit, difference, grown, part_of, tree_of

TRIES = 200


class Child(NamedTuple):
    """A new document and how it came about."""

    spec: arch.Spec  # canonical
    operator: str  # names joined by "+"
    diff: tuple[str, ...]  # `path: old -> new`, against the (first) parent


def apply(edit: Edit, spec: arch.Spec, rng: random.Random) -> arch.Spec | None:
    """The child that an edit makes; None where it makes none: inapplicable, invalid, the same."""
    tree = copy.deepcopy(tree_of(spec))
    if not edit(tree["arch"], rng):
        return None
    child = grown(tree)
    if child is None or arch.fingerprint(child) == arch.fingerprint(spec):
        return None
    return child


Operator = Callable[[arch.Spec, random.Random], arch.Spec | None]
"""A pure function of a document and the state of a generator."""


def of_a_stack(edit: Edit) -> Edit:
    """The edit on an architecture's stack, or on one of its pipeline's."""
    return lambda tree, rng: edit(part_of(tree, rng), rng)


def of_all_stacks(edit: Edit) -> Edit:
    """The edit, with the same draws, on every stack: what they must have in common."""

    def apply_to_all(tree, rng):
        drawn, parts = rng.getstate(), [tree, *tree.get("modules", {}).values()]
        done = []
        for part in parts:
            if "mix_unit" in part:
                rng.setstate(drawn)
                done.append(edit(part, rng))
        return all(done)

    return apply_to_all


ALL = {name: of_a_stack(edit) for name, edit in EDITS.items()} | REWIRINGS
ALL["width"] = of_all_stacks(EDITS["width"])
OPERATORS: dict[str, Operator] = {name: partial(apply, edit) for name, edit in ALL.items()}


def mutate(
    spec: arch.Spec,
    rng: random.Random,
    *,
    steps: int = 1,
    operators: Collection[str] = tuple(OPERATORS),
    known: Collection[str] = (),
) -> Child:
    """A child by `steps` operators in a row, each of which changed the network.

    The child's fingerprint is its parent's never, and none of `known`.

    Raises:
      ValueError: an operator has no such name, or no child was found in 200 tries.
    """
    unknown = set(operators) - set(OPERATORS)
    if unknown or steps < 1:
        raise ValueError(f"Wanted names of OPERATORS and steps >= 1, got {unknown} and {steps}.")
    names, avoided = sorted(operators), {arch.fingerprint(spec), *known}
    for _ in range(TRIES):
        child, applied = spec, []
        for _ in range(TRIES):
            name = rng.choice(names)
            if (changed := OPERATORS[name](child, rng)) is not None:
                child = changed
                applied.append(name)
            if len(applied) == steps:
                break
        if len(applied) == steps and arch.fingerprint(child) not in avoided:
            return Child(child, "+".join(applied), _diff(spec, child))
    raise ValueError(f"None of `operators` made a new child in {TRIES} tries.")


# What crosses over together: a looped stack has as many layers as its parts.
GENES = (
    ("d_model",),
    ("n_layers", "recurrence"),
    ("mix_unit",),
    ("ffn",),
    ("norm",),
    ("pos",),
    ("kv_policy",),
    ("residual",),
    ("depth_router",),
    ("cond",),
    ("hierarchy",),
)


def crossover(
    one: arch.Spec, two: arch.Spec, rng: random.Random, *, known: Collection[str] = ()
) -> Child | None:
    """Each gene from either parent; None where no mixture is valid and unlike both.

    Of a pipeline one of the stacks crosses over.
    What is not architecture (training, budgets) is the first parent's.
    """
    first, second = tree_of(one), tree_of(two)
    avoided = {arch.fingerprint(one), arch.fingerprint(two), *known}
    for _ in range(2 * len(GENES)):
        tree = copy.deepcopy(first)
        ours, theirs = part_of(tree["arch"], rng), part_of(second["arch"], rng)
        for gene in GENES:
            if rng.random() < 0.5 and not (ours is not tree["arch"] and gene == ("d_model",)):
                for name in gene:
                    ours.pop(name, None)
                    if name in theirs:
                        ours[name] = copy.deepcopy(theirs[name])
        child = grown(tree)
        if child is not None and arch.fingerprint(child) not in avoided:
            return Child(child, "crossover", _diff(one, child))
    return None


def _diff(parent: arch.Spec, child: arch.Spec) -> tuple[str, ...]:
    return tuple(difference(tree_of(parent), tree_of(child)))
