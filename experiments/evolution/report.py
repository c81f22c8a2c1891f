"""The report of a run, from its events: strict JSON, its keys those of the public toolkit.

A score is in nats per unit of the task on held-out batches. Of what is compared by training, only
`deep_evaluations` (fresh seeds, all from scratch) may say that one network beats another.
"""

import platform
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import jax
import numpy as np
from scipy import stats

from experiments.evolution import shown
from experiments.evolution.search import of_search, variant
from experiments.evolution.settings import births
from forge_jax import arch, evolve
from forge_jax.arch import sizes
from forge_jax.arch.pipeline import steps_of
from forge_jax.evolve.loop import pareto_ranks

TIMINGS = ("tokens_per_sec", "tokens_per_cpu_sec", "compile_s", "seconds", "cpu_seconds")
TIMINGS += ("cache", "peak_rss_gb")
"""keys that differ from run to run"""
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


def births_in(config: dict[str, Any], settings: evolve.Settings) -> int:
    """Trials of a generation of the run with this config."""
    return births(settings.population, config.get("overflow_factor", 1.0))


def architecture(document: dict[str, Any]) -> dict[str, Any]:
    """What kind of network it is, in the toolkit's words."""
    found = arch.from_dict(document).arch
    steps = steps_of(found)
    stacks = {step.module: step.arch for step in steps if step.code is None}
    kinds = [m.kind for stack in stacks.values() for m in sizes.mixers(stack.mix_unit)]
    modules = document["arch"].get("modules", {})
    return {
        "mixer_counts": {kind: kinds.count(kind) for kind in sorted(set(kinds))},
        "has_router": any(stack.mix_unit.kind == "route" for stack in stacks.values()),
        "has_latent": any(step.code is not None for step in steps),
        "pipeline_stages": len(found.pipeline or ()),
        "recurrence": document["arch"].get("recurrence"),
        "module_recurrence": {n: m["recurrence"] for n, m in modules.items() if "recurrence" in m},
    }


def history(events: Sequence[evolve.Event], ladder: evolve.Ladder, born: int) -> list[dict]:
    """The rungs of halving, in their order."""
    out = []
    for e in events:
        if e["event"] == "report" and e["rung"] < ladder.rungs:
            found = e["metrics"]
            kept = ("loss_start", "loss_final", "qpc")
            row = {"cfg_path": f"{variant(e['trial'], born)}.yaml", "steps": e["steps"]}
            row |= {"score": e["score"], "tokens": found.get("total_tokens")}
            row |= {name: found.get(name) for name in kept}
            out.append(row | {"metrics": found, "error": e["error"]})
    return out


def candidate(
    trial: evolve.Trial, events: Sequence[evolve.Event], ladder: evolve.Ladder, born: int
) -> dict[str, Any]:
    """A trial with its rungs; stage 0 ends halving, higher ones are behind hurdles."""
    mine = [e for e in events if e["event"] == "report" and e["trial"] == trial.id]
    stages = [
        {
            "stage": e["rung"] - ladder.rungs + 1,
            "steps": e["steps"],
            "score": e["score"],
            "tokens": e["metrics"].get("total_tokens"),
            "flops": e["metrics"].get("total_flops"),
            "error": e["error"],
        }
        for e in mine
    ]
    last = mine[-1] if mine else {"score": None, "steps": 0, "metrics": {}}
    names = ("qpc", "tokens_per_sec", "total_tokens", "total_flops")
    scores = [s["score"] for s in stages if s["score"] is not None]
    return {
        "candidate_index": trial.id,
        "cfg_path": f"{variant(trial.id, born)}.yaml",
        "hash": trial.fingerprint,
        "stages": stages,
        "best_score": min(scores, default=None),
        "best_steps": last["steps"],
        **{name: last["metrics"].get(name) for name in names},
        "metrics": last["metrics"],
        "architecture": architecture(trial.document),
    }


def front(trials: dict[int, evolve.Trial], ladder: evolve.Ladder) -> list[int]:
    """Trials that nobody beats in score, FLOPs, parameters and KV bytes at once.

    Among those that came furthest together, to the end of halving.
    """
    last = ladder.rungs - 1
    rows = {
        t.id: (r.score, *r.objectives)
        for t in trials.values()
        for r in t.reports
        if r.rung == last and r.score < float("inf")
    }
    if not rows:
        return []
    ranks = pareto_ranks(np.array(list(rows.values())))
    return [trial for trial, rank in zip(rows, ranks, strict=True) if rank == 0]


