"""The search for the best mixture of experts: NSGA-II or CEM, every candidate measured.

A genome is alpha in [0, upper]^K (one for the whole model, or one for each layer) and the rank
fraction rho below which singular components are dropped. Accuracy and KL come from running the
candidate on validation items; latency, memory and throughput from the cost model that was
calibrated on measured runs of a few rank fractions.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import run as runs
from experiments.measure import CostModel
from experiments.problem import Problem, score_all
from experiments.scoring import Mixtures
from forge_jax import search

Genome = dict[str, Any]
"""alpha (groups, K) and rank (), with a leading population axis"""

Fitness = Callable[[Genome], tuple[np.ndarray, np.ndarray]]
"""population -> fitness (P, 4), KL to the base (P,)"""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How the mixture is searched."""

    search: Literal["nsga2", "cem"] = "nsga2"
    """NSGA-II looks for a front of four objectives, CEM for the most accurate mixture"""
    population: int = 24
    """mixtures in a generation"""
    generations: int = 20
    """of the search at most: it stops where the hypervolume stands still"""
    search_items: int = 32
    """validation items a domain and evaluation"""
    evaluations: int = 1
    """averaged in each fitness, each on `search_items` of its own, which is a fitness on so many
    times the items: the guide's remedy for noise, whose only source here are the items"""
    per_layer: bool = False
    """one alpha for each layer instead of one for the model"""
    alpha_upper: float = 2.0
    """1 is one of the guide's remedies"""
    normalize_alpha: bool = False
    """alpha sums to 1, another remedy"""
    lowest_rank: float = 0.2
    """rank fraction below which no matrix is cut"""
    kl_limit: float = 1.0
    """nats per answer token that a mixture may be from the base; an answer of one token that the
    base gives with probability p is log(1/p) away by itself"""
    calibration_ranks: tuple[float, ...] = (1.0, 0.6, 0.45, 0.3, 0.15)
    """rank fractions at which the cost model is fitted to measured runs"""

    def check(self) -> None:
        """Raise a ValueError that lists every setting out of its range."""
        least = {"population": 2, "generations": 1, "search_items": 1, "evaluations": 1}
        wrong = [f"`{n}` must be at least {k}" for n, k in least.items() if getattr(self, n) < k]
        if not 0 < self.lowest_rank <= 1:
            wrong.append(f"`lowest_rank` must lie in (0, 1], got {self.lowest_rank}")
        ranks = self.calibration_ranks
        if len(set(ranks)) < 2 or max(ranks) != 1 or min(ranks) <= 0:
            wrong.append(f"`calibration_ranks` must be 1 and others above 0, got {ranks}")
        if not self.kl_limit > 0:
            wrong.append(f"`kl_limit` must be positive, got {self.kl_limit}")
        if not self.alpha_upper > 0:
            wrong.append(f"`alpha_upper` must be positive, got {self.alpha_upper}")
        if wrong:
            raise ValueError(", ".join(wrong) + ".")


DEFAULTS = Settings()


def limits(settings: Settings) -> search.Limits:
    """The guide's limits with the settings' own for the KL."""
    return search.Limits(kl=settings.kl_limit)


class Found(NamedTuple):
    """The last population and what it scored; P members."""

    genomes: Genome
    fitness: np.ndarray  # (P, 4): error, latency_ms, memory_gb, -throughput_tps
    kl: np.ndarray  # (P,) nats
    violation: np.ndarray  # (P,), 0 where the guide's limits hold
    hypervolume: list[float]  # of each generation


class Evaluated(NamedTuple):
    """A population and what it scored."""

    genomes: Genome
    fitness: np.ndarray  # as Found's
    kl: np.ndarray  # (P,) nats
    violation: np.ndarray  # (P,), see `violation`


def groups(paths: Sequence[str], per_layer: bool) -> dict[str, int]:
    """The row of alpha that each matrix uses: its layer's, or the only one."""
    if not per_layer:
        return dict.fromkeys(paths, 0)
    layers = list(dict.fromkeys(path.split("/")[0] for path in paths))
    return {path: layers.index(path.split("/")[0]) for path in paths}


def by_path(alpha, index: dict[str, int]) -> dict[str, Any]:
    """Alpha (..., groups, K) as (..., K) for every matrix."""
    return {path: alpha[..., row, :] for path, row in index.items()}


