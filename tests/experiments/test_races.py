"""Every race in tiny shapes: its record, its check of agreement, its floors, the page."""

import dataclasses
import functools
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("pymoo")

from experiments.bench import all as every  # noqa: E402
from experiments.bench import (  # noqa: E402
    candidates,
    cognate_step,
    decoders,
    decompose,
    four_experts,
    generation,
    nsga2,
    page,
    population,
    race,
    rl_step,
    rows,
)
from experiments.files import read_json, write_json  # noqa: E402
from forge_jax.models.cognate import CognateConfig  # noqa: E402

pytestmark = pytest.mark.torch

RATES = {"product": 1e9, "copy": 1e9}
EASY, HARD = 1e-9, 1e9  # floors that are met, and missed, on any machine
SCORED = population.Shape(16, 1, 3, experts=2, tokens=5, vocab=23)
STEP = rl_step.Shape(16, 1, rows=2, time=5, vocab=23)
TINY = candidates.Shape(2, 9, 2, {"d_model": 24, "n_layers": 1})
COGNATE = cognate_step.Shape(
    *(2, 5),
    CognateConfig(
        vocab_size=23,
        d_model=8,
        layers=1,
        heads=2,
        d_ff=12,
        max_positions=8,
        memory="ema",
        positions="learned",
        d_mem=4,
        gate_hidden=5,
        answer_heads=2,
    ),
)
MAKERS = {
    "scored": lambda: population.make(SCORED, {race.PUBLIC: EASY, race.TORCH: HARD}, "float32"),
    "scored_gpt2": lambda: population.make(
        dataclasses.replace(SCORED, family="gpt2"), {race.PUBLIC: EASY}, "float32"
    ),
    "generated": lambda: population.make(
        population.Shape(16, 1, 2, experts=2, rows=2, tokens=4, new_tokens=3, vocab=23),
        {race.PUBLIC: EASY},
        "float32",
    ),
    "few_shot": lambda: population.make(
        population.Shape(16, 1, 3, experts=2, rows=2, tokens=5, vocab=23),
        {race.PUBLIC: EASY},
        "float32",
    ),
    "rl_step": lambda: rl_step.make(STEP, {race.PUBLIC: EASY}, "float32"),
    "experts": lambda: four_experts.make(rl_step.Shape(16, 1, 2, 5, 23, experts=2), "float32"),
    "train_gpt": lambda: candidates.make(TINY, EASY, retained=False),
    "train_retention": lambda: candidates.make(TINY, HARD, retained=True),
    "rows": lambda: rows.make(rows.Shape(12, 20, 4, 2), {race.PUBLIC: EASY}, "bfloat16"),
    "llama": lambda: generation.make(
        generation.Shape("llama", 16, 1, 23, 2, 4, 3), {generation.PEER: EASY}, "float32"
    ),
    "gpt2": lambda: generation.make(
        generation.Shape("gpt2", 16, 1, 23, 1, 4, 3), {generation.PEER: EASY}, "float32"
    ),
    "cognate_step": lambda: cognate_step.make(COGNATE, EASY, {cognate_step.FRUGAL: 2.0}, 1.0),
    "cognate_three": lambda: cognate_step.three(COGNATE),
    "nsga2": lambda: nsga2.make(nsga2.Shape(12, 2), {nsga2.PEER: EASY}),
    "decompose": lambda: decompose.make(decompose.Shape(12), {decompose.PEER: EASY}, 3e-6),
}


@functools.cache
def made(name):
    """A race, compiled once for all tests."""
    return MAKERS[name]()


@functools.cache
def measured(name):
    """What is written down of a race; two rounds."""
    with jax.default_matmul_precision("highest"):
        result = race.measure(made(name), 2, lambda: RATES)
    return result | {"provenance": race.provenance("float32")}


@pytest.mark.parametrize("name", MAKERS)
def test_a_race_is_written_down(name, tmp_path):
    result = measured(name)
    write_json(tmp_path / "race.json", result)  # all of it is plain
    ours, *others = result["rows"].values()
    assert ours["over_ours"] == 1
    assert others
    for row in result["rows"].values():
        assert row["seconds"] > 0
    assert {len(s) for s in result["all_seconds"].values()} == {2}
    assert ours["compile_s"] is not None
    tolerance = result["agreement"]["tolerance"]
    # in another dtype ours may differ from itself, and that is only shown
    apart = [d for n, d in result["agreement"].items() if not n.endswith("as timed")]
    assert max(apart) <= tolerance
    if name != "nsga2":
        assert result["roofline"]["of_measured"] > 0


