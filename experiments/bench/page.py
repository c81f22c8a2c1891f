"""Write the races' page, every number of it from the JSON files in a directory.

python -m experiments.bench.page runs/bench --page docs/performance.md
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tyro

from experiments.bench.race import OURS, judged, markdown, shown, table
from experiments.files import read_json, write_atomic, write_json
from experiments.run import clean_errors

# in the order of the page
ORDER = (
    *("population_scoring", "population_few_shot", "few_shot", "population_generation"),
    *("rl_step", "four_experts", "rows"),
    *("generation", "nsga2", "decompose"),
)

HEAD = """# Performance

`python -m experiments.bench.all runs/bench --rounds 3 --page docs/performance.md` runs these races
and writes this page; one module of them is `python -m experiments.bench.<name> runs/bench` with
population, rl_step, four_experts, rows, generation, nsga2, decompose or few_shot, and
`python -m experiments.bench.page runs/bench --page docs/performance.md` writes the page again. A
race that was run again takes the place of its old result: each states its rounds, and under Machine
its commit. The
optimizer's race is in `docs/optimizer.md`, that of architectures `experiments.bench.candidates`.

How to read it:

- Before a race is timed, each side runs once and the results are compared; a race whose sides
  disagree stops with an error.
- A time is the median over the rounds. A ratio is the median of the rounds' own ratios, each round
  timing every side once: it need not be the quotient of two medians.
- "Public way" is that of Transformer-Squared's published code, U diag(s z) Vᵀ built anew for every
  candidate, in transformers' model where that code has vLLM, and without reloading it; all matrices
  of attention and MLP are adapted, where that code adapts the MLP's. "Same algebra in torch" is
  our factored form in that model: against it, what is left is the compiler and not the formula.
- Compilation is not in the times and has its own column. Held is what stays from run to run
  (weights, factors, states), temporary what XLA allots beside it; torch does not tell.
- The ceilings are the rates that this machine reaches on one large product and one large copy.
  What a race has to multiply and to move, counted by hand and taken at these rates, is the time
  that its share of the ceilings refers to. For the decomposition the count is that of a textbook
  algorithm, most of which is not products. The copy writes as well as it reads, and products and
  copies are added up as if neither overlapped: where a race mostly reads, as decoding does, the
  share can exceed 100 % and is no bound.
- torch runs as many threads as JAX, without `torch.compile`. The race of NSGA-II needs pymoo, which
  comes with the `dev` extra, and few_shot the experts of `make demo`.
- few_shot is the fitness of few-shot adaptation on real shots: the public way generates the
  answers, up to the longest, ours judges them in one pass and finds the same ones right, which is
  possible where an answer must be exact. At width 576 it is SmolLM2, with `--base smollm2` and the
  experts that `docs/log.md` names. population_few_shot is the loss of random decoders at other
  widths. How often ours is faster there depends on width and tokens: decision 66.
"""


@dataclasses.dataclass(frozen=True)
class Args:
    out: tyro.conf.Positional[Path]
    """directory with the races' JSON files"""
    page: Path | None = None
    """Markdown file to write; `performance.md` in `out` unless given"""


def read(out: Path) -> list[dict[str, Any]]:
    """The results in a directory, in the order of the page."""
    found = [read_json(path) for path in sorted(out.glob("*.json"))]
    races = [r for r in found if isinstance(r, dict) and {"rows", "floors", "title"} <= set(r)]
    if not races:
        raise ValueError(f"{out} has no results of races.")

    def place(result):
        firsts = [i for i, name in enumerate(ORDER) if result["name"].startswith(name)]
        size = result["name"].rpartition("_")[2]
        number = int(size) if size.isdigit() else 0
        return min(firsts, default=len(ORDER)), result["settings"].get("new_tokens", 0), number

    return sorted(races, key=place)


def summary(results: Sequence[Mapping[str, Any]]) -> str:
    """Every floor in one table."""
    rows = []
    for result in results:
        for floor in result["floors"]:
            sign = "≤" if floor["at_most"] else "≥"
            verdict = "met" if floor["met"] else f"missed by {100 * floor['missed_by']:.1f} %"
            wanted = f"{sign} {shown(floor['wanted'])}"
            rows.append((result["name"], floor["what"], wanted, shown(floor["got"]), verdict))
    return markdown(("race", "what", "wanted", "measured", ""), rows)


