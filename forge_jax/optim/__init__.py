"""Gradient transformations and the optimizer that the phases share."""

from forge_jax.optim.chain import mugrok as mugrok
from forge_jax.optim.chain import with_hyperparams as with_hyperparams
from forge_jax.optim.clip import QkClipState as QkClipState
from forge_jax.optim.clip import is_qk as is_qk
from forge_jax.optim.clip import qk_clip as qk_clip
from forge_jax.optim.clip import qk_clip_logits as qk_clip_logits
from forge_jax.optim.clip import qk_site as qk_site
from forge_jax.optim.config import MuGrokConfig as MuGrokConfig
from forge_jax.optim.grokfast import GrokfastEmaState as GrokfastEmaState
from forge_jax.optim.grokfast import grokfast_ema as grokfast_ema
from forge_jax.optim.layout import flax_attention_layout as flax_attention_layout
from forge_jax.optim.layout import flax_layout as flax_layout
from forge_jax.optim.layout import is_embedding as is_embedding
from forge_jax.optim.layout import torch_layout as torch_layout
from forge_jax.optim.measured import diagnostics as diagnostics
from forge_jax.optim.muon import ScaleByMuonState as ScaleByMuonState
from forge_jax.optim.muon import scale_by_fan as scale_by_fan
from forge_jax.optim.muon import scale_by_muon as scale_by_muon
from forge_jax.optim.newton_schulz import orthogonalize as orthogonalize
from forge_jax.optim.precision import MasterCopyState as MasterCopyState
from forge_jax.optim.precision import master_copy as master_copy
