"""What a search will spend, said before anything is spent: shapes are traced, nothing compiled."""

from typing import Any

from experiments.evolution.candidates import Setup, admitted, own_steps
from forge_jax import arch, evolve

Row = dict[str, Any]


def rungs(ladder: evolve.Ladder, trials: int, setup: Setup, train_flops: float) -> list[Row]:
    """Per rung its total steps, and how many trials reach it: expected in halving, at most behind.

    FLOPs are those of networks of `train_flops` a row, all seeds of a trial counted.
    """
    out = []
    for rung in range(ladder.rungs + ladder.stages):
        reached = trials // ladder.reduction ** min(rung, ladder.rungs - 1)
        steps = ladder.steps(rung) - ladder.steps(rung - 1)
        tokens = reached * steps * setup.rows * setup.length * len(setup.seeds)
        out.append(
            {
                "rung": rung,
                "kind": "halving" if rung < ladder.rungs else "hurdle",
                "steps": ladder.steps(rung),
                "trials": reached,
                "tokens": tokens,
                "flops": tokens * train_flops / setup.length,
            }
        )
    return out


def documents(specs: dict[str, arch.Spec], setup: Setup) -> list[Row]:
    """What each document costs, or why it is refused."""
    out: list[Row] = []
    for name, spec in specs.items():
        try:
            spent = admitted(spec, setup)
        except ValueError as error:
            out.append({"name": name, "refused": str(error)})
            continue
        shown = {"params": spent.params, "flops_per_token": spent.flops / setup.length}
        shown |= {
            "kv_bytes_per_token": spent.kv_bytes,
            "steps_of_100": own_steps(100, spent, setup),
            "max_steps": spec.train.budget and spec.train.budget.max_steps,
        }
        out.append({"name": name, "train_flops": spent.train_flops, **shown})
    return out


def described(found: list[Row], setup: Setup, settings: evolve.Settings) -> str:
    """What the documents cost and the ladder spends, in words."""
    costs = [row["train_flops"] for row in found if "refused" not in row]
    mean = setup.step_flops or sum(costs) / max(len(costs), 1)
    # who is born and refused is no trial's training
    trials = settings.trials - sum("refused" in row for row in found[: settings.trials])
    steps = rungs(settings.ladder, trials, setup, mean)
    lines = []
    for row in found:
        if "refused" in row:
            lines.append(f"{row['name']}: refused. {row['refused']}")
            continue
        end = f" (its training ends at {row['max_steps']})" if row["max_steps"] else ""
        lines.append(
            f"{row['name']}: {row['params']:,} parameters, {row['flops_per_token']:,.0f} FLOPs and "
            f"{row['kv_bytes_per_token']:,.0f} KV bytes per token, "
            f"{row['steps_of_100']} steps for 100 of the ladder{end}"
        )
    for row in steps:
        often = "at most " if row["kind"] == "hurdle" else ""
        lines.append(
            f"rung {row['rung']} ({row['kind']}): {row['steps']} steps, {often}{row['trials']} "
            f"trials, {row['tokens']:,} tokens, {row['flops']:.3g} FLOPs"
        )
    total = sum(row["flops"] for row in steps)
    lines.append(f"in all at most {total:.3g} FLOPs of training, candidates like the documents")
    return "\n".join(lines)
