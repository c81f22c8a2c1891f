"""The search for the best mixture of experts: NSGA-II or CEM, every candidate measured.

A genome is alpha in [0, upper]^K (one for the whole model, or one for each layer) and the rank
fraction rho below which singular components are dropped. Accuracy and KL come from running the
candidate on validation items; latency, memory and throughput from the cost model that was
calibrated on measured runs of a few rank fractions.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import run as runs
from experiments.data.tasks import Task, first
from experiments.measure import CostModel
from experiments.model import Weights
from forge_jax import search, svf

Genome = dict[str, Any]
"""alpha (groups, K) and rank (), with a leading population axis"""


class Settings(NamedTuple):
    """What the search depends on."""

    population: int
    generations: int
    items: int  # validation items a domain and evaluation
    evaluations: int  # averaged in each fitness, the guide's remedy for noise
    per_layer: bool
    upper: float  # bound of alpha: 2, or 1 as the guide's remedy
    normalize: bool  # alpha sums to 1, another remedy
    lowest_rank: float


class Found(NamedTuple):
    """The last population and what it scored; P members."""

    genomes: Genome
    fitness: np.ndarray  # (P, 4): error, latency_ms, memory_gb, -throughput_tps
    kl: np.ndarray  # (P,) nats
    hypervolume: list[float]  # of each generation


def groups(paths: Sequence[str], per_layer: bool) -> dict[str, int]:
    """The row of alpha that each matrix uses: its layer's, or the only one."""
    if not per_layer:
        return dict.fromkeys(paths, 0)
    layers = list(dict.fromkeys(path.split("/")[0] for path in paths))
    return {path: layers.index(path.split("/")[0]) for path in paths}


def by_path(alpha, index: dict[str, int]) -> dict[str, Any]:
    """Alpha (groups, K) as one (K,) vector for every matrix."""
    return {path: alpha[row] for path, row in index.items()}


def normalized(alpha):
    """Alpha with a sum of 1 in every group; all zero stays."""
    return alpha / jnp.maximum(alpha.sum(axis=-1, keepdims=True), 1e-6)


def candidate_scales(factors, experts, genome: Genome, index: dict[str, int]):
    """The singular values of one genome: mixed, and zero from its rank on."""
    s = svf.scales(factors, svf.mix(experts, by_path(genome["alpha"], index)))

    def cut(values):
        full = values.shape[-1]
        kept = search.cost.deployed_rank(full, full, genome["rank"])
        return jnp.where(jnp.arange(full) < kept, values, 0)

    return {path: cut(values) for path, values in s.items()}


def make_scales(index: dict[str, int]):
    """A compiled function (factors, experts, population) -> singular values (P, r)."""

    @jax.jit
    def scales(factors, experts, population: Genome):
        return jax.vmap(lambda genome: candidate_scales(factors, experts, genome, index))(
            population
        )

    return scales


def make_fitness(
    weights: Weights, experts, tasks: Sequence[Task], scorer, costs: CostModel, settings, index
) -> Callable[[Genome], tuple[np.ndarray, np.ndarray]]:
    """A function population -> fitness (P, 4), KL (P,): every candidate runs on every domain."""
    scales = make_scales(index)
    count = settings.items * settings.evaluations
    batches = [first(t.batches["validation"], count) for t in tasks]
    answers = [[i.answer for i in t.items["validation"][:count]] for t in tasks]

    def fitness(population: Genome):
        s = scales(weights["factors"], experts, population)
        scores = [
            scorer(weights, s, batch, task, wanted)
            for task, batch, wanted in zip(tasks, batches, answers, strict=True)
        ]
        error = 1 - np.mean([score.correct.mean(axis=1) for score in scores], axis=0)
        kl = np.mean([score.kl for score in scores], axis=0)
        predicted = costs.predict(np.asarray(population["rank"]))
        return np.stack([error, *predicted], axis=1).astype(np.float32), kl

    return fitness


def violation(fitness: np.ndarray, kl: np.ndarray, limits: search.Limits) -> np.ndarray:
    """How far each candidate misses the guide's limits, summed as fractions of them."""
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
    alpha = jax.random.uniform(keys[0], (size, rows, experts)) * settings.upper
    rank = jax.random.uniform(keys[1], (size,), minval=settings.lowest_rank)
    known = reference_alphas(experts)[:size]
    alpha = alpha.at[: len(known)].set(np.broadcast_to(known[:, None], (len(known), rows, experts)))
    return {"alpha": alpha, "rank": rank.at[: len(known)].set(1.0)}


def reference_alphas(experts: int) -> np.ndarray:
    """The mixtures that are always in the table: each expert alone, 1/K, all ones."""
    ones = np.ones(experts)
    return np.concatenate([np.eye(experts), [ones / experts], [ones]]).astype(np.float32)


