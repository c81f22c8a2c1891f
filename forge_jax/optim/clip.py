"""Bounds on query and key weights, so that attention logits stay bounded."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from forge_jax.optim.layout import (
    Layout,
    components,
    flax_layout,
    from_matrices,
    name,
    to_matrices,
)

QkSelect = Callable[[str, Any], "bool | slice"]
"""path and leaf -> whether it projects to queries or keys; a slice of the outputs that do, if it
projects to values as well"""
NumHeads = int | None | Callable[[str, Any], int | None]
"""heads of every selected leaf, or of each by path and leaf; None is the whole matrix"""
Site = Callable[[str, Any], "tuple[str, Literal['q', 'k']] | None"]
"""path and leaf -> the attention it belongs to and its part there, None for all other leaves"""

_PARTS: dict[str, Literal["q", "k"]] = {
    **dict.fromkeys(("q_proj", "w_q", "query"), "q"),
    **dict.fromkeys(("k_proj", "w_k", "key"), "k"),
}
_NO_PARAMS = "`params` must be given to `update`: the clip bounds the weights, not the update."


class QkClipState(NamedTuple):
    """What the last update clipped."""

    num_clipped: jax.Array  # int32 scalar, heads
    max_norm: jax.Array  # float32 scalar, the largest norm or logit before clipping


def qk_site(path: str, leaf: Any) -> tuple[str, Literal["q", "k"]] | None:
    """Split a path at a component that is q_proj, w_q or query, or k_proj, w_k or key.

    `layers_0/attn/q_proj/kernel` is the query of `layers_0/attn`. Leaves of one axis have none,
    nor have biases, of which stacked layers have matrices.
    """
    parts = components(path)
    if jnp.ndim(leaf) < 2 or parts[-1] == "bias":
        return None
    for i, part in enumerate(parts):
        if part in _PARTS:
            return "/".join(parts[:i]), _PARTS[part]
    return None


def is_qk(path: str, leaf: Any) -> bool:
    """Return whether a whole component of the path is a usual name of a query or key matrix.

    Fused projections have no such name; declare them with a function that returns a slice:

        lambda path, leaf: path.endswith("in_proj_weight") and slice(0, 2 * width)
    """
    return qk_site(path, leaf) is not None


def qk_clip(
    threshold: float,
    num_heads: NumHeads = None,
    select: QkSelect = is_qk,
    *,
    layout: Layout = flax_layout,
) -> optax.GradientTransformationExtraArgs:
    r"""Project the stepped query and key weights on the ball of Frobenius norm `threshold`.

    $$ U' = \gamma (W + U) - W, \qquad \gamma = \min(1, \tau / \|W + U\|_F) $$

    for each head, so that $\|W + U'\| \le \tau$. It must be the last link of the chain, where U
    is what will be added to W.

    The guide scales the step alone, $U' = \tau U / \|W + U\|$. That bounds nothing: the norm is
    then at most $\|W\| + \tau \|U\| / \|W + U\|$, which equal pushes let grow as $\sqrt{t}$, and no
    scale of a step brings back a weight that is outside already.

    The bound is that of the weights in float32. Rounding them to bfloat16, alone or from a
    `master_copy`, can leave the rounded ones above it by about one part in 256.

    Args:
        threshold: $\tau$, positive.
        num_heads: heads among the selected outputs. Never guessed: None bounds whole matrices,
            which is $\sqrt{heads}$ looser for heads of equal norm.
        select: which leaves are queries and keys. A match of none warns in `init`.
        layout: which axes are inputs and outputs; further axes are a batch of matrices.

    Raises:
        ValueError: `threshold` is not positive; in `init` and `update`, a `query` or `key` of
            three axes has heads but only the default layout; in `update`, `params` are missing or
            a leaf's outputs are no multiple of its heads.
    """
    if not threshold > 0:
        raise ValueError(f"`threshold` must be positive, got {threshold}.")

    def init_fn(params):
        return _start(params, lambda *at: _outputs(select(*at)), num_heads, layout, "select")

    def update_fn(updates, state, params=None, **extra_args):
        del state, extra_args
        if params is None:
            raise ValueError(_NO_PARAMS)
        norms = []

        def clip(path, u, w):
            outputs = _outputs(select(name(path), w))
            if outputs is None:
                return u
            count = _count(num_heads, name(path), w)
            _check_declared(name(path), w, count, layout)
            dims = layout(name(path), w)
            stepped = to_matrices(w.astype(jnp.float32) + u.astype(jnp.float32), dims)
            heads = _split(stepped[..., outputs], count, name(path))
            norm = _norms(heads)
            norms.append(norm.ravel())
            # Rounding of the norm and of the weights must not leave them above the threshold.
            gamma = jnp.where(norm > threshold, threshold * (1 - 2.0**-20) / norm, 1.0)
            return _scaled(w, u, stepped, gamma, outputs, dims)

        updates = jax.tree_util.tree_map_with_path(clip, updates, params)
        return updates, _report(norms, threshold)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def qk_clip_logits(
    threshold: float,
    num_heads: int,
    num_kv_heads: int | None = None,
    *,
    site: Site = qk_site,
    layout: Layout = flax_layout,
) -> optax.GradientTransformationExtraArgs:
    r"""Shrink query and key weights of the heads whose attention logits were too large.

    $$ U' = \sqrt{\gamma} (W + U) - W, \qquad \gamma = \min(1, \tau / S) $$

    S is the largest logit of the head in this step's forward pass, over batch and positions
    (MuonClip, arXiv 2507.20534). Queries that share a key share the largest S of their group, so
    that both sides are scaled alike. The forward pass saw W, so the next step's logits can exceed
    the threshold by what U adds. Biases are left alone: the logits of projections without bias
    scale by $\gamma$ exactly. It belongs at the end of the chain:

        tx = optax.chain(optim.mugrok(config), optim.qk_clip_logits(100.0, num_heads=8))
        tx.update(grads, state, params, max_logits={"layers_0/attn": s})  # s: [num_heads]

    Args:
        threshold: $\tau$, positive.
        num_heads: query heads.
        num_kv_heads: key heads, a divisor of `num_heads`; as many if None.
        site: which attention a leaf belongs to. `max_logits` has one entry for each, with the
            batch axes of its leaves (stacked layers) before the heads.
        layout: which axes are inputs and outputs.

    Raises:
        ValueError: an argument is out of its range; in `init` and `update`, a `query` or `key` of
            three axes has only the default layout; in `update`, `params` or `max_logits` are
            missing or do not fit the leaves.
    """
    kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    if not threshold > 0:
        raise ValueError(f"`threshold` must be positive, got {threshold}.")
    if kv_heads < 1 or num_heads % kv_heads:
        raise ValueError(f"`num_kv_heads` must divide {num_heads=}, got {kv_heads}.")

    def init_fn(params):
        return _start(params, site, num_heads, layout, "site")

    def update_fn(updates, state, params=None, *, max_logits=None, **extra_args):
        del state, extra_args
        if params is None:
            raise ValueError(_NO_PARAMS)
        observed, max_logits = {}, max_logits or {}
        _check_sites(params, max_logits, site)

        def clip(path, u, w):
            found = site(name(path), w)
            if found is None:
                return u
            where, part = found
            _check_declared(name(path), w, num_heads, layout)
            dims = layout(name(path), w)
            stepped = to_matrices(w.astype(jnp.float32) + u.astype(jnp.float32), dims)
            logits = jnp.asarray(max_logits[where], jnp.float32)
            if logits.shape != (*stepped.shape[:-2], num_heads):
                want = (*stepped.shape[:-2], num_heads)
                raise ValueError(f"`max_logits[{where!r}]` must be {want}, got {logits.shape}.")
            observed[where] = logits.ravel()
            groups = logits.reshape(*logits.shape[:-1], kv_heads, -1).max(-1)
            gamma = threshold / jnp.maximum(groups, threshold)
            if part == "q":
                gamma = jnp.repeat(gamma, num_heads // kv_heads, axis=-1)
            _split(stepped, gamma.shape[-1], name(path))
            return _scaled(w, u, stepped, jnp.sqrt(gamma), slice(None), dims)

        updates = jax.tree_util.tree_map_with_path(clip, updates, params)
        return updates, _report(list(observed.values()), threshold)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _start(
    params: Any, chosen: Callable[[str, Any], Any], num_heads: Any, layout: Layout, word: str
) -> QkClipState:
    """Check the leaves that are clipped, warn of none, and return the first state."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    clipped = [(name(path), leaf) for path, leaf in leaves if chosen(name(path), leaf)]
    for path, leaf in clipped:
        _check_declared(path, leaf, _count(num_heads, path, leaf), layout)
    if not clipped:
        warnings.warn(f"QK-clip is on, but `{word}` matches no leaf of `params`.", stacklevel=3)
    return QkClipState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32))


