"""NSGA-II (Deb, Pratap, Agarwal, Meyarivan 2002, doi:10.1109/4235.996017) with evosax signatures.

    key first, every objective minimised; the three methods are jitted, as evosax's are.
    state = nsga2.init(key, population, fitness, params)
    population, state = nsga2.ask(key, state, params)
    state, metrics = nsga2.tell(key, population, fitness, state, params)

`fitness` is (population, objectives). Offspring reach `tell` evaluated, and only then compete
with their parents. There is no scalar archive of a best member: `state.rank == 0` is the front.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PyTree

from forge_jax.search import genome
from forge_jax.search.order import argsort, lexsort, places
from forge_jax.search.pareto import crowding_distance, non_dominated_rank
from forge_jax.search.variation import polynomial_mutation, simulated_binary_crossover

# Ranks behind every real one: a copy of another member, and a failed evaluation.
COPY = int(jnp.iinfo(jnp.int32).max) - 1
FAILED = COPY + 1


class State(struct.PyTreeNode):
    """The evaluated population; after a `tell`, from the best member to the worst."""

    population: Float[Array, "population genes"]
    fitness: Float[Array, "population objectives"]
    violation: Float[Array, " population"]  # 0 where every constraint holds
    rank: Int[Array, " population"]  # 0 is the front; COPY and FAILED are last
    crowding: Float[Array, " population"]  # room within the rank, inf at its ends
    generation_counter: Int[Array, ""]


class Params(struct.PyTreeNode):
    """Bounds (a scalar, one value per gene, or a pytree like the genome) and operator settings."""

    lower: PyTree = 0.0
    upper: PyTree = 1.0
    crossover_rate: ArrayLike = 0.9  # of pairs; in a crossed pair every gene has even odds
    crossover_eta: ArrayLike = 15.0  # larger: children closer to their parents
    mutation_rate: ArrayLike = 0.1  # of genes; `default_params` sets 1 / genes
    mutation_eta: ArrayLike = 20.0  # larger: smaller steps


@dataclasses.dataclass(frozen=True, eq=False)
class NSGA2:
    """Elitist multi-objective search over pytrees of floats shaped like `solution`.

    A member whose fitness or violation is not finite is never a parent and never survives while
    one finite member exists; free places are filled with copies. Equal genomes count once: the
    later one ranks behind every distinct member, its fitness notwithstanding.
    """

    population_size: int
    solution: PyTree

    def __post_init__(self):
        """Check the static facts."""
        if self.population_size < 2:
            raise ValueError(f"`population_size` must be at least 2, got {self.population_size}.")
        genome.check(self.solution)

    @property
    def num_dims(self) -> int:
        """Number of genes."""
        return genome.size(self.solution)

    @property
    def default_params(self) -> Params:
        """Unit bounds and the usual settings: eta 15 at rate 0.9, eta 20 at rate 1 / genes."""
        return Params(mutation_rate=1 / self.num_dims)

    @functools.partial(jax.jit, static_argnames="self")
    def init(
        self,
        key: Array,
        population: PyTree,
        fitness: Float[Array, "population objectives"],
        params: Params,
        violation: Float[Array, " population"] | None = None,
    ) -> State:
        """Start from an evaluated population, kept as it is, in its order."""
        del key, params
        members = genome.ravel(self.solution, population)
        fitness, violation = _evaluated(members, fitness, violation)
        if len(members) != self.population_size:
            raise ValueError(f"Want {self.population_size} members, got {len(members)}.")
        rank, crowding = _sort(members, fitness, violation)
        zero = jnp.zeros((), jnp.int32)
        return State(members, fitness, violation, rank, crowding, zero)

    @functools.partial(jax.jit, static_argnames="self")
    def ask(self, key: Array, state: State, params: Params) -> tuple[PyTree, State]:
        """Make offspring: crowded tournament, SBX, polynomial mutation, all within the bounds."""
        lower = genome.bound("lower", params.lower, self.num_dims)
        upper = genome.bound("upper", params.upper, self.num_dims)
        select_key, cross_key, mutate_key = jax.random.split(key, 3)
        pairs = (self.population_size + 1) // 2
        # A first population may lie outside the bounds; the operators may not.
        parents = state.population[_tournament(select_key, state, 2 * pairs)]
        parents = jnp.clip(parents, lower, upper).astype(state.population.dtype)
        children = jnp.concatenate(
            simulated_binary_crossover(
                cross_key,
                parents[:pairs],
                parents[pairs:],
                lower,
                upper,
                eta=params.crossover_eta,
                rate=params.crossover_rate,
            )
        )
        # A child equal to its parent would spend an evaluation on nothing.
        idle = (children == parents).all(axis=1)
        children = polynomial_mutation(
            mutate_key,
            children,
            lower,
            upper,
            eta=params.mutation_eta,
            rate=params.mutation_rate,
            force=idle,
        ).astype(parents.dtype)
        return genome.unravel(self.solution, children[: self.population_size]), state

    @functools.partial(jax.jit, static_argnames="self")
    def tell(
        self,
        key: Array,
        population: PyTree,
        fitness: Float[Array, "offspring objectives"],
        state: State,
        params: Params,
        violation: Float[Array, " offspring"] | None = None,
    ) -> tuple[State, dict[str, Array]]:
        """Keep the best `population_size` of parents and evaluated offspring.

        `violation` is the summed amount by which constraints are missed, 0 where all hold. A
        member that holds them beats one that does not; the smaller violation wins among the
        rest (Deb et al. 2002, section VI-A).
        """
        del key, params
        members = genome.ravel(self.solution, population)
        fitness, violation = _evaluated(members, fitness, violation)
        if fitness.shape[1] != state.fitness.shape[1]:
            raise ValueError(f"Want {state.fitness.shape[1]} objectives, got {fitness.shape[1]}.")
        # Parents go first: of two equal genomes the earlier evaluation stays.
        members, fitness, violation = (
            jnp.concatenate([old, new.astype(old.dtype)])
            for old, new in (
                (state.population, members),
                (state.fitness, fitness),
                (state.violation, violation),
            )
        )
        rank, crowding = _sort(members, fitness, violation)
        state = _survive(
            State(members, fitness, violation, rank, crowding, state.generation_counter + 1),
            self.population_size,
        )
        return state, _metrics(state)

    def get_population(self, state: State) -> PyTree:
        """Return the surviving population as pytrees like `solution`."""
        return genome.unravel(self.solution, state.population)


def _metrics(state: State) -> dict[str, Array]:
    """Return the generation, the least value of each objective, and the size of the front."""
    finite = (state.rank < FAILED)[:, None]
    return {
        "generation_counter": state.generation_counter,
        "best_fitness": jnp.where(finite, state.fitness, jnp.inf).min(axis=0),
        "front_size": ((state.rank == 0) & (state.violation <= 0)).sum(),
    }


def _evaluated(members, fitness, violation):
    """Check what came back from the evaluation and bring it to floats."""
    fitness = jnp.asarray(fitness)
    if fitness.ndim != 2 or len(fitness) != len(members):
        raise ValueError(
            f"`fitness` must be ({len(members)}, objectives), got {fitness.shape}; "
            "a search for one number is `CEM`."
        )
    violation = jnp.zeros(len(members)) if violation is None else jnp.asarray(violation)
    if violation.shape != (len(members),):
        raise ValueError(f"`violation` must be ({len(members)},), got {violation.shape}.")
    return tuple(x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in (fitness, violation))


def _sort(members, fitness, violation):
    """Return rank and crowding: feasible fronts, then less violation, then copies, then failed."""
    evaluated = jnp.isfinite(fitness).all(axis=1) & jnp.isfinite(violation)
    distinct = evaluated & ~_copies(members, evaluated)
    feasible = distinct & (violation <= 0)
    # What is not feasible shares the rank below the last front, and is told apart from there.
    rank = non_dominated_rank(jnp.where(feasible[:, None], fitness, jnp.inf))
    missed = jnp.where(distinct & ~feasible, violation, jnp.inf)
    behind = places(missed).astype(rank.dtype)
    rank = jnp.where(feasible, rank, rank + behind)
    rank = jnp.where(evaluated, jnp.where(distinct, rank, COPY), FAILED)
    return rank, crowding_distance(fitness, rank)


def _copies(
    members: Float[Array, "population genes"], evaluated: Bool[Array, " population"]
) -> Bool[Array, " population"]:
    """Mark evaluated members that equal an earlier evaluated one, gene by gene.

    Members are sorted by a hash and compared with their neighbour, O(n log n): no false alarm,
    and a copy is missed only where two different genomes share all 32 bits of the hash.
    """
    bits = jax.lax.bitcast_convert_type(members.astype(jnp.float32), jnp.uint32)
    # Each gene is mixed with its place by murmur3's finalizer before the sum: a sum of weighted
    # bits collides on a grid of genes.
    bits += jnp.arange(members.shape[1], dtype=jnp.uint32) * jnp.uint32(0x9E3779B1)
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    hashes = (bits ^ (bits >> 16)).sum(axis=1, dtype=jnp.uint32)
    order = lexsort([hashes, ~evaluated])
    ordered = members[order]
    equal = jnp.concatenate([jnp.zeros(1, bool), (ordered[1:] == ordered[:-1]).all(axis=1)])
    return jnp.zeros(len(members), bool).at[order].set(equal & evaluated[order])


def _survive(state: State, room: int) -> State:
    """Keep the `room` best by rank, then by crowding; copies fill what failures leave free."""
    order = lexsort([-state.crowding, state.rank])
    usable = _usable(state)
    keep = order[jnp.arange(room) % usable]
    rank = jnp.where(jnp.arange(room) < usable, state.rank[keep], COPY)
    return State(
        state.population[keep],
        state.fitness[keep],
        state.violation[keep],
        rank,
        state.crowding[keep],
        state.generation_counter,
    )


def _usable(state: State) -> Int[Array, ""]:
    """Count the members that did not fail; all of them if every one did."""
    count = (state.rank < FAILED).sum()
    return jnp.where(count > 0, count, len(state.rank))


def _tournament(key: Array, state: State, winners: int) -> Int[Array, " winners"]:
    """Pick parents in pairs: the lower rank wins, then the larger crowding distance.

    Every usable member enters equally often, as with the two permutations of Deb's own code.
    """
    order = argsort(state.rank == FAILED)
    shuffled = argsort(jax.random.bits(key, (2 * winners,)))
    entries = shuffled % _usable(state)
    a, b = order[entries].reshape(2, winners)
    rank, crowding = state.rank, state.crowding
    better = (rank[b] < rank[a]) | ((rank[b] == rank[a]) & (crowding[b] > crowding[a]))
    return jnp.where(better, b, a)
