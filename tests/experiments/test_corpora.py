"""Phase 1's data sets, curriculum and packing, on rows shaped like the real ones."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from experiments.data.corpora import CATEGORIES, CORPORA, examples, to_example
from experiments.data.curriculum import STAGES, shares, stage_of
from experiments.data.packing import Document, encode_document, pack, stack_rows
from forge_jax.models.cognate import SPECIALIZATIONS

CHOICES = {"text": ["ice", "iron"], "label": ["A", "B"]}
ROWS = {
    "gsm8k": ({"question": "1+1?", "answer": "It is 2.\n#### 2"}, "1+1?", "It is 2.\n#### 2"),
    "svamp": (
        {"Body": "Two hens.", "Question": "How many?", "Answer": 2.0},
        "Two hens. How many?",
        "2.0",
    ),
    "asdiv": ({"body": "9 apples.", "question": "How many?", "answer": "9 (apples)"}, "9", "9"),
    "mbpp": ({"text": "Add.", "code": "def f():\r\n  pass"}, "Add.", "def f():\n  pass"),
    "codexglue": ({"docstring": "Adds.", "code": "def f(): 1"}, "Adds.", "def f(): 1"),
    "arc_easy": ({"question": "Cold?", "choices": CHOICES, "answerKey": "A"}, "- iron", "ice"),
    "arc_challenge": (
        {"question": "Heavy?", "choices": CHOICES, "answerKey": "B"},
        "- ice\n- iron",
        "iron",
    ),
    "hotpotqa": (
        {
            "context": {"title": ["T", "U"], "sentences": [["One. ", "Two."], ["Three."]]},
            "question": "Who?",
            "answer": "Ann",
        },
        "T: One. Two.\nU: Three.\nWho?",
        "Ann",
    ),
    "drop": (
        {"passage": "P.", "question": "When?", "answers_spans": {"spans": ["1900", "1901"]}},
        "P.\nWhen?",
        "1900",
    ),
    "strategyqa": ({"question": "Can it?", "answer": False}, "Can it?", "no"),
    "boolq": ({"passage": "P.", "question": "is it", "answer": True}, "P.\nis it?", "yes"),
    "piqa": ({"goal": "Cut.", "sol1": "Saw", "sol2": "Sew", "label": 1}, "- Saw\n- Sew", "Sew"),
    "hellaswag": ({"ctx": "He", "endings": ["runs", "is", "a", "b"], "label": "0"}, "He", "runs"),
    "wikitext": ({"text": " A line.\n"}, "", " A line.\n"),
    "fineweb_edu": ({"text": "Text."}, "", "Text."),
    "openwebtext": ({"text": "Text."}, "", "Text."),
}


def test_there_are_sixteen_and_every_category_has_one():
    assert set(ROWS) == set(CORPORA)
    assert len(CORPORA) == 16
    assert {corpus.category for corpus in CORPORA.values()} == set(CATEGORIES)


@pytest.mark.parametrize("name", CORPORA)
def test_rows_become_examples(name):
    row, within, answer = ROWS[name]
    example = to_example(name, row)
    assert example is not None
    assert within in example.prompt
    assert example.answer.startswith(answer)
    assert (example.category, example.source) == (CORPORA[name].category, name)
    if example.category != "language":
        assert example.prompt.startswith("Q: ")
        assert example.prompt.endswith("\nA: ")


@pytest.mark.parametrize("name", CORPORA)
def test_changed_fields_are_named(name):
    with pytest.raises(ValueError, match=f"A row of {name} with the fields other does not fit"):
        to_example(name, {"other": 1})


def test_rows_without_text_or_answer_are_left_out():
    assert to_example("wikitext", {"text": " \n"}) is None
    assert to_example("mbpp", {"text": "Add.", "code": ""}) is None
    with pytest.raises(ValueError, match="does not fit"):
        to_example("drop", {"passage": "", "question": "", "answers_spans": {"spans": []}})


def test_jsonl_is_read(tmp_path):
    row = ROWS["gsm8k"][0]
    text = "\n".join(json.dumps({**row, "question": q}) for q in ("a?", "b?", "c?"))
    (tmp_path / "gsm8k.jsonl").write_text(text + "\n")
    got = list(examples("gsm8k", directory=tmp_path))
    assert [e.prompt for e in got] == ["Q: a?\nA: ", "Q: b?\nA: ", "Q: c?\nA: "]
    assert len(list(examples("gsm8k", directory=tmp_path, limit=2))) == 2
    (tmp_path / "gsm8k.jsonl").write_text(text + "\nnot json\n")
    with pytest.raises(ValueError, match=r"Line 4 of .*gsm8k.jsonl is not JSON"):
        list(examples("gsm8k", directory=tmp_path))
    (tmp_path / "mbpp.jsonl").write_text("")
    with pytest.raises(ValueError, match="mbpp has no examples"):
        list(examples("mbpp", directory=tmp_path))


def test_what_is_not_there_is_said(tmp_path):
    with pytest.raises(ValueError, match="There is no data set 'x'; there are gsm8k"):
        list(examples("x"))
    with pytest.raises(ValueError, match=r"neither .*svamp\.jsonl nor a folder"):
        list(examples("svamp", directory=tmp_path))
    with pytest.raises(ValueError, match="svamp has no split 'validation' of its own"):
        list(examples("svamp", directory=tmp_path, split="validation"))


def test_stages_follow_the_documents_epochs():
    stages = [stage_of(step, 100).number for step in range(100)]
    assert [stages.count(n) for n in (1, 2, 3)] == [30, 30, 40]
    assert stages == sorted(stages)
    assert [len(stage.datasets) for stage in STAGES] == [6, 10, 14]
    with pytest.raises(ValueError, match="`step`"):
        stage_of(100, 100)


@pytest.mark.parametrize("specialization", SPECIALIZATIONS)
@pytest.mark.parametrize("step", [0, 45, 99])
def test_shares_are_a_distribution_and_follow_the_mix(specialization, step):
    sizes = {name: 100 * (i + 1) for i, name in enumerate(CORPORA)}
    got = shares(step, 100, specialization, sizes)
    assert set(got) == set(stage_of(step, 100).datasets)
    assert sum(got.values()) == pytest.approx(1)
    assert min(got.values()) > 0
    math = sum(share for name, share in got.items() if CORPORA[name].category == "math")
    code = sum(share for name, share in got.items() if CORPORA[name].category == "code")
    mix = dict(SPECIALIZATIONS[specialization].mix)
    assert math / code == pytest.approx(mix["math"] / mix["code"])


def test_shares_within_a_category_go_by_size_and_temperature():
    sizes = {"gsm8k": 400, "svamp": 100}
    assert shares(0, 10, "speed", sizes) == pytest.approx({"gsm8k": 2 / 3, "svamp": 1 / 3})
    alike = shares(0, 10, "speed", sizes, temperature=0)
    assert alike == pytest.approx({"gsm8k": 0.5, "svamp": 0.5})
    with pytest.raises(ValueError, match="No data set of stage 1"):
        shares(0, 10, "speed", {"drop": 5})


def make_tokenizer():
    words = {w: i for i, w in enumerate(["<pad>", "<eos>", "<unk>", "Q", ":", "A", "x", "y", "z"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def test_only_answers_are_learned():
    from experiments.data.corpora import Example

    example = Example("Q: x\nA: ", "y z", "math", "gsm8k")
    document = encode_document(make_tokenizer(), example, 1)
    assert document == Document([3, 4, 6, 5, 4, 7, 8, 1], 5)
    (row,) = pack([document], 9, 0)
    np.testing.assert_array_equal(row.labels[0], [-100] * 4 + [7, 8, 1, -100, -100])
    text = encode_document(make_tokenizer(), Example("", "x y", "language", "wikitext"), 1)
    (row,) = pack([text], 3, 0)
    np.testing.assert_array_equal(row.labels[0], [7, 1, -100])


def test_rows_hold_whole_documents_and_every_token():
    lengths = [3, 4, 2, 9, 1, 5]
    documents = [Document(list(range(10 * i, 10 * i + n)), 1) for i, n in enumerate(lengths, 1)]
    rows = stack_rows(list(pack(documents, 7, 0)))
    np.testing.assert_array_equal(
        rows.segments,
        [
            [1, 1, 1, 2, 2, 2, 2],
            [1, 1, 0, 0, 0, 0, 0],
            [1, 1, 1, 1, 1, 1, 1],
            [1, 2, 2, 2, 2, 2, 0],
        ],
    )
    # a label is the next token of the same document
    same = rows.segments[:, 1:] == rows.segments[:, :-1]
    want = np.where(same & (rows.segments[:, 1:] > 0), rows.tokens[:, 1:], -100)
    np.testing.assert_array_equal(rows.labels[:, :-1], want)
    assert (rows.labels[:, -1] == -100).all()
    with pytest.raises(ValueError, match="`length` must be at least 2"):
        list(pack(documents, 1, 0))
