"""The commands on architecture documents."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from experiments import evolve
from experiments import run as runs
from experiments.evolution.candidates import Limits
from experiments.evolution.report import births_in
from experiments.evolution.search import variant
from experiments.evolution.settings import rungs, settings_of
from experiments.evolution.shown import cells, latest, table
from forge_jax import arch

ARCHS = sorted((Path(evolve.__file__).parent / "archs").glob("*.yaml"))


@pytest.mark.parametrize("path", ARCHS, ids=lambda path: path.stem)
def test_shipped_documents_are_valid(path, capsys):
    assert evolve.main(evolve.Validate((path,), strict=True)) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"VALID {path}\nfingerprint ")
    assert "note" not in out


def test_a_bad_document_is_told_and_fails(tmp_path, capsys):
    good = (ARCHS[0].parent / "nanogpt_tiny.yaml").read_text()
    (tmp_path / "a.yaml").write_text(good.replace("heads: 6", "heads: 7"))
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    files = (tmp_path / "a.yaml", ARCHS[0], tmp_path / "b.yaml", tmp_path / "absent.yaml")
    assert evolve.main(evolve.Validate(files)) == 1
    out = capsys.readouterr().out
    assert out.count("INVALID") == 3
    assert "arch.mix_unit.mixer.heads (line 8): must divide d_model 192, got 7" in out


def test_validate_tells_of_budgets(tmp_path, capsys):
    tight = 'budget: {params_target: 1000, flops_target: "match:other"}\n'
    for text in (tight, tight.replace('"match:other"', "1")):
        (tmp_path / "a.yaml").write_text(DOCUMENT.replace("WINDOW", "3") + text)
        assert evolve.main(evolve.Validate((tmp_path / "a.yaml",))) == 0
    first, second = capsys.readouterr().out.split("VALID")[1:]
    assert "budget, for one row: `references` must have 'other'" in first
    assert "flops_target: " in second
    assert second.count("budget, for one row: ") == 2


def test_the_shipped_schema_is_the_one_that_is_written(tmp_path):
    """Editors read it by the first line of each document; another library judges by it as we do."""
    assert evolve.main(evolve.Schema(tmp_path / "s.json")) == 0
    assert (tmp_path / "s.json").read_text() == (ARCHS[0].parent / "arch.schema.json").read_text()
    schema = json.loads((tmp_path / "s.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    judge = jsonschema.Draft202012Validator(schema)
    for path in ARCHS:
        text = path.read_text()
        assert text.startswith("# yaml-language-server: $schema=arch.schema.json\n")
        document = arch.to_dict(arch.parse(text))
        assert judge.is_valid(document)
        for wrong in ({"window": 3}, {"n_layers": 0}, {"norm": "BatchNorm"}, {"d_model": "wide"}):
            assert not judge.is_valid(document | {"arch": document["arch"] | wrong})


DOCUMENT = """
arch:
  d_model: 8
  n_layers: 1
  mix_unit:
    kind: single
    mixer: {kind: Attention, heads: 1, stencil: {kind: local, window: WINDOW}}
  ffn: {kind: dense, mult: 2, act: relu}
  norm: RMSNorm
  pos: {kind: learned}
