"""Phase 7: SVF experts of a checkpoint, the best mixture of them, the artifacts for Phase 8.

    python -m experiments.phase7 nano --seeds 0,1,2 --out runs/demo
    python -m experiments.phase7 smollm2 --out runs/smollm2
    python -m experiments.phase7 nano --checkpoint path/to/phase6.json --source hub --out runs/mine

Reads a Phase 6 checkpoint, trains one expert z per domain by REINFORCE + KL (all in one compiled
step), searches their mixture with NSGA-II, chooses it on validation items, measures it on test
items and writes config.json, metrics.jsonl, summary.json, phase7.json with its artifacts, and
report.html. `--resume` continues a killed run to the same bits.
"""

import dataclasses
import io
import shutil
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from experiments import experts as training
from experiments import measure, mixture, model, results
from experiments import run as runs
from experiments.data.splits import Split
from experiments.data.tasks import Task, load_tasks
from experiments.reopen import check
from experiments.report import write_report
from experiments.scoring import make_params_scorer, make_scorer
from forge_jax import optim, search, svf
from forge_jax.domains import DOMAINS
from interop import load_low_rank, load_phase6, write_phase8


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
    source: Literal["procedural", "hub"] = "procedural"
    """procedural: the embedded tasks; hub: gsm8k, mbpp, ai2_arc, textvqa"""
    data: str | None = None
    """with --source hub: a directory of local copies"""
    unplanted: tuple[str, ...] = ("bits",)
    """tasks without planted frequencies, scored and reported apart"""
    select: Literal["attention", "mlp", "both"] = "both"
    """matrices that get a z"""
    stop_token: bool = True
    """an answer must end with the end-of-text token"""

    train_items: int = 800
    validation_items: int = 96
    test_items: int = 300
    steps: int = 50
    """updates of the experts at most"""
    prompts: int = 16
    samples: int = 8
    """responses to each prompt"""
    temperature: float = 1.0
    top_p: float = 1.0
    learning_rate: float = 1e-2
    """of z; preset 7's `fallback_lr` is 2e-3, for runs of hundreds of steps"""
    grokfast_lambda: float = 0.05
    kl_coefficient: float = 0.2
    baseline: Literal["leave_one_out", "none"] = "leave_one_out"
    supervised: bool = False
    """fit the answers by cross-entropy instead of sampling"""
    validate_every: int = 10
    patience: int = 4

    search: Literal["nsga2", "cem"] = "nsga2"
    population: int = 24
    generations: int = 20
    search_items: int = 32
    evaluations: int = 1
    per_layer: bool = False
    """one alpha for each layer instead of one for the model"""
    alpha_upper: float = 2.0
    normalize_alpha: bool = False
    lowest_rank: float = 0.2
    twin_loss: float = 0.02
    """accuracy on validation that the low-rank twin may lose"""
    chunk: int = 8
    """candidates that run at once"""

    resume: bool = False
    replace: bool = False
    """take the place of an earlier run in `out` once this one is whole"""
    wandb: str | None = None
    """Weights & Biases project; off unless given"""
    wandb_mode: Literal["online", "offline"] | None = None
    tensorboard: bool = False


PRESETS = {
    "nano": ("the shipped nano checkpoint, four domains", Args()),
    "smollm2": (
        "SmolLM2-135M-Instruct, small settings",
        Args(
            base="smollm2",
            domains=("sums",),
            unplanted=(),
            stop_token=False,
            train_items=60,
            validation_items=10,
            test_items=18,
            steps=20,
            prompts=16,
            samples=16,
            population=8,
            generations=4,
            search_items=16,
            validate_every=4,
        ),
    ),
}


def training_settings(args: Args, answer_length: int) -> training.Settings:
    """The experts' part of the settings."""
    return training.Settings(
        steps=args.steps,
        prompts=args.prompts,
        samples=args.samples,
        max_new_tokens=answer_length,
        temperature=args.temperature,
        top_p=args.top_p,
        supervised=args.supervised,
        baseline=args.baseline,
        validate_every=args.validate_every,
        patience=args.patience,
    )


def search_settings(args: Args) -> mixture.Settings:
    """The search's part of the settings."""
    return mixture.Settings(
        population=args.population,
        generations=args.generations,
        items=args.search_items,
        evaluations=args.evaluations,
        per_layer=args.per_layer,
        upper=args.alpha_upper,
        normalize=args.normalize_alpha,
        lowest_rank=args.lowest_rank,
    )


