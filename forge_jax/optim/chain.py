"""MuonGrokfast as an optax chain."""

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from forge_jax.optim import measured as measures
from forge_jax.optim.clip import NumHeads, QkSelect, is_qk, qk_clip
from forge_jax.optim.config import MuGrokConfig
from forge_jax.optim.grokfast import grokfast_ema
from forge_jax.optim.layout import Layout, Select, flax_layout, name
from forge_jax.optim.muon import UpdateScale, scale_by_fan, scale_by_muon
from forge_jax.optim.precision import in_float32


def mugrok(
    config: MuGrokConfig,
    qk_select: QkSelect = is_qk,
    num_heads: NumHeads = None,
    fallback: Select | None = None,
    diagnostics: bool = False,
    *,
    layout: Layout = flax_layout,
    update_scale: UpdateScale = "none",
    nesterov: bool = False,
    tol: float | None = None,
    muon_weight_decay: float = 0.0,
    decay_mask: Select | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Build the optimizer: Grokfast, then Muon or the fallback leaf by leaf, then QK-clip.

    Every gradient passes the Grokfast filter. Leaves of two or more axes go to Muon, all others,
    and all leaves if `enable_muon` is off, to AdamW or Lion. QK-clip comes last and sees the step
    as it will be added. State is float32 whatever the dtype of the parameters; `master_copy`
    around this keeps a float32 copy of them too.

    Weight decay pulls what is optimised to zero. For the scales `z` of `forge_jax.svf`, where
    z = 1 is the base model, optimise z - 1: decay then pulls to the base, and a scale without
    gradient stays there.

        loss(jax.tree.map(lambda d: 1 + d, delta))  # delta = z - 1 starts at zero

    Changes of `config` after this call have no effect.

    Args:
        config: rates, switches and thresholds.
        qk_select: which leaves `qk_clip` bounds.
        num_heads: their heads; `qk_clip_per_head` off, or None, bounds whole matrices.
        fallback: which matrices go to the fallback all the same; `is_embedding` is a choice. A
            stack of vectors (layers, width) looks like a matrix and must be sent there by name.
        diagnostics: keep measurements in the state, for `optim.diagnostics`.
        layout: which axes of a leaf are inputs and outputs.
        update_scale: see `scale_by_fan`.
        nesterov: see `scale_by_muon`.
        tol: see `orthogonalize`.
        muon_weight_decay: decoupled, multiplied by `muon_lr`; the guide has none.
        decay_mask: which leaves weight decay applies to; all if None.

    Raises:
        ValueError: a field or an argument is out of range; in `update`, `params` are missing, or
            gradients, parameters and state do not belong together.
    """
    config.validate()
    # A traced decay, as of a torch group, has no value to check.
    known = isinstance(muon_weight_decay, int | float)
    if known and not muon_weight_decay >= 0:
        raise ValueError(f"`muon_weight_decay` must be at least 0, got {muon_weight_decay}.")
    watch = measures.measured if diagnostics else lambda tx, measure: tx
    mask = None if decay_mask is None else lambda params: _by_path(decay_mask, params)
    muon = optax.chain(
        watch(
            scale_by_muon(
                config.muon_momentum,
                config.muon_ns_steps,
                config.muon_ns_coeffs,
                tol=tol,
                nesterov=nesterov,
                layout=layout,
            ),
            measures.muon_metrics(layout),
        ),
        scale_by_fan(update_scale, layout),
        # Without decay the link would still read every parameter.
        optax.identity()
        if known and not muon_weight_decay
        else optax.add_decayed_weights(muon_weight_decay, mask),
        optax.scale_by_learning_rate(config.muon_lr),
    )
    links = [watch(optax.identity(), measures.norm_of("gradient/norm"))]
    if config.enable_grokfast:
        ema = grokfast_ema(config.grokfast_alpha, config.grokfast_lambda)
        links.append(watch(ema, measures.filter_metrics(config.grokfast_lambda)))
    if config.enable_muon:
        routes: dict[Hashable, Any] = {"muon": muon, "fallback": _fallback(config, mask)}
        links.append(optax.partition(routes, lambda params: _labels(fallback, params)))
    else:
        links.append(_fallback(config, mask))
    if config.use_qk_clip and config.enable_muon_clip:
        heads = num_heads if config.qk_clip_per_head else None
        clip = qk_clip(config.qk_clip_threshold, heads, qk_select, layout=layout)
        links.append(watch(clip, measures.clip_metrics))
    links.append(watch(optax.identity(), measures.norm_of("update/norm")))
    return in_float32(optax.chain(*links))


def with_hyperparams(
    config: MuGrokConfig,
    build: Callable[[MuGrokConfig], optax.GradientTransformation] = mugrok,
) -> optax.GradientTransformationExtraArgs:
    """Build an optimizer whose two learning rates are in its state, to be read and set.

        tx = with_hyperparams(config, functools.partial(mugrok, fallback=is_embedding))
        state = tx.init(params)
        state.hyperparams["muon_lr"] = 1e-3

    A rate that is a schedule is written there at each step. Changes of `config` after this call
    have no effect.
    """
    # optax calls `tx` again at every update, long after the caller may have changed the config.
    config = dataclasses.replace(config)

    def tx(muon_lr, fallback_lr):
        return build(dataclasses.replace(config, muon_lr=muon_lr, fallback_lr=fallback_lr))

    rates = {"muon_lr": config.muon_lr, "fallback_lr": config.fallback_lr}
    # By default optax rounds them to the dtype of the parameters.
    return optax.inject_hyperparams(tx, hyperparam_dtype=jnp.dtype("float32"))(**rates)


def _labels(fallback: Select | None, params: Any) -> Any:
    """Name the route of each leaf."""

    def is_muon(path, leaf):
        return jnp.ndim(leaf) >= 2 and not (fallback and fallback(path, leaf))

    return jax.tree.map(lambda yes: "muon" if yes else "fallback", _by_path(is_muon, params))


def _by_path(select: Select, params: Any) -> Any:
    """Return the tree of what `select` says of each leaf."""
    return jax.tree_util.tree_map_with_path(lambda p, leaf: bool(select(name(p), leaf)), params)


def _fallback(config: MuGrokConfig, mask: Any) -> optax.GradientTransformation:
    """Build the optimizer of the parameters that are not orthogonalised."""
    optimizer = optax.adamw if config.fallback_type == "adamw" else optax.lion
    b1, b2 = config.fallback_betas
    decay = config.fallback_weight_decay
    return optimizer(config.fallback_lr, b1=b1, b2=b2, weight_decay=decay, mask=mask)