def test_bfloat16_is_timed_and_its_rounding_shown():
    rounding = measured("rows")["agreement"]["forge_jax, as timed"]
    assert 1e-4 < rounding < 3e-2
    with_factors = decoders.cast(decoders.make_case(decoders.llama_spec(16, 1, 23), 2), "bfloat16")
    leaf = with_factors.factors["layers_0"]["mlp"]["up_proj"]["kernel"]
    assert (leaf.u.dtype, leaf.s.dtype) == (jnp.bfloat16, jnp.float32)


def test_the_better_ceilings_count():
    slow_then_fast = iter([{"flop": 1e6, "byte": 5e9}, {"flop": 4e9, "byte": 1e6}])
    result = race.measure(made("rows"), 1, lambda: next(slow_then_fast))
    assert result["ceilings"] == {"flop": 4e9, "byte": 5e9}
    work = made("rows").work
    assert work is not None
    least = (work.flops / 4e9 + work.bytes / 5e9) / made("rows").units
    assert result["roofline"]["seconds"] == pytest.approx(least)


def test_floors_are_met_and_missed():
    by_peer = {floor["what"].split(" / ")[0]: floor for floor in measured("scored")["floors"]}
    assert by_peer[race.PUBLIC]["met"]
    assert not by_peer[race.TORCH]["met"]
    assert "MISSED by 100.0 %" in race.judged(by_peer[race.TORCH])
    assert race.verdict("x", 9.0, 12.0)["missed_by"] == pytest.approx(0.25)
    assert race.verdict("x", 12.0, 12.0)["met"]
    assert race.verdict("x", 0.6, 0.5, at_most=True)["missed_by"] == pytest.approx(0.2)
    assert race.verdict("x", 0.5, 0.5, at_most=True)["met"]
    assert not race.verdict("x", float("nan"), 1.0)["met"]


def test_cognates_memory_is_judged_and_its_products_counted():
    result = measured("cognate_step")
    by_name = {floor["what"]: floor for floor in result["floors"]}
    assert by_name["peak of a process, GB"]["missed_by"] == pytest.approx(1.0)
    assert result["notes"] == {"peak_gb": {cognate_step.FRUGAL: 2.0}}
    # the public forward pass has 67 M products a token; it makes the features' keys six times
    flops = cognate_step.work(cognate_step.Shape(1, 1)).flops
    assert flops / 6e6 == pytest.approx(67, rel=0.03)


def test_both_sides_of_cognates_race_go_the_same_way():
    names = (race.OURS, cognate_step.FRUGAL, cognate_step.KEEPING, cognate_step.EAGER)
    sides = [cognate_step.contender(COGNATE, name) for name in names]
    ours, *others, eager = ([float(side.run()) for _ in range(3)] for side in sides)
    assert ours[2] < ours[0] - 1e-3
    np.testing.assert_allclose(others, [ours] * 2, rtol=1e-5)
    np.testing.assert_allclose(eager, ours, rtol=1e-4)


@pytest.mark.slow
def test_peak_memory_is_that_of_another_process():
    found = cognate_step.peaks(COGNATE, (race.OURS,))
    assert 0.1 < found[race.OURS] < 4


def test_the_factored_step_and_the_dense_one_are_both_shown():
    result = measured("rl_step")
    assert rl_step.DENSE in result["rows"]
    (bound,) = [floor for floor in result["floors"] if floor["at_most"]]
    assert bound["wanted"] == 0.5
    assert (
        measured("experts")["notes"]["faster in five rounds before the race"] in four_experts.WAYS
    )


def scaled(function):
    """`function` with its result off by one in a thousand."""
    return lambda *args, **kwargs: 1.001 * function(*args, **kwargs)


