"""Search over pytrees of floats: NSGA-II, CEM, Pareto measures, and what a candidate costs."""

from forge_jax.search import cost as cost
from forge_jax.search.cem import CEM as CEM
from forge_jax.search.limits import Limits as Limits
from forge_jax.search.limits import violations as violations
from forge_jax.search.nsga2 import NSGA2 as NSGA2
from forge_jax.search.pareto import converged as converged
from forge_jax.search.pareto import crowding_distance as crowding_distance
from forge_jax.search.pareto import hypervolume as hypervolume
from forge_jax.search.pareto import non_dominated_rank as non_dominated_rank
from forge_jax.search.population import cheaper_form as cheaper_form
from forge_jax.search.population import evaluate_population as evaluate_population
