"""Adaptation at inference: which expert for which question, and what two passes cost.

    python -m experiments.adapt nano --experts runs/demo --out runs/adapt
    python -m experiments.adapt nano --experts runs/demo --chat

Reads the experts of a `experiments.phase7` run (without --experts it trains them first), measures
every way to dispatch a question on wordings it was and was not fitted on, two passes against an
oracle that knows the domain, few-shot mixtures against the uniform one and the best single expert,
and the first pass against the second. The questions of "other" belong to no expert: there the base
is right. Writes config.json, metrics.jsonl and adapt.json.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from experiments import dispatching, experts, model, problem, serving
from experiments import run as runs
from experiments.chat import NEW, chat, make_reply
from experiments.dispatching import ROOM
from experiments.forms import SVF
from experiments.phase7 import parse_seeds
from experiments.problem import Problem
from experiments.questions import Asked, make_sets, wordings_of
from experiments.shots import few_shot
from experiments.training import DEFAULTS, Settings, make_tx
from forge_jax import adapt, svf
from forge_jax.domains import DOMAINS
from interop import load_phase8

SEARCH = adapt.FewShot(generations=15)


@dataclasses.dataclass(frozen=True)
class Args:
    out: Path = Path("runs/adapt")
    """run directory to create"""
    base: Literal["nano", "smollm2"] = "nano"
    """the preset's own checkpoint"""
    checkpoint: Path | None = None
    """another: Phase 6 file or JSON, Hugging Face directory or .gguf"""
    experts: Path | None = None
    """directory of a phase7 run; without one the experts are trained first"""
    domains: tuple[str, ...] = DOMAINS
    """where they are trained: one expert each"""
    stop_token: bool = True
    """an answer must end with the end-of-text token; with `experts` as in their run"""
    seed: int = 0
    """of the experts' training and of the classification expert"""
    items: int = 64
    """questions of each domain in every measured set"""
    fit_items: int = 480
    """questions of each domain that the dispatchers are fitted on"""
    expert_steps: int = 100
    """updates of the classification expert"""
    shots: int = 10
    """examples of a mixed domain"""
    shot_tests: int = 100
    """questions of it"""
    shot_seeds: str = "0,1,2,3,4"
    """draws of a mixed domain, each of another pair of domains"""
    few_shot: adapt.FewShot = SEARCH
    training: Settings = DEFAULTS
    chat: bool = False
    """talk to the adapted model in the terminal instead; nothing is measured"""
    mix: bool = False
    """with `chat`: all experts answer together, by their probabilities"""
    resume: bool = False
    """go on with a killed run in `out`"""
    replace: bool = False
    """take the place of an earlier run in `out` once this one is whole"""


SMOLLM2 = Args(
    base="smollm2",
    domains=("sums", "largest"),
    stop_token=False,
    items=10,
    fit_items=72,
    expert_steps=30,
    shot_tests=20,
    training=Settings(
        steps=20, prompts=12, samples=16, learning_rate=3e-3, decay=True, kl_coefficient=0.0
    ),
)
PRESETS = {
    "nano": ("the shipped nano checkpoint, four domains", Args()),
    "smollm2": ("SmolLM2-135M-Instruct, small settings", SMOLLM2),
}


