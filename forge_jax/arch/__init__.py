"""A language for transformer architectures: documents in, Flax modules and costs out."""

from forge_jax.arch.build import Cache as Cache
from forge_jax.arch.build import Network as Network
from forge_jax.arch.build import build as build
from forge_jax.arch.build import init_cache as init_cache
from forge_jax.arch.canonical import canonical as canonical
from forge_jax.arch.canonical import fingerprint as fingerprint
from forge_jax.arch.cost import Cost as Cost
from forge_jax.arch.cost import cost as cost
from forge_jax.arch.cost import over_budget as over_budget
from forge_jax.arch.knobs import compile_key as compile_key
from forge_jax.arch.knobs import knobs as knobs
from forge_jax.arch.parse import emit as emit
from forge_jax.arch.parse import from_dict as from_dict
from forge_jax.arch.parse import notes as notes
from forge_jax.arch.parse import parse as parse
from forge_jax.arch.parse import to_dict as to_dict
from forge_jax.arch.schema import Spec as Spec
from forge_jax.arch.schema import json_schema as json_schema
from forge_jax.arch.text import DocumentError as DocumentError
