"""Halving and hurdles, each as the paper's algorithm on small logs; novelty."""

import math

import numpy as np
import pytest

from forge_jax import arch, evolve
from forge_jax.evolve import asha
from tests.evolve.planted import PLANTED, SEED

HALVING = evolve.Ladder(first=10, reduction=2, rungs=3)
HURDLES = evolve.Ladder(first=10, reduction=2, rungs=1, stages=3, stage_steps=5, births=2)


def log(*reports):
    """Events of trials that scored (trial, rung, score)."""
    names = dict.fromkeys(trial for trial, _, _ in reports)
    born = [
        {"event": "create", "trial": i, "spec": {}, "fingerprint": str(i), "parents": []}
        for i in names
    ]
    told = [
        {"event": "report", "trial": i, "rung": r, "score": s, "objectives": []}
        for i, r, s in reports
    ]
    return born + told


def promoted(*reports):
    trial = evolve.promotion(evolve.trials_of(log(*reports)), HALVING)
    return None if trial is None else trial.id


def test_steps_of_the_rungs():
    assert [HALVING.steps(r) for r in range(-1, 3)] == [0, 10, 20, 40]
    assert [HURDLES.steps(r) for r in range(4)] == [10, 15, 20, 25]
    assert evolve.Ladder(10, 2, 2, stages=2).steps(3) == 60


def test_the_best_half_is_promoted_as_soon_as_it_is_one():
    assert promoted((0, 0, 5.0)) is None
    assert promoted((0, 0, 5.0), (1, 0, 4.0)) == 1
    assert promoted((0, 0, 5.0), (1, 0, 4.0), (1, 1, 3.0)) is None
    assert promoted((0, 0, 5.0), (1, 0, 4.0), (1, 1, 3.0), (2, 0, 1.0), (3, 0, 9.0)) == 2
    # the higher rung goes first
    both = [(0, 0, 5.0), (1, 0, 4.0), (2, 0, 1.0), (3, 0, 2.0), (2, 1, 0.5), (3, 1, 0.7)]
    assert promoted(*both) == 2
    assert promoted(*both, (2, 2, 0.4)) is None


def test_a_failed_trial_is_never_promoted():
    assert promoted((0, 0, None), (1, 0, None)) is None
    assert promoted((0, 0, None), (1, 0, math.nan), (2, 0, 3.0), (3, 0, math.inf)) == 2


def test_hurdles_rise_with_those_who_pass_them():
    """So et al.: the mean of the finished sets the first hurdle, of those beyond it the second."""
    first = [(0, 0, 4.0), (1, 0, 2.0)]
    assert evolve.hurdles(log(*first), HURDLES) == (3.0,)
    assert evolve.hurdles(log(first[0]), HURDLES) == ()
    second = [*first, (1, 1, 1.5), (2, 0, 9.0), (3, 0, 2.5)]
    assert evolve.hurdles(log(*second), HURDLES) == (3.0, 1.5)
    # nobody beyond the second hurdle: no third
    third = [*second, (4, 0, 9.0), (5, 0, 9.0)]
    assert evolve.hurdles(log(*third), HURDLES) == (3.0, 1.5)
    assert evolve.hurdles(log(*third, (1, 2, 1.0), (6, 0, 8.0)), HURDLES) == (3.0, 1.5, 1.0)


def test_a_trial_climbs_while_it_beats_hurdles():
    limits = (3.0, 1.5)

    def climbs(*reports):
        trial = asha.continuation(evolve.trials_of(log(*reports)), limits, HURDLES)
        return None if trial is None else trial.id

    assert climbs((0, 0, 4.0)) is None
    assert climbs((0, 0, 4.0), (1, 0, 2.0)) == 1
    assert climbs((1, 0, 2.0), (1, 1, 1.6)) is None
    assert climbs((1, 0, 2.0), (1, 1, 1.5)) == 1
    assert climbs((1, 0, 2.0), (1, 1, 1.5), (1, 2, 0.1)) is None
    assert climbs((0, 0, None)) is None


def test_a_ladder_is_checked():
    with pytest.raises(ValueError, match="reduction of at least 2"):
        next(
            evolve.run(
                [SEED],
                lambda *_: evolve.Result(0.0),
                evolve.Settings(10, ladder=asha.Ladder(reduction=1)),
            )
        )


def test_a_log_is_checked():
    with pytest.raises(ValueError, match="trial 3, never created"):
        evolve.trials_of([{"event": "report", "trial": 3}])
    with pytest.raises(ValueError, match="create or report, got 'x'"):
        evolve.trials_of([{"event": "x"}])


def test_novelty_is_the_distance_to_others():
    rows = np.array([[0.0, 7], [0, 7], [1, 7], [10, 7]])
    found = evolve.novelty(rows, nearest=1)
    deviation = rows[:, 0].std()
    np.testing.assert_allclose(found, np.array([0, 0, 1, 9]) / deviation)
    np.testing.assert_allclose(evolve.novelty(rows * [1000, 1], nearest=1), found)
    np.testing.assert_array_equal(evolve.novelty(rows[:1]), [0])
    values = evolve.novelty_of([SEED, SEED, PLANTED])
    assert values.argmax() == 2
    assert arch.fingerprint(SEED) != arch.fingerprint(PLANTED)