def normalized(alpha):
    """Alpha with a sum of 1 in every group; all zero stays."""
    return alpha / jnp.maximum(alpha.sum(axis=-1, keepdims=True), 1e-6)


def mixtures(experts, genomes: Genome, index: dict[str, int]) -> Mixtures:
    """The candidates that P genomes describe."""
    alphas = by_path(np.asarray(genomes["alpha"]), index)
    return Mixtures(experts, alphas, np.asarray(genomes["rank"]))


def make_fitness(
    problem: Problem, experts, costs: CostModel, settings: Settings, index: dict[str, int]
) -> Fitness:
    """Every candidate runs on every domain."""
    count = settings.search_items * settings.evaluations

    def fitness(population: Genome):
        candidates = mixtures(experts, population, index)
        scores = score_all(problem, candidates, problem.tasks, "validation", count)
        error = 1 - np.mean([score.correct.mean(axis=1) for score in scores], axis=0)
        kl = np.mean([score.kl for score in scores], axis=0)
        predicted = costs.predict(np.asarray(population["rank"]))
        return np.stack([error, *predicted], axis=1).astype(np.float32), kl

    return fitness


def violation(fitness: np.ndarray, kl: np.ndarray, limits: search.Limits) -> np.ndarray:
    """How far each candidate misses the guide's limits: the sum of `search.violations`."""
    metrics = {
        "accuracy": 1 - fitness[:, 0],
        "latency_ms": fitness[:, 1],
        "vram_gb": fitness[:, 2],
        "throughput_tps": -fitness[:, 3],
        "kl": kl,
    }
    return np.sum([np.asarray(v) for v in search.violations(metrics, limits).values()], axis=0)


def start(rows: int, experts: int, settings: Settings, key) -> Genome:
    """The first population: every expert alone, 1/K, all ones, and uniform draws."""
    keys = jax.random.split(key)
    size = settings.population
    alpha = jax.random.uniform(keys[0], (size, rows, experts)) * settings.alpha_upper
    rank = jax.random.uniform(keys[1], (size,), minval=settings.lowest_rank)
    known = reference_alphas(experts)[:size]
    alpha = alpha.at[: len(known)].set(np.broadcast_to(known[:, None], (len(known), rows, experts)))
    return {"alpha": alpha, "rank": rank.at[: len(known)].set(1.0)}


def reference_alphas(experts: int) -> np.ndarray:
    """The mixtures that are always in the table: each expert alone, 1/K, all ones."""
    ones = np.ones(experts)
    return np.concatenate([np.eye(experts), [ones / experts], [ones]]).astype(np.float32)


def find(
    run: runs.Run, fitness: Fitness, rows: int, experts: int, settings: Settings, seed: int
) -> Found:
    """Search alpha (rows, experts) and the rank by the method of the settings."""

    def evaluate(population: Genome) -> Evaluated:
        if settings.normalize_alpha:
            population = {**population, "alpha": normalized(population["alpha"])}
        scored, kl = fitness(population)
        return Evaluated(population, scored, kl, violation(scored, kl, limits(settings)))

    method = find_nsga2 if settings.search == "nsga2" else find_cem
    last, volumes = method(run, evaluate, rows, experts, settings, seed)
    genomes = jax.tree.map(np.asarray, last.genomes)
    return Found(genomes, last.fitness, last.kl, last.violation, volumes)


def find_nsga2(run: runs.Run, evaluate, rows: int, experts: int, settings: Settings, seed: int):
    """NSGA-II until the hypervolume stands still or the generations are used up."""
    key = runs.key(seed, "nsga2")
    first_genomes = start(rows, experts, settings, runs.key(seed, "population"))
    template = jax.tree.map(lambda x: jnp.zeros(x.shape[1:]), first_genomes)
    method = search.NSGA2(settings.population, template)
    lower = {"alpha": jnp.zeros((rows, experts)), "rank": jnp.float32(settings.lowest_rank)}
    upper = {"alpha": jnp.full((rows, experts), settings.alpha_upper), "rank": jnp.float32(1)}
    params = method.default_params.replace(lower=lower, upper=upper)
    scored = evaluate(first_genomes)
    # worse than anything met at the start: fixed for the whole run, so volumes can be compared
    worst = scored.fitness.max(axis=0)
    reference = worst + 0.1 * np.abs(worst) + 1e-6
    start_key = runs.key(seed, "nsga2 start")
    state = method.init(start_key, first_genomes, scored.fitness, params, scored.violation)
    history = np.full(settings.generations + 1, np.nan, np.float32)
    history[0] = volume(state, reference)

    def one(number: int, carry):
        state, history = carry
        ask_key, tell_key = jax.random.split(jax.random.fold_in(key, number))
        population, state = method.ask(ask_key, state, params)
        seen = evaluate(population)
        state, _ = method.tell(tell_key, population, seen.fitness, state, params, seen.violation)
        history = history.copy()
        history[number + 1] = volume(state, reference)
        return (state, history), row(state, number + 1, float(history[number + 1]))

    def converged(number: int, carry) -> bool:
        return stands_still(carry[1][: number + 1])

    number, (state, history) = generations(
        run, f"seed{seed}-search", settings, seed, (state, history), one, converged
    )
    last = evaluate(method.get_population(state))
    return last, [float(v) for v in history[: number + 1]]


