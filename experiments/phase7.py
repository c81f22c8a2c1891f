"""Phase 7: SVF experts of a checkpoint, the best mixture of them, the artifacts for Phase 8.

    python -m experiments.phase7 nano --seeds 0,1,2 --out runs/demo
    python -m experiments.phase7 nano --algorithm ppo --out runs/ppo
    python -m experiments.phase7 smollm2 --out runs/smollm2
    python -m experiments.phase7 nano --checkpoint path/to/phase6.json --source hub --out runs/mine

Reads a Phase 6 checkpoint, trains one expert z per domain by REINFORCE + KL, or by another
`--algorithm` (all in one compiled step), searches their mixture with NSGA-II, chooses it on
validation items, measures it on test items and writes config.json, metrics.jsonl, summary.json,
phase7.json with its artifacts, and report.html. `--resume` continues a killed run to the same bits.
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import jax
import tyro
from jax.sharding import Mesh

from experiments import artifacts, ceilings, experts, measure, mixture, model, results
from experiments import run as runs
from experiments.data.sources import HUB, TASKS
from experiments.data.splits import Split
from experiments.forms import SVF
from experiments.problem import CACHE, Problem, set_up
from experiments.reopen import check
from experiments.report import write_report
from forge_jax import parallel, svf
from forge_jax.domains import DOMAINS
from interop.cache import ROUTINE


@dataclasses.dataclass(frozen=True)
class Args:
    out: Path = Path("runs/phase7")
    """run directory to create"""
    base: Literal["nano", "smollm2"] = "nano"
    """the preset's own checkpoint"""
    checkpoint: Path | None = None
    """another: Phase 6 file or JSON, Hugging Face directory or .gguf"""
    seeds: str = "0"
    """random seeds, as 0,1,2"""
    domains: tuple[str, ...] = DOMAINS
    """one expert each: math, code, reasoning, vision, bits, sums, largest, quartz (`make data`)"""
    source: Literal["procedural", "hub"] = "procedural"
    """procedural: the embedded tasks; hub: gsm8k, mbpp, ai2_arc, textvqa, whose first 1,000 rows of
    train are shared out by content over train, validation and test"""
    data: str | None = None
    """with --source hub: a directory of local copies; else that of quartz.jsonl (default data)"""
    unplanted: tuple[str, ...] = ("bits",)
    """tasks without planted frequencies, scored and reported apart; not those with an expert"""
    reward: str = "task"
    """task: that of each task's data; exact, numeric, unit_tests (in a sandbox), or your own
    package.module:function; an answer counts as right where it is above 0"""
    select: Literal["attention", "mlp", "both"] = "both"
    """matrices that get a z"""
    cache: Path = CACHE
    """directory in which decompositions are kept"""
    max_full: int = 4096
    """singular values above which a matrix gets a randomized decomposition of so many"""
    stop_token: bool = True
    """an answer must end with the end-of-text token"""
    free_tokens: int = 128
    """that a response may have where its answer is read out of free text (--source hub)"""
    train_items: int = 800
    """questions of each domain"""
    validation_items: int = 96
    """those that the best step and the best mixture are chosen by"""
    test_items: int = 300
    """those that the final numbers are of"""

    training: experts.Settings = experts.DEFAULTS
    mixing: mixture.Settings = mixture.DEFAULTS
    twin_loss: float = 0.02
    """accuracy on validation that the low-rank twin may lose"""
    chunk: int = 8
    """candidates that run at once"""
    mesh: str | None = None
    """many devices: data=2,population=4 (and model=): rows, candidates, parts of the matrices"""
    ceilings: bool = False
    """train full fine-tuning and LoRA on as many samples too"""

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


PRESETS = {
    "nano": ("the shipped nano checkpoint, four domains", Args()),
    "smollm2": (
        "SmolLM2-135M-Instruct, small settings",
        Args(
            base="smollm2",
            domains=("sums", "largest"),
            unplanted=(),
            stop_token=False,
            # every question there is of sums
            train_items=77,
            validation_items=11,
            test_items=22,
            training=experts.Settings(
                steps=20,
                prompts=16,
                samples=16,
                learning_rate=3e-3,
                decay=True,
                # where all samples are right the KL alone has a gradient: docs/log.md
                kl_coefficient=0.0,
            ),
            mixing=mixture.Settings(
                population=6,
                generations=3,
                search_items=10,
                kl_limit=3.0,
                calibration_ranks=(1.0, 0.2),
            ),
        ),
    ),
}


