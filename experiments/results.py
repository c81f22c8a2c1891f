"""What a run found: the choice of the mixture, the table of test accuracies, the summary."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from experiments import mixture
from experiments.problem import Problem, score_all
from forge_jax import search, svf

Correct = dict[str, dict[str, np.ndarray]]
"""row of the table -> task -> (N,) bool, one entry a test item"""


class Chosen(NamedTuple):
    """The best mixture and its low-rank twin."""

    alpha: np.ndarray  # (groups, K)
    twin_rank: float  # the least rank fraction that keeps the accuracy


def choose(
    found: mixture.Found,
    problem: Problem,
    experts,
    index: dict[str, int],
    *,
    kl_limit: float,
    lowest_rank: float,
    twin_loss: float,
) -> Chosen:
    """Choose on all validation items: the best alpha at full rank, then the least rank it bears.

    Candidates are the search's last population, the reference mixtures and the base. The KL limit
    is kept where any candidate but the base keeps it; one whose KL is not finite is never chosen.
    The rank falls from 1 to `lowest_rank` until it costs more than `twin_loss` of accuracy; one
    at which no matrix becomes smaller is no twin.

    Raises:
      ValueError: no candidate has a finite KL.
    """
    rows, count = found.genomes["alpha"].shape[1:]
    known = np.concatenate([mixture.reference_alphas(count), np.zeros((1, count), np.float32)])
    known = np.repeat(known[:, None], rows, axis=1)
    alphas = np.concatenate([found.genomes["alpha"], known])

    def scored(alpha, rank):
        candidates = mixture.mixtures(experts, {"alpha": alpha, "rank": rank}, index)
        scores = score_all(problem, candidates, problem.tasks, "validation")
        accuracy = np.mean([x.correct.mean(axis=1) for x in scores], axis=0)
        return accuracy, np.mean([x.kl for x in scores], axis=0)

    accuracy, kl = scored(alphas, np.ones(len(alphas), np.float32))
    best = best_of(accuracy, kl, kl_limit)
    ranks = np.linspace(1, lowest_rank, len(alphas)).astype(np.float32)
    cut, _ = scored(np.broadcast_to(alphas[best], alphas.shape), ranks)
    twin = last_kept(cut, cut[0] - twin_loss)
    rank = float(ranks[twin])
    shapes = [(leaf.u.shape[0], leaf.vt.shape[1]) for leaf in leaves(problem)]
    saves = search.cost.memory(shapes, rank, 0.0) < search.cost.memory(shapes, 1.0, 0.0)
    return Chosen(alphas[best], rank if saves else 1.0)


def leaves(problem: Problem) -> list[svf.Factors]:
    """The decomposed matrices."""
    return [leaf for _, leaf in svf.named_factors(problem.weights["factors"])]


def best_of(accuracy: np.ndarray, kl: np.ndarray, limit: float) -> int:
    """The most accurate candidate within the KL limit, or without one if none keeps it.

    The last candidate is the base, which keeps any limit: it does not count for the others.
    """
    finite = np.isfinite(kl) & np.isfinite(accuracy)
    if not finite.any():
        raise ValueError("No mixture has a finite KL to the base and accuracy.")
    within = finite & (kl <= limit)
    allowed = within if within[:-1].any() else finite
    return int(np.argmax(np.where(allowed, accuracy - 1e-6 * np.where(finite, kl, 0), -np.inf)))


def last_kept(accuracy: np.ndarray, least: float) -> int:
    """How far a falling rank can go before its accuracy is first below `least`."""
    below = np.flatnonzero(accuracy < least)
    return (
        int(below[0]) - 1 if len(below) and below[0] > 0 else 0 if len(below) else len(accuracy) - 1
    )


def table(
    problem: Problem, experts, chosen: Chosen, index: dict[str, int]
) -> tuple[Correct, dict[str, float]]:
    """Test correctness of every row of the table, and its KL to the base, mean over the domains.

    The last row is the low-rank twin.
    """
    names = [t.name for t in problem.tasks]
    tasks = [*problem.tasks, *problem.unplanted]
    count = len(names)
    references = np.concatenate([np.zeros((1, count)), mixture.reference_alphas(count)])
    alphas = np.repeat(references[:, None], chosen.alpha.shape[0], axis=1)
    alphas = np.concatenate([alphas, [chosen.alpha, chosen.alpha]]).astype(np.float32)
    ranks = np.array([*np.ones(len(alphas) - 1), chosen.twin_rank])
    candidates = mixture.mixtures(experts, {"alpha": alphas, "rank": ranks}, index)
    scores = score_all(problem, candidates, tasks, "test")
    rows = ["base", *names, "uniform", "alpha_one", "best", "twin"]
    correct = {
        row: {task.name: score.correct[i] for task, score in zip(tasks, scores, strict=True)}
        for i, row in enumerate(rows)
    }
    # tasks without planted frequencies stand apart: they move no constraint
    kl = np.mean([score.kl for score in scores[:count]], axis=0)
    return correct, dict(zip(rows, kl.tolist(), strict=True))


def accuracies(correct: Correct, row: str, names: Sequence[str]) -> dict[str, float]:
    """Task -> accuracy of one row."""
    return {name: float(correct[row][name].mean()) for name in names}


def seed_summary(correct: Correct, names: Sequence[str]) -> dict[str, Any]:
    """One seed's table under the summary's keys."""
    rows = {
        row: accuracies(correct, row, names) for row in ("base", "uniform", "alpha_one", "best")
    }
    return {**rows, "experts": {name: accuracies(correct, name, names) for name in names}}


def average(trees: Sequence[Any]) -> Any:
    """The mean of equal nested dictionaries of numbers, in the order of their keys."""
    if isinstance(trees[0], dict):
        return {key: average([tree[key] for tree in trees]) for key in trees[0]}
    return float(np.mean(trees))


def gain(
    per_seed: Sequence[Correct], names: Sequence[str], rivals: Sequence[str]
) -> dict[str, float]:
    """Best mixture less its best rival, mean over domains, with a paired 95 % interval.

    The same test items are scored by both and in every seed: the standard error is that of the
    per-item difference, averaged over seeds. The rival is the best on average of each seed.
    """
    differences = []
    for correct in per_seed:
        rival = max(rivals, key=lambda row: np.mean(list(accuracies(correct, row, names).values())))
        differences.append({n: correct["best"][n].astype(float) - correct[rival][n] for n in names})
    paired = [np.mean([d[n] for d in differences], axis=0) for n in names]
    mean = float(np.mean([p.mean() for p in paired]))
    error = math.sqrt(sum(p.var(ddof=1) / len(p) for p in paired)) / len(names)
    return {"mean": mean, "low": mean - 1.96 * error, "high": mean + 1.96 * error}


def summary(
    per_seed: Sequence[Correct], names: Sequence[str], unplanted: Sequence[str], seeds
) -> dict[str, Any]:
    """summary.json without its timings; see experiments/report.py."""
    seen = [seed_summary(correct, names) for correct in per_seed]
    whole = average(seen)
    own = {n: whole["experts"][n][n] for n in names}
    kept = {n: whole["best"][n] / own[n] if own[n] else None for n in names}
    apart = {
        row: average([accuracies(correct, row, unplanted) for correct in per_seed])
        for row in per_seed[0]
        if unplanted
    }
    return {
        **whole,
        "seeds": list(seeds),
        "kept": kept,
        "gain": gain(per_seed, names, names),
        "gain_over_plain": gain(per_seed, names, ("uniform", "alpha_one")),
        "unplanted": apart,
        "per_seed": seen,
    }


def with_svf(
    reached: Sequence[dict[str, Any]], per_seed: Sequence[Correct], names: Sequence[str], size: int
) -> dict[str, Any]:
    """The ceilings' mean over seeds, below the experts on their own domains; `size` in bytes."""
    own = [{n: float(correct[n][n].mean()) for n in names} for correct in per_seed]
    return {"SVF": {"accuracy": average(own), "bytes": size}, **average(reached)}