def optimizer_config(args: Args) -> optim.MuGrokConfig:
    """Preset 7 with the run's rates."""
    return optim.MuGrokConfig.from_phase(
        7,
        fallback_lr=args.learning_rate,
        grokfast_lambda=args.grokfast_lambda,
        kl_coefficient=args.kl_coefficient,
    )


def parse_seeds(text: str) -> list[int]:
    """Seeds from "0,1,2"."""
    if not all(part.strip().isdigit() for part in text.split(",")):
        raise ValueError(f"`--seeds` must be whole numbers such as 0,1,2, got {text!r}.")
    return [int(part) for part in text.split(",")]


class Problem(NamedTuple):
    """What all seeds share."""

    model: model.Model
    weights: model.Weights
    tasks: list[Task]
    unplanted: list[Task]
    answer_length: int
    scorer: Any
    params_scorer: Any


def set_up(args: Args, path: Path) -> Problem:
    """Load the checkpoint and the tasks."""
    made, weights = model.load(path, args.select, Path(".cache/svd"))
    counts: dict[Split, int] = {
        "train": args.train_items,
        "validation": args.validation_items,
        "test": args.test_items,
    }

    def tasks(names: tuple[str, ...], source: str) -> list[Task]:
        return load_tasks(
            names,
            made.tokenizer,
            source=source,
            directory=args.data,
            image_token=made.image_token,
            counts=counts,
            bos=made.bos,
            eos=made.eos if args.stop_token else None,
        )

    planted = tasks(args.domains, args.source)
    length = planted[0].batches["test"].answers.shape[1]
    scorer = make_scorer(made, chunk=args.chunk, max_new_tokens=length)
    params_scorer = make_params_scorer(made, length)
    apart = tasks(args.unplanted, "procedural")
    return Problem(made, weights, planted, apart, length, scorer, params_scorer)


def measure_file(problem: Problem, path: Path) -> dict[str, float]:
    """The guide's four figures of the model in a file, on test items."""
    load = load_low_rank if path.suffix == ".safetensors" else load_phase6
    checkpoint = load(path)
    params = jax.tree.map(jnp.asarray, checkpoint.params)
    score = [
        problem.params_scorer(
            params,
            checkpoint.projector,
            task.batches["test"],
            task,
            [i.answer for i in task.items["test"]],
        ).mean()
        for task in problem.tasks
    ]
    figures = measure.metrics(measure.measure(problem.model, params))
    return {**figures, "accuracy": float(np.mean(score))}


def write_artifacts(
    run: runs.Run, problem: Problem, experts, chosen: results.Chosen, index, kl: float, seed: int
) -> Path:
    """Write one seed's Phase 8 directory unless it is there already."""
    directory = run.path / f"seed{seed}"
    if directory.exists():
        return directory
    names = [t.name for t in problem.tasks]
    factors = problem.weights["factors"]
    z = results.factors_of_alpha(chosen.alpha, index, experts)

    def succeeded(metrics: dict[str, float]) -> bool:
        missed = search.violations({**metrics, "kl": kl}, search.Limits())
        return all(float(v) == 0 for v in missed.values())

    per_layer = len(chosen.alpha) > 1
    twin = svf.truncate(factors, z, chosen.twin_rank) if chosen.twin_rank < 1 else None
    return write_phase8(
        directory,
        problem.model.checkpoint,
        {name: {k: v[i] for k, v in experts.items()} for i, name in enumerate(names)},
        chosen.alpha.mean(axis=0).tolist(),
        adapted_params=jax.device_get(svf.materialize(factors, z)),
        measure=lambda path: runs.once(
            run, f"seed{seed}-{path.name}", lambda: measure_file(problem, path)
        ),
        succeeded=succeeded,
        alpha_by_path=mixture.by_path(chosen.alpha, index) if per_layer else None,
        low_rank_params=twin,
        rank_fraction=chosen.twin_rank,
        extra_metadata={"seed": seed, "kl_to_base_nats": kl},
    )


