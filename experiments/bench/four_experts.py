"""Race one SVF step of four experts at once against one expert after another.

    python -m experiments.bench.four_experts runs/bench

The step is that of `experiments.bench.rl_step`. At once is `jax.vmap` or `jax.lax.map` over the
experts in one program: whichever is faster here is the one that races, and its name is shown.
"""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from experiments.bench import decoders, race, rl_step
from experiments.bench.race import OURS, PUBLIC, TORCH

FULL = rl_step.Shape(256, 6, experts=4)


def after_another(contenders: list[race.Contender]) -> race.Contender:
    """All of them in turn, what they computed stacked."""

    def run():
        return [contender.run() for contender in contenders]

    def answer():
        outs = [contender.outcome() for contender in contenders]
        return jax.tree.map(lambda *leaves: np.stack([race.as_numpy(x) for x in leaves]), *outs)

    first = contenders[0]
    held = [c.held_bytes or 0 for c in contenders]
    return race.Contender(run, first.compile_s, max(held), first.temporary_bytes, answer)


def mapped(step, factors, *args):
    """One expert after another in one program."""
    return jax.lax.map(lambda x: step(factors, *x), args)


def vmapped(step, factors, *args):
    """All experts in the same products."""
    return jax.vmap(functools.partial(step, factors))(*args)


WAYS = {"vmap": vmapped, "lax.map": mapped}


def at_once(case: decoders.Case, over):
    """The step of all experts, whose z, tokens and rewards are stacked."""
    return functools.partial(over, rl_step.make_step(case))


def make(shape: rl_step.Shape, dtype: str) -> race.Race:
    """The race of K experts at once; the faster of `jax.vmap` and `jax.lax.map` is shown."""
    case = rl_step.case_of(shape)
    tokens, reward = rl_step.data(shape, case.spec)
    z = jax.tree.map(jnp.asarray, case.experts)

    stacked = (jax.vmap(rl_step.start)(z), jnp.asarray(tokens), jnp.asarray(reward))
    rows = range(shape.experts)
    apart = [jax.tree.map(lambda x, k=k: x[k], stacked) for k in rows]
    step = race.compiled(rl_step.make_step(case), case.factors, *apart[0])
    programs = {
        name: race.compiled(at_once(case, over), case.factors, *stacked)
        for name, over in WAYS.items()
    }

    def contender(name):
        return rl_step.stepping(programs[name], case.factors, *stacked)

    def theirs(k, public):
        return rl_step.torch_contender(case, k, tokens[k], reward[k], public=public)

    def others():
        singles = [rl_step.stepping(step, case.factors, *args) for args in apart]
        return {
            f"{OURS}, one after another": after_another(singles),
            PUBLIC: after_another([theirs(k, True) for k in rows]),
            TORCH: after_another([theirs(k, False) for k in rows]),
        }

    # in the company that they race in, which leaves the memory in other states than they do alone
    company = {name: contender(name) for name in WAYS} | others()
    taken = race.interleaved({name: one.run for name, one in company.items()}, 5)
    faster, slower = sorted(WAYS, key=lambda name: np.median(taken[name]))
    cased, timed = decoders.cast(case, dtype), None
    if dtype != "float32":
        timed = rl_step.compiled(at_once(cased, WAYS[faster]), cased.factors, *stacked)
    return race.Race(
        name=f"four_experts_{shape.hidden}",
        title=(
            f"one SVF step of {shape.experts} experts, {shape.rows} responses of {shape.time} "
            f"tokens each; {OURS} is {faster}"
        ),
        settings=dataclasses.asdict(shape),
        entries={
            OURS: contender(faster),
            f"{OURS}, {slower}": contender(slower),
            **others(),
        },
        difference=race.relative,
        tolerance=1e-4,
        work=rl_step.work(cased, shape),
        unit="step",
        timed=timed,
        summary=lambda: {"faster in five rounds before the race": faster},
    )


def races(dtype: str) -> Iterator[race.Race]:
    """The race of this module at full size."""
    yield make(FULL, dtype)


if __name__ == "__main__":
    args = tyro.cli(race.Args, prog="python -m experiments.bench.four_experts", description=__doc__)
    race.command(args, races)
