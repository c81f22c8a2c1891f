"""Rewards by name: what a response earns, +1 or another number, from its text and the answer."""

import importlib
import math as _math
from collections.abc import Callable
from typing import Any

from forge_jax.domains import exact, math

Reward = Callable[[str, str], float]
NAMED: dict[str, Reward] = {"exact": exact, "numeric": math.reward}
"""exact: the answer and nothing else; numeric: the response's final number is the answer's"""


def reward_of(name: str) -> Reward | None:
    """The reward that `--reward` names; None for "task", the one that comes with each task's data.

    `package.module:function` is a function `(response, answer) -> number` of your own.

    Raises:
      ValueError: there is no such reward.
    """
    if name == "task":
        return None
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
