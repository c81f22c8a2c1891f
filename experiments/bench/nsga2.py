"""Race a generation of NSGA-II against pymoo's, on DTLZ2 of four variables and three objectives.

    python -m experiments.bench.nsga2 runs/bench

Both cross by SBX (eta 15, rate 0.9) and mutate by the polynomial (eta 20, rate 1 / genes), pymoo
with its compiled parts. Their random streams differ, so what is compared before the race is what
has one answer: the ranks of the same points. pymoo looks for no duplicates; ours does.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from experiments.bench import race
from experiments.bench.race import OURS
from forge_jax import search

PEER = "pymoo"
GENES, OBJECTIVES = 4, 3


@dataclasses.dataclass(frozen=True)
class Shape:
    """A population, and how many generations one run goes on by."""

    population: int
    generations: int


FULL = (
    (Shape(50, 50), {PEER: 8.0}),
    (Shape(1000, 5), {PEER: 6.0}),
    (Shape(10000, 1), {PEER: 3.5}),
)


def dtlz2(x):
    """Deb, Thiele, Laumanns and Zitzler 2005, problem 2: a front on the unit sphere."""
    g = ((x[:, 2:] - 0.5) ** 2).sum(axis=1)
    # cos(pi / 2) is -4e-8 in float32, and a front of points below zero never ends
    angle = jnp.clip(x[:, :2], 0, 1) * (jnp.pi / 2)
    cos, sin = jnp.maximum(jnp.cos(angle), 0), jnp.sin(angle)
    parts = [cos[:, 0] * cos[:, 1], cos[:, 0] * sin[:, 1], sin[:, 0]]
    return (1 + g)[:, None] * jnp.stack(parts, axis=1)


def ours(shape: Shape, start: np.ndarray) -> race.Contender:
    """Generations in one scan; each run goes on where the last one ended."""
    algorithm = search.NSGA2(shape.population, jnp.zeros(GENES))
    params = algorithm.default_params

    def generation(state, key):
        ask_key, tell_key = jax.random.split(key)
        population, state = algorithm.ask(ask_key, state, params)
        state, _ = algorithm.tell(tell_key, population, dtlz2(population), state, params)
        return state, None

    def advance(state, key):
        key, run_key = jax.random.split(key)
        keys = jax.random.split(run_key, shape.generations)
        return jax.lax.scan(generation, state, keys)[0], key

    members = jnp.asarray(start, jnp.float32)
    key = jax.random.key(0)
    kept = [algorithm.init(key, members, dtlz2(members), params), key]
    program = race.compiled(advance, *kept)

    def run():
        kept[:] = jax.block_until_ready(program.call(*kept))
        return kept[0].fitness

    held = race.size(kept[0])
    return race.Contender(run, program.compile_s, held, program.temporary_bytes)


def theirs(shape: Shape, start: np.ndarray) -> race.Contender:
    """pymoo's generations, one `next` after another."""
    from pymoo.algorithms.moo.nsga2 import NSGA2
    from pymoo.operators.crossover.sbx import SBX
    from pymoo.operators.mutation.pm import PM
    from pymoo.problems import get_problem

    algorithm = NSGA2(
        pop_size=shape.population,
        sampling=start,  # pyright: ignore[reportArgumentType]
        crossover=SBX(prob=0.9, eta=15),
        mutation=PM(prob=1.0, prob_var=1 / GENES, eta=20),
        eliminate_duplicates=False,
    )
    problem = get_problem("dtlz2", n_var=GENES, n_obj=OBJECTIVES)
    algorithm.setup(problem, termination=("n_gen", 10**9), seed=0, verbose=False)
    algorithm.next()  # the first evaluates the start, as `init` does

    def run():
        for _ in range(shape.generations):
            algorithm.next()
        members: Any = algorithm.pop
        return members.get("F")

    return race.Contender(run)


def sphere_gap(fitness: Any) -> float:
    """Mean of |F|^2 less 1, its least value, which the whole front has."""
    return float((np.asarray(fitness, np.float64) ** 2).sum(axis=1).mean() - 1)


def our_ranks(points: np.ndarray) -> np.ndarray:
    """The rank of every point, from 0."""
    return np.asarray(jax.jit(search.non_dominated_rank)(points))


def their_ranks(points: np.ndarray) -> np.ndarray:
    """The same by pymoo's sorting, which NSGA-II there uses."""
    from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting

    ranks = np.empty(len(points), np.int64)
    for i, front in enumerate(NonDominatedSorting().do(points.astype(np.float64))):
        ranks[front] = i
    return ranks


def make(shape: Shape, floors: dict[str, float]) -> race.Race:
    """One race. What is ranked in the check is as many points as parents and offspring are."""
    rng = np.random.default_rng(0)
    start = rng.random((shape.population, GENES))
    points = np.asarray(dtlz2(jnp.asarray(rng.random((2 * shape.population, GENES)))))
    own, peer = ours(shape, start), theirs(shape, start)

    def summary():
        gaps = {name: sphere_gap(entry.run()) for name, entry in ((OURS, own), (PEER, peer))}
        return {f"mean of |F|^2 - 1 at the end, {name}": gap for name, gap in gaps.items()}

    return race.Race(
        name=f"nsga2_{shape.population}",
        title=f"one generation of NSGA-II, population {shape.population}, DTLZ2",
        settings={**dataclasses.asdict(shape), "genes": GENES, "objectives": OBJECTIVES},
        entries={
            OURS: own._replace(answer=lambda: our_ranks(points)),
            PEER: peer._replace(answer=lambda: their_ranks(points)),
        },
        difference=race.unequal,
        tolerance=0.0,
        floors=floors,
        units=shape.generations,
        unit="generation",
        summary=summary,
    )


def races(dtype: str) -> Iterator[race.Race]:
    """Every race of this module at full size; NSGA2 keeps float32 whatever `dtype` says."""
    del dtype
    for shape, floors in FULL:
        yield make(shape, floors)


if __name__ == "__main__":
    args = tyro.cli(race.Args, prog="python -m experiments.bench.nsga2", description=__doc__)
    race.command(args, races)
