"""Phase 1: train Cognate, one of its three specializations or all three in one program.

    python -m experiments.phase1 --specialization all --smoke
    python -m experiments.phase1 --specialization all --small
    python -m experiments.phase1 --specialization reasoning --data hub --out runs/reasoning

Writes config.json, metrics.jsonl, tokenizer.json, checkpoints, plots, report.html, comparison.md,
wandb_config.yaml, summary.json and, for each model, <name>/model.pt and .safetensors: the average
of the weights at the best validation loss. `--data offline` trains on generated stand-ins for the
data sets. `--resume` continues a killed run to the same bits, timings aside.
"""

import sys
import time
from typing import Any, NamedTuple

import jax
import numpy as np
import tyro

from experiments import run as runs
from experiments.cognate import metrics, report, validation
from experiments.cognate.args import Args, check_settings, defaults
from experiments.cognate.problem import Problem, load, next_batch, shares_at
from experiments.cognate.training import (
    State,
    init_state,
    keep_best,
    make_tx,
    make_update,
    schedule,
)
from experiments.data.curriculum import stage_of
from experiments.data.cursor import Cursor
from experiments.data.tokenizer import save_tokenizer
from interop.cognate import save_cognate


class Stand(NamedTuple):
    """Where a run stands: all that a checkpoint holds."""

    state: State
    cursor: Cursor
    trainable: np.ndarray  # (models,) parameters that have had a gradient
    epoch_seconds: float  # spent in the epoch that is under way


def load_problem(args: Args) -> Problem:
    """The texts, the tokenizer and the models that the arguments name.

    A resumed run keeps its tokenizer: training one again need not give the same.
    """
    path = args.out.with_name(args.out.name + ".partial") if args.replace else args.out
    own = path / "tokenizer.json"
    return load(
        args.shape,
        args.names,
        data=args.data,
        datasets=args.datasets,
        train=args.train_examples,
        validation=args.validation_examples,
        tokenizer=own if args.resume and own.is_file() else args.tokenizer,
        length=args.length,
        held_rows=args.held_batch,
        steps=args.training.steps,
        seed=args.seed,
    )


