"""Race the fitness of few-shot adaptation on a real model: 32 mixtures of experts, ten shots.

    python -m experiments.bench.few_shot runs/bench --experts runs/demo

Model, experts, mixed domain and shots are those of `experiments.adapt` on that run, padded to their
own longest; the mixtures are the base, every expert, the uniform one and random ones in [0, 1].
Fitness is which answers are right as a whole. The public way rebuilds every matrix of a candidate
and generates, here up to the longest answer. Ours asks whether each token of the answer has the
largest logit given those before it (`models.Judge`), which is the same where the answer must be
exact, and the race ends where it is not; it cannot replace free text from which a number is read.
"Judged" rebuilds too and asks as ours does: what is left between the two is the rebuilding, one
batch for all in place of one for each, and the compiler.
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
import tyro

from experiments import adapt
from experiments import run as runs
from experiments.bench import decoders, race
from experiments.bench.population import Ask, folded, one_by_one
from experiments.bench.race import OURS, PUBLIC, TORCH
from experiments.problem import Problem
from experiments.questions import longest, questions
from experiments.shots import mixed_domain
from forge_jax import search, svf
from forge_jax.adapt import FewShot, references
from forge_jax.models import Judge, Questions

JUDGED, NO_DIAGONAL = "public way, judged", "public way, judged, no diagonal matrix"
EXPERTS = Path("runs/demo")
"""what `make demo` writes"""
FLOOR = 10.0


@dataclasses.dataclass(frozen=True)
class Args(race.Args):
    experts: Path = EXPERTS
    """directory of a phase7 run"""
    base: Literal["nano", "smollm2"] = "nano"
    """of that run"""
    population: int = 32
    """mixtures; at least the base, every expert and the uniform one"""
    shots: int = 10
    """questions of the mixed domain"""

    @property
    def is_standard(self) -> bool:
        """Whether the floor is meant for these settings."""
        return (self.population, self.shots) == (32, 10)


def case_of(problem: Problem, experts: dict[str, np.ndarray]) -> decoders.Case:
    """The model and its experts as the races take them."""
    model, factors = problem.model, problem.weights["factors"]
    checkpoint = model.checkpoint
    return decoders.Case(checkpoint.spec, model.decoder, checkpoint.params, factors, experts)


def shots_of(problem: Problem, count: int) -> Questions:
    """The first mixed domain's shots; answers as long as the longest of them.

    Raises:
      ValueError: there are no shots, no second domain, or images, which no side here is given.
    """
    if count < 1 or len(problem.tasks) < 2:
        given = f"{count} shots and {len(problem.tasks)} domains"
        raise ValueError(f"Wanted at least one shot and two domains, got {given}.")
    _, items, _ = mixed_domain(problem, 0, count, 2)
    if problem.model.image_token is not None and any(item.image is not None for item in items):
        raise ValueError("The first two domains of the run must be without images.")
    batch = questions(problem, items, longest(problem, [item.prompt for item in items]))
    longest_answer = int(batch.answer_mask.sum(axis=1).max())
    return batch._replace(
        answers=batch.answers[:, :longest_answer],
        answer_mask=batch.answer_mask[:, :longest_answer],
        images=None,
    )


def mixtures(count: int, experts: int) -> np.ndarray:
    """The base, every expert, the uniform mixture, and others drawn from [0, 1].

    Raises:
      ValueError: there are fewer than those named.
    """
    FewShot(population=count).check(experts)
    drawn = np.random.default_rng(2).uniform(0, 1, (count, experts))
    return np.concatenate([references(experts, 1)[:, 0], drawn])[:count].astype(np.float32)


def ours(case: decoders.Case, shots: Questions, alpha) -> race.Contender:
    """All candidates in one program, with the likelihoods that break the search's ties."""
    adapted, score = svf.transform(case.decoder), Judge(case.spec)

    def evaluate(factors, experts, alpha, shots):
        return search.evaluate_population(adapted, factors, experts, alpha, score, shots)

    experts = jax.tree.map(jnp.asarray, case.experts)
    made = race.jax_contender(evaluate, case.factors, experts, jnp.asarray(alpha), shots)
    return made._replace(answer=lambda: made.run().correct)


class Tensors(NamedTuple):
    """The shots in torch, as `Questions`."""

    tokens: torch.Tensor
    mask: torch.Tensor
    answers: torch.Tensor
    answer_mask: torch.Tensor


def in_torch(shots: Questions) -> Tensors:
    """The shots as tensors of integers, the answers' mask of truth values."""
    tokens, mask, answers, live = (
        torch.tensor(np.asarray(x), device=decoders.DEVICE) for x in shots[:4]
    )
    return Tensors(tokens.long(), mask.long(), answers.long(), live)


