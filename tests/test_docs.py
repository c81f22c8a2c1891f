"""The blocks of the documents run as they stand, one after another."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest

ROOT = Path(__file__).parent.parent


def blocks(document):
    return re.findall(r"^```python\n(.*?)^```", (ROOT / document).read_text(), re.M | re.S)


def run(document, tmp_path, monkeypatch, count=None):
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in blocks(document)[:count]:
        exec(compile(block, document, "exec"), names)
    return names


@pytest.mark.torch
def test_the_library_page_runs_and_does_what_it_says(tmp_path, monkeypatch):
    names = run("docs/library.md", tmp_path, monkeypatch)
    assert names["losses"][-1] < names["losses"][0]
    assert names["scores"].shape == (8, 2)
    assert np.ptp(names["scores"]) > 0
    assert names["reward"].shape == (8, 2)
    best = names["state"].best_solution[None]
    again = names["population"](best, names["likely"], names["questions"])
    np.testing.assert_allclose(again.mean(), -names["state"].best_fitness, rtol=1e-4)
    assert names["answers"].tokens.shape == (2, 8)
    assert {len(z) for z in names["places"].values()} == {4}
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        names["again"].params,
        names["dense"],
    )
    twice = 2 * np.asarray(names["layer"].kernel[...]).sum(axis=0)
    np.testing.assert_allclose(names["twice"][0], twice, rtol=1e-4, atol=1e-5)


def test_the_readmes_example_runs(tmp_path, monkeypatch, capsys):
    run("README.md", tmp_path, monkeypatch, count=1)
    assert float(capsys.readouterr().out) < 1e-3


def test_cognates_example_runs(tmp_path, monkeypatch):
    names = run("docs/cognate.md", tmp_path, monkeypatch, count=1)
    assert names["out"].logits.shape == (2, 32, 32768)
    assert int(names["out"].answers.min()) >= 1
