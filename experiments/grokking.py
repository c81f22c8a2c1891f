"""How many steps until addition modulo 97 generalises: AdamW and Muon, with Grokfast and without.

    python -m experiments.grokking runs/grokking
    python -m experiments.grokking runs/grokking-smoke --smoke

A network of two layers sees a fraction of all pairs (a, b) and predicts (a + b) mod p on the
others. Each arm tunes its own learning rate on seeds that are not reported (the first rate whose
runs have all generalised wins), then runs the reported seeds, all in one program, vmapped. The
arms differ in nothing else: the same batches, weight decay and initial weights; Muon's updates
have the "rms" scale, so that one rate serves its matrices and the embedding that AdamW has. The
number is the first evaluation at which the validation accuracy is 95 %; a run that never gets
there is counted, not averaged.

Writes `config.json`, `result.json`, `table.md` and `grokking.png`.
"""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
import tyro
from jaxtyping import Array, Float, Int
from matplotlib.figure import Figure

from experiments import figures
from experiments.files import write_atomic, write_json
from forge_jax import optim


@dataclasses.dataclass(frozen=True)
class Args:
    out: tyro.conf.Positional[Path]
    """directory for the results"""
    prime: int = 97
    """modulus"""
    fraction: float = 0.5
    """of all pairs that training sees"""
    width: int = 64
    """of an embedding; the hidden layer has four times as many units"""
    steps: int = 1500
    """updates of a run at most; it ends when every seed has generalised"""
    every: int = 10
    """updates between evaluations"""
    batch: int = 512
    """pairs of an update"""
    seeds: int = 5
    """reported runs of each arm"""
    tuning_seeds: int = 2
    """runs for each learning rate tried"""
    rates: tuple[float, ...] = (1e-2, 3e-2, 1e-1, 3e-1)
    """learning rates tried"""
    weight_decay: float = 1.0
    """decoupled, times the learning rate"""
    grokfast_alpha: float = 0.98
    """decay of the gradient's mean"""
    grokfast_lambda: float = 2.0
    """weight of the mean"""
    smoke: bool = False
    """a small modulus and few steps: does it run"""


class Run(NamedTuple):
    """One run; a population of them is stacked."""

    params: dict[str, Array]
    opt_state: Any
    key: Array


ARMS = {
    "adamw": (False, False),
    "adamw + grokfast": (False, True),
    "muon": (True, False),
    "muon + grokfast": (True, True),
}
"""Muon, Grokfast"""
TARGET = 0.95


def logits(params: dict[str, Array], pairs: Int[Array, "batch 2"]) -> Float[Array, "batch prime"]:
    """Embed both numbers, one hidden layer, one output for each residue."""
    x = params["embedding"][pairs].reshape(len(pairs), -1)
    return jax.nn.relu(x @ params["hidden"] + params["bias"]) @ params["output"]


def init_params(key: Array, args: Args) -> dict[str, Array]:
    """Draw weights of variance 1 / inputs."""
    keys, p, d = jax.random.split(key, 3), args.prime, args.width
    return {
        "embedding": jax.random.normal(keys[0], (p, d)),
        "hidden": jax.random.normal(keys[1], (2 * d, 4 * d)) / jnp.sqrt(2 * d),
        "bias": jnp.zeros(4 * d),
        "output": jax.random.normal(keys[2], (4 * d, p)) / jnp.sqrt(4 * d),
    }


def pairs_of(seed: Array, args: Args) -> tuple[Int[Array, "train 2"], Int[Array, "rest 2"]]:
    """Split all pairs at random, by seed."""
    p = args.prime
    pairs = jnp.stack(jnp.divmod(jnp.arange(p * p), p), axis=1)
    pairs = jax.random.permutation(jax.random.fold_in(jax.random.key(1), seed), pairs)
    return pairs[: int(args.fraction * p * p)], pairs[int(args.fraction * p * p) :]


def optimizer(arm: str, rate: Array, args: Args) -> optax.GradientTransformation:
    """Build the arm's chain; the rate may be traced."""
    muon, grokfast = ARMS[arm]
    config = optim.MuGrokConfig(
        enable_muon=muon,
        enable_grokfast=grokfast,
        grokfast_alpha=args.grokfast_alpha,
        grokfast_lambda=args.grokfast_lambda,
        use_qk_clip=False,
        fallback_betas=(0.9, 0.98),
        fallback_weight_decay=args.weight_decay,
    )
    config = dataclasses.replace(config, muon_lr=rate, fallback_lr=rate)
    return optim.mugrok(
        config,
        fallback=optim.is_embedding,
        update_scale="rms",
        muon_weight_decay=args.weight_decay,
    )


def start(seed: Array, arm: str, args: Args) -> Run:
    params = init_params(jax.random.fold_in(jax.random.key(0), seed), args)
    state = optimizer(arm, jnp.ones(()), args).init(params)
    return Run(params, state, jax.random.fold_in(jax.random.key(2), seed))


def advance(run: Run, seed: Array, rate: Array, arm: str, args: Args) -> tuple[Run, Array]:
    """Take `every` updates and return the validation accuracy after them."""
    train, rest = pairs_of(seed, args)
    tx = optimizer(arm, rate, args)

    def loss(params, batch):
        labels = batch.sum(1) % args.prime
        entropy = optax.softmax_cross_entropy_with_integer_labels(logits(params, batch), labels)
        return entropy.mean()

    def update(run, _):
        key, batch_key = jax.random.split(run.key)
        batch = train[jax.random.randint(batch_key, (args.batch,), 0, len(train))]
        grads = jax.grad(loss)(run.params, batch)
        updates, state = tx.update(grads, run.opt_state, run.params)
        params: Any = optax.apply_updates(run.params, updates)
        return Run(params, state, key), None

    run, _ = jax.lax.scan(update, run, None, args.every)
    right = logits(run.params, rest).argmax(1) == rest.sum(1) % args.prime
    return run, right.mean()


