"""What the training commands of `experiments.evolve` take, and the search that it means."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from experiments.evolution.candidates import NO_LIMITS, Limits
from forge_jax import evolve


@dataclasses.dataclass(frozen=True)
class Common:
    """What every training command takes."""

    files: tyro.conf.Positional[tuple[Path, ...]]
    """YAML documents, or directories of them; the first is the baseline"""
    out: Annotated[Path, tyro.conf.arg(aliases=["--output"])]
    """run directory to create"""
    task: Literal["markov", "recall", "copy", "sums", "text"] = "markov"
    """what is learned; text: Python's reference manual"""
    data: Path | None = None
    """a file whose bytes are learned instead; its last tenth is held out"""
    seq_len: int = 128
    """tokens of a row"""
    batch_size: int = 4
    """rows of a batch"""
    held_out: int = 8
    """batches that scores are of"""
    repeats: int = 1
    """seeds that a candidate is trained with; its score is their mean"""
    seed: int = 0
    """decides everything"""
    lr: float | None = None
    """learning rate of all, in place of the documents' own"""
    equal_flops: bool = False
    """count the steps of a candidate so that its FLOPs are those of the first document"""
    limits: Limits = NO_LIMITS
    plan: bool = False
    """print rungs and cost, then end"""
    time_budget: float | None = None
    """seconds after which no training begins; a resumed run may have another"""
    deep_steps: int = 0
    """train the baseline and the best from scratch for so many steps with fresh seeds"""
    deep_top_k: int = 1
    """so many of the best"""
    deep_seeds: int = 3
    """fresh seeds of each"""
    device: str | None = None
    """cpu, cuda, ...; JAX's choice unless given"""
    cache: Path | None = Path(".cache/jax")
    """directory of compiled programs, unless the environment names one, and, in `results`, of what
    trainings found, which are not run again; None: JAX's settings, and everything is trained"""
    resume: bool = False
    """go on with a killed run in `out`; with --replace if it was started so"""
    replace: bool = False
    """take the place of an earlier run in `out` once this one is whole"""
    wandb: str | None = None
    """Weights & Biases project; off unless given"""
    tensorboard: bool = False
    """write event files into the run directory too"""


@dataclasses.dataclass(frozen=True)
class Train(Common):
    """Train each document for the same steps."""

    out: Annotated[Path, tyro.conf.arg(aliases=["--output"])] = Path("runs/train")
    """run directory to create"""
    seq_len: int = 64
    """tokens of a row"""
    steps: int = 20
    """of training"""


@dataclasses.dataclass(frozen=True)
class Sweep(Common):
    """Send documents through successive halving, then hurdles."""

    out: Annotated[Path, tyro.conf.arg(aliases=["--output"])] = Path("runs/sweep")
    """run directory to create"""
    asha_min: int = 10
    """steps of the first rung"""
    asha_max: int = 60
    """steps at the end of halving, at most"""
    asha_reduction: int = 3
    """one in so many goes on, to so many times the steps"""
    pdh_base: int = 20
    """steps of a stage behind a hurdle"""
    pdh_stages: int = 3
    """such stages at most"""
    pdh_births: int = 2
    """trials that end halving between two hurdles"""


@dataclasses.dataclass(frozen=True)
class Evolve(Sweep):
    """Let documents have children, and send all through the ladder."""

    out: Annotated[Path, tyro.conf.arg(aliases=["--output"])] = Path("runs/evolution")
    """run directory to create"""
    seq_len: int = 192
    """tokens of a row"""
    batch_size: int = 6
    """rows of a batch"""
    generations: int = 2
    """times a generation is born; the documents are the first of it"""
    population: int = 6
    """so many live, and, but for `overflow_factor`, are born in a generation"""
    top_k: int = 3
    """parents: the best so many of the living"""
    novelty_extra: int = 2
    """parents: so many of the most novel others"""
    immigrants: int = 2
    """expected children of a document in a generation"""
    macro_prob: float = 0.35
    """share of the mutations by two to four operators"""
    crossover_prob: float = 0.35
    """share of the children with two parents"""
    replacement: Literal["aging", "score"] = "aging"
    """who lives: the youngest, or the best"""
    overflow_factor: float = 1.0
    """so many times `population` are born in a generation; `population` of all live"""
    top_index: Path | None = None
    """search_report.json of an earlier run"""
    top_count: int = 0
    """so many of its best become documents too"""
    pareto: bool = False
    """parents by rank in (score, FLOPs, parameters, KV bytes)"""
    asha_min: int = 20
    """steps of the first rung"""
    asha_max: int = 80
    """steps at the end of halving, at most"""
    asha_reduction: int = 2
    """one in so many goes on, to so many times the steps"""
    pdh_base: int = 60
    """steps of a stage behind a hurdle"""
    pdh_stages: int = 2
    """such stages at most"""


