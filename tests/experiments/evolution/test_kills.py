"""A search with real training, killed at random moments and resumed, ends as one left alone."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.experiments.evolution.test_search import without_timings

ROOT = Path(__file__).resolve().parents[3]
DOCUMENT = """\
arch:
  d_model: 32
  n_layers: 2
  mix_unit: {kind: single, mixer: {kind: Attention, heads: 4}}
  ffn: {kind: dense, mult: 2.0, act: gelu}
  norm: RMSNorm
  pos: {kind: rope}
train: {ctx_len: 32}
"""
FLAGS = """--generations 3 --population 4 --seq-len 32 --batch-size 2 --asha-min 30 --asha-max 120
--pdh-base 60 --deep-steps 60 --deep-top-k 2 --deep-seeds 2 --seed 5"""


def started(path, name, *, resume=False):
    """The command in a process of its own; its caches hold programs, and no results of others."""
    flags = [*FLAGS.split(), "--out", path / name, "--cache", path / f"cache-{name}"]
    command = [sys.executable, "-m", "experiments.evolve", "evolve", path / "seed.yaml", *flags]
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    return subprocess.Popen(
        [*map(str, command), *(["--resume"] if resume else [])],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process):
    _, said = process.communicate()
    assert process.returncode == 0, said


def begun(path, name):
    return any((path / n / "config.json").exists() for n in (name, f"{name}.partial"))


@pytest.mark.slow
def test_twenty_kills_change_nothing(tmp_path):
    (tmp_path / "seed.yaml").write_text(DOCUMENT)
    ended(started(tmp_path, "whole"))
    shutil.copytree(tmp_path / "cache-whole", tmp_path / "cache-killed")
    shutil.rmtree(tmp_path / "cache-killed" / "results")
    rng, kills = random.Random(1), 0
    while kills < 20:
        process = started(tmp_path, "killed", resume=begun(tmp_path, "killed"))
        try:
            _, said = process.communicate(timeout=rng.uniform(4, 9))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
        else:
            pytest.fail(f"over after {kills} kills: {said}")
    ended(started(tmp_path, "killed", resume=True))
    reports = [
        json.loads((tmp_path / name / "search_report.json").read_text())
        for name in ("whole", "killed")
    ]
    assert without_timings(reports[0]) == without_timings(reports[1])
    files = [p for p in (tmp_path / "whole").rglob("*") if p.suffix in (".yaml", ".mmd")]
    assert len(files) > 12
    for file in [*files, tmp_path / "whole" / "lineage.json"]:
        other = tmp_path / "killed" / file.relative_to(tmp_path / "whole")
        assert other.read_bytes() == file.read_bytes()
