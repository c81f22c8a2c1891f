"""A run of a search with an evaluation that costs nothing: killed anywhere, it ends the same."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from experiments import run as runs
from experiments.evolution import lineage, report, search
from forge_jax import arch, evolve
from tests.evolve.planted import SEED
from tests.evolve.planted import evaluate as planted

LADDER = evolve.Ladder(first=4, reduction=2, rungs=2, stages=1, births=1)
SETTINGS = evolve.Settings(10**6, 8, population=4, immigrants=0.2, macro=0.3, ladder=LADDER)
UNIT = {"unit": "x", "task": "planted", "floor": 0.0, "unigram_entropy": 1.0}
CONFIG = {"seed": 3, "seq_len": 1, "batch_size": 1, "data_is": UNIT}


class Killed(BaseException):
    """In place of a signal."""


def evaluation(run, at=-1, moment="before"):
    """The planted score, a counter as the training state; raises at a call, as a kill would."""
    store, calls = search.store_of(run), 0

    def evaluate(spec, name, done, steps):
        nonlocal calls
        calls += 1
        if calls == at and moment == "before":
            raise Killed
        found = store.restore(name, {"steps": np.int64(0)})
        at_step, state = found or (0, {"steps": np.int64(0)})
        assert at_step == state["steps"] in (done, steps)
        store.save(name, steps, {"steps": np.int64(steps)})
        if calls == at:
            raise Killed
        if name == "trial2":
            raise RuntimeError("as if compilation had failed")
        result = planted(spec, 0, done, steps)
        metrics = {"score_by_seed": [result.score, result.score + 0.1], "compile_s": time.time()}
        return result._replace(metrics=metrics)

    return evaluate


def searched(out, *, resume=False, deadline=None, **killed):
    """The whole of a run: search, fresh seeds, report and lineage."""
    with runs.opened(out, CONFIG, resume=resume) as run:
        evaluate, seen = evaluation(run, **killed), []
        events, late = search.search(
            run, evaluate, [SEED], SETTINGS, births=4, seed=3, show=seen.append, deadline=deadline
        )
        deep = {"count": 2, "steps": 20, "seeds": [7, 8]}
        events, _ = search.deepen(run, evaluate, events, **deep, show=seen.append)
        built = report.built(events, SETTINGS, CONFIG, {"out_of_time": late})
        runs.write_json(out / "search_report.json", built)
        lineage.write(out, events, SETTINGS, 4, "x", "TD")
    return built


def without_timings(value):
    if isinstance(value, dict):
        return {k: without_timings(v) for k, v in value.items() if k not in report.TIMINGS}
    return [without_timings(v) for v in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("search") / "run"
    return out, searched(out)


def same(out, whole):
    """Whether a resumed run has left what an unbroken one does."""
    path, wanted = whole
    found = without_timings(runs.read_json(out / "search_report.json"))
    assert found == without_timings(runs.plain(wanted))
    files = [p for p in path.rglob("*") if p.suffix in (".yaml", ".mmd", ".png")]
    assert len(files) == SETTINGS.trials + 2
    for file in [*files, path / "lineage.json"]:
        assert (out / file.relative_to(path)).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(("at", "moment"), [(1, "saved"), (5, "before"), (11, "saved")])
def test_a_killed_run_ends_in_the_same_report(whole, tmp_path, at, moment):
    """Killed before a training, or between its checkpoint and its event."""
    with pytest.raises(Killed):
        searched(tmp_path / "run", at=at, moment=moment)
    searched(tmp_path / "run", resume=True)
    same(tmp_path / "run", whole)


def test_the_report_says_what_happened(whole):
    out, built = whole
    text = (out / "search_report.json").read_text()
    json.loads(text, parse_constant=pytest.fail)
    assert len(built["candidates"]) == SETTINGS.trials
    failed = built["candidates"][2]
    assert "as if compilation had failed" in failed["stages"][0]["error"]
    assert failed["best_score"] is None
    reports = [e for e in runs.rows(out) if e["event"] == "report"]
    first = [e for e in reports if e["rung"] == 0]
    assert len(first) == SETTINGS.trials
    assert built["asha"]["evaluated"] == sum(e["rung"] < LADDER.rungs for e in reports)
    assert built["asha"]["promoted"] == len(reports) - len(first) > 2
    assert max(s["stage"] for c in built["candidates"] for s in c["stages"]) == LADDER.stages
    base, best, _ = built["deep_evaluations"]
    assert (base["candidate_index"], base["against_baseline"]) == (0, None)
    gap = best["score"] - base["score"]
    assert best["against_baseline"]["difference"] == pytest.approx(gap)
    assert 0 <= built["pareto_front"][0] < SETTINGS.trials


def test_lineage_names_operator_and_diff(whole):
    found = json.loads((whole[0] / "lineage.json").read_text())["records"]
    assert [r["child"] for r in found[:5]] == [
        *(f"gen_0/variant_{i}" for i in range(4)),
        "gen_1/variant_0",
    ]
    graph = (whole[0] / "lineage.mmd").read_text()
    for r in found[1:]:
        assert r["op"] != "seed"
        assert r["diff"]
        assert all(f"t{p} --> t{r['trial']}" in graph for p in numbers(r["parents"]))
    spec = arch.parse((whole[0] / f"{found[5]['child']}.yaml").read_text(), strict=True)
    assert arch.fingerprint(spec) == found[5]["fingerprint"]
    assert (whole[0] / "lineage.png").read_bytes()[:4] == b"\x89PNG"


def numbers(names):
    return [4 * int(n.split("/")[0][4:]) + int(n.rsplit("_")[-1]) for n in names]


def test_time_ends_a_search_and_a_longer_time_takes_it_up(whole, tmp_path):
    out = tmp_path / "run"
    assert searched_nothing(out)
    searched(out, resume=True)
    found = runs.read_json(out / "search_report.json")
    assert not found["out_of_time"]
    same(out, whole)


def searched_nothing(out):
    with runs.opened(out, CONFIG) as run:
        events, late = search.search(
            run,
            evaluation(run),
            [SEED],
            SETTINGS,
            births=4,
            seed=3,
            show=lambda _: None,
            deadline=0,
        )
        return late and not events


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict"),
    [
        ([1.0, 1.1, 0.9], [2.0, 2.1, 1.95], "better"),
        ([2.0, 2.1, 1.95], [1.0, 1.1, 0.9], "worse"),
        ([1.0, 2.0, 3.0], [3.0, 1.0, 2.5], "within seed noise"),
        ([1.0, 2.0], [1.0, 2.0], "within seed noise"),
        ([1.0], [2.0], "one seed"),
    ],
)
def test_a_winner_is_named_above_seed_noise_only(ours, theirs, verdict):
    assert report.against(ours, theirs)["verdict"] == verdict


def test_kill_9_anywhere(whole, tmp_path):
    """The same in processes of their own, killed after so many events."""
    out, root = tmp_path / "run", Path(__file__).resolve().parents[3]
    code = f"from pathlib import Path\nfrom {Path(__file__).stem} import searched\n"
    paths = os.pathsep.join([str(root), str(Path(__file__).parent)])
    environment = {**os.environ, "PYTHONPATH": paths}
    for events in (1, 9):
        resume = (out / "config.json").is_file()
        line = f"{code}searched(Path({str(out)!r}), resume={resume})"
        process = subprocess.Popen([sys.executable, "-c", line], env=environment)
        while process.poll() is None and written(out) < events:
            time.sleep(0.002)
        assert process.poll() is None, "the run was over before it could be killed"
        process.kill()
        process.wait()
    searched(out, resume=True)
    same(out, whole)
    shutil.rmtree(out)


def written(out):
    with contextlib.suppress(OSError):
        return len((out / "metrics.jsonl").read_bytes().splitlines())
    return 0
