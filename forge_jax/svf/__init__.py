"""Singular value fine-tuning: frozen factors, vectors `z`, mixtures, the Linen transform."""

from forge_jax.svf.factors import Factors as Factors
from forge_jax.svf.factors import decompose as decompose
from forge_jax.svf.factors import identity as identity
from forge_jax.svf.factors import is_factors as is_factors
from forge_jax.svf.factors import materialize as materialize
from forge_jax.svf.factors import named_factors as named_factors
from forge_jax.svf.factors import path_name as path_name
from forge_jax.svf.factors import restore as restore
from forge_jax.svf.factors import scales as scales
from forge_jax.svf.layout import Axes as Axes
from forge_jax.svf.layout import Layout as Layout
from forge_jax.svf.lowrank import kept_rank as kept_rank
from forge_jax.svf.lowrank import mask_rank as mask_rank
from forge_jax.svf.lowrank import truncate as truncate
from forge_jax.svf.mixing import deltas as deltas
from forge_jax.svf.mixing import mix as mix
from forge_jax.svf.mixing import mix_weights as mix_weights
from forge_jax.svf.mixing import pad_experts as pad_experts
from forge_jax.svf.randomized import randomized_svd as randomized_svd
from forge_jax.svf.rows import apply_rows as apply_rows
from forge_jax.svf.rows import row_scales as row_scales
from forge_jax.svf.select import is_attention as is_attention
from forge_jax.svf.select import is_attention_or_mlp as is_attention_or_mlp
from forge_jax.svf.select import is_mlp as is_mlp
from forge_jax.svf.transform import Transformed as Transformed
from forge_jax.svf.transform import transform as transform
