"""forge_jax: pure-functional JAX tools that make a language model adapt itself.

The rooms, from the lowest to the highest: `svf` (singular value fine-tuning), `optim`, `models`,
`domains`, `parallel` (many devices), `rl`, `search`, `adapt`; beside them, imported by name,
`arch` (architecture documents) and `evolve` (their search).
"""

from forge_jax import adapt as adapt
from forge_jax import domains as domains
from forge_jax import models as models
from forge_jax import optim as optim
from forge_jax import parallel as parallel
from forge_jax import rl as rl
from forge_jax import search as search
from forge_jax import svf as svf