def rungs(first: int, last: int, reduction: int) -> int:
    """Rungs of halving: first, first * reduction, ... up to `last` steps."""
    count = 1
    while reduction > 1 and first * reduction**count <= last:
        count += 1
    return count


def ladder_of(args: Train | Sweep) -> evolve.Ladder:
    """The rungs that the arguments mean."""
    if isinstance(args, Train):
        return evolve.Ladder(first=args.steps, rungs=1)
    return evolve.Ladder(
        first=args.asha_min,
        reduction=args.asha_reduction,
        rungs=rungs(args.asha_min, args.asha_max, args.asha_reduction),
        stages=args.pdh_stages,
        stage_steps=args.pdh_base,
        births=args.pdh_births,
    )


def births(population: int, overflow_factor: float) -> int:
    """Trials of a generation."""
    return round(population * overflow_factor)


def settings_of(args: Train | Sweep, documents: int) -> evolve.Settings:
    """The search that the arguments mean; only `evolve` has trials beyond the documents."""
    ladder = ladder_of(args)
    unlimited = 10**15  # steps: the trials end a search
    if not isinstance(args, Evolve):
        return evolve.Settings(unlimited, documents, population=documents, ladder=ladder)
    born = births(args.population, args.overflow_factor)
    return evolve.Settings(
        unlimited,
        args.generations * born,
        population=args.population,
        aging=args.replacement == "aging",
        parents=args.top_k,
        novel_parents=args.novelty_extra,
        tournament=2,
        crossover=args.crossover_prob,
        novel=0.0,
        immigrants=args.immigrants / born,
        macro=args.macro_prob,
        mutations=4,
        pareto=args.pareto,
        ladder=ladder,
    )


def check(args: Train | Sweep) -> None:
    """Raise a ValueError for settings out of their range."""
    names = ("seq_len", "batch_size", "held_out", "repeats", "deep_top_k", "deep_seeds")
    names += ("steps",) if isinstance(args, Train) else ("asha_min", "asha_max", "pdh_births")
    if isinstance(args, Evolve):
        names += ("generations", "population", "top_k")
    wrong = [f"`{name}` must be at least 1" for name in names if getattr(args, name) < 1]
    if isinstance(args, Sweep) and args.asha_reduction < 2:
        wrong.append("`asha_reduction` must be at least 2")
    if isinstance(args, Sweep) and args.asha_max < args.asha_min:
        wrong.append("`asha_max` must not be below `asha_min`")
    if isinstance(args, Evolve):
        shares = {"macro_prob": args.macro_prob, "crossover_prob": args.crossover_prob}
        wrong += [f"`{n}` must lie in [0, 1]" for n, v in shares.items() if not 0 <= v <= 1]
        if not 0 <= args.immigrants <= args.population:
            wrong.append("`immigrants` must lie between 0 and `population`")
        if not 1 <= args.overflow_factor <= 100:
            wrong.append("`overflow_factor` must lie between 1 and 100")
        if args.top_count < 0 or bool(args.top_count) != (args.top_index is not None):
            wrong.append("`top_index` and a positive `top_count` go together")
    if max(args.repeats, args.deep_seeds) > 500:
        wrong.append("`repeats` and `deep_seeds` must be at most 500")
    if args.seed < 0 or args.deep_steps < 0:
        wrong.append("`seed` and `deep_steps` must not be negative")
    if args.lr is not None and not args.lr > 0:
        wrong.append("`lr` must be positive")
    limits = {f.name: getattr(args.limits, f.name) for f in dataclasses.fields(args.limits)}
    wrong += [
        f"`limits.{n}` must be positive" for n, v in limits.items() if v is not None and v <= 0
    ]
    if wrong:
        raise ValueError(", ".join(wrong) + ".")
