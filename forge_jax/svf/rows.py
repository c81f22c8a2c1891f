"""One batch whose rows run with different experts or mixtures."""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from forge_jax.svf.transform import Transformed


def apply_rows(
    adapted: Transformed, factors: PyTree[Any], s: Mapping[str, Float[Array, "candidates r"]]
) -> Callable[..., Any]:
    """`apply(tokens, ...)` that gives each candidate an equal share of the rows, in order.

    With P candidates and P x B rows, the first B rows run with the first candidate's singular
    values, and so on. All rows share U and Vt in one product. K experts, a population of mixtures
    and [z, 1] for a reference policy are all this.

    Args:
        adapted: a transformed Linen module, called with the batch as its first argument.
        factors: its parameters.
        s: for each path the singular values of every candidate, from `svf.scales`.
    """

    def apply(x, *args, **kwargs):
        rows = {k: jnp.repeat(v, x.shape[0] // v.shape[0], axis=0)[:, None] for k, v in s.items()}
        return adapted.apply({"params": factors}, x, *args, scales=rows, **kwargs)

    return apply
