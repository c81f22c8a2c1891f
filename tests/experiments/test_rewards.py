"""Rewards by name."""

import sys
from types import SimpleNamespace

import pytest

from experiments import sandbox
from experiments.data.rewards import program_of, reward_of


def test_the_named_ones_say_what_counts():
    exact, numeric = reward_of("exact"), reward_of("numeric")
    assert exact is not None
    assert numeric is not None
    assert exact(" 12\n", "12") == 1
    assert exact("It is 12.", "12") == -1
    assert numeric("It is 12.0, I think", "12") == 1
    assert numeric("It is 13", "12") == -1
    assert reward_of("task") is None


def test_a_function_of_ones_own(monkeypatch):
    """Whatever number it gives is the reward; what is no number is refused."""
    own = SimpleNamespace(closeness=lambda r, a: -abs(len(r) - len(a)) / 2, broken=lambda r, a: r)
    monkeypatch.setitem(sys.modules, "own_rewards", own)
    reward = reward_of("own_rewards:closeness")
    assert reward is not None
    assert reward("abc", "a") == -1.0
    broken = reward_of("own_rewards:broken")
    assert broken is not None
    with pytest.raises(ValueError, match="finite"):
        broken("abc", "a")


@pytest.mark.parametrize("name", ["best", "no_such_module:f", "math:no_such_function", "math:pi"])
def test_what_is_no_reward_is_refused(name):
    with pytest.raises(ValueError, match="reward"):
        reward_of(name)


@pytest.mark.skipif(sandbox.missing() is not None, reason="no sandbox here")
def test_unit_tests_are_run():
    reward = reward_of("unit_tests")
    assert reward is not None
    said = "Here it is:\n```python\ndef f(x):\n    return 2 * x\n```\nDone."
    assert program_of(said) == "def f(x):\n    return 2 * x\n"
    assert reward(said, "assert f(2) == 4") == 1
    assert reward(said, "assert f(2) == 5") == -1
    for answer in ("7", "[1, 2, 3]", "three words long", ""):  # what would hold of any program
        with pytest.raises(ValueError, match="wants answers that assert something"):
            reward("x = 1", answer)


def test_unit_tests_are_refused_without_a_sandbox(monkeypatch):
    monkeypatch.setattr(sandbox, "missing", lambda: "namespaces are not to be had")
    with pytest.raises(ValueError, match="none are run: namespaces"):
        reward_of("unit_tests")