def train(
    arm: str, rates: Sequence[float], seeds: Sequence[int], args: Args
) -> Float[np.ndarray, "rates seeds times"]:
    """Return the accuracy of each run at each evaluation, until a rate has all its seeds there."""
    seed, rate = (x.ravel() for x in np.meshgrid(np.array(seeds), np.array(rates, np.float32)))
    chunk = jax.jit(
        jax.vmap(lambda run, seed, rate: advance(run, seed, rate, arm, args)), donate_argnums=0
    )
    runs = jax.vmap(lambda seed: start(seed, arm, args))(seed)
    curves: list[np.ndarray] = []
    while len(curves) * args.every < args.steps:
        runs, accuracy = chunk(runs, seed, rate)
        curves.append(np.asarray(accuracy).reshape(len(rates), len(seeds)))
        if np.any(np.all(np.max(curves, axis=0) >= TARGET, axis=1)):
            break
    return np.stack(curves, axis=-1)


def steps_to_target(curves: Float[np.ndarray, "r t"], every: int) -> list[int | None]:
    """Return the first step of each run at which it was evaluated at 95 %, None if at none."""
    reached = curves >= TARGET
    return [int((row.argmax() + 1) * every) if row.any() else None for row in reached]


def tune(arm: str, args: Args) -> tuple[float, dict[str, list[float]]]:
    """Return the rate whose runs all arrived first, or failing that the one of best accuracy."""
    seeds = [1000 + i for i in range(args.tuning_seeds)]
    curves = train(arm, args.rates, seeds, args)
    final = curves.max(-1)
    arrived = np.all(final >= TARGET, axis=1)
    winner = int(np.argmax(arrived * 2 + final.mean(1)))
    table = {f"{rate:g}": row.tolist() for rate, row in zip(args.rates, final, strict=True)}
    return args.rates[winner], table


def summary(steps: list[int | None]) -> dict[str, Any]:
    reached = [s for s in steps if s is not None]
    return {
        "steps": steps,
        "reached": len(reached),
        "mean": float(np.mean(reached)) if reached else None,
        "std": float(np.std(reached, ddof=1)) if len(reached) > 1 else None,
    }


def table(rows: dict[str, dict[str, Any]]) -> str:
    lines = ["| arm | rate | reached 95 % | steps, mean ± s.d. | each seed |"]
    lines.append("|---|---|---|---|---|")
    for arm, row in rows.items():
        mean = "-" if row["mean"] is None else f"{row['mean']:.0f}"
        spread = "" if row["std"] is None else f" ± {row['std']:.0f}"
        each = ", ".join("never" if s is None else str(s) for s in row["steps"])
        lines.append(
            f"| {arm} | {row['rate']:g} | {row['reached']} of {len(row['steps'])} "
            f"| {mean}{spread} | {each} |"
        )
    return "\n".join(lines)


def plot(curves: dict[str, np.ndarray], args: Args) -> Figure:
    """Draw the accuracy of every seed, and the mean of each arm while all its seeds run."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for i, (arm, rows) in enumerate(curves.items()):
        x = args.every * np.arange(1, rows.shape[1] + 1)
        axes.plot(x, 100 * rows.T, color=figures.colour(i), lw=0.6, alpha=0.5)
        axes.plot(x, 100 * rows.mean(0), color=figures.colour(i), lw=1.8, label=arm)
    axes.axhline(100 * TARGET, color=figures.INK, lw=0.8, ls=":")
    axes.set(xlabel="updates", ylabel="validation accuracy, %", ylim=(0, 101))
    axes.set_title(f"Addition modulo {args.prime}, {args.seeds} seeds")
    axes.legend()
    return figure


def main(args: Args) -> dict[str, Any]:
    if args.smoke:
        tiny = {"prime": 11, "width": 8, "steps": 100, "batch": 32, "seeds": 2}
        args = dataclasses.replace(args, **tiny, tuning_seeds=1, rates=(3e-2, 1e-1))
    args.out.mkdir(parents=True)  # refuse to overwrite a run
    write_json(args.out / "config.json", dataclasses.asdict(args) | {"out": str(args.out)})
    rows, curves = {}, {}
    for arm in ARMS:
        started = time.perf_counter()
        rate, tuning = tune(arm, args)
        curves[arm] = train(arm, [rate], range(args.seeds), args)[0]
        rows[arm] = summary(steps_to_target(curves[arm], args.every))
        rows[arm] |= {"rate": rate, "tuning": tuning, "seconds": time.perf_counter() - started}
        print(f"{arm}: rate {rate:g}, steps {rows[arm]['steps']}, {rows[arm]['seconds']:.0f} s")
    result = {"rows": rows, "curves": {arm: c.tolist() for arm, c in curves.items()}}
    write_json(args.out / "result.json", result)
    write_atomic(args.out / "table.md", table(rows) + "\n")
    with mpl.rc_context(figures.STYLE):
        plot(curves, args).savefig(args.out / "grokking.png", dpi=150)
    print(table(rows))
    return result


if __name__ == "__main__":
    main(tyro.cli(Args, prog="python -m experiments.grokking", description=__doc__))