def absent(results: Sequence[Mapping[str, Any]]) -> str:
    """The kinds of race that have no result here."""
    kinds = [k for k in ORDER if not any(r["name"].startswith(k) for r in results)]
    return f"Not run here: {', '.join(kinds)}." if kinds else ""


def machine(results: Sequence[Mapping[str, Any]]) -> str:
    """What the races ran on; one line for each set-up, the one-thread race has its own."""
    lines = {}
    for result in results:
        p = result["provenance"]
        versions = ", ".join(f"{name} {v}" for name, v in p["versions"].items())
        processor = p.get("processor") or "a processor without a name"
        line = (
            f"{p['cores']} cores of {processor}, JAX on {p['device']} ({p['platform']}), "
            f"{p['dtype']}, torch with {p['torch_threads']} threads, commit {p['commit']}; "
            f"{versions}."
        )
        lines.setdefault(line, []).append(result["name"])
    return "\n\n".join(f"{', '.join(names)}: {line}" for line, names in lines.items())


def crowded(result: Mapping[str, Any]) -> str:
    """A warning where other jobs ran beside the race; torch's threads then wait for each other."""
    cores = result["provenance"]["cores"]
    if result["load"] <= cores + 0.5:
        return ""
    return (
        f" The load average was {result['load']:.1f} on {cores} cores, of other jobs beside this "
        "race or shortly before it: do not rely on its ratios."
    )


def ceilings(result: Mapping[str, Any]) -> str:
    """The machine's rates during the race, and how near to them ours is."""
    (product, flop_s), *_, (_, byte_s) = result["ceilings"].items()
    product = product.split(",")[0]
    said = f"Ceilings: {product} {flop_s / 1e9:.1f} Gflop/s, copy {byte_s / 1e9:.1f} GB/s"
    roofline = result["roofline"]
    if roofline is None:
        return f"{said}. Sorting and comparing is near to neither."
    return (
        f"{said}. {roofline['flops'] / 1e9:.3g} Gflop and {roofline['bytes'] / 1e6:.3g} MB a run "
        f"take {shown(roofline['seconds'], 1e3)} ms a {result['unit']} at these rates, "
        f"{100 * roofline['of_measured']:.0f} % of what was measured."
    )


def section(result: Mapping[str, Any]) -> str:
    """One race: its settings, table, floors and share of the ceilings."""
    settings = ", ".join(f"{k} {v}" for k, v in result["settings"].items())
    agreement = dict(result["agreement"])
    tolerance = agreement.pop("tolerance")
    apart = ", ".join(f"{name} {shown(d)}" for name, d in agreement.items())
    lines = [
        f"## {result['name']}",
        f"{result['title'][0].upper()}{result['title'][1:]}. Settings: {settings}. "
        f"{result['rounds']} rounds, load {result['load']:.1f}.{crowded(result)}",
        table(result),
        f"Difference from {OURS}, at most {shown(tolerance)} allowed: {apart}.",
    ]
    if result["floors"]:
        lines.append("\n".join(f"- {judged(floor)}" for floor in result["floors"]))
    lines.append(ceilings(result))
    notes = {n: v if isinstance(v, str) else shown(v) for n, v in result["notes"].items()}
    if notes:
        lines.append("\n".join(f"- {name}: {value}" for name, value in notes.items()))
    return "\n\n".join(lines)


def render(results: Sequence[Mapping[str, Any]]) -> str:
    """The whole page."""
    shared = [result["name"] for result in results if crowded(result)]
    warning = f"The load average was above the cores in {', '.join(shared)}: do not rely on these."
    top = [HEAD, warning if shared else "", summary(results), absent(results)]
    parts = [*top, "## Machine", machine(results), *map(section, results)]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


@clean_errors()
def main(args: Args) -> str:
    """Write the page and `result.json`, all races in one file."""
    results = read(args.out)
    write_json(args.out / "result.json", {"races": results})
    page = render(results)
    write_atomic(args.page or args.out / "performance.md", page)
    return page


if __name__ == "__main__":
    main(tyro.cli(Args, prog="python -m experiments.bench.page", description=__doc__))
