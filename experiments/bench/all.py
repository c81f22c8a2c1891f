"""Run the races of docs/performance.md, and write the page about them.

    python -m experiments.bench.all runs/bench --page docs/performance.md

Writes `<race>.json` of each, `result.json` of all, and the page. Each module runs in a process of
its own, so that no race finds the memory or the threads of another.
"""

import dataclasses
import subprocess
import sys
from pathlib import Path

import tyro

from experiments.bench import few_shot, page, race
from experiments.run import clean_errors

MODULES = (
    *("population", "rl_step", "four_experts", "rows", "generation", "nsga2", "decompose"),
    "few_shot",
)


@dataclasses.dataclass(frozen=True)
class Args(race.Args):
    page: Path | None = None
    """Markdown file to write; `performance.md` in `out` unless given"""
    only: tuple[str, ...] = MODULES
    """modules to run; the page has the results of earlier runs too"""
    experts: Path = few_shot.EXPERTS
    """run directory of `experiments.phase7 nano`, for few_shot"""


@clean_errors()
def main(args: Args) -> None:
    """Run the modules one after another; the first that fails ends the run."""
    unknown = sorted(set(args.only) - set(MODULES))
    if unknown:
        raise ValueError(f"`only` must be among {', '.join(MODULES)}, got {', '.join(unknown)}.")
    for name in args.only:
        if name == "few_shot" and not args.experts.is_dir():
            why = f"few_shot needs {args.experts}, which `make demo` writes"
            if args.only != MODULES:
                raise ValueError(f"{why}.")
            print(f"[bench] left out: {why}")
            continue
        print(f"[bench] {name}", flush=True)
        options = ["--rounds", str(args.rounds), "--dtype", args.dtype]
        if name == "few_shot":
            options += ["--experts", str(args.experts)]
        module = [sys.executable, "-m", f"experiments.bench.{name}", str(args.out)]
        if code := subprocess.run([*module, *options], check=False).returncode:
            raise SystemExit(code)  # it has said why
    page.main(page.Args(args.out, args.page))
    print(f"\n{page.summary(page.read(args.out))}")


if __name__ == "__main__":
    main(tyro.cli(Args, prog="python -m experiments.bench.all", description=__doc__))