@pytest.mark.parametrize(
    ("name", "side"),
    [
        *(("scored", side) for side in (race.PUBLIC, race.TORCH)),
        *(("scored_gpt2", side) for side in (race.PUBLIC, race.TORCH)),
        *(("rl_step", side) for side in (race.PUBLIC, race.TORCH)),
        *(("experts", side) for side in (race.PUBLIC, race.TORCH)),
        ("rows", race.PUBLIC),
    ],
)
def test_a_side_that_is_altered_ends_the_race(name, side, monkeypatch):
    measured(name)
    if side == race.PUBLIC:
        monkeypatch.setattr(decoders, "rebuild", scaled(decoders.rebuild))
    else:
        monkeypatch.setattr(decoders.Factored, "forward", scaled(decoders.Factored.forward))
    with pytest.raises(ValueError, match=f"{side} computed something else than forge_jax"):
        race.check(made(name))


@pytest.mark.parametrize("name", ["generated", "llama", "gpt2"])
def test_other_tokens_end_the_race(name, monkeypatch):
    measured(name)
    real = population.continued

    def altered(model, tokens, new_tokens):
        head = model.get_output_embeddings().weight
        with torch.no_grad():
            head.neg_()
            out = real(model, tokens, new_tokens)
            head.neg_()
        return out

    monkeypatch.setattr(population if name == "generated" else generation, "continued", altered)
    with pytest.raises(ValueError, match="computed something else"):
        race.check(made(name))


@pytest.mark.parametrize("name", ["train_gpt", "train_retention"])
def test_another_training_ends_the_race(name, monkeypatch):
    """Positions that turn the other way; a gate that is left out."""
    measured(name)
    turned = candidates.turned
    monkeypatch.setattr(candidates, "turned", lambda x, theta: turned(x.flip(2), theta).flip(2))
    monkeypatch.setattr(candidates.F, "silu", torch.ones_like)
    with pytest.raises(ValueError, match="computed something else than forge_jax"):
        race.check(made(name))


def test_other_ranks_or_values_end_the_race(monkeypatch):
    peers = nsga2.their_ranks
    monkeypatch.setattr(nsga2, "their_ranks", lambda points: peers(points) + (points[:, 0] > 1))
    with pytest.raises(ValueError, match="pymoo computed something else"):
        race.check(made("nsga2"))
    full = decompose.theirs
    monkeypatch.setattr(decompose, "theirs", lambda w: full({k: 1.001 * x for k, x in w.items()}))
    with pytest.raises(ValueError, match=r"torch\.linalg\.svd computed something else"):
        race.check(decompose.make(decompose.Shape(12), {}, 3e-6))


def test_counts_by_hand():
    case = decoders.make_case(decoders.llama_spec(16, 1, 23), 2)
    # four of 16 x 16, two of 16 x 64, one of 64 x 16, all of rank 16, and the head
    factored = 4 * 16 * 32 + 3 * 16 * 80 + 16 * 23
    work = decoders.decoder_work(case, 2, 3, factored=True, passes=5)
    assert work.flops == 2 * factored * 6 + 4 * 2 * 9 * 16
    assert work.bytes == 4 * factored * 5
    dense = decoders.decoder_work(case, 2, 3, factored=False)
    assert dense.bytes == 4 * (4 * 256 + 3 * 1024 + 16 * 23)
    assert decompose.flops((4, 2)) == 6 * 4 * 4 + 20 * 8
    assert nsga2.sphere_gap(nsga2.dtlz2(jnp.full((3, 4), 0.5))) == pytest.approx(0, abs=1e-6)


def test_a_population_race_is_called_after_what_it_does():
    wide = dataclasses.replace(SCORED, hidden=32)
    shapes = [SCORED, wide, dataclasses.replace(SCORED, rows=2)]
    shapes += [s for s, _ in population.FULL if s.new_tokens or s.family == "gpt2"]
    wanted = ["scoring_16", "scoring_32", "few_shot_16", "scoring_gpt2_256", "generation_256"]
    assert [population.name(shape) for shape in shapes] == [f"population_{x}" for x in wanted]


