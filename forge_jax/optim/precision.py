"""Float32 inside an optimizer whose parameters and gradients are shorter."""

import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from forge_jax.optim.layout import name


class MasterCopyState(NamedTuple):
    """Float32 parameters, of which those of the model are roundings."""

    master: Any  # same structure and shapes as the params, float32
    inner: Any


def master_copy(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Run `tx` on a float32 copy of the parameters, which its state keeps.

    Steps too small for bfloat16 add up in the copy instead of being lost. The emitted update, in
    the dtype of the gradients, takes the parameters to the rounded copy: exactly where a step is
    small against its parameter, else up to the rounding of the step itself. That error does not
    add up, as each update starts from where the parameters are; for the same reason changes made
    to the parameters by anyone else are overwritten.

    Raises:
        ValueError: in `update`, `params` are missing.
    """
    tx = optax.with_extra_args_support(tx)

    def init_fn(params):
        # A copy even of float32 leaves: callers may donate both params and state.
        master = jax.tree.map(lambda p: jnp.array(p, jnp.float32, copy=True), params)
        return MasterCopyState(master, tx.init(master))

    def update_fn(updates, state, params=None, **extra_args):
        if params is None:
            raise ValueError("`params` must be given to `update`: it says what to move from.")
        grads = _float32(updates)
        steps, inner = tx.update(grads, state.inner, state.master, **extra_args)
        master = optax.apply_updates(state.master, steps)
        updates = jax.tree.map(
            lambda m, p, g: (m.astype(p.dtype).astype(jnp.float32) - p).astype(g.dtype),
            master,
            params,
            updates,
        )
        return updates, MasterCopyState(master, inner)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def in_float32(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Give `tx` float32 gradients and parameters, hence float32 state; restore the dtype after.

    Raises:
        ValueError: in `update`, `params` are missing, or gradients, parameters and state do not
            belong together.
    """
    tx = optax.with_extra_args_support(tx)

    def init_fn(params):
        return tx.init(_float32(params))

    def update_fn(updates, state, params=None, **extra_args):
        if params is None:
            raise ValueError("`params` must be given to `update`: weight decay and clips need it.")
        _check("`updates`", updates, "`params`", params)
        with warnings.catch_warnings():
            # `init` has warned of what it has to say; here only shapes are asked for.
            warnings.simplefilter("ignore")
            wanted = jax.eval_shape(init_fn, params)
        _check("`opt_state`", state, "a fresh state of these `params`", wanted)
        new, state = tx.update(_float32(updates), state, _float32(params), **extra_args)
        return jax.tree.map(lambda u, g: u.astype(g.dtype), new, updates), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _float32(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def _check(label: str, got: Any, reference: str, wanted: Any) -> None:
    """Raise a ValueError that names the leaves in which two trees differ."""
    if jax.tree.structure(got) == jax.tree.structure(wanted):
        pairs = zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True)
        if all(jnp.shape(a) == jnp.shape(b) for a, b in pairs):
            return
    have, want = _shapes(got), _shapes(wanted)
    keys = [key for key in sorted(have | want) if have.get(key) != want.get(key)]
    lines = [f"{k}: {want.get(k, 'nothing')}, got {have.get(k, 'nothing')}" for k in keys[:5]]
    more = [f"and {len(keys) - 5} more"] if len(keys) > 5 else []
    listed = "; ".join([*lines, *more]) or "the containers differ"
    raise ValueError(f"{label} must have the structure and shapes of {reference}: {listed}.")


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {name(path): jnp.shape(leaf) for path, leaf in leaves}
