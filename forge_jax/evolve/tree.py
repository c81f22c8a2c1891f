"""Documents as trees that operators edit, and what became of them."""

import random
from collections.abc import Callable
from typing import Any

from forge_jax import arch

Tree = dict[str, Any]
Edit = Callable[[Tree, random.Random], bool]
"""Changes the `arch` of a canonical document in place; False where it does not apply."""


def tree_of(spec: arch.Spec) -> Tree:
    """The canonical document as plain data, every size filled in."""
    return arch.to_dict(arch.canonical(spec))


def part_of(tree: Tree, rng: random.Random) -> Tree:
    """A canonical architecture, or one of its pipeline's stacks."""
    stacks = [module for module in tree.get("modules", {}).values() if "mix_unit" in module]
    return rng.choice(stacks) if stacks else tree


def grown(tree: Tree) -> arch.Spec | None:
    """The canonical document of a tree; None where the tree is none, or has idle fields."""
    try:
        return arch.canonical(arch.from_dict(tree))
    except arch.DocumentError:
        return None


def mixers_of(tree: Tree) -> list[Tree]:
    """The mixers of an architecture."""
    unit = tree["mix_unit"]
    return [unit["mixer"]] if unit["kind"] == "single" else unit["choices"]


def pick(tree: Tree, rng: random.Random, *kinds: str) -> Tree | None:
    """One of the mixers of these kinds, or None."""
    fitting = [m for m in mixers_of(tree) if m["kind"] in kinds]
    return rng.choice(fitting) if fitting else None


def divisors(n: int, least: int = 1) -> list[int]:
    """Divisors of n from `least` on."""
    return [k for k in range(least, n + 1) if n % k == 0]


def step_in(values: list[Any], value: Any, rng: random.Random) -> Any:
    """A neighbour of `value` in an ordered list, or of where it would stand."""
    below = [v for v in values if v < value]
    above = [v for v in values if v > value]
    near = [*below[-1:], *above[:1]]
    return rng.choice(near) if near else value


def other(values: list[Any], value: Any, rng: random.Random) -> Any:
    """Any value of a list but this one."""
    return rng.choice([v for v in values if v != value])


def difference(old: Any, new: Any, path: str = "") -> list[str]:
    """What changed between two trees, one `path: old -> new` each."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(k for k in new if k not in old)]
        pairs = [(f"{path}.{k}".lstrip("."), old.get(k), new.get(k)) for k in keys]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = [(f"{path}[{i}]", a, b) for i, (a, b) in enumerate(zip(old, new, strict=True))]
    else:
        return [] if old == new else [f"{path}: {old} -> {new}"]
    return [line for name, a, b in pairs for line in difference(a, b, name)]
