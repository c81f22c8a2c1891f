"""Cross-entropy method, diagonal normal (de Boer et al. 2005, section 5), evosax signatures.

key first, one number per member, minimised; the three methods are jitted, as evosax's are.
state = cem.init(key, mean, params)
population, state = cem.ask(key, state, params)
state, metrics = cem.tell(key, population, fitness, state, params)
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import struct
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, ArrayLike, Float, Int, PyTree

from forge_jax.search import genome


class State(struct.PyTreeNode):
    """The sampling distribution and the best member met."""

    mean: Float[Array, " genes"]
    std: Float[Array, " genes"]
    best_solution: Float[Array, " genes"]  # NaN until a finite fitness was told
    best_fitness: Float[Array, ""]  # inf until then
    generation_counter: Int[Array, ""]


class Params(struct.PyTreeNode):
    """Bounds and spread: each a scalar, one value per gene, or a pytree like the genome."""

    lower: PyTree = -jnp.inf
    upper: PyTree = jnp.inf
    std_init: PyTree = 0.5  # of the first population; Transformer-Squared's value
    std_min: PyTree = 1e-3  # the spread never falls below: ties in accuracy would end the search
    smoothing: ArrayLike = 0.0  # weight of the previous mean and std, in [0, 1)


@dataclasses.dataclass(frozen=True, eq=False)
class CEM:
    """Refit a normal to the best `elite_ratio` of its samples, clipped to the bounds.

    A member whose fitness is not finite is never an elite and never the best. With
    `reevaluate_best`, slot 0 of every population is the best member so far, and what `tell`
    hears of it replaces what was known: a lucky draw of a noisy fitness does not stay best.
    """

    population_size: int
    solution: PyTree
    elite_ratio: float = 0.2
    reevaluate_best: bool = False

    def __post_init__(self):
        """Check the static facts."""
        if self.population_size < 2:
            raise ValueError(f"`population_size` must be at least 2, got {self.population_size}.")
        if not 0 < self.elite_ratio <= 1:
            raise ValueError(f"`elite_ratio` must lie in (0, 1], got {self.elite_ratio}.")
        genome.check(self.solution)

    @property
    def num_dims(self) -> int:
        """Number of genes."""
        return genome.size(self.solution)

    @property
    def num_elites(self) -> int:
        """Number of members the distribution is refitted to."""
        return max(1, int(self.elite_ratio * self.population_size))

    @property
    def default_params(self) -> Params:
        """No bounds, spread 0.5 at first and 0.001 at least, no smoothing."""
        return Params()

    @functools.partial(jax.jit, static_argnames="self")
    def init(self, key: Array, mean: PyTree, params: Params) -> State:
        """Start around `mean`, a pytree like `solution`."""
        del key
        mean = genome.ravel(self.solution, jax.tree.map(lambda x: jnp.asarray(x)[None], mean))[0]
        std = genome.bound("std_init", params.std_init, self.num_dims).astype(mean.dtype)
        nothing = jnp.full_like(mean, jnp.nan)
        return State(mean, std, nothing, jnp.float32(jnp.inf), jnp.zeros((), jnp.int32))

    @functools.partial(jax.jit, static_argnames="self")
    def ask(self, key: Array, state: State, params: Params) -> tuple[PyTree, State]:
        """Sample a population, clipped to the bounds."""
        lower, upper = (
            genome.bound(name, getattr(params, name), self.num_dims) for name in ("lower", "upper")
        )
        noise = jax.random.normal(key, (self.population_size, self.num_dims), state.mean.dtype)
        members = jnp.clip(state.mean + state.std * noise, lower, upper).astype(noise.dtype)
        if self.reevaluate_best:
            known = jnp.isfinite(state.best_fitness)
            members = members.at[0].set(jnp.where(known, state.best_solution, members[0]))
        return genome.unravel(self.solution, members), state

    @functools.partial(jax.jit, static_argnames="self")
    def tell(
        self,
        key: Array,
        population: PyTree,
        fitness: Float[Array, " population"],
        state: State,
        params: Params,
    ) -> tuple[State, dict[str, Array]]:
        """Move the mean and the standard deviation to those of the elites."""
        del key
        members, fitness = genome.ravel(self.solution, population), jnp.asarray(fitness)
        if fitness.shape != (len(members),):
            raise ValueError(f"`fitness` must be ({len(members)},), got {fitness.shape}.")
        fitness = fitness.astype(state.best_fitness.dtype)
        fitness = jnp.where(jnp.isfinite(fitness), fitness, jnp.inf)
        order = jnp.argsort(fitness)[: self.num_elites]
        mean, std = _fit(members[order], jnp.isfinite(fitness[order]), state)
        keep = jnp.asarray(params.smoothing, mean.dtype)
        mean, std = (
            keep * old + (1 - keep) * new for old, new in ((state.mean, mean), (state.std, std))
        )
        floor = genome.bound("std_min", params.std_min, self.num_dims)
        best_solution, best_fitness = self._best(members, fitness, state)
        state = State(
            mean,
            jnp.maximum(std, floor).astype(std.dtype),
            best_solution,
            best_fitness,
            state.generation_counter + 1,
        )
        return state, {
            "generation_counter": state.generation_counter,
            "best_fitness_in_generation": fitness.min(),
            "best_fitness": best_fitness,
            "std_mean": state.std.mean(),
        }

    def get_mean(self, state: State) -> PyTree:
        """Return the mean as a pytree like `solution`."""
        return ravel_pytree(self.solution)[1](state.mean)

    def get_best_solution(self, state: State) -> PyTree:
        """Return the best member met as a pytree like `solution`."""
        return ravel_pytree(self.solution)[1](state.best_solution)

    def _best(self, members, fitness, state):
        """Return the best member so far and its fitness."""
        known = state.best_fitness
        if self.reevaluate_best:
            again = (members[0] == state.best_solution).all()
            known = jnp.where(again, jnp.inf, known)
        index = jnp.argmin(fitness)
        better = fitness[index] < known
        return (
            jnp.where(better, members[index], state.best_solution),
            jnp.where(better, fitness[index], known),
        )


def _fit(elites, finite, state):
    """Return mean and standard deviation of the finite elites; the state's own if there is none."""
    weights = finite / jnp.maximum(finite.sum(), 1)
    mean = weights @ elites
    std = jnp.sqrt(weights @ (elites - mean) ** 2)
    return (
        jnp.where(finite.any(), mean, state.mean),
        jnp.where(finite.any(), std, state.std),
    )
