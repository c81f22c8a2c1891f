"""Published tests of a checkpoint and of what phase 7 made of it.

    make data demo-smollm2
    python -m experiments.exams --adapted runs/smollm2 --out runs/exams

Every model answers the same questions of GSM8K, HumanEval, QuaRTz and HellaSwag. With `--adapted`,
the directory of a `experiments.phase7` run, the models are the base, each expert and the mixture;
`--others` adds checkpoints such as a merged LoRA. GSM8K and HumanEval are written greedily and
judged by the final number and by the set's own tests in a sandbox; of QuaRTz and HellaSwag the
option with the highest log probability a byte is taken. Writes config.json and exams.json:
accuracies, and differences to the base with paired 95 % intervals over questions (adjusted as
Bonett and Price, 2012, so that few differences do not look like certainty). The sets are samples
and the prompts have no examples: the numbers compare these models, not with published ones.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import tyro

from experiments import model as models
from experiments import run as runs
from experiments import sandbox
from experiments.data.batches import pad, prompt_rows
from experiments.data.exams import NAMES, Choice, Exam, Written, load_exam
from experiments.problem import CACHE, experts_sha256, run_settings
from forge_jax import adapt, svf
from forge_jax.models import LogLikelihood, Questions, Respond
from interop import load_phase8

STEP = 64
"""prompts are padded to a multiple of so many tokens, so that few programs are compiled"""


@dataclasses.dataclass(frozen=True)
class Args:
    out: Path = Path("runs/exams")
    """run directory to create"""
    checkpoint: Path | None = None
    """the preset's own, or another: Phase 6 file, Hugging Face directory or .gguf"""
    adapted: Path | None = None
    """directory of a phase7 run on that checkpoint"""
    others: tuple[Path, ...] = ()
    """further checkpoints of the same shape and tokenizer"""
    only: tuple[str, ...] = ()
    """models that sit, such as mixture or lora-merged (of runs/lora/merged), and the base; all
    unless given"""
    data: Path = Path("data")
    """where `make data` put the sets"""
    exams: tuple[Literal["gsm8k", "humaneval", "quartz", "hellaswag"], ...] = NAMES
    items: int = 100
    """questions of each set at most"""
    rows: int = 20
    """questions, or options, that are answered at once"""
    resume: bool = False
    """go on with a killed run in `out`"""
    replace: bool = False
    """take the place of an earlier run in `out` once this one is whole"""


def candidates(
    args: Args, made: models.Model, weights: models.Weights
) -> dict[str, Callable[[], Any]]:
    """Name -> a function that gives the parameters: the base, experts, mixture, others.

    All are looked at before any is asked.

    Raises:
      ValueError: the experts are of another base or selection, a checkpoint has another shape or
        tokenizer, or two models have one name.
    """
    found: list[tuple[str, Callable[[], Any]]] = [("base", lambda: made.checkpoint.params)]
    if args.adapted is not None:
        adapted = load_phase8(args.adapted)
        if adapted.metadata.get("base_sha256") != made.checkpoint.sha256:
            raise ValueError(f"The experts in {args.adapted} are of another base.")
        materialized = jax.jit(svf.materialize)
        for name, z in adapted.experts.items():
            own: Any = {k: v[None] for k, v in z.items()}
            adapt.check_experts(weights["factors"], own)
            found.append((name, partial(materialized, weights["factors"], z)))
        found.append(("mixture", lambda: adapted.params))
    for path in args.others:
        other = models.read(path)
        words = None if other.tokenizer is None else other.tokenizer.to_str()
        if other.spec != made.checkpoint.spec or words != made.tokenizer.to_str():
            raise ValueError(f"{path} has another shape or tokenizer than the base.")
        found.append(
            (f"{path.parent.name}-{path.name}", lambda path=path: models.read(path).params)
        )
    names = [name for name, _ in found]
    if len(set(names)) < len(names):
        raise ValueError(f"Every model needs a name of its own, got {', '.join(names)}.")
    if unknown := [name for name in args.only if name not in names]:
        raise ValueError(f"`--only` must be among {', '.join(names)}, got {', '.join(unknown)}.")
    chosen = {"base", *args.only} if args.only else names
    return {name: parameters for name, parameters in found if name in chosen}