def find_cem(run: runs.Run, evaluate, rows: int, experts: int, settings: Settings, seed: int):
    """The cross-entropy method on accuracy alone, at full rank; a limit missed counts as error.

    What is left is the best mixture met and draws from the last distribution.
    """
    key = runs.key(seed, "cem")
    method = search.CEM(
        settings.population, {"alpha": jnp.zeros((rows, experts))}, reevaluate_best=True
    )
    params = method.default_params.replace(lower=0.0, upper=settings.alpha_upper)
    mean = {"alpha": jnp.full((rows, experts), 1 / experts)}
    state = method.init(runs.key(seed, "cem start"), mean, params)
    ranks = jnp.ones(settings.population)

    def one(number: int, state):
        ask_key, tell_key = jax.random.split(jax.random.fold_in(key, number))
        population, state = method.ask(ask_key, state, params)
        seen = evaluate({**population, "rank": ranks})
        error = seen.fitness[:, 0] + seen.violation
        state, _ = method.tell(tell_key, population, error, state, params)
        best = {"adas/best_accuracy": float(1 - seen.fitness[np.argmin(error), 0])}
        return state, {"adas/generation": number + 1, **best}

    _, state = generations(run, f"seed{seed}-cem", settings, seed, state, one)
    drawn, _ = method.ask(jax.random.fold_in(key, settings.generations), state, params)
    alpha = drawn["alpha"].at[0].set(method.get_best_solution(state)["alpha"])
    return evaluate({"alpha": alpha, "rank": ranks}), []


def generations(
    run: runs.Run, name: str, settings: Settings, seed: int, carry, one, converged=None
):
    """Run `one(number, carry) -> carry, row` for every generation; (generations run, carry).

    Every row is logged; every fifth carry, and the last, is a checkpoint.
    """
    number, carry = runs.restore_latest(run, carry, name=name) or (0, carry)
    with runs.progress(settings.generations, f"search, seed {seed}", initial=number) as advance:
        while number < settings.generations and not (converged and converged(number, carry)):
            carry, row = one(number, carry)
            number += 1
            runs.log(run, {"step": number, "seed": seed, **row})
            if number % 5 == 0:
                runs.save(run, number, carry, name=name)
            advance(1, accuracy=row["adas/best_accuracy"])
        runs.save(run, number, carry, name=name)
    return number, carry


def stands_still(history: np.ndarray) -> bool:
    """Whether the hypervolume has converged, once there is one."""
    return history[-1] > 0 and search.converged([float(v) for v in history])


def volume(state, reference: np.ndarray) -> float:
    """Hypervolume of the first front where it keeps the limits; 0 before any candidate does."""
    front = (np.asarray(state.rank) == 0) & (np.asarray(state.violation) == 0)
    return search.hypervolume(np.asarray(state.fitness)[front], reference) if front.any() else 0.0


def row(state, generation: int, hypervolume: float) -> dict[str, float]:
    """One generation under the guide's names.

    The front is of candidates that keep the limits; the best are of these, or of all before any
    does.
    """
    fitness, kept = np.asarray(state.fitness), np.asarray(state.violation) == 0
    best = fitness[kept if kept.any() else slice(None)].min(axis=0)
    return {
        "adas/generation": generation,
        "adas/best_accuracy": float(1 - best[0]),
        "adas/best_latency_ms": float(best[1]),
        "adas/best_memory_gb": float(best[2]),
        "adas/best_throughput_tps": float(-best[3]),
        "adas/pareto_front_size": int((kept & (np.asarray(state.rank) == 0)).sum()),
        "adas/hypervolume": hypervolume,
    }
