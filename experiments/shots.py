"""Few-shot adaptation to a mixed domain, against the uniform mixture and the best single expert."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from experiments.problem import Problem
from experiments.questions import longest, questions
from forge_jax import adapt, search
from forge_jax.models import Judge, Questions


def mixed_domain(problem: Problem, seed: int, shots: int, tests: int):
    """Two domains in equal parts: their names, shots of the train split, questions of the test one.

    The pair goes round with the seed. The shots were seen by the experts in training, as questions
    of their domain; the mixture of domains was not.
    """
    pairs = list(itertools.combinations(problem.tasks, 2))
    pair = pairs[seed % len(pairs)]
    rng = np.random.default_rng((seed, 7))

    def drawn(split, count):
        share = [count - count // 2, count // 2]
        return [
            task.items[split][i]
            for task, n in zip(pair, share, strict=True)
            for i in rng.choice(len(task.items[split]), n, replace=False)
        ]

    return "+".join(t.name for t in pair), drawn("train", shots), drawn("test", tests)


def interval(differences: list[float]) -> dict[str, Any]:
    """Mean of paired differences with its 95 % t interval, which one difference does not have."""
    x = np.array(differences)
    mean = float(x.mean())
    if len(x) == 1:
        return {"mean": mean, "low": None, "high": None, "seeds": 1}
    half = float(stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x)))
    return {"mean": mean, "low": mean - half, "high": mean + half, "seeds": len(x)}


def few_shot(
    problem: Problem,
    experts,
    search_of: adapt.FewShot,
    *,
    seeds: list[int],
    shots: int,
    tests: int,
) -> dict[str, Any]:
    """For each seed test accuracies of what was found, the uniform mixture, the best single expert.

    The single expert is the best on the same shots, ties broken by likelihood.

    Raises:
      ValueError: there are no shots.
    """
    if shots < 1:
        raise ValueError("Few-shot adaptation needs at least one shot, got none.")
    adapted, factors = problem.model.adapted, problem.weights["factors"]
    paths, count = list(experts), len(problem.tasks)
    score = Judge(problem.model.decoder.spec)
    drawn = [mixed_domain(problem, seed, shots, tests) for seed in seeds]
    length = longest(problem, [i.prompt for _, a, b in drawn for i in a + b])

    @jax.jit
    def find(key, factors, experts, batch: Questions) -> adapt.Found:
        return search_of(key, adapted, factors, experts, score, batch)

    def tested(found: adapt.Found, single: int, batch: Questions) -> dict[str, float]:
        base, *alone, uniform = adapt.references(count, len(found.alpha))
        alphas = {"found": found.alpha, "uniform": uniform, "single": alone[single], "base": base}
        by_path = search_of.by_path(jnp.stack(list(alphas.values())), paths)
        judged = search.evaluate_population(adapted, factors, experts, by_path, score, batch)
        right = np.asarray(judged.correct).mean(axis=1)
        return dict(zip(alphas, right.tolist(), strict=True))

    rows = []
    for seed, (name, given, held_out) in zip(seeds, drawn, strict=True):
        found = find(jax.random.key(seed), factors, experts, questions(problem, given, length))
        order = np.lexsort((np.asarray(found.single.logp), np.asarray(found.single.accuracy)))
        single = int(order[-1])
        rows.append(
            {
                "seed": seed,
                "domain": name,
                "single": problem.tasks[single].name,
                "alpha": np.asarray(found.alpha.mean(axis=0)).tolist(),
                "shots": float(found.best.accuracy),
                "test": tested(found, single, questions(problem, held_out, length)),
            }
        )
    differences = {
        other: interval([r["test"]["found"] - r["test"][other] for r in rows])
        for other in ("uniform", "single")
    }
    return {"rows": rows, "found_less": differences}
