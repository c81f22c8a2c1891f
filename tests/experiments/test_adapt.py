"""experiments.adapt on one layer of nano: a whole small run, the conversation, bad input."""

import functools
import io
import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from experiments import adapt, questions, serving, shots
from experiments import run as runs
from experiments.chat import Reply, bucket, chat
from experiments.training import Settings
from forge_jax.adapt import FewShot
from forge_jax.domains import DOMAINS

SMALL: dict[str, Any] = {
    "items": 6,
    "fit_items": 24,
    "expert_steps": 3,
    "shots": 4,
    "shot_tests": 6,
    "shot_seeds": "0,1",
    "few_shot": FewShot(generations=2, population=8),
    "training": Settings(steps=2, prompts=4, samples=2, validate_every=2, algorithm="grpo"),
}


@pytest.mark.slow
def test_a_run_measures_everything(checkpoint, tmp_path, monkeypatch):
    """Experts trained on the spot; every number is a share, and the rows do not mix."""
    monkeypatch.setattr(serving, "NEW", 8)
    args = adapt.Args(
        out=tmp_path / "run", checkpoint=checkpoint, domains=("math", "code", "vision"), **SMALL
    )
    adapt.main(args)
    found = runs.read_json(tmp_path / "run" / "adapt.json")
    for row in found["dispatch"].values():
        assert set(row) == {"validation", "plain", "reworded", "shared", "other"}
        assert all(0 <= v <= 1 for v in row.values())
    # three templates are easily told apart, even by one layer
    assert found["dispatch"]["head"]["plain"] > 0.9
    assert found["dispatch"]["head"]["other"] == 0  # it always names an expert
    for two in found["two_pass"].values():
        assert two["rows_equal_one_expert_alone"]
        assert two["rows_equal_one_by_one"]
        assert two["recompiles_for_a_new_expert"] == 0
    assert 0 < found["cost"]["first_ms"] < found["cost"]["second_ms"]
    assert [r["domain"] for r in found["few_shot"]["rows"]] == ["math+code", "math+vision"]
    assert found["few_shot"]["found_less"]["uniform"]["seeds"] == 2
    rows = [json.loads(line) for line in (args.out / "metrics.jsonl").read_text().splitlines()]
    assert any("dispatch/head/plain" in row for row in rows)
    assert any("svf/math/clip_fraction" in row for row in rows)  # trained by GRPO


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_wording_keeps_the_content(domain):
    """The source's own wording is the first of those that are fitted on; held-out ones are not."""
    from experiments.data.sources import procedural, take

    items = take(procedural(domain, 0, "<image>"), "test", 3)
    own = questions.WORDINGS[domain]
    for item in items:
        content = own.content(item.prompt)
        assert own.fit[0].format(content) == item.prompt
        assert content
    held_out = questions.reworded(items, domain, "reworded")
    fitted = questions.reworded(items, domain, "fit")
    for kind in (held_out, fitted, questions.reworded(items, domain, "shared")):
        assert [i.answer for i in kind] == [i.answer for i in items]
        assert all(own.content(i.prompt) in k.prompt for i, k in zip(items, kind, strict=True))
    assert not {i.prompt for i in held_out} & {i.prompt for i in fitted}
    assert questions.reworded(items, domain, "plain") == items


def test_no_wording_is_both_fitted_on_and_held_out():
    for own in questions.WORDINGS.values():
        fitted, held_out = (
            own.fit + questions.SHARED_FIT,
            own.held_out + questions.SHARED_HELD_OUT,
        )
        assert not set(fitted) & set(held_out)
        assert all(form.count("{}") == 1 for form in fitted + held_out)


def test_the_interval_is_students():
    """Five differences of mean 2 and standard error 0.707: t(0.975, 4) = 2.776."""
    found = shots.interval([1.0, 2.0, 3.0, 0.0, 4.0])
    assert found["mean"] == 2
    np.testing.assert_allclose(found["high"] - 2, 2.776 * np.sqrt(2.5 / 5), rtol=1e-3)
    np.testing.assert_allclose(found["mean"] - found["low"], found["high"] - found["mean"])


def test_shots_and_questions_of_a_mixed_domain_are_disjoint():
    """Equal parts of two domains, of splits that share no content."""
    from experiments.data.sources import procedural, take
    from experiments.data.splits import split_of

    def task(name):
        source = {s: take(procedural(name, 0, None), s, 12) for s in ("train", "test")}
        return SimpleNamespace(name=name, items=source)

    problem: Any = SimpleNamespace(tasks=[task("math"), task("sums"), task("largest")])
    seen = set()
    for seed in range(4):
        name, given, asked = shots.mixed_domain(problem, seed, 5, 8)
        seen.add(name)
        assert {split_of(item) for item in given} == {"train"}
        assert {split_of(item) for item in asked} == {"test"}
        assert not {i.prompt for i in given} & {i.prompt for i in asked}
        parts = [{i.prompt for i in t.items["test"]} for t in problem.tasks if t.name in name]
        assert [sum(i.prompt in part for i in asked) for part in parts] == [4, 4]
        assert len({i.prompt for i in given}) == 5
    assert seen == {"math+sums", "math+largest", "sums+largest"}