def load(args: Args) -> tuple[Problem, dict[str, Any] | None]:
    """The base with its tasks, and the experts, {path: (K, r)}, unless they are to be trained.

    Raises:
      ValueError: the experts are of another base, or do not fit it.
    """
    args.training.check()
    found = None if args.experts is None else load_phase8(args.experts)
    settings: dict[str, Any] = {"select": "both", "source": "procedural", "data": None}
    settings |= {"stop_token": args.stop_token, "free_tokens": 128}
    if args.experts is not None:
        settings = problem.run_settings(args.experts)
    domains = args.domains if found is None else tuple(found.experts)
    for domain in domains:
        wordings_of(domain, "plain")  # refuses a domain without wordings before anything is loaded
    counts: Any = {
        "train": max(args.fit_items, args.training.prompts, args.shots),
        "validation": args.items,
        "test": max(args.items, math.ceil(args.shot_tests / 2)),
    }
    made = problem.set_up(
        args.checkpoint or (model.NANO if args.base == "nano" else model.smollm2()),
        domains=domains,
        unplanted=(),
        counts=counts,
        chunk=8,
        **settings,
    )
    if found is None:
        return made, None
    theirs, ours = found.metadata.get("base_sha256"), made.model.checkpoint.sha256
    if theirs != ours:
        raise ValueError(
            f"The experts in {args.experts} are of another base ({str(theirs)[:12]}), this one is "
            f"{ours[:12]}."
        )
    if inexact := [task.name for task in made.tasks if not task.is_exact]:
        raise ValueError(
            f"Adaptation is measured on answers that are exact; in {args.experts} those of "
            f"{', '.join(inexact)} are read out of free text."
        )
    z: Any = problem.stacked(found.experts)
    adapt.check_experts(made.weights["factors"], z)
    return made, z


def train(run: runs.Run, args: Args, made: Problem) -> dict[str, np.ndarray]:
    """Experts of the domains, as `experiments.phase7` trains them."""
    tx = make_tx(args.training)
    step = experts.make_step(made.model, SVF, tx, args.training, made.new_tokens)
    given = (made.weights, made.tasks, made.scorer, step, args.training, args.seed)
    return experts.train(run, *given)


def sets_of(made: Problem, args: Args) -> dict[str, Asked]:
    """What is fitted on, what the way is chosen on, what is measured on."""
    return make_sets(
        made,
        {
            "fit": ("train", "fit", args.fit_items),
            "validation": ("validation", "fit", args.items),
            "plain": ("test", "plain", args.items),
            "reworded": ("test", "reworded", args.items),
            "shared": ("test", "shared", args.items),
        },
        others=args.items,
    )


MEASURED = ("plain", "reworded", "shared")
"""sets whose questions have an expert; those of "other" are for the base"""


def run_all(run: runs.Run, args: Args, made: Problem, sets: dict[str, Asked], z) -> dict[str, Any]:
    """Every measurement; each is logged as it comes."""
    ways = dispatching.fit(made, sets, args.expert_steps, args.seed)
    choosers = dispatching.make_choosers(made)
    shares = dispatching.measure(choosers, ways, sets, ("validation", *MEASURED, "other"))
    runs.log(
        run,
        {"step": 0, **{f"dispatch/{w}/{s}": v for w, r in shares.items() for s, v in r.items()}},
    )
    # the head first: of ways that are as good it is the one without a prompt of its own
    way = max(("head", "expert", "calibrated", "labels"), key=lambda w: shares[w]["validation"])
    served = serving.accuracy(made, z, ways, way, {name: sets[name] for name in MEASURED})
    shown = ("two_pass", "oracle", "base", "of_oracle", "dispatched_right")
    logged = {f"two_pass/{name}/{k}": row[k] for name, row in served.items() for k in shown}
    runs.log(run, {"step": 1, **{k: v for k, v in logged.items() if v is not None}})
    cost = runs.once(run, "costs", lambda: serving.costs(made, z, ways, way, sets["plain"]))
    given = {
        "seeds": parse_seeds(args.shot_seeds, "--shot-seeds"),
        "shots": args.shots,
        "tests": args.shot_tests,
    }
    found = few_shot(made, z, args.few_shot, **given)
    for row in found["rows"]:
        runs.log(
            run, {"step": 2 + row["seed"], **{f"few_shot/{k}": v for k, v in row["test"].items()}}
        )
    return {"dispatch": shares, "way": way, "two_pass": served, "cost": cost, "few_shot": found}


