"""Rewards by name: what a response earns, +1 or another number, from its text and the answer."""

import ast
import importlib
import math as _math
import re
from collections.abc import Callable
from typing import Any

from experiments import sandbox
from forge_jax.domains import exact, math, signed

Reward = Callable[[str, str], float]


def unit_tests(response: str, answer: str) -> float:
    """+1 where the response is a program after which the answer's asserts hold, else -1.

    Both run in `experiments.sandbox`, and are refused where there is none. What the sandbox keeps a
    program from is harm, not deceit: see `sandbox.passes`.

    Raises:
      ValueError: the answer is no Python, or asserts nothing.
    """
    check_tests(answer)
    return signed(sandbox.passes(program_of(response), answer))


def check_tests(answer: str) -> None:
    """Raise a ValueError where an answer is no Python, or asserts nothing."""
    try:
        found = any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(answer)))
    except SyntaxError:
        found = False
    if not found:
        raise ValueError(
            f"The reward unit_tests wants answers that assert something, got {answer[:60]!r}: "
            "`--source hub --domains programs` has such."
        )


def program_of(response: str) -> str:
    """The first fenced block of a response, or all of it."""
    found = FENCE.search(response)
    return found.group(1) if found else response


FENCE = re.compile(r"```(?:python)?\n(.*?)```", re.DOTALL)
NAMED: dict[str, Reward] = {"exact": exact, "numeric": math.reward, "unit_tests": unit_tests}
"""exact: the answer and nothing else; numeric: the response's final number is the answer's;
unit_tests: the answers are asserts"""


def reward_of(name: str) -> Reward | None:
    """The reward that `--reward` names; None for "task", the one that comes with each task's data.

    `package.module:function` is a function `(response, answer) -> number` of your own.

    Raises:
      ValueError: there is no such reward.
    """
    if name == "task":
        return None
    if name == "unit_tests" and (why := sandbox.missing()) is not None:
        raise ValueError(f"`--reward unit_tests` runs programs, and here none are run: {why}.")
    if name in NAMED:
        return NAMED[name]
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise ValueError(
            f"`--reward` must be task, {', '.join(NAMED)} or package.module:function, got {name!r}."
        )
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"The reward {name} is not to be had: {error}.") from error
    return checked(name, found)


def checked(name: str, function: Any) -> Reward:
    """The function, each of whose values must be a finite number."""
    if not callable(function):
        raise ValueError(f"The reward {name} is no function.")

    def reward(response: str, answer: str) -> float:
        value: Any = function(response, answer)
        if isinstance(value, str) or not _math.isfinite(value):
            raise ValueError(f"The reward {name} must give finite numbers, got {value!r}.")
        return float(value)

    return reward