def run_seed(run: runs.Run, args: Args, problem: Problem, step, seed: int) -> results.Correct:
    """Train, search, choose, score and write; the correctness of every test item."""
    names = [t.name for t in problem.tasks]
    settings = training_settings(args, problem.answer_length)
    experts = training.train(
        run,
        problem.weights,
        problem.tasks,
        problem.scorer,
        step,
        optimizer_config(args),
        settings,
        seed,
    )
    factors = problem.weights["factors"]
    measured = runs.once(run, "calibration", lambda: measure.calibrate(problem.model, factors))
    costs = measure.cost_model(factors, measured)
    index = mixture.groups(list(experts), args.per_layer)
    rows = max(index.values()) + 1
    fitness = mixture.make_fitness(
        problem.weights, experts, problem.tasks, problem.scorer, costs, search_settings(args), index
    )
    find = mixture.find if args.search == "nsga2" else mixture.find_cem
    limits = search.Limits()
    found = find(run, fitness, rows, len(names), search_settings(args), limits, seed)
    chosen = results.choose(
        found,
        problem.weights,
        experts,
        problem.tasks,
        problem.scorer,
        index,
        limits.kl,
        args.twin_loss,
    )
    every = [*problem.tasks, *problem.unplanted]
    correct, kl = results.table(
        problem.weights, experts, chosen.alpha, every, names, problem.scorer, index
    )
    directory = write_artifacts(run, problem, experts, chosen, index, float(kl[-1]), seed)
    final = runs.read_json(directory / "phase7.json")["metrics"]
    mean_alpha = chosen.alpha.mean(axis=0)
    runs.log(
        run,
        {
            "step": 0,
            "seed": seed,
            **{f"mixture/{n}": float(a) for n, a in zip(names, mean_alpha, strict=True)},
            **{f"final/{k}": v for k, v in final.items()},
        },
    )
    write_npz(run.path / f"search_seed{seed}.npz", search_arrays(found))
    write_npz(run.path / f"z_heatmap_seed{seed}.npz", results.z_heatmap(experts, names))
    return correct


def write_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write `arrays` whole or not at all."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    runs.write_atomic(path, buffer.getvalue())


def search_arrays(found: mixture.Found) -> dict[str, np.ndarray]:
    """The last population for the report's Pareto plot."""
    fitness = found.fitness
    rank = np.asarray(search.non_dominated_rank(jnp.asarray(fitness)))
    return {
        "accuracy": 1 - fitness[:, 0],
        "latency_ms": fitness[:, 1],
        "memory_gb": fitness[:, 2],
        "front": rank == 0,
        "hypervolume": np.array(found.hypervolume),
        "alpha": found.genomes["alpha"],
        "rank": found.genomes["rank"],
    }


def lift(run: runs.Run, seed: int) -> None:
    """Put the first seed's artifacts at the top of the run; after a kill it is done again."""
    own = run.path / f"seed{seed}"
    shutil.copytree(own, run.path, dirs_exist_ok=True)
    shutil.rmtree(own)
    for name in ("search", "z_heatmap"):
        (run.path / f"{name}_seed{seed}.npz").replace(run.path / f"{name}.npz")


@runs.clean_errors()
def main(args: Args) -> None:
    """Run every seed, then write summary and report."""
    seeds = parse_seeds(args.seeds)
    own = model.NANO if args.base == "nano" else model.smollm2()
    problem = set_up(args, args.checkpoint or own)
    names = [t.name for t in problem.tasks]
    with runs.opened(
        args.out,
        args,
        resume=args.resume,
        replace=args.replace,
        wandb=args.wandb,
        wandb_mode=args.wandb_mode,
        tensorboard=args.tensorboard,
    ) as run:
        config = optimizer_config(args)
        step = training.make_step(
            problem.model,
            optim.mugrok(config),
            problem.tasks,
            training_settings(args, problem.answer_length),
            config.kl_coefficient,
        )
        per_seed = [run_seed(run, args, problem, step, seed) for seed in seeds]
        lift(run, seeds[0])
        apart = [t.name for t in problem.unplanted]
        summary = results.summary(per_seed, names, apart, seeds)
        spent = {"seconds": runs.seconds(run), "peak_rss_gb": runs.peak_rss_gb()}
        runs.write_json(run.path / "summary.json", {**summary, **spent})
        write_report(run.path)
        done = runs.finish(run)
    results.show(summary, names)
    print(check(done))
    print(f"report: {done / 'report.html'}")


if __name__ == "__main__":
    main(tyro.extras.overridable_config_cli(PRESETS))
