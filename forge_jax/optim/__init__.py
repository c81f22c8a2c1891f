"""Gradient transformations and the optimizer that the phases share."""

from forge_jax.optim.chain import mugrok as mugrok
from forge_jax.optim.config import MuGrokConfig as MuGrokConfig
from forge_jax.optim.grokfast import GrokfastEmaState as GrokfastEmaState
from forge_jax.optim.grokfast import grokfast_ema as grokfast_ema
