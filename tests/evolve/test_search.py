"""The whole search: better than chance, the same after a kill, alive when candidates fail."""

import json
import math
import random

import pytest
from scipy.stats import binomtest

from forge_jax import arch, evolve
from forge_jax.evolve.loop import fitness
from tests.evolve.planted import SEED, distance, evaluate

LADDER = evolve.Ladder(first=20, reduction=2, rungs=3, stages=2, stage_steps=40, births=3)
SETTINGS = evolve.Settings(steps=8000, population=16, ladder=LADDER)


SHORT = SETTINGS._replace(steps=1600, population=10)


def searched(seed, settings=SETTINGS, events=(), evaluate=evaluate):
    return [*events, *evolve.run([SEED], evaluate, settings, seed=seed, events=events)]


def steps_of(events):
    """Training steps that a log stands for, counted apart from the search's own count."""
    last, total = {}, 0
    for e in events:
        if e["event"] == "report":
            total += e["steps"] - last.get(e["trial"], 0)
            last[e["trial"]] = e["steps"]
    return total


def random_search(seed, steps, full=80):
    """Random children, each trained to the end of halving; the distance of the best."""
    rng = random.Random(f"random {seed}")
    found = []
    for _ in range(steps // full):
        spec = evolve.mutate(SEED, rng, steps=rng.randint(1, 8)).spec
        found.append((evaluate(spec, 0, 0, full).score, distance(spec)))
    return min(found)[1]


@pytest.mark.slow
def test_the_search_beats_chance():
    """Sign test over 20 seeds at equal steps."""
    wins, losses = 0, 0
    for seed in range(20):
        events = searched(seed)
        steps = steps_of(events)
        assert steps <= SETTINGS.steps
        winner = evolve.best(events)
        assert winner is not None
        ours = distance(arch.from_dict(winner.document))
        theirs = random_search(seed, steps)
        wins, losses = wins + (ours < theirs), losses + (ours > theirs)
    print(f"{wins} wins, {losses} losses")
    assert binomtest(wins, wins + losses, alternative="greater").pvalue < 0.01


def test_every_part_of_the_ladder_is_climbed():
    events = searched(0, SHORT)
    trials = evolve.trials_of(events)
    rungs = [trial.rung for trial in trials.values()]
    assert max(rungs) == LADDER.rungs - 1 + LADDER.stages
    assert 1 < sum(r >= LADDER.rungs - 1 for r in rungs) < sum(r >= 1 for r in rungs) < len(rungs)
    assert len({t.fingerprint for t in trials.values()}) == len(trials)
    born = [e for e in events if e["event"] == "create"]
    assert born[0]["operator"] == "seed"
    assert all(e["diff"] for e in born[1:])
    # one birth in five, of few: a single short search may have none
    born += [e for seed in (1, 2) for e in searched(seed, SHORT) if e["event"] == "create"]
    assert any(e["operator"] == "crossover" for e in born)


@pytest.mark.parametrize("pareto", [False, True])
def test_a_killed_search_goes_on_to_the_same_end(pareto):
    settings = SHORT._replace(steps=500, pareto=pareto)
    whole = searched(3, settings)
    lines = [json.dumps(e, allow_nan=False) for e in whole]
    for cut in (0, 1, 7, len(whole) // 2, len(whole)):
        kept = [json.loads(line) for line in lines[:cut]]
        assert [json.dumps(e) for e in searched(3, settings, kept)] == lines
    assert searched(4, settings) != whole


def test_training_continues_from_where_it_stood():
    at = {}

    def continued(spec, trial, done, steps):
        assert at.get(trial, 0) == done < steps
        at[trial] = steps
        return evaluate(spec, trial, done, steps)

    events = searched(0, SHORT._replace(steps=600), evaluate=continued)
    assert sum(at.values()) == steps_of(events)


def test_candidates_may_fail():
    def fragile(spec, trial, done, steps):
        if trial % 3 == 1:
            raise RuntimeError("out of memory, or so")
        return evolve.Result(math.nan) if trial % 3 == 2 else evaluate(spec, trial, done, steps)

    events = searched(0, SHORT._replace(steps=600), evaluate=fragile)
    reports = [e for e in events if e["event"] == "report"]
    failed = [e for e in reports if e["score"] is None]
    assert {e["trial"] % 3 for e in failed} == {1, 2}
    assert all("out of memory" in e["error"] for e in failed if e["trial"] % 3 == 1)
    assert all(e["rung"] == 0 for e in failed)
    parents = {p for e in events if e["event"] == "create" for p in e["parents"]}
    assert {p % 3 for p in parents} == {0}


def test_a_mistake_of_the_program_is_no_failed_candidate():
    def wrong(*_):
        raise NotImplementedError("x") from None

    def absent(*_):
        raise AttributeError("x")

    with pytest.raises(AttributeError):
        searched(0, evaluate=absent)
    assert searched(0, SHORT._replace(steps=20), evaluate=wrong)[1]["score"] is None


def test_rank_weighs_the_objectives():
    """Of (score, FLOPs) the second best score is worse than the best in both: it falls behind."""
    events = []
    for i, (score, flops) in enumerate([(1.0, 9.0), (1.05, 10.0), (1.1, 8.0), (1.2, 1.0)]):
        events.append({"event": "create", "trial": i, "parents": [], "fingerprint": str(i)})
        events[-1] |= {"spec": {}, "operator": "seed", "diff": []}
        events.append({"event": "report", "trial": i, "rung": 0, "steps": 1, "score": score})
        events[-1] |= {"objectives": [flops], "metrics": {}, "error": None}
    trials = list(evolve.trials_of(events).values())

    def order(pareto):
        found = fitness(trials, pareto)
        return sorted(found, key=found.__getitem__)

    assert order(False) == [0, 1, 2, 3]
    assert order(True) == [0, 2, 3, 1]
