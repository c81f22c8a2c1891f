"""A genome is any pytree of floats; the searches see it as one flat vector."""

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree


def size(solution: PyTree) -> int:
    """Count the genes of the template `solution`."""
    return sum(jnp.size(leaf) for leaf in jax.tree.leaves(solution))


def check(solution: PyTree) -> None:
    """Refuse a template that has no genes, or genes that are not floats."""
    leaves = jax.tree_util.tree_leaves_with_path(solution)
    if not leaves:
        raise ValueError("`solution` must hold at least one array, got none.")
    for path, leaf in leaves:
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            name = jax.tree_util.keystr(path) or "the array"
            raise ValueError(f"`solution` must hold floats, got {jnp.result_type(leaf)} in {name}.")


def ravel(solution: PyTree, population: PyTree) -> Float[Array, "population genes"]:
    """Flatten a population, `solution` with one leading axis more, to the template's dtype."""
    want, got = jax.tree.structure(solution), jax.tree.structure(population)
    if want != got:
        raise ValueError(f"`population` must be a pytree {want} like `solution`, got {got}.")
    for (path, leaf), template in zip(
        jax.tree_util.tree_leaves_with_path(population), jax.tree.leaves(solution), strict=True
    ):
        if jnp.shape(leaf)[1:] != jnp.shape(template) or jnp.ndim(leaf) == 0:
            raise ValueError(
                f"`population` must be (population, *{jnp.shape(template)}) in "
                f"{jax.tree_util.keystr(path) or 'its array'}, got {jnp.shape(leaf)}."
            )
    flat = jax.vmap(lambda member: ravel_pytree(member)[0])(population)
    return flat.astype(ravel_pytree(solution)[0].dtype)


def unravel(solution: PyTree, population: Float[Array, "population genes"]) -> PyTree:
    """Undo `ravel`."""
    return jax.vmap(ravel_pytree(solution)[1])(population)


def bound(name: str, value: PyTree, genes: int) -> Float[Array, " genes"]:
    """Spread a bound to one value per gene: a scalar, (genes,), or a pytree like the genome."""
    flat = ravel_pytree(value)[0]
    if flat.size not in (1, genes):
        raise ValueError(f"`{name}` must hold 1 or {genes} values, got {flat.size}.")
    return jnp.broadcast_to(flat, (genes,))