def parse_seeds(text: str, option: str = "--seeds") -> list[int]:
    """Seeds from "0,1,2"."""
    if not all(part.strip().isdigit() for part in text.split(",")):
        raise ValueError(f"`{option}` must be whole numbers such as 0,1,2, got {text!r}.")
    seeds = [int(part) for part in text.split(",")]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"`{option}` must differ, got {text!r}.")
    return seeds


def parse_mesh(text: str | None) -> Mesh | None:
    """The mesh of all devices from "data=2,population=4"."""
    if text is None:
        return None
    pairs = [part.partition("=")[::2] for part in text.split(",")]
    if not all(size.strip().isdigit() for _, size in pairs):
        raise ValueError(f"`--mesh` must be axes and sizes such as data=2,model=4, got {text!r}.")
    return parallel.make_mesh({axis.strip(): int(size) for axis, size in pairs})


def check_settings(args: Args) -> None:
    """Raise a ValueError for settings out of their range, or that do not go together."""
    args.training.check()
    args.mixing.check()
    needs = {
        "train_items": args.training.prompts,
        "validation_items": args.mixing.search_items * args.mixing.evaluations,
        "test_items": 2,  # an interval needs two
        "max_full": 1,
        "chunk": 1,
        "free_tokens": 1,
    }
    wrong = [f"`{n}` must be at least {k}" for n, k in needs.items() if getattr(args, n) < k]
    known = HUB if args.source == "hub" else TASKS
    for option, names, there in (
        ("domains", args.domains, known),
        ("unplanted", args.unplanted, TASKS),
    ):
        if unknown := [n for n in names if n not in there]:
            wrong.append(f"`--{option}` must be among {', '.join(there)}, got {', '.join(unknown)}")
    if wrong:
        raise ValueError(", ".join(wrong) + ".")


def load(args: Args) -> Problem:
    """The checkpoint and the tasks that the arguments name."""
    mesh = parse_mesh(args.mesh)
    rows = len(args.domains) * args.training.prompts
    if mesh and rows % (mesh.shape["population"] * mesh.shape["data"]):
        raise ValueError(
            f"`--mesh {args.mesh}` cannot share out the {rows} rows of a step (domains x prompts)."
        )
    counts: dict[Split, int] = {
        "train": args.train_items,
        "validation": args.validation_items,
        "test": args.test_items,
    }
    problem = set_up(
        args.checkpoint or (model.NANO if args.base == "nano" else model.smollm2()),
        select=args.select,
        cache=args.cache,
        max_full=args.max_full,
        domains=args.domains,
        unplanted=[name for name in args.unplanted if name not in args.domains],
        source=args.source,
        data=args.data,
        stop_token=args.stop_token,
        counts=counts,
        free_tokens=args.free_tokens,
        chunk=args.chunk,
        mesh=mesh,
        reward=args.reward,
    )
    check_problem(args, problem)
    return problem


def check_problem(args: Args, problem: Problem) -> None:
    """Raise a ValueError where the settings ask for more than the checkpoint and the data have."""
    needs: dict[Split, int] = {
        "train": args.training.prompts,
        "validation": args.mixing.search_items * args.mixing.evaluations,
        "test": 2,
    }
    few = [
        f"{task.name} has {len(task.items[split])} {split} items, {count} are needed"
        for task in problem.tasks
        for split, count in needs.items()
        if len(task.items[split]) < count
    ]
    if few:
        raise ValueError("; ".join(few) + ".")
    leaves = svf.named_factors(problem.weights["factors"])
    if args.mixing.lowest_rank < 1 and any(leaf.rest is not None for _, leaf in leaves):
        raise ValueError(
            f"`--max-full {args.max_full}` leaves matrices with a part that has no singular "
            "values, which no rank fraction can cut: set `--lowest-rank 1`."
        )


