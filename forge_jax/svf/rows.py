"""One batch whose rows run with different experts or mixtures."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from forge_jax.svf.factors import scales
from forge_jax.svf.mixing import mix
from forge_jax.svf.transform import Transformed

Choice = Float[Array, "rows experts"] | Mapping[str, Float[Array, "rows experts"]]


def row_scales(
    factors: PyTree[Any],
    experts: Mapping[str, Float[Array, "experts *batch r"]],
    choice: Choice | Int[Array, " rows"],
    renormalize: bool = False,
) -> dict[str, Float[Array, "rows *batch r"]]:
    """Return each row's own singular values, for `apply_rows`: one expert or mixture per row.

        apply = svf.apply_rows(adapted, factors, svf.row_scales(factors, experts, choice))

    `generate` keeps the samples of a row with it. Everything is an argument of the program: another
    choice, or other experts in as many places (`pad_experts`), compile nothing.

    Args:
        factors: the parameters of the transformed module.
        experts: for each path the z of all experts.
        choice: for each row the coefficients of its mixture (as the `alpha` of `mix`; per path, if
            wanted), or the index of its expert. A row of zeros, and an index that no expert has
            (-1), is the base model.
        renormalize: see `scales`.

    Raises:
        ValueError: `choice` has another shape, or does not fit the experts.
    """
    if not isinstance(choice, Mapping):
        choice = jnp.asarray(choice)
        if jnp.issubdtype(choice.dtype, jnp.integer):
            return scales(factors, _picked(experts, choice), renormalize)
    shapes = {jnp.shape(alpha) for alpha in jax.tree.leaves(choice)}
    if any(len(shape) != 2 for shape in shapes):
        raise ValueError(
            f"`choice` must be (rows, experts) coefficients or (rows,) integers, got {shapes}."
        )
    return scales(factors, jax.vmap(mix, (None, 0))(experts, choice), renormalize)


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


def _picked(
    experts: Mapping[str, Float[Array, "experts *batch r"]], index: Int[Array, " rows"]
) -> dict[str, Float[Array, "rows *batch r"]]:
    """Take each row's expert; ones where there is none."""
    if index.ndim != 1:
        raise ValueError(f"`choice` must have one index per row, got the shape {index.shape}.")
    knobs: dict[str, Any] = {"mode": "fill", "fill_value": 1, "wrap_negative_indices": False}
    return {name: jnp.asarray(z).at[index].get(**knobs) for name, z in experts.items()}