def test_the_page_has_every_race_and_every_floor(tmp_path):
    names = ("gpt2", "scored", "rl_step", "nsga2")
    for name in names:
        write_json(tmp_path / f"{measured(name)['name']}.json", measured(name))
    text = page.main(page.Args(tmp_path, tmp_path / "docs" / "page.md"))
    assert (tmp_path / "docs" / "page.md").read_text() == text
    titles = [line for line in text.splitlines() if line.startswith("## ")]
    wanted = ["Machine", *(measured(n)["name"] for n in ("scored", "rl_step", "gpt2", "nsga2"))]
    assert titles == [f"## {title}" for title in wanted]
    absent = "population_few_shot, few_shot, population_generation, four_experts, rows, decompose"
    assert f"Not run here: {absent}." in text
    assert text.count("missed by 100.0 %") == 1
    assert len(read_json(tmp_path / "result.json")["races"]) == 4
    assert page.render(page.read(tmp_path)) == text  # result.json is no race


def test_a_crowded_machine_is_named():
    quiet = {"load": 2.1, "provenance": {"cores": 2}}
    assert page.crowded(quiet) == ""
    assert "do not rely on its ratios" in page.crowded(quiet | {"load": 3.0})


def test_a_directory_without_results_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no results"):
        page.read(tmp_path)


def test_one_command_runs_every_module(tmp_path, monkeypatch, capsys):
    calls = []
    codes = {}

    def run(command, check, **options):
        calls.append(command)
        name = command[2].rpartition(".")[2]
        return subprocess.CompletedProcess(command, codes.get(name, 0))

    monkeypatch.setattr(subprocess, "run", run)
    write_json(tmp_path / "x.json", measured("scored"))
    every.main(every.Args(tmp_path, rounds=3, experts=tmp_path))
    assert [c[2].rpartition(".")[2] for c in calls] == list(every.MODULES)
    assert all(c[3:8] == [str(tmp_path), "--rounds", "3", "--dtype", "float32"] for c in calls)
    assert [c[8:] for c in calls if c[8:]] == [["--experts", str(tmp_path)]]
    assert (tmp_path / "performance.md").exists()
    assert race.PUBLIC in capsys.readouterr().out
    calls.clear()
    absent = tmp_path / "absent"
    every.main(every.Args(tmp_path, experts=absent))
    assert len(calls) == len(every.MODULES) - 1
    assert "left out: few_shot needs" in capsys.readouterr().out
    refused = {"few_shot": "`make demo` writes", "nonsense": "`only` must be among"}
    for name, said in refused.items():
        with pytest.raises(SystemExit, match="2"):
            every.main(every.Args(tmp_path, only=(name,), experts=absent))
        assert said in capsys.readouterr().err
    codes |= {"rows": 2, "decompose": 2}
    calls.clear()
    with pytest.raises(SystemExit, match="2"):
        every.main(every.Args(tmp_path, only=("rows", "nsga2")))
    assert len(calls) == 1
    with pytest.raises(SystemExit, match="2"):
        decompose.command(race.Args(tmp_path))
    with pytest.raises(SystemExit, match="2"):
        page.main(page.Args(tmp_path / "absent"))
    with pytest.raises(SystemExit, match="2"):
        race.command(race.Args(tmp_path, rounds=0), lambda dtype: iter([]))
    assert "`--rounds` must be at least 1" in capsys.readouterr().err


def test_a_module_writes_its_races(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(race, "prepare", lambda dtype, threads: None)
    monkeypatch.setattr(race, "ceilings", lambda dtype: RATES)
    race.command(race.Args(tmp_path, rounds=1), lambda dtype: iter([made("rows")]))
    race.command(race.Args(tmp_path, dtype="bfloat16"), lambda dtype: iter([made("nsga2")]))
    said = capsys.readouterr().out
    assert "left out: nsga2_12 is in float32 alone" in said
    assert f"{race.PUBLIC} / forge_jax" in said
    result = read_json(tmp_path / "rows_of_experts.json")
    assert result["provenance"]["versions"]["jax"] == jax.__version__
    assert race.installed("no-such-package-of-ours") is None


def test_one_thread_everywhere(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    found = decompose.environment()
    assert found["OMP_NUM_THREADS"] == found["OPENBLAS_NUM_THREADS"] == "1"
    assert "intra_op_parallelism_threads=1" in found["XLA_FLAGS"]