def _outputs(selected: bool | slice) -> slice | None:
    """Return the outputs that a selection means, None for none."""
    if isinstance(selected, slice):
        return selected
    return slice(None) if selected else None


def _count(num_heads: NumHeads, path: str, leaf: Any) -> int | None:
    """Return the heads of one leaf."""
    return num_heads(path, leaf) if callable(num_heads) else num_heads


def _check_declared(path: str, leaf: Any, heads: int | None, layout: Layout) -> None:
    """Raise a ValueError where Flax's own attention would be read as a stack of matrices.

    Its `query` and `key` are (inputs, heads, width), those of a scanned Dense (layers, inputs,
    outputs): shapes cannot tell them apart, so that the caller has to.
    """
    flax_names = {"query", "key"} & set(components(path))
    if heads is not None and layout is flax_layout and flax_names and jnp.ndim(leaf) >= 3:
        raise ValueError(
            f"`layout` must declare the axes of {path}, got the default for {jnp.shape(leaf)}: "
            "give `optim.flax_attention_layout` if they are (inputs, heads, width), or your own."
        )


def _split(
    matrices: Float[Array, "*batch inputs outputs"], heads: int | None, path: str
) -> Float[Array, "*batch inputs heads width"]:
    """Cut the outputs into heads.

    Raises:
        ValueError: they are no multiple of the heads.
    """
    *rest, outputs = matrices.shape
    heads = 1 if heads is None else heads
    if heads < 1 or outputs % heads:
        raise ValueError(f"`num_heads` must divide the {outputs} outputs of {path}, got {heads}.")
    return matrices.reshape(*rest, heads, outputs // heads)


def _norms(heads: Float[Array, "*batch inputs heads width"]) -> Float[Array, "*batch heads"]:
    """Return the Frobenius norm of each head, to a few units in the last place."""
    heads = jnp.swapaxes(heads, -3, -2)
    squares = jnp.square(heads.reshape(*heads.shape[:-2], -1))
    # XLA's own sum may run in one chain, whose rounding for large heads exceeds 1e-6.
    while squares.shape[-1] > 1:
        half = (squares.shape[-1] + 1) // 2
        rest = squares[..., half:]
        squares = squares[..., :half].at[..., : rest.shape[-1]].add(rest)
    return jnp.sqrt(squares[..., 0])


def _scaled(w: Array, u: Array, stepped: Array, gamma: Float[Array, "*batch heads"], outputs, dims):
    """Return the update that takes W to gamma (W + U); where gamma is 1 it is U, bit for bit."""
    width = stepped[..., outputs].shape[-1] // gamma.shape[-1]
    factors = jnp.ones((*stepped.shape[:-2], 1, stepped.shape[-1]))
    factors = factors.at[..., outputs].set(jnp.repeat(gamma, width, axis=-1)[..., None, :])
    factors = jnp.broadcast_to(factors, stepped.shape)
    target = from_matrices(factors * stepped, w.shape, dims)
    moved = (target - w.astype(jnp.float32)).astype(u.dtype)
    return jnp.where(from_matrices(factors, w.shape, dims) < 1, moved, u)


def _check_sites(params: Any, max_logits: Mapping[str, Array], site: Site) -> None:
    """Raise a ValueError that names every attention without logits."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    found = [site(name(path), leaf) for path, leaf in leaves]
    missing = sorted({pair[0] for pair in found if pair} - set(max_logits))
    if missing:
        raise ValueError(f"`max_logits` must have an entry for each attention, not for: {missing}.")


def _report(values: list[Array], threshold: float) -> QkClipState:
    """Count what was above the threshold, and find the largest."""
    flat = jnp.concatenate([*values, jnp.zeros(1)])
    return QkClipState(jnp.sum(flat > threshold, dtype=jnp.int32), jnp.max(flat))