def groups(prompts: Sequence[list[int]], size: int, most: int) -> Iterator[tuple[np.ndarray, int]]:
    """Questions of like length together: (indices, padded length), each group of `size` rows.

    Lengths are rounded up, to `most` at most.

    The last group repeats a question, so that a shape is compiled once.
    """
    order = np.argsort([len(p) for p in prompts], kind="stable")
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        longest = max(len(prompts[i]) for i in chosen)
        yield np.resize(chosen, size), min(-(-longest // STEP) * STEP, most)


def sit_choice(made: models.Model, params, exam: Exam, rows: int) -> np.ndarray:
    """Whether the right option has the highest log probability a byte, (questions,)."""
    asked = [(q.prompt, o) for q in exam.questions if isinstance(q, Choice) for o in q.options]
    prompts = prompt_rows(made.tokenizer, [p for p, _ in asked], made.bos)
    options = prompt_rows(made.tokenizer, [o for _, o in asked], None)
    spec, width = made.decoder.spec, max(map(len, options))
    models.check_length(spec, max(map(len, prompts)), width)
    logp = np.zeros(len(asked))
    for chosen, length in groups(prompts, rows, spec.max_position_embeddings - width):
        asked_for: Any = pad([prompts[i] for i in chosen], length, 0, left=True)
        offered: Any = pad([options[i] for i in chosen], width, 0, left=False)
        batch = Questions(*asked_for, *offered)
        logp[chosen] = likelihood(made.decoder, params, batch)
    per_byte = iter(logp / [len(o.encode()) for _, o in asked])
    right = []
    for question in exam.questions:
        assert isinstance(question, Choice)
        scores = [next(per_byte) for _ in question.options]
        right.append(int(np.argmax(scores)) == question.right)
    return np.array(right)


def sit_written(made: models.Model, params, exam: Exam, rows: int) -> np.ndarray:
    """Whether the greedy response is right, (questions,)."""
    prompts = prompt_rows(made.tokenizer, [q.prompt for q in exam.questions], made.bos)
    models.check_length(made.decoder.spec, max(map(len, prompts)), exam.new_tokens)
    written = [""] * len(prompts)
    most = made.decoder.spec.max_position_embeddings - exam.new_tokens
    for chosen, length in groups(prompts, rows, most):
        rows_of: Any = pad([prompts[i] for i in chosen], length, 0, left=True)
        batch = Questions(*rows_of, *(x[:, :0] for x in rows_of))
        out = respond(made.decoder, exam.new_tokens, made.stops, params, batch)
        said = models.texts(made, np.asarray(out.tokens), np.asarray(out.mask))
        for i, text in zip(chosen, said, strict=True):
            written[i] = text
    return np.array([judged(q, t) for q, t in zip(exam.questions, written, strict=True)])


def judged(question: Any, text: str) -> bool:
    """Whether the response, cut where the question says, is right."""
    assert isinstance(question, Written)
    for end in question.ends:
        text = text.partition(end)[0]
    return question.is_right(text)


@partial(jax.jit, static_argnums=0)
def likelihood(decoder, params, batch: Questions):
    """Log probability of every row's answer, nats."""
    return LogLikelihood(decoder.spec)(partial(decoder.apply, {"params": params}), batch)


@partial(jax.jit, static_argnums=(0, 1, 2))
def respond(decoder, new_tokens: int, stops: tuple[int, ...], params, batch: Questions):
    """The greedy responses."""
    apply = partial(decoder.apply, {"params": params})
    return Respond(decoder.spec, new_tokens, stops)(apply, batch)


def compared(right: np.ndarray, base: np.ndarray) -> dict[str, float]:
    """Accuracy, and the difference to the base with its 95 % interval over paired questions."""
    gained, lost = float((right & ~base).sum()), float((base & ~right).sum())
    count = len(right)
    p, q = (gained + 1) / (count + 2), (lost + 1) / (count + 2)
    spread = 1.96 * math.sqrt((p + q - (p - q) ** 2) / (count + 2))
    return {
        "accuracy": float(right.mean()),
        "difference": (gained - lost) / count,
        "low": p - q - spread,
        "high": p - q + spread,
        "questions": count,
    }


def show(found: dict[str, dict[str, dict[str, float]]]) -> None:
    """Print the table, in per cent."""
    for exam, rows in found.items():
        print(f"{exam} ({next(iter(rows.values()))['questions']} questions)")
        for name, row in rows.items():
            interval = f"{100 * row['low']:+.1f} to {100 * row['high']:+.1f}"
            print(
                f"  {name:20} {100 * row['accuracy']:5.1f}  {100 * row['difference']:+.1f} "
                f"({interval})"
            )


@runs.clean_errors()
def main(args: Args) -> None:
    """Let every model sit every exam."""
    if args.items < 2 or args.rows < 1:
        raise ValueError("`items` must be at least 2 and `rows` at least 1.")
    if not (args.resume or args.replace):
        runs.refuse_existing(args.out)
    if "humaneval" in args.exams and (why := sandbox.missing()) is not None:
        raise ValueError(
            f"humaneval runs programs, and here none are run: {why}. Leave it out: --exams gsm8k "
            "quartz hellaswag."
        )
    exams = [load_exam(args.data, name, args.items) for name in args.exams]
    theirs = run_settings(args.adapted) if args.adapted else {"select": "both", "max_full": None}
    path = args.checkpoint or models.smollm2()
    made, weights = models.load(path, theirs["select"], CACHE, theirs["max_full"])
    given = {"experts_sha256": experts_sha256(args.adapted)}
    config = {**runs.plain(args), "base_sha256": made.checkpoint.sha256, **given}
    asked = candidates(args, made, weights)
    right: dict[str, dict[str, list[bool]]] = {exam.name: {} for exam in exams}
    with runs.opened(args.out, config, resume=args.resume, replace=args.replace) as run:
        for name, parameters in asked.items():
            params = jax.device_put(parameters())
            for exam in exams:
                sit = sit_choice if isinstance(exam.questions[0], Choice) else sit_written
                given = partial(sit, made, params, exam, args.rows)
                right[exam.name][name] = runs.once(run, f"{exam.name}-{name}", given)
                print(f"{exam.name}, {name}: {100 * np.mean(right[exam.name][name]):.1f} %")
        found = {
            exam: {name: compared(np.array(x), np.array(rows["base"])) for name, x in rows.items()}
            for exam, rows in right.items()
        }
        runs.write_json(run.path / "exams.json", {"exams": found, "seconds": runs.seconds(run)})
        done = runs.finish(run)
    show(found)
    print(f"written: {done / 'exams.json'}")


if __name__ == "__main__":
    main(tyro.cli(Args, prog="python -m experiments.exams", description=__doc__))
