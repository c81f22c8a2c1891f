"""What the backward pass computes again in place of keeping it."""

from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax

Remat = Literal["full", "dots", "none"]


def rematted(body: Callable[..., Any], what: Remat) -> Any:
    """A scan's body, module or function, that keeps its input and, with "dots", its products."""
    if what == "none":
        return body
    policy = jax.checkpoint_policies.dots_saveable if what == "dots" else None
    return nn.remat(body, prevent_cse=False, policy=policy)