def against(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """Paired comparison over seeds: same batches, same initial keys; negative is better."""
    gap = np.subtract(ours, theirs)
    out: dict[str, Any] = {"difference": float(gap.mean()), "p": None, "verdict": "one seed"}
    if len(gap) < 2:
        return out
    out["p"] = float(stats.ttest_rel(ours, theirs).pvalue) if gap.std() else float(gap.any() == 0)
    certain = out["p"] < 0.05
    out["verdict"] = ("better" if gap.mean() < 0 else "worse") if certain else "within seed noise"
    return out


def deep(events: Sequence[evolve.Event], born: int, config: dict[str, Any]) -> list[dict]:
    """What fresh seeds say of the best, each against the baseline."""
    rows = [e for e in events if e["event"] == "deep"]
    base = next((e["metrics"].get("score_by_seed") for e in rows if e["trial"] == 0), None)
    out = []
    for e in rows:
        mine = e["metrics"].get("score_by_seed")
        compared = against(mine, base) if mine and base and e["trial"] else None
        out.append(
            {
                "candidate_index": e["trial"],
                "rank": e["rank"],
                "cfg_path": f"{variant(e['trial'], born)}.yaml",
                "steps": e["steps"],
                "seq_len": config["seq_len"],
                "batch_size": config["batch_size"],
                "loss_final": e["metrics"].get("loss_final"),
                "qpc": e["metrics"].get("qpc"),
                "score": e["score"],
                "seeds": e["seeds"],
                "against_baseline": compared,
                "metrics": e["metrics"],
                "error": e["error"],
            }
        )
    return out


def built(
    events: Sequence[evolve.Event],
    settings: evolve.Settings,
    config: dict[str, Any],
    rest: dict[str, Any],
) -> dict[str, Any]:
    """The report; `rest` (cache, seconds, ...) stands beside the keys."""
    ladder, born = settings.ladder, births_in(config, settings)
    trials = evolve.trials_of(of_search(events))
    tried = history(events, ladder, born)
    scores = [h["score"] for h in tried if h["score"] is not None]
    return {
        "asha": {
            "evaluated": len(tried),
            "promoted": sum(e["event"] == "report" and e["rung"] > 0 for e in events),
            "best_score": min(scores, default=None),
            "history": tried,
        },
        "candidates": [candidate(t, events, ladder, born) for t in trials.values()],
        "deep_evaluations": deep(events, born, config),
        "pareto_front": front(trials, ladder),
        "hurdles": list(evolve.hurdles(of_search(events), ladder)),
        "failed": sum(bool(e.get("error")) and not e.get("refused") for e in events),
        "refused": len({e["trial"] for e in events if e.get("refused")}),
        "seed": config["seed"],
        "data": config["data_is"],
        "versions": {
            **{name: version(name) for name in PACKAGES},
            "python": platform.python_version(),
        },
        "device": jax.devices()[0].device_kind,
        **rest,
    }


def ranked(built: dict[str, Any]) -> list[dict[str, Any]]:
    """The candidates that have a score, those trained longest first, then the best."""
    done = [c for c in built["candidates"] if c["stages"] and c["stages"][-1]["score"] is not None]
    return sorted(done, key=lambda c: (-c["best_steps"], c["stages"][-1]["score"]))


def words(built: dict[str, Any], most: int = 5) -> str:
    """The best, and what fresh seeds say, for a terminal."""
    data = built["data"]
    floor = "unknown" if data["floor"] is None else f"{data['floor']:.4g}"
    lines = [
        f"{data['task']}: nats per {data['unit']}, held out; floor {floor}, "
        f"frequencies alone {data['unigram_entropy']:.4g}"
    ]
    for c in ranked(built)[:most]:
        score, found = c["stages"][-1]["score"], c["metrics"]
        lines.append(
            f"  {c['cfg_path']}: {score:.4f} after {found['steps']} steps, "
            f"{found['params']:,} parameters, {found['flops_per_token'] / 1e6:.2f} MFLOP per token"
        )
    for e in (e for e in built["deep_evaluations"] if e["score"] is not None):
        versus = e["against_baseline"]
        tail = "no baseline to compare with" if e["candidate_index"] else "baseline"
        if versus is not None:
            gap, p = f"{versus['difference']:+.4f}", shown.number(versus["p"], 2)
            tail = f"{gap} against the baseline, p {p}: {versus['verdict']}"
        lines.append(
            f"  fresh seeds, {e['cfg_path']}: {e['score']:.4f} after {e['metrics']['steps']} "
            f"steps, {tail}"
        )
    count = len(built["candidates"])
    best = f", the best {most} above" if count > most else ""
    ends = f"{built['failed']} failed trainings, {built['refused']} refused"
    lines.append(f"  {count} candidates{best}, {ends}")
    return "\n".join(lines)