def are_right(written: torch.Tensor, shots: Tensors, times: int) -> torch.Tensor:
    """Whether each answer is what was written, (times, shots)."""
    answers, live = (x.repeat(times, 1) for x in (shots.answers, shots.answer_mask))
    return ((written == answers) | ~live).all(dim=1).view(times, -1)


def generating(shots: Tensors, stops: tuple[int, ...]) -> Ask:
    """Write the answers; no longer than the longest, as nothing longer is right."""

    def ask(model, times: int):
        prompts, mask = (x.repeat(times, 1) for x in (shots.tokens, shots.mask))
        most = shots.answers.shape[1]
        knobs: dict[str, Any] = {"do_sample": False, "max_new_tokens": most, "pad_token_id": 0}
        out = model.generate(prompts, attention_mask=mask, eos_token_id=list(stops), **knobs)
        written = out[:, prompts.shape[1] :]
        written = torch.nn.functional.pad(written, (0, most - written.shape[1]))
        return are_right(written, shots, times)

    return ask


def judging(shots: Tensors) -> Ask:
    """Ask for the largest logit at every token of the answers, in one pass."""
    row = torch.cat([shots.tokens, shots.answers], dim=1)
    row_mask = torch.cat([shots.mask, shots.answer_mask.long()], dim=1)

    def ask(model, times: int):
        tokens, mask = row.repeat(times, 1), row_mask.repeat(times, 1)
        logits = model(
            tokens,
            attention_mask=mask,
            position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),
            use_cache=False,
            logits_to_keep=shots.answers.shape[1] + 1,
        ).logits
        return are_right(logits[:, :-1].argmax(dim=-1), shots, times)

    return ask


def work(case: decoders.Case, shots: Questions, population: int) -> race.Work:
    """Count the products of the form that `evaluate_population` takes; mixing is not counted."""
    rows, answer = shots.answers.shape
    length = shots.tokens.shape[1] + answer
    experts: Any = case.experts
    form = search.cheaper_form(case.factors, experts, rows * length, population)
    given = {"factored": form == "factored", "logits": answer}
    return decoders.decoder_work(case, population * rows, length - 1, **given)


def make(problem: Problem, experts: dict[str, np.ndarray], args: Args) -> race.Race:
    """The race on one run's experts, in float32 on both sides."""
    case, shots = case_of(problem, experts), shots_of(problem, args.shots)
    alpha = mixtures(args.population, len(problem.tasks))
    theirs, first = in_torch(shots), ours(case, shots, alpha)
    generate, judge = generating(theirs, problem.model.stops), judging(theirs)
    entries = {
        OURS: first,
        PUBLIC: one_by_one(case, alpha, generate, diagonal=True),
        JUDGED: one_by_one(case, alpha, judge, diagonal=True),
        NO_DIAGONAL: one_by_one(case, alpha, judge, diagonal=False),
        TORCH: folded(case, alpha, len(shots.tokens), judge),
    }
    right = np.asarray(first.outcome())
    kind = "" if args.is_standard else f"{args.population}x{args.shots}_"
    spec = case.spec
    return race.Race(
        name=f"few_shot_{kind}{spec.hidden_size}",
        title=(
            f"{args.population} mixtures of {len(problem.tasks)} experts of {args.base}, which of "
            f"{args.shots} answers are right: generated the public way, judged by ours"
        ),
        settings={
            "hidden": spec.hidden_size,
            "layers": spec.num_hidden_layers,
            "population": args.population,
            "experts": len(problem.tasks),
            "base_sha256": problem.model.checkpoint.sha256[:12],
            "domain": "+".join(task.name for task in problem.tasks[:2]),
            "shots": args.shots,
            "prompt_tokens": shots.tokens.shape[1],
            "answer_tokens": shots.answers.shape[1],
        },
        entries=entries,
        difference=race.unequal,
        tolerance=0.0,
        floors={} if kind else {PUBLIC: FLOOR},
        work=work(case, shots, args.population),
        unit="population",
        summary=lambda: {"answers right, share of all": float(right.mean())},
    )


@runs.clean_errors()
def main(args: Args) -> None:
    """Race on the experts of a run."""
    loading = adapt.PRESETS[args.base][1]
    problem, experts = adapt.load(
        dataclasses.replace(loading, experts=args.experts, shots=args.shots)
    )
    assert experts is not None
    race.command(args, lambda dtype: iter([make(problem, experts, args)]))


if __name__ == "__main__":
    main(tyro.cli(Args, prog="python -m experiments.bench.few_shot", description=__doc__))
