"""Few-shot adaptation: the mixture of experts that answers k examples best, found by CEM."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from forge_jax import search, svf
from forge_jax.adapt.serve import Experts

Score = Callable[[Callable[..., Any], Any], tuple[Bool[Array, " shots"], Float[Array, " shots"]]]
"""`score(apply, shots)`: is each answer right, and the log probability of the right one, nats"""


class OnShots(NamedTuple):
    """What a mixture makes of the shots."""

    accuracy: Float[Array, "..."]
    logp: Float[Array, "..."]  # mean over the shots, nats


class Found(NamedTuple):
    """The mixture that was found, and what it competed with."""

    alpha: Float[Array, "groups experts"]  # the best member met
    mean: Float[Array, "groups experts"]  # of the last distribution
    best: OnShots
    base: OnShots  # alpha = 0
    single: OnShots  # (K,), each expert alone
    uniform: OnShots  # alpha = 1/K
    history: Float[Array, " generations"]  # best fitness so far, minimised


@dataclasses.dataclass(frozen=True)
class FewShot:
    """Cross-entropy search over alpha (Transformer-Squared, arXiv 2501.06252, section 3.2).

    Population, elites, bounds and spread are those of the published code. Deviations: z = 1 + sum
    alpha (z_k - 1), so that alpha = 0 is the base; ties in accuracy are broken by log-likelihood
    among the elites too, not for the best alone; the first population holds the base, each expert
    and the uniform mixture, so that what is found is at least as good on the shots.
    """

    groups: Literal["global", "layer", "tensor"] = "global"
    """one alpha for the model, for each layer, for each matrix"""
    population: int = 32
    generations: int = 50
    elite_ratio: float = 0.2
    upper: float = 1.0
    std: float = 0.5
    """of the first population"""

    def index(self, paths: Sequence[str]) -> dict[str, int]:
        """The row of alpha that each matrix uses; a layer is what stands before the first "/"."""
        keys = {
            "global": ["" for _ in paths],
            "layer": [path.split("/")[0] for path in paths],
            "tensor": list(paths),
        }
        if self.groups not in keys:
            raise ValueError(f"`groups` must be one of {', '.join(keys)}, got {self.groups!r}.")
        order = list(dict.fromkeys(keys[self.groups]))
        return {path: order.index(key) for path, key in zip(paths, keys[self.groups], strict=True)}

    def by_path(self, alpha: Float[Array, "... groups experts"], paths: Sequence[str]):
        """Alpha of every matrix, {path: (..., K)}, as `svf.mix` takes it."""
        return {path: alpha[..., row, :] for path, row in self.index(paths).items()}

    def check(self, experts: int) -> None:
        """Raise a ValueError for settings that so many experts cannot be searched with."""
        if not (self.upper > 0 and self.std > 0 and 0 < self.elite_ratio <= 1):
            raise ValueError(
                "Wanted `upper` and `std` above 0 and `elite_ratio` in (0, 1], got "
                f"{self.upper}, {self.std}, {self.elite_ratio}."
            )
        if self.population < experts + 2 or self.generations < 1:
            raise ValueError(
                f"Wanted at least 1 generation and a population of {experts + 2}, for the base, "
                f"every expert and their mean; got {self.generations}, {self.population}."
            )

    def __call__(
        self,
        key: Array,
        adapted: svf.Transformed,
        factors: PyTree[Any],
        experts: Experts,
        score: Score,
        shots: Any,
    ) -> Found:
        """Search; a pure function, one program when it is compiled (`adapted`, `score` static).

        Raises:
            ValueError: there are no shots, or the population is too small for the references.
        """
        count = min((len(leaf) for leaf in jax.tree.leaves(shots)), default=0)
        if not count:
            raise ValueError("Few-shot adaptation needs at least one shot, got none.")
        paths = list(experts)
        named = references(len(experts[paths[0]]), max(self.index(paths).values()) + 1)
        self.check(len(experts[paths[0]]))
        cem = search.CEM(self.population, named[0], self.elite_ratio)
        params = cem.default_params.replace(lower=0.0, upper=self.upper, std_init=self.std)
        start = cem.init(key, named[-1], params)

        def evaluate(members) -> OnShots:
            alphas = self.by_path(members, paths)
            correct, logp = search.evaluate_population(
                adapted, factors, experts, alphas, score, shots, rounds=self.generations
            )
            return OnShots(correct.mean(axis=1), logp.mean(axis=1))

        def generation(state, inputs):
            key, number = inputs
            asked, state = cem.ask(key, state, params)
            first = asked.at[: len(named)].set(named)
            members = jnp.where(number == 0, first, asked)
            seen = evaluate(members)
            fitness = _fitness(seen, count)
            state, metrics = cem.tell(key, members, fitness, state, params)
            place = jnp.argmin(fitness)
            top = OnShots(seen.accuracy[place], seen.logp[place])
            head = OnShots(*(x[: len(named)] for x in seen))
            return state, (metrics["best_fitness"], fitness[place], top, head)

        inputs = (jax.random.split(key, self.generations), jnp.arange(self.generations))
        state, (history, each, top, head) = jax.lax.scan(generation, start, inputs)
        best = jax.tree.map(lambda x: x[jnp.argmin(each)], top)
        base, single, uniform = (
            OnShots(*(x[0][part] for x in head)) for part in (0, slice(1, -1), -1)
        )
        alpha, mean = cem.get_best_solution(state), cem.get_mean(state)
        return Found(alpha, mean, best, base, single, uniform, history)


def references(experts: int, groups: int) -> Float[Array, "references groups experts"]:
    """Alpha of the base, of every expert alone, and of the uniform mixture, in this order."""
    rows = [jnp.zeros((1, experts)), jnp.eye(experts), jnp.full((1, experts), 1 / experts)]
    return jnp.repeat(jnp.concatenate(rows)[:, None], groups, axis=1)


def _fitness(seen: OnShots, count: int) -> Float[Array, " population"]:
    """Minus the accuracy, and in place of one shot more the likelihood, mapped into (0, 1).

    A mixture that is no number at all is worst.
    """
    tie = 1.0 / (1.0 - jnp.minimum(seen.logp, 0.0))
    fitness = -(seen.accuracy + 0.99 * tie / count)
    return jnp.where(jnp.isnan(fitness), jnp.inf, fitness)
