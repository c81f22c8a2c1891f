"""Two ceilings train side by side; one that fails stops the other."""

from types import SimpleNamespace
from typing import Any

import pytest

from experiments import ceilings

TASKS: Any = SimpleNamespace(tasks=[SimpleNamespace(name="math", is_exact=True)])


@pytest.fixture
def run(tmp_path, monkeypatch) -> Any:
    monkeypatch.setattr(ceilings, "dense_weights", lambda problem: {})
    monkeypatch.setattr(ceilings, "accuracy", lambda problem, params, task, split: params)
    return SimpleNamespace(path=tmp_path)


def test_both_are_there_at_once(run, monkeypatch):
    both: Any = {"full fine-tuning": 1, "LoRA, rank 16": 2}
    begun = set()

    def train(problem, weights, ceiling, task, seed, stop):
        begun.add(ceiling)
        while len(begun) < 2 and not stop.wait(0.01):
            pass
        return ceiling / 4, None, 100 * ceiling

    monkeypatch.setattr(ceilings, "train", train)
    found = ceilings.measure(run, TASKS, both, 0)
    assert found["full fine-tuning"] == {"accuracy": {"math": 0.25}, "bytes": 100}
    assert found["LoRA, rank 16"] == {"accuracy": {"math": 0.5}, "bytes": 200}
    monkeypatch.delattr(ceilings, "train")
    assert ceilings.measure(run, TASKS, both, 0) == found  # a resumed run reads them


@pytest.mark.parametrize("failing", [1, 2])
def test_a_failure_stops_the_other(run, monkeypatch, failing):
    def train(problem, weights, ceiling, task, seed, stop):
        if ceiling == failing:
            raise ValueError("out of memory")
        if not stop.wait(30):
            raise AssertionError("It was not stopped.")
        raise InterruptedError("stopped")

    monkeypatch.setattr(ceilings, "train", train)
    both: Any = {"full fine-tuning": 1, "LoRA, rank 16": 2}
    with pytest.raises(ValueError, match="out of memory"):
        ceilings.measure(run, TASKS, both, 0)
    assert not list(run.path.rglob("*.json"))
