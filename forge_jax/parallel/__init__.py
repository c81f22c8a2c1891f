"""Many devices: one mesh, where each array lies on it, candidates shared out among its groups.

Compilation and communication are JAX's own: a jitted function follows the shardings of its
arguments, so nothing here wraps or schedules one.
"""

from forge_jax.parallel.candidates import map_candidates as map_candidates
from forge_jax.parallel.mesh import AXES as AXES
from forge_jax.parallel.mesh import make_mesh as make_mesh
from forge_jax.parallel.placement import CANDIDATES as CANDIDATES
from forge_jax.parallel.placement import EXPERT_ROWS as EXPERT_ROWS
from forge_jax.parallel.placement import REPLICATED as REPLICATED
from forge_jax.parallel.placement import ROWS as ROWS
from forge_jax.parallel.placement import fitting as fitting
from forge_jax.parallel.placement import shard as shard
from forge_jax.parallel.rules import DECODER_RULES as DECODER_RULES
from forge_jax.parallel.rules import Rules as Rules
from forge_jax.parallel.rules import param_specs as param_specs
from forge_jax.parallel.rules import shard_params as shard_params