def find(
    run: runs.Run,
    fitness: Callable[[Genome], tuple[np.ndarray, np.ndarray]],
    rows: int,
    experts: int,
    settings: Settings,
    limits: search.Limits,
    seed: int,
) -> Found:
    """Run NSGA-II until the hypervolume stands still or the generations are used up."""
    key = jax.random.fold_in(jax.random.key(seed), 7)
    first_genomes = start(rows, experts, settings, key)
    template = jax.tree.map(lambda x: jnp.zeros(x.shape[1:]), first_genomes)
    method = search.NSGA2(settings.population, template)
    lower = {"alpha": jnp.zeros((rows, experts)), "rank": jnp.float32(settings.lowest_rank)}
    upper = {"alpha": jnp.full((rows, experts), settings.upper), "rank": jnp.float32(1)}
    params = method.default_params.replace(lower=lower, upper=upper)

    def evaluate(population: Genome):
        if settings.normalize:
            population = {**population, "alpha": normalized(population["alpha"])}
        scored, kl = fitness(population)
        return scored, kl, violation(scored, kl, limits)

    name = f"seed{seed}-search"
    scored, kl, missed = evaluate(first_genomes)
    # worse than anything met at the start: fixed for the whole run, so volumes can be compared
    reference = scored.max(axis=0) + 0.1 * np.abs(scored.max(axis=0)) + 1e-6
    state = method.init(key, first_genomes, scored, params, missed)
    volumes = [volume(state, reference)]
    history = np.full(settings.generations + 1, np.nan, np.float32)
    history[0] = volumes[0]
    generation, (state, history) = runs.restore_latest(run, (state, history), name=name) or (
        0,
        (state, history),
    )
    with runs.progress(settings.generations, f"search, seed {seed}", initial=generation) as advance:
        while generation < settings.generations and not stands_still(history[: generation + 1]):
            ask_key, tell_key = jax.random.split(jax.random.fold_in(key, generation))
            population, state = method.ask(ask_key, state, params)
            scored, kl, missed = evaluate(population)
            state, _ = method.tell(tell_key, population, scored, state, params, missed)
            generation += 1
            history[generation] = volume(state, reference)
            runs.log(run, row(state, generation, float(history[generation]), seed))
            if generation % 5 == 0:
                runs.save(run, generation, (state, history), name=name)
            advance(1, accuracy=1 - float(state.fitness[:, 0].min()))
        runs.save(run, generation, (state, history), name=name)
    genomes = method.get_population(state)
    scored, kl, _ = evaluate(genomes)
    return Found(
        jax.tree.map(np.asarray, genomes),
        scored,
        kl,
        [float(v) for v in history[: generation + 1]],
    )


def find_cem(
    run: runs.Run,
    fitness: Callable[[Genome], tuple[np.ndarray, np.ndarray]],
    rows: int,
    experts: int,
    settings: Settings,
    limits: search.Limits,
    seed: int,
) -> Found:
    """The cross-entropy method on accuracy alone, at full rank; a limit missed counts as error."""
    key = jax.random.fold_in(jax.random.key(seed), 8)
    template = {"alpha": jnp.zeros((rows, experts))}
    method = search.CEM(settings.population, template, reevaluate_best=True)
    params = method.default_params.replace(lower=0.0, upper=settings.upper)
    state = method.init(key, {"alpha": jnp.full((rows, experts), 1 / experts)}, params)
    name = f"seed{seed}-cem"
    generation, state = runs.restore_latest(run, state, name=name) or (0, state)
    found = None
    with runs.progress(settings.generations, f"cem, seed {seed}", initial=generation) as advance:
        while generation < settings.generations:
            ask_key, tell_key = jax.random.split(jax.random.fold_in(key, generation))
            population, state = method.ask(ask_key, state, params)
            full = {"alpha": population["alpha"], "rank": jnp.ones(settings.population)}
            if settings.normalize:
                full = {**full, "alpha": normalized(full["alpha"])}
            scored, kl = fitness(full)
            scalar = scored[:, 0] + violation(scored, kl, limits)
            state, _ = method.tell(tell_key, population, scalar, state, params)
            found = Found(jax.tree.map(np.asarray, full), scored, kl, [])
            generation += 1
            best = scored[np.argmin(scored[:, 0])]
            logged = {"step": generation, "seed": seed, "adas/generation": generation}
            runs.log(run, {**logged, "adas/best_accuracy": float(1 - best[0])})
            runs.save(run, generation, state, name=name)
            advance(1, accuracy=float(1 - best[0]))
    best = {"alpha": method.get_best_solution(state)["alpha"][None], "rank": jnp.ones(1)}
    if settings.normalize:
        best = {**best, "alpha": normalized(best["alpha"])}
    scored, kl = fitness(best) if found is None else (None, None)
    if found is None:
        return Found(jax.tree.map(np.asarray, best), scored, kl, [])
    return found


def stands_still(history: np.ndarray) -> bool:
    """Whether the hypervolume has converged, once there is one."""
    return history[-1] > 0 and search.converged([float(v) for v in history])


def volume(state, reference: np.ndarray) -> float:
    """Hypervolume of the first front where it keeps the limits; 0 before any candidate does."""
    front = (np.asarray(state.rank) == 0) & (np.asarray(state.violation) == 0)
    return search.hypervolume(np.asarray(state.fitness)[front], reference) if front.any() else 0.0


def row(state, generation: int, hypervolume: float, seed: int) -> dict[str, float]:
    """One generation under the guide's names."""
    fitness = np.asarray(state.fitness)
    best = fitness.min(axis=0)
    return {
        "step": generation,
        "seed": seed,
        "adas/generation": generation,
        "adas/best_accuracy": float(1 - best[0]),
        "adas/best_latency_ms": float(best[1]),
        "adas/best_memory_gb": float(best[2]),
        "adas/best_throughput_tps": float(-best[3]),
        "adas/pareto_front_size": int((np.asarray(state.rank) == 0).sum()),
        "adas/hypervolume": hypervolume,
    }
