"""Search over architectures: mutation, crossover, novelty, successive halving, hurdles."""

from forge_jax.evolve.asha import Ladder as Ladder
from forge_jax.evolve.asha import hurdles as hurdles
from forge_jax.evolve.asha import promotion as promotion
from forge_jax.evolve.history import Event as Event
from forge_jax.evolve.history import Trial as Trial
from forge_jax.evolve.history import trials_of as trials_of
from forge_jax.evolve.loop import Refused as Refused
from forge_jax.evolve.loop import Result as Result
from forge_jax.evolve.loop import Settings as Settings
from forge_jax.evolve.loop import best as best
from forge_jax.evolve.loop import run as run
from forge_jax.evolve.mutate import OPERATORS as OPERATORS
from forge_jax.evolve.mutate import Child as Child
from forge_jax.evolve.mutate import crossover as crossover
from forge_jax.evolve.mutate import mutate as mutate
from forge_jax.evolve.novelty import novelty as novelty
from forge_jax.evolve.novelty import novelty_of as novelty_of