def z_heatmap(experts, names: Sequence[str]) -> dict[str, np.ndarray]:
    """How far each expert moved each matrix: rms(z - 1)."""
    values = [np.sqrt(np.mean((np.asarray(z) - 1) ** 2, axis=1)) for z in experts.values()]
    return {
        "names": np.array(list(experts)),
        "values": np.stack(values, axis=1),
        "experts": np.array(list(names)),
    }


def mixed_z(alpha: np.ndarray, index: dict[str, int], experts):
    """The mixed z of one alpha (groups, K)."""
    return svf.mix(experts, mixture.by_path(jnp.asarray(alpha), index))


def show(summary: dict[str, Any], names: Sequence[str]) -> None:
    """Print the table of test accuracies, in per cent; several seeds as mean and spread."""
    lines = Table(title=f"test accuracy, %, seeds {summary['seeds']}")
    for head in ("", *names, "mean"):
        lines.add_column(head, justify="right" if head else "left")
    rows = {"base": lambda x: x["base"]}
    rows |= {f"{n} expert": lambda x, n=n: x["experts"][n] for n in names}
    rows |= {"uniform 1/K": lambda x: x["uniform"], "alpha = 1": lambda x: x["alpha_one"]}
    rows["best mixture"] = lambda x: x["best"]
    for label, row in rows.items():
        seen = 100 * np.array([[row(x)[n] for n in names] for x in summary["per_seed"]])
        seen = np.concatenate([seen, seen.mean(axis=1, keepdims=True)], axis=1)
        means = [f"{m:.1f}" for m in seen.mean(axis=0)]
        spreads = [f" ± {s:.1f}" for s in seen.std(axis=0, ddof=1)] if len(seen) > 1 else ""
        lines.add_row(label, *map("".join, zip(means, spreads or [""] * len(means), strict=True)))
    Console(width=100).print(lines)
    kept = ", ".join(f"{n} {100 * v:.0f} %" for n, v in summary["kept"].items() if v)
    print(f"the mixture keeps of each expert's own accuracy: {kept}")
    for key, rival in (("gain", "best single expert"), ("gain_over_plain", "better of 1/K and 1")):
        mean, low, high = (100 * summary[key][k] for k in ("mean", "low", "high"))
        print(f"over the {rival}: {mean:+.1f} points (95 %: {low:+.1f} to {high:+.1f})")
    for name, one in summary.get("ceilings", {}).items():
        scores = "  ".join(f"{n} {100 * a:.1f}" for n, a in one["accuracy"].items())
        print(f"own domain, {name} ({one['bytes'] / 1e3:,.0f} kB an expert): {scores}")
    for task in next(iter(summary["unplanted"].values()), {}):
        scores = {row: f"{100 * x[task]:.0f}" for row, x in summary["unplanted"].items()}
        print(f"without planted frequencies, {task}: {scores}")