def epoch_of(step: int, args: Args) -> int:
    """The epoch, from 1, in which the update number `step`, from 1, falls."""
    return -(-step * args.epochs // args.training.steps)


def ends_epoch(step: int, args: Args) -> bool:
    """Whether the update number `step` is the last of its epoch."""
    return step == args.training.steps or epoch_of(step + 1, args) > epoch_of(step, args)


def training_rows(args: Args, problem: Problem, step: int, measured, speed: float) -> runs.Row:
    """The metrics of every model at the update number `step`."""
    scheduled: Any = schedule(args.training, args.training.muon_lr)(step - 1)
    rate = float(scheduled)
    row: dict[str, Any] = {}
    for k, model in enumerate(problem.specializations):
        own = metrics.training_row(
            {name: values[k] for name, values in measured.items()},
            step=step,
            epoch=epoch_of(step, args),
            rate=rate,
            capacity=model.capacity,
            last_answer=args.shape.steps,
            tokens_per_second=speed,
        )
        if not np.isfinite(own["train/loss"]):
            raise ValueError(
                f"The loss of the {model.name} model is not finite at step {step}: lower "
                "`--muon-lr` or `--fallback-lr`."
            )
        row |= {args.prefixes[model.name] + name: value for name, value in own.items()}
    return row


def epoch_rows(args: Args, step: int, scored: list[dict[str, float]], seconds: float) -> runs.Row:
    """The metrics of every model at the end of an epoch."""
    stage = stage_of(step - 1, args.training.steps).number
    row: dict[str, Any] = {}
    for name, own in zip(args.names, scored, strict=True):
        found = metrics.epoch_row(own, stage, seconds / 60)
        row |= {args.prefixes[name] + key: value for key, value in found.items()}
    return row


def validate(run: runs.Run, args: Args, problem: Problem, scores, step: int, stand: Stand) -> State:
    """Score the averages on the validation rows, log it, and keep those that are the best."""
    found = scores(stand.state.average, problem.held.rows, problem.controls, args.held_batch)
    scored = validation.summarize(found, problem.held)
    row = epoch_rows(args, step, scored, stand.epoch_seconds)
    runs.log(run, {"step": step, "seed": args.seed, **row})
    losses = np.array([own["loss"] for own in scored])
    return keep_best(stand.state, losses, args.margin, args.patience)


def train(run: runs.Run, args: Args, problem: Problem) -> Stand:
    """Train until the steps are used up or no model improves any more."""
    settings, controls = args.training, problem.controls
    tx = make_tx(settings, args.shape)
    update = make_update(problem.model, tx, settings, args.seed)
    scores = validation.make_scorer(problem.model, settings.compiler_options)
    state = init_state(problem.model, tx, problem.keys())
    stand = Stand(state, problem.start(), np.zeros(len(args.names), np.int64), 0.0)
    start, stand = runs.restore_latest(run, stand) or (0, stand)
    tokens = settings.batch * settings.accumulate * args.length * len(args.names)
    shape = {"parts": settings.accumulate, "rows": settings.batch, "length": args.length}
    last = since = time.monotonic()
    counted = start
    with runs.progress(settings.steps, "phase 1", initial=start) as advance:
        for step in range(start + 1, settings.steps + 1):
            if int(stand.state.stale.min()) >= args.patience:
                break
            batch, cursor = next_batch(problem, stand.cursor, step - 1, **shape)
            state, measured = update(stand.state, batch, controls)
            is_end, shown = ends_epoch(step, args), {}
            is_logged = is_end or step % args.log_every == 0
            if is_logged:
                measured = jax.device_get(measured)  # waits for the update
            now = time.monotonic()
            stand = Stand(state, cursor, stand.trainable, stand.epoch_seconds + now - last)
            last = now
            if is_logged:
                speed = tokens * (step - counted) / (now - since)
                row = training_rows(args, problem, step, measured, speed)
                runs.log(run, {"step": step, "seed": args.seed, **row})
                trainable = np.maximum(stand.trainable, measured["trainable_params"])
                stand = stand._replace(trainable=trainable)
                shown = {"loss": float(np.mean(measured["loss_ce"]))}
                since, counted = now, step
            if is_end:
                state = validate(run, args, problem, scores, step, stand)
                stand = stand._replace(state=state, epoch_seconds=0.0)
            if is_end or step % args.save_every == 0:
                runs.save(run, step, stand)
                last = time.monotonic()
                since += last - now
            advance(1, **shown)
    return stand


def compare(run: runs.Run, args: Args, problem: Problem, best: Any) -> dict[str, dict[str, float]]:
    """The finished models side by side, all on the same validation rows."""
    options = args.training.compiler_options
    scores = validation.make_scorer(problem.model, options)
    found = scores(best, problem.held.rows, problem.controls, args.held_batch)
    scored = validation.summarize(found, problem.held)
    few = validation.some_rows(problem.held, args.halting_rows)
    halting = validation.make_halting(problem.model, few, options)
    models = {}
    for k, (model, own) in enumerate(zip(problem.specializations, scored, strict=True)):
        stops = runs.once(
            run,
            f"halting_{model.name}",
            lambda k=k: halting(
                jax.tree.map(lambda x: x[k], best), jax.tree.map(lambda x: x[k], problem.controls)
            )._asdict(),
        )
        models[model.name] = {
            "halt_threshold": model.controls.halt_threshold,
            "capacity": model.capacity,
            "surprise": model.surprise,
            "perplexity": float(np.exp(own["loss"])),
            **own,
            **stops,
        }
    return models


def write(run: runs.Run, args: Args, problem: Problem, stand: Stand) -> dict[str, Any]:
    """Export the best averages, log the last row, and write everything that is looked at."""
    best = stand.state.best
    one = jax.tree.map(lambda x: x[0], best)
    total = sum(leaf.size for leaf in jax.tree.leaves(one))
    final: dict[str, Any] = {}
    for k, name in enumerate(args.names):
        params = jax.device_get(jax.tree.map(lambda x, k=k: x[k], best))
        (run.path / name).mkdir(exist_ok=True)
        save_cognate(run.path / name / "model", params, args.shape)
        own = metrics.final_row(total, int(stand.trainable[k]), runs.seconds(run))
        final |= {args.prefixes[name] + key: value for key, value in own.items()}
    step = int(stand.state.step[0])
    runs.log(run, {"step": step, "seed": args.seed, **final})
    models = compare(run, args, problem, best)
    marks = np.linspace(0, args.training.steps - 1, 101).astype(int)
    shares = {n: [shares_at(problem, int(at), n) for at in marks] for n in args.names}
    known = validation.unigram_entropy(problem.held)
    lead = f"{', '.join(args.names)}: {total:,} parameters each, {step} updates, data: {args.data}"
    lead += f"; frequencies alone would give a loss of {known:.2f} nats"
    report.write(run.path, runs.rows(run.path), args.prefixes, shares, models, lead)
    runs.write_atomic(
        run.path / "wandb_config.yaml", metrics.dashboard(tuple(args.prefixes.values()))
    )
    summary = {
        "models": models,
        "parameters": total,
        "updates": step,
        "data": args.data,
        "examples": {name: len(found) for name, found in problem.train.items()},
        "unigram_entropy": known,
        "validation_rows": len(problem.held.rows.tokens),
        "tokenizer_tokens": problem.tokenizer.get_vocab_size(),
        "seconds": runs.seconds(run),
        "peak_rss_gb": runs.peak_rss_gb(),
    }
    runs.write_json(run.path / "summary.json", summary)
    return summary


def settings_of(args: Args, problem: Problem) -> dict[str, Any]:
    """The settings of a run, those of model and training one by one, and what its data are."""
    settings = runs.plain(args)
    training, shape = settings.pop("training"), settings.pop("shape")
    shape = {f"shape.{name}": value for name, value in shape.items()}
    return {**settings, **training, **shape, "texts_sha256": problem.digest()}


@runs.clean_errors()
def main(args: Args) -> None:
    """Train, compare and export."""
    check_settings(args)
    if not (args.resume or args.replace):
        runs.refuse_existing(args.out)
    problem = load_problem(args)
    with runs.opened(
        args.out,
        settings_of(args, problem),
        resume=args.resume,
        replace=args.replace,
        wandb=args.wandb,
        wandb_mode=args.wandb_mode,
        tensorboard=args.tensorboard,
    ) as run:
        save_tokenizer(problem.tokenizer, run.path / "tokenizer.json")
        stand = train(run, args, problem)
        summary = write(run, args, problem, stand)
        done = runs.finish(run)
    print(report.markdown(summary["models"]))
    spent = f"{summary['updates']} updates in {summary['seconds']:.0f} s"
    print(f"{spent}; report: {done / 'report.html'}")


if __name__ == "__main__":
    main(tyro.cli(Args, default=defaults(sys.argv[1:]), prog="python -m experiments.phase1"))