def run_seed(
    run: runs.Run, args: Args, problem: Problem, step: experts.Step, seed: int
) -> tuple[results.Correct, Path]:
    """Train, search, choose, score and write; the correctness of every test item, and where."""
    names = [t.name for t in problem.tasks]
    weights, factors = problem.weights, problem.weights["factors"]
    z = experts.train(run, weights, problem.tasks, problem.scorer, step, args.training, seed)
    ranks = args.mixing.calibration_ranks
    single = jax.device_put(factors, jax.devices()[0])  # the cost model is that of one device
    calibrated = runs.once(
        run, "calibration", lambda: measure.calibrate(problem.model, single, ranks)
    )
    costs = measure.cost_model(factors, calibrated)
    index = mixture.groups(list(z), args.mixing.per_layer)
    fitness = mixture.make_fitness(problem, z, costs, args.mixing, index)
    rows = max(index.values()) + 1
    found = mixture.find(run, fitness, rows, len(names), args.mixing, seed)
    chosen = results.choose(
        found,
        problem,
        z,
        index,
        kl_limit=args.mixing.kl_limit,
        lowest_rank=args.mixing.lowest_rank,
        twin_loss=args.twin_loss,
    )
    correct, kl = results.table(problem, z, chosen, index)
    directory = artifacts.write(
        run, problem, z, chosen, index, kl, mixture.limits(args.mixing), seed
    )
    final = runs.read_json(directory / "phase7.json")["metrics"]
    mixed = dict(zip(names, chosen.alpha.mean(axis=0).tolist(), strict=True))
    row: dict[str, Any] = {"step": 0, "seed": seed}
    row |= {f"mixture/{n}": a for n, a in mixed.items()}
    runs.log(run, row | {f"final/{k}": v for k, v in final.items()})
    artifacts.write_arrays(run, f"search_seed{seed}", artifacts.search_arrays(found))
    artifacts.write_arrays(run, f"z_heatmap_seed{seed}", results.z_heatmap(z, names))
    return correct, directory


def run_seeds(run: runs.Run, args: Args, problem: Problem, seeds: list[int]) -> dict[str, Any]:
    """Run every seed; the summary without its timings. The first seed's files end on top."""
    tx = experts.make_tx(args.training)
    given = (args.training, problem.new_tokens, problem.mesh)
    step = experts.make_step(problem.model, SVF, tx, *given)
    others = ceilings.make_ceilings(problem, args.training) if args.ceilings else {}
    correct, directories, reached = [], [], []
    for seed in seeds:
        right, directory = run_seed(run, args, problem, step, seed)
        correct.append(right)
        directories.append(directory)
        reached.append(ceilings.measure(run, problem, others, seed))
    artifacts.lift(run, directories[0])
    for name in ("search", "z_heatmap"):
        (run.path / f"{name}_seed{seeds[0]}.npz").replace(run.path / f"{name}.npz")
    names = [t.name for t in problem.tasks]
    summary = results.summary(correct, names, [t.name for t in problem.unplanted], seeds)
    if others:
        summary["ceilings"] = results.with_svf(reached, correct, names, ceilings.svf_bytes(problem))
    return summary


@runs.clean_errors()
def main(args: Args) -> None:
    """Run every seed, then write summary and report."""
    seeds = parse_seeds(args.seeds)
    check_settings(args)
    if not (args.resume or args.replace):
        runs.refuse_existing(args.out)
    problem = load(args)
    made_by = {
        "base_sha256": problem.model.checkpoint.sha256,
        "jax": jax.__version__,
        "svd": ROUTINE,
        "platform": jax.default_backend(),
    }
    with runs.opened(
        args.out,
        {**runs.plain(args), **made_by},
        resume=args.resume,
        replace=args.replace,
        wandb=args.wandb,
        wandb_mode=args.wandb_mode,
        tensorboard=args.tensorboard,
    ) as run:
        summary = run_seeds(run, args, problem, seeds)
        spent = {"seconds": runs.seconds(run), "peak_rss_gb": runs.peak_rss_gb()}
        runs.write_json(run.path / "summary.json", {**summary, **spent})
        write_report(run.path)
        seeds_of = sorted(path.parent for path in run.path.glob("seed*/phase7.json"))
        opened_again = [check(path) for path in (run.path, *seeds_of)]
        names = {name for row in runs.rows(run.path) for name in row}
        done = runs.finish(run)
    results.show(summary, [t.name for t in problem.tasks])
    print("\n".join(opened_again))
    print(f"metrics: {len(names)} names in metrics.jsonl, their families in docs/metrics.md")
    print(f"report: {done / 'report.html'}")


if __name__ == "__main__":
    main(
        tyro.extras.overridable_config_cli(
            PRESETS,
            config=(tyro.conf.OmitArgPrefixes,),
            prog="python -m experiments.phase7",
            description=f"{__doc__}\nAll options: python -m experiments.phase7 nano --help",
        )
    )
