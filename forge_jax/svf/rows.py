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

    Raises:
        ValueError: the paths differ in their number of candidates; on call, the rows of the batch
            are no multiple of it.
    """
    counts = {name: v.shape[0] for name, v in s.items()}
    if len(set(counts.values())) != 1:
        raise ValueError(f"`s` must have the same number of candidates everywhere, got {counts}.")
    candidates = next(iter(counts.values()))

    def apply(x, *args, **kwargs):
        share, rest = divmod(x.shape[0], candidates)
        if rest or not share:
            raise ValueError(
                f"The batch must have a multiple of {candidates} rows, one share per candidate, "
                f"got {x.shape[0]}."
            )
        rows = {name: jnp.repeat(v, share, axis=0)[:, None] for name, v in s.items()}
        return adapted.apply({"params": factors}, x, *args, scales=rows, **kwargs)

    return apply