def test_buckets_are_powers_of_two_within_the_context():
    assert [bucket(n, 512, 96) for n in (1, 32, 33, 100, 300, 416)] == [32, 32, 64, 128, 416, 416]
    with pytest.raises(ValueError, match="context of 512"):
        bucket(417, 512, 96)


def test_a_conversation_survives_what_cannot_be_answered(capsys):
    def reply(question):
        if question == "long":
            raise ValueError("The question has 900 tokens.")
        return Reply(question.upper(), "math", 1.0, 2.0, 0.0)

    chat(reply, io.StringIO("one\\ntwo\nlong\nlast\n\nnever\n"))
    said = capsys.readouterr().out
    assert "ONE\nTWO\n  [math; first pass 1.0 ms, second 2.0 ms]" in said
    assert "900 tokens" in said
    assert "LAST" in said
    assert "NEVER" not in said


def test_a_reply_is_the_dispatchers_expert_or_a_mixture(checkpoint):
    """Each against generation with that z, which `svf.materialize` writes into the weights."""
    import jax
    import jax.numpy as jnp

    from experiments import model
    from experiments.chat import make_reply
    from forge_jax import adapt as library
    from forge_jax import models, svf

    made, weights = model.load(checkpoint, "both")
    rng = np.random.default_rng(0)
    names = ("math", "code")
    z: Any = {
        path: np.stack([rng.uniform(-3, 6, x.shape) for _ in names]).astype(np.float32)
        for path, x in svf.identity(weights["factors"]).items()
    }
    tasks = [SimpleNamespace(name=name) for name in names]
    problem: Any = SimpleNamespace(model=made, weights=weights, tasks=tasks)
    width = made.decoder.spec.hidden_size
    labels = library.make_labels([0, 1, library.BASE], room=4)
    bias = jnp.array([0.0, jnp.log(3.0), jnp.log(4.0), 9.0])
    shown = jnp.zeros((width, 4)), bias
    head = library.ClassifierDispatch(*shown, labels)
    padded = svf.pad_experts(z, 4)
    row = made.tokenizer.encode("What is 1 + 2?\n", add_special_tokens=False).ids
    row = [made.bos, *row] if made.bos is not None else row

    def written(alpha):
        mixed = svf.mix(z, jnp.asarray(alpha))
        params = svf.materialize(weights["factors"], mixed)
        apply = functools.partial(made.decoder.apply, {"params": params})
        given = jnp.array([row]), jnp.ones((1, len(row)), bool), jax.random.key(0)
        options = {"max_new_tokens": 96, "stop_tokens": made.stops, "temperature": 0.0}
        out = models.generate(apply, made.decoder.spec, *given, **options)
        return model.texts(made, np.asarray(out.tokens), np.asarray(out.mask))[0]

    alone = make_reply(problem, padded, head)
    first, again = alone("What is 1 + 2?"), alone("What is 3?")
    assert (first.by, first.text) == ("base", written([0.0, 0.0]))
    assert first.compile_s > 0 == again.compile_s
    mixed = make_reply(problem, padded, head, mix=True)("What is 1 + 2?")
    assert mixed.by == "0.50 base + 0.38 code + 0.12 math"
    assert mixed.text == written([0.125, 0.375])
    assert len({first.text, mixed.text}) == 2


def refused(args, capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        adapt.main(args)
    assert stop.value.code == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: ")
    assert len(said.splitlines()) == 1
    return said


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"shots": 0}, "shots"),
        ({"domains": ("math", "cooking")}, "cooking"),
        ({"shot_seeds": "one"}, "one"),
        ({"chat": True}, "--experts"),
        ({"domains": ("math",)}, "two domains"),
        ({"few_shot": FewShot(population=5)}, "population of 6"),
        ({"training": Settings(algorithm="grpo", samples=1)}, "samples"),
    ],
)
def test_bad_input_is_one_sentence(checkpoint, tmp_path, capsys, change, named):
    args = adapt.Args(out=tmp_path / "run", checkpoint=checkpoint, **{**SMALL, **change})
    assert named in refused(args, capsys)
    assert not (tmp_path / "run").exists()


def test_experts_of_another_base_are_refused(checkpoint, tmp_path, capsys, monkeypatch):
    """The record says which base they were trained on."""
    z = {"layers_0/mlp/up_proj/kernel": np.ones(3, np.float32)}
    record = SimpleNamespace(experts={"math": z}, metadata={"base_sha256": "0" * 64})
    settings = {"select": "both", "source": "procedural", "data": None, "stop_token": True}
    (tmp_path / "config.json").write_text(
        json.dumps(settings | {"free_tokens": 8, "max_full": None, "reward": "task"})
    )
    monkeypatch.setattr(adapt, "load_phase8", lambda path: record)
    args = adapt.Args(out=tmp_path / "run", checkpoint=checkpoint, experts=tmp_path, **SMALL)
    assert "another base" in refused(args, capsys)


def test_a_question_beyond_the_context_is_refused():
    """Before anything is padded or compiled."""
    spec = SimpleNamespace(max_position_embeddings=40)
    model = SimpleNamespace(decoder=SimpleNamespace(spec=spec))
    problem: Any = SimpleNamespace(model=model, new_tokens=8)
    with pytest.raises(ValueError, match="context of 40"):
        questions.questions(problem, [], 33)