train: {ctx_len: 32, lr: 0.03}
"""


@pytest.fixture
def sweep(tmp_path):
    """Two windows of one network, and a wide one that the limit refuses."""
    for name, text in {
        "a": DOCUMENT.replace("WINDOW", "3"),
        "b": DOCUMENT.replace("WINDOW", "5"),
        "c": DOCUMENT.replace("WINDOW", "3").replace("d_model: 8", "d_model: 64"),
    }.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    return evolve.Sweep(
        (tmp_path,),
        out=tmp_path / "run",
        **{"seq_len": 8, "batch_size": 2, "held_out": 2, "task": "sums"},
        **{"asha_min": 10, "asha_max": 20, "asha_reduction": 2, "pdh_stages": 0},
        **{"deep_steps": 10, "deep_seeds": 2, "limits": Limits(max_params=1000), "cache": None},
    )


def test_equal_flops_and_an_end_of_training_are_refused(sweep, tmp_path, capsys):
    ending = DOCUMENT.replace("lr: 0.03", "lr: 0.03, budget: {max_steps: 4}")
    (tmp_path / "b.yaml").write_text(ending.replace("WINDOW", "5"))
    plan = dataclasses.replace(sweep, plan=True)
    assert evolve.main(plan) == 0
    assert "100 steps for 100 of the ladder (its training ends at 4)" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        evolve.main(dataclasses.replace(plan, equal_flops=True))
    assert "`equal_flops` contradicts train.budget.max_steps of b" in capsys.readouterr().err


def test_a_run_in_which_nothing_was_trained_has_failed(sweep, capsys):
    none = dataclasses.replace(sweep, limits=Limits(max_params=1))
    assert evolve.main(dataclasses.replace(none, plan=True)) == 1
    assert "steps, 0 trials, 0 tokens" in capsys.readouterr().out
    one = {"population": 1, "generations": 1, "immigrants": 0, "top_k": 1, "plan": True}
    shared = ("files", "out", "task", "limits", "cache")
    few = evolve.Evolve(**{name: getattr(none, name) for name in shared}, **one)
    assert evolve.main(few) == 1
    assert "steps, 0 trials, 0 tokens" in capsys.readouterr().out  # of three documents one is born
    assert evolve.main(none) == 1
    said = capsys.readouterr()
    assert "3 candidates, 0 failed trainings, 3 refused" in said.out
    assert said.err.endswith("nothing was trained: every candidate was refused or failed\n")


def test_a_sweep_writes_what_it_promises(sweep, capsys):
    """Two structures at most are compiled: the windows share one, what is refused has none."""
    out = sweep.out
    assert evolve.main(dataclasses.replace(sweep, plan=True)) == 0
    planned = capsys.readouterr().out
    assert "c: refused. Over budget: max_params" in planned
    assert "rung 1 (halving): 20 steps, 1 trials" in planned
    assert not out.exists()
    assert evolve.main(sweep) == 0
    shown = capsys.readouterr().out
    assert "sums: nats per scored token, held out; floor 0, " in shown
    built = runs.read_json(out / "search_report.json")
    json.loads((out / "search_report.json").read_text(), parse_constant=pytest.fail)
    assert built["cache"]["misses"] == 1
    assert built["cache"]["hits"] == 4
    a, b, c = built["candidates"]
    assert c["stages"][0]["error"].startswith("Over budget: max_params: ")  # and no traceback
    assert (built["failed"], built["refused"]) == (0, 1)
    assert sorted(x["best_steps"] for x in (a, b)) == [10, 20]
    assert a["metrics"]["kv_bytes_per_token"] == 64
    assert 0 <= a["metrics"]["ece"] <= 1
    best = max((a, b), key=lambda x: x["best_steps"])
    assert best["metrics"]["score"] == best["stages"][-1]["score"]
    assert len(built["deep_evaluations"]) == 2
    deep = built["deep_evaluations"][0]
    assert deep["seeds"] == [500, 501]
    assert deep["metrics"]["error_recovery"] != 0
    assert deep["metrics"]["needle"] == 0  # one layer with a window of three does not reach it
    assert "needle" not in a["metrics"]  # of the best alone
    for i, name in enumerate("abc"):
        spec = arch.parse((out / f"gen_0/variant_{i}.yaml").read_text())
        assert arch.fingerprint(spec) == runs.read_json(out / "config.json")["documents"][name]
    again(out, sweep, capsys)


def again(out, sweep, capsys):
    """Report, lineage and a second run in the same place."""
    names = ("search_report.json", "lineage.json", "lineage.mmd", "lineage.png")
    before = {name: (out / name).read_bytes() for name in names}
    for name in names:
        (out / name).unlink() if name != "search_report.json" else None
    assert evolve.main(evolve.Report(out)) == 0
    assert evolve.main(evolve.Lineage(out)) == 0
    assert {name: (out / name).read_bytes() for name in names} == before
    assert evolve.main(evolve.Lineage(out, direction="LR")) == 0
    assert (out / "lineage.mmd").read_text().startswith("graph LR\n")
    index = out / "search_report.json"
    shared: dict[str, Any] = {"seq_len": 8, "task": "sums", "held_out": 2}
    args = evolve.Evolve((out.parent / "a.yaml",), top_index=index, top_count=2, **shared)
    specs, _ = evolve.set_up(args)
    windows = [arch.knobs(s)["stack"]["mixers"][0]["window"] for s in specs.values()]
    assert windows == [3, 5]  # `a` is met again under another name, `c` has no score
    assert list(specs) == ["a", "run-gen_0-variant_1"]
    other = out.parent / "phase7"
    other.mkdir()
    (other / "config.json").write_text("{}")
    refused = [
        (evolve.Validate(()), "There is no document"),
        (dataclasses.replace(args, top_index=out / "config.json"), "must be a search_report.json"),
        (dataclasses.replace(args, top_count=0), "`top_index` and a positive `top_count`"),
        (sweep, "already exists"),
        (dataclasses.replace(sweep, resume=True, seed=1), r"other settings: seed \(was 0, now 1\)"),
        (dataclasses.replace(sweep, files=()), "There is no document"),
        (dataclasses.replace(sweep, limits=Limits(max_flops=0)), "`limits.max_flops` must be"),
        (dataclasses.replace(sweep, lr=-1.0, repeats=0), "`repeats` must be at least 1, `lr` must"),
        (dataclasses.replace(sweep, asha_max=9), "`asha_max` must not be below `asha_min`"),
        (evolve.Report(out.parent), "is no run directory"),
        (evolve.Report(other), "is no run of `experiments.evolve`"),
        (evolve.Lineage(other), "is no run of `experiments.evolve`"),
    ]
    capsys.readouterr()
    for args, sentence in refused:
        with pytest.raises(SystemExit):
            evolve.main(args)
        assert re.search(sentence, capsys.readouterr().err)


def test_flags_mean_a_search():
    args = evolve.Evolve((Path("x"),), asha_min=20, asha_max=100, population=5, immigrants=1)
    found = settings_of(args, 2)
    assert [found.ladder.steps(r) for r in range(5)] == [20, 40, 80, 140, 200]
    assert (found.trials, found.immigrants, found.macro) == (10, 0.2, 0.35)
    assert (found.parents, found.novel_parents, found.aging) == (3, 2, True)
    full = dataclasses.replace(args, overflow_factor=1.6)
    more = settings_of(full, 2)
    assert (more.trials, more.population, more.immigrants) == (16, 5, 1 / 8)
    assert [variant(i, 8) for i in (7, 8)] == ["gen_0/variant_7", "gen_1/variant_0"]
    assert births_in({"overflow_factor": 1.6}, more) == 8
    assert births_in({}, found) == 5
    plain = settings_of(evolve.Train((Path("x"),), steps=7), 3)
    assert (plain.trials, plain.ladder.rungs, plain.ladder.steps(0)) == (3, 1, 7)
    assert rungs(10, 60, 3) == 2


def test_the_table_shows_the_best_first():
    created = {"event": "create", "operator": "width", "parents": [0]}
    told = {"score_se": None, "params": 5, "flops_per_token": 2e6, "tokens_per_sec": None}
    events = [
        *({**created, "trial": i} for i in range(4)),
        *(
            {"event": "report", "trial": i, "rung": 0, "steps": 9, "score": s, "error": e}
            | {"metrics": {} if e else told | {"compile_s": 1.5}}
            for i, s, e in ((0, 2.5, None), (1, 1.25, None), (2, None, "Trace\nValueError: bad"))
        ),
    ]
    rows = [cells(i, row) for i, row in latest(events).items()]
    assert rows[1] == ["1", "0", "width", "9", "1.25", "5", "2", "–", "1.5"]
    assert rows[2][-1] == "failed: ValueError: bad"
    assert rows[3][-1] == "in training"
    assert list(table(events, "t").columns[0].cells) == ["3", "1", "0", "2"]
