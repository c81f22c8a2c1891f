"""The settings of `experiments.phase1`, and three sets of defaults."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from experiments.cognate.training import Settings
from forge_jax.models.cognate import SPECIALIZATIONS, CognateConfig

DEFAULTS, SHAPE = Settings(), CognateConfig()
Name = Literal["reasoning", "memory", "speed", "all"]


@dataclasses.dataclass(frozen=True)
class Args:
    specialization: Annotated[Name, tyro.conf.arg(aliases=["--model"])] = "reasoning"
    """which model; all trains the three in one program"""
    out: Path = Path("runs/phase1")
    """run directory to create"""
    data: str = "hub"
    """hub, offline (generated stand-ins), or a directory of <name>.jsonl files or copies"""
    datasets: tuple[str, ...] = ()
    """only these; default those of the curriculum"""
    tokenizer: Path | None = None
    """a tokenizer.json to use; default one is trained on the run's text"""
    train_examples: int = 20_000
    """of each data set at most"""
    validation_examples: int = 200
    """of each data set at most"""
    length: int = 512
    """tokens in a row"""
    epochs: int = 10
    """parts of the training: after each comes a validation and a checkpoint"""
    patience: int = 3
    """training stops when no model has improved for so many epochs"""
    margin: float = 0.01
    """nats by which the validation loss must fall to count as improved"""
    held_batch: int = 16
    """validation rows scored at once"""
    halting_rows: int = 8
    """validation rows on which halting is measured at the end"""
    log_every: int = 100
    """updates"""
    save_every: int = 500
    """updates from one checkpoint to the next; epochs end with one in any case"""
    seed: int = 0
    training: Annotated[Settings, tyro.conf.OmitArgPrefixes] = DEFAULTS
    shape: CognateConfig = SHAPE

    smoke: bool = False
    """other defaults: a tiny model, offline"""
    small: bool = False
    """other defaults: a model of 1.4 M parameters, offline"""
    resume: bool = False
    """go on with a killed run in `out`; with --replace if it was started so"""
    replace: bool = False
    """take the place of an earlier run in `out` once this one is whole"""
    wandb: str | None = None
    """Weights & Biases project; off unless given"""
    wandb_mode: Literal["online", "offline"] | None = None
    """as W&B's own setting unless given"""
    tensorboard: bool = False
    """write event files into the run directory too"""

    @property
    def names(self) -> list[str]:
        """The models to train."""
        return list(SPECIALIZATIONS) if self.specialization == "all" else [self.specialization]

    @property
    def prefixes(self) -> dict[str, str]:
        """What stands before the metrics' names of each model; nothing where there is one."""
        return {n: f"{n}/" if self.specialization == "all" else "" for n in self.names}


SMALL = Args(
    small=True,
    out=Path("runs/phase1_small"),
    data="offline",
    train_examples=4000,
    validation_examples=100,
    length=128,
    log_every=20,
    training=Settings(steps=1000, batch=16, accumulate=1, fallback_lr=3e-3),
    shape=CognateConfig(
        vocab_size=1024,
        d_model=128,
        layers=4,
        heads=4,
        d_ff=384,
        max_positions=512,
        window=64,
        d_mem=64,
        gate_hidden=64,
        answer_heads=4,
    ),
)
SMOKE = Args(
    smoke=True,
    out=Path("runs/phase1_smoke"),
    data="offline",
    train_examples=300,
    validation_examples=16,
    length=96,
    epochs=4,
    halting_rows=4,
    log_every=10,
    training=Settings(
        steps=40,
        batch=4,
        accumulate=2,
        fallback_lr=1e-2,
        average_decay=0.9,
    ),
    shape=CognateConfig(
        vocab_size=512,
        d_model=48,
        layers=2,
        heads=2,
        d_ff=96,
        max_positions=128,
        window=32,
        d_mem=24,
        gate_hidden=24,
        answer_heads=2,
    ),
)


def defaults(arguments: list[str]) -> Args:
    """The defaults that the command line asks for; its other flags change them."""
    return SMOKE if "--smoke" in arguments else SMALL if "--small" in arguments else Args()


def check_settings(args: Args) -> None:
    """Raise a ValueError for settings out of their range, or that do not go together."""
    least = ("train_examples", "validation_examples", "epochs", "patience", "held_batch")
    least += ("halting_rows", "log_every", "save_every")
    wrong = [f"`{n}` must be at least 1" for n in least if getattr(args, n) < 1]
    wrong += args.training.problems()
    wrong += ["`margin` and `seed` must be at least 0"] * (args.margin < 0 or args.seed < 0)
    if not 2 <= args.length <= args.shape.max_positions:
        wrong.append(
            f"`length` must lie between 2 and the model's {args.shape.max_positions} positions "
            f"(`--shape.max-positions`), got {args.length}"
        )
    if args.epochs > args.training.steps:
        wrong.append(f"`epochs` must be at most `steps`, {args.training.steps}, got {args.epochs}")
    if args.shape.is_reference:
        wrong.append('compat="reference" repeats a model that sees its labels and is not trained')
    if wrong:
        raise ValueError("; ".join(wrong) + ".")
