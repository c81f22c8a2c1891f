"""MuonGrokfast as an optax chain."""

import optax

from forge_jax.optim.config import MuGrokConfig
from forge_jax.optim.grokfast import grokfast_ema


def mugrok(config: MuGrokConfig) -> optax.GradientTransformation:
    """Build the optimizer: the Grokfast filter over all gradients, then AdamW or Lion.

    Without Muon every parameter takes the fallback, whatever its number of axes. Weight decay pulls
    what is optimised to zero. For the scales `z` of `forge_jax.svf`, where z = 1 is the base model,
    optimise z - 1: decay then pulls to the base, and a scale without gradient stays there.

        loss(jax.tree.map(lambda d: 1 + d, delta))  # delta = z - 1 starts at zero

    Changes of `config` after this call have no effect.

    Raises:
        ValueError: a field is out of range, or `config` asks for Muon or QK-clip, which this
            version does not have.
    """
    config.validate()
    if config.enable_muon:
        raise ValueError(
            f"Muon is not in this version: {config.phase_name} needs `enable_muon=False`, got True."
        )
    if config.use_qk_clip and config.enable_muon_clip:
        raise ValueError(
            f"QK-clip is not in this version: {config.phase_name} needs `use_qk_clip=False`, "
            "got True."
        )
    filters = []
    if config.enable_grokfast:
        filters.append(grokfast_ema(config.grokfast_alpha, config.grokfast_lambda))
    return optax.chain(*filters, _fallback(config))


def _fallback(config: MuGrokConfig) -> optax.GradientTransformation:
    """Build the optimizer of the parameters that are not orthogonalised."""
    optimizer = optax.adamw if config.fallback_type == "adamw" else optax.lion
    b1, b2 = config.fallback_betas
    return optimizer(config.fallback_lr, b1=b1, b2=b2, weight_decay=config.fallback_weight_decay)