def show(summary: dict[str, Any]) -> None:
    """Print the tables."""
    names = (*MEASURED, "other")
    print("dispatch, % right" + "".join(f"{name:>11}" for name in names))
    for way, row in summary["dispatch"].items():
        print(f"  {way:15}" + "".join(f"{100 * row[name]:11.1f}" for name in names))
    for name, two in summary["two_pass"].items():
        share = two["of_oracle"]
        of_oracle = "no share" if share is None else f"{share:.3f}"
        print(
            f"two passes ({summary['way']}), {name}: {100 * two['two_pass']:.1f} %, oracle "
            f"{100 * two['oracle']:.1f}, base {100 * two['base']:.1f}; {of_oracle} of the oracle; "
            f"rows equal one expert alone: {two['rows_equal_one_expert_alone']}, one by one: "
            f"{two['rows_equal_one_by_one']}; recompilations for another number of experts: "
            f"{two['recompiles_for_a_new_expert']}"
        )
    cost = summary["cost"]
    print(
        f"first pass {cost['first_ms']:.2f} ms (a prefill {cost['prefill_ms']:.2f}), second "
        f"{cost['second_ms']:.1f} ms at {NEW} tokens; beyond a prefill "
        f"{cost['beyond_prefill_ms']:+.2f} ms, {100 * cost['beyond_prefill_of_second']:.2f} % of "
        "the second"
    )
    for row in summary["few_shot"]["rows"]:
        said = ", ".join(f"{k} {100 * v:.0f}" for k, v in row["test"].items())
        print(f"few-shot seed {row['seed']}, {row['domain']}: {said} (single: {row['single']})")
    for other, d in summary["few_shot"]["found_less"].items():
        said = "one seed has no interval"
        if d["low"] is not None:
            said = f"95 % {100 * d['low']:+.1f} to {100 * d['high']:+.1f}"
        print(f"few-shot less {other}: {100 * d['mean']:+.1f} points ({said})")


@runs.clean_errors()
def main(args: Args) -> None:
    """Measure, or talk."""
    if args.items < 2 or args.fit_items < 2 or args.shots < 1 or args.shot_tests < 2:
        raise ValueError(
            "`items`, `fit_items` and `shot_tests` must be at least 2 and `shots` at least 1."
        )
    parse_seeds(args.shot_seeds, "--shot-seeds")
    if args.chat:
        talk(args)
        return
    if not (args.resume or args.replace):
        runs.refuse_existing(args.out)
    made, z = load(args)
    args.few_shot.check(len(made.tasks))
    if len(made.tasks) < 2:
        raise ValueError("A mixed domain needs two domains.")
    sets = sets_of(made, args)
    model.check_length(made.model.decoder.spec, sets["plain"].plain.tokens.shape[1], NEW)
    given = {"experts_sha256": problem.experts_sha256(args.experts)}
    config = {**runs.plain(args), "base_sha256": made.model.checkpoint.sha256, **given}
    with runs.opened(args.out, config, resume=args.resume, replace=args.replace) as run:
        z = train(run, args, made) if z is None else z
        summary = run_all(run, args, made, sets, z)
        runs.write_json(run.path / "adapt.json", {**summary, "seconds": runs.seconds(run)})
        done = runs.finish(run)
    show(summary)
    print(f"written: {done / 'adapt.json'}")


def talk(args: Args) -> None:
    """The conversation, with a head fitted on the spot."""
    if args.experts is None:
        raise ValueError("`--chat` needs `--experts`, the directory of a phase7 run.")
    made, z = load(args)
    assert z is not None
    sets = make_sets(made, {"fit": ("train", "fit", args.fit_items)})
    head = dispatching.fit_head(made, sets["fit"])
    padded = svf.pad_experts(z, len(made.tasks) + ROOM)
    chat(make_reply(made, padded, head, args.mix))


if __name__ == "__main__":
    main(
        tyro.extras.overridable_config_cli(
            PRESETS,
            config=(tyro.conf.OmitArgPrefixes,),
            prog="python -m experiments.adapt",
            description=f"{__doc__}\nAll options: python -m experiments.adapt nano --help",
        )
    )
