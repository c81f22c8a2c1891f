"""The four domains: prompts, answers and rewards, without any file or network."""

from forge_jax.domains import code as code
from forge_jax.domains import math as math
from forge_jax.domains import reasoning as reasoning
from forge_jax.domains import vision as vision
from forge_jax.domains.item import DOMAINS as DOMAINS
from forge_jax.domains.item import Item as Item
from forge_jax.domains.item import exact as exact
from forge_jax.domains.item import signed as signed
