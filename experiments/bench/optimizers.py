"""Race MuonGrokfast against optax's and torch's Muon on the 26.97 M parameters of Cognate.

    python -m experiments.bench.optimizers runs/bench_optimizers

One process, side by side: every round times each optimizer once, in turn, and the figures are
medians over the rounds; a ratio is the median of the rounds' ratios, so that a slow spell of the
machine falls on both. Embeddings go to AdamW everywhere. Compilation is timed apart, without the
cache. The roofline is what the step's products and its passes over memory would take at the rates
that this machine reaches on float32 products, large or of 320, whichever is faster, and on one
large copy.

Writes `config.json`, `result.json` and `table.md`; the last lines are the ratios.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import tyro

from experiments.bench.race import ceilings, compiled, interleaved, markdown, median_ratio, size
from experiments.files import write_atomic, write_json
from forge_jax import optim
from forge_jax.optim.newton_schulz import multiplications


@dataclasses.dataclass(frozen=True)
class Args:
    out: tyro.conf.Positional[Path]
    """directory for the results"""
    rounds: int = 9
    """timed rounds; medians are over these"""


class Contender(NamedTuple):
    """An optimizer that is ready to run."""

    step: Callable[[], None]  # returns when the parameters are there
    compile_s: float
    compile_cpu_s: float  # of this process, over all threads: other jobs do not add to it
    state_bytes: int
    temporary_bytes: int | None


def cognate_shapes() -> dict[str, tuple[int, ...]]:
    """Return the shapes of Cognate's parameters, torch's (outputs, inputs)."""
    d, ff, memory = 320, 1280, 160
    shapes: dict[str, tuple[int, ...]] = {
        "backbone.token_emb.weight": (32768, d),
        "backbone.pos_emb.weight": (2048, d),
        "backbone.norm.weight": (d,),
        "backbone.ltm.w_down.weight": (memory, d),
        "backbone.ltm.w_up.weight": (d, memory),
        "backbone.mag_gate.w_concat.weight": (memory, 2 * d),
        "backbone.mag_gate.w_concat.bias": (memory,),
        "backbone.mag_gate.w_gate.weight": (d, memory),
        "backbone.mag_gate.w_gate.bias": (d,),
        "act_head.w_halt.weight": (1, d),
        "act_head.w_halt.bias": (1,),
    }
    for i in range(8):
        layer = f"backbone.layers.{i}"
        shapes |= {f"{layer}.norm{k}.weight": (d,) for k in (1, 2)}
        shapes |= {f"{layer}.attention.w_{k}.weight": (d, d) for k in "qkvo"}
        shapes |= {f"{layer}.mlp.w_{k}.weight": (ff, d) for k in ("gate", "up")}
        shapes |= {f"{layer}.mlp.w_down.weight": (d, ff)}
    linears = {f"trm.refiner.{k}_attn.in_proj": (3 * d, d) for k in ("feature", "answer")}
    linears |= {f"trm.refiner.{k}_attn.out_proj": (d, d) for k in ("feature", "answer")}
    linears |= {"trm.refiner.mlp.0": (2 * d, 3 * d), "trm.refiner.mlp.2": (d, 2 * d)}
    linears |= {"trm.updater.mlp.0": (2 * d, 2 * d), "trm.updater.mlp.2": (d, 2 * d)}
    linears |= {"trm.z0_proj": (d, d), "trm.y0_proj": (d, d)}
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for part in ("refiner", "updater"):
        shapes |= {f"trm.{part}.norm.{k}": (d,) for k in ("weight", "bias")}
    return shapes


def draw(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    """Return Gaussian arrays of size 0.02."""
    rng = np.random.default_rng(seed)
    return {n: 0.02 * rng.standard_normal(s, np.float32) for n, s in shapes.items()}


def to_muon(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) >= 2 and not optim.is_embedding(name, None)


def jax_contender(tx: optax.GradientTransformation, shapes: Mapping[str, Any]) -> Contender:
    """Compile one step of `tx`, update and addition, with parameters and state donated."""
    params, grads = (jax.tree.map(jnp.asarray, draw(shapes, seed)) for seed in (0, 1))
    state = tx.init(params)

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    program = compiled(step, params, state, grads, donate=(0, 1))
    carry = [params, state]

    def run():
        carry[:] = jax.block_until_ready(program.call(*carry, grads))

    times = program.compile_s, program.compile_cpu_s
    return Contender(run, *times, size(state), program.temporary_bytes)


def torch_contender(shapes: Mapping[str, Any]) -> Contender:
    """Return torch.optim.Muon on the matrices and fused AdamW on all else."""
    values, grads = draw(shapes, 0), draw(shapes, 1)
    params = {n: torch.nn.Parameter(torch.from_numpy(v)) for n, v in values.items()}
    for name, p in params.items():
        p.grad = torch.from_numpy(grads[name])
    muon = [p for n, p in params.items() if to_muon(n, shapes[n])]
    rest = [p for n, p in params.items() if not to_muon(n, shapes[n])]
    optimizers = [
        torch.optim.Muon(muon, lr=0.01, weight_decay=0.0, nesterov=False),
        torch.optim.AdamW(rest, lr=1e-4, fused=True),
    ]

    def run():
        for optimizer in optimizers:
            optimizer.step()

    run()
    state = [s for o in optimizers for s in o.state.values()]
    return Contender(run, 0.0, 0.0, size(state), None)


def contenders(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Contender]:
    """Return every optimizer of the race."""
    config = optim.MuGrokConfig.from_phase(1)
    bare = dataclasses.replace(config, enable_grokfast=False, use_qk_clip=False)
    knobs: Any = {"fallback": optim.is_embedding, "layout": optim.torch_layout}
    spec = optax.contrib.MuonDimensionNumbers(1, 0)
    specs: Any = {n: spec if to_muon(n, s) else None for n, s in shapes.items()}
    theirs = optax.contrib.muon(
        0.01,
        nesterov=False,
        adam_learning_rate=1e-4,
        adam_b2=0.999,
        adam_weight_decay=0.01,
        muon_weight_dimension_numbers=specs,
    )
    return {
        "mugrok": jax_contender(optim.mugrok(config, num_heads=5, **knobs), shapes),
        "mugrok without Grokfast and clip": jax_contender(optim.mugrok(bare, **knobs), shapes),
        "optax.contrib.muon": jax_contender(theirs, shapes),
        "torch.optim.Muon + fused AdamW": torch_contender(shapes),
    }


def counted(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, float]:
    """Count the step's floating-point operations and the bytes it has to read and write.

    Every parameter: itself, its gradient and its Grokfast mean are read, itself and the mean are
    written. A matrix adds its momentum, read and written; others add two moments.
    """
    matrices = [s for n, s in shapes.items() if to_muon(n, s)]
    whole, chosen = (sum(f(s) for s in matrices) for f in (whole_flops, chosen_flops))
    total = sum(math.prod(s) for s in shapes.values())
    orthogonal = sum(math.prod(s) for s in matrices)
    passes = 5 * total + 2 * orthogonal + 4 * (total - orthogonal)
    return {"flops": chosen, "flops of the whole form": whole, "bytes": 4 * passes}


def whole_flops(shape: tuple[int, ...]) -> float:
    m, n = sorted(shape)
    return 2 * 5 * m * m * (2 * n + m)


def chosen_flops(shape: tuple[int, ...]) -> float:
    m, n = sorted(shape)
    return 2 * multiplications(m, n, "jordan", 5)


def roofline_s(counts: Mapping[str, float], rates: Mapping[str, float]) -> float:
    """Return the seconds that the counted work would take at the measured rates.

    Of two measured rates of float32 products the better one is the ceiling: neither size is
    always the faster.
    """
    flop_s = max(rate for name, rate in rates.items() if name.startswith("float32 product"))
    byte_s = next(rate for name, rate in rates.items() if name.startswith("copy"))
    return counts["flops"] / flop_s + counts["bytes"] / byte_s


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the rows as Markdown; state and temporaries are in units of the parameters."""
    heads = ("optimizer", "ms a step", "mugrok / it", "compile s", "CPU s", "state", "temporaries")
    lines = []
    for name, row in rows.items():
        temporaries = row["temporaries_of_params"]
        numbers = (
            f"{1e3 * row['seconds']:.0f}",
            f"{row['mugrok_over_it']:.2f}",
            f"{row['compile_s']:.1f}",
            f"{row['compile_cpu_s']:.1f}",
            f"{row['state_of_params']:.2f}",
            "-" if temporaries is None else f"{temporaries:.2f}",
        )
        lines.append((name, *numbers))
    return markdown(heads, lines)


def main(args: Args) -> dict[str, Any]:
    jax.config.update("jax_enable_compilation_cache", False)
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "config.json", dataclasses.asdict(args) | {"out": str(args.out)})
    shapes = cognate_shapes()
    total = sum(math.prod(s) for s in shapes.values())
    entries = contenders(shapes)
    seconds = interleaved({name: entry.step for name, entry in entries.items()}, args.rounds)
    rates, counts = ceilings(), counted(shapes)
    rows = {
        name: {
            "seconds": float(np.median(seconds[name])),
            "mugrok_over_it": median_ratio(seconds["mugrok"], seconds[name]),
            "compile_s": entry.compile_s,
            "compile_cpu_s": entry.compile_cpu_s,
            "state_of_params": entry.state_bytes / (4 * total),
            "temporaries_of_params": None
            if entry.temporary_bytes is None
            else entry.temporary_bytes / (4 * total),
        }
        for name, entry in entries.items()
    }
    roofline = roofline_s(counts, rates)
    result = {
        "parameters": total,
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "rows": rows,
        "all_seconds": seconds,
        "ceilings": rates,
        "counted": counts,
        "roofline_s": roofline,
        "roofline_over_measured": roofline / rows["mugrok"]["seconds"],
    }
    write_json(args.out / "result.json", result)
    write_atomic(args.out / "table.md", table(rows) + "\n")
    print(f"{total:,} parameters, medians of {args.rounds} rounds, load {result['load']:.1f}")
    print(table(rows))
    for name, rate in rates.items():
        print(f"{name}: {rate / 1e9:.1f} G")
    whole = counts["flops of the whole form"] / 1e9
    print(f"{counts['flops'] / 1e9:.0f} Gflop a step, {whole:.0f} without the Gram form")
    print(
        f"roofline {1e3 * roofline:.0f} ms, {100 * result['roofline_over_measured']:.0f} % of "
        f"mugrok's {1e3 * rows['mugrok']['seconds']:.0f} ms"
    )
    for name in list(rows)[2:]:
        print(f"mugrok / {name}: {rows[name]['mugrok_over_it']:.3f}")
    return result


if __name__ == "__main__":
    main(tyro.cli(Args, prog="python -m experiments.bench.optimizers", description=__doc__))
