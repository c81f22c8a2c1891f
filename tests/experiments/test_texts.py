"""Phase 1's texts: where they come from, that splits do not meet, and the tokenizer."""

import json
from itertools import islice

import pytest

from experiments.data.corpora import CORPORA, Example
from experiments.data.standins import standins
from experiments.data.texts import STANDS_FOR, content, read_texts, without_overlap
from experiments.data.tokenizer import load_tokenizer, save_tokenizer, train_bpe

SPECIALS = ("<pad>", "<eos>")


def rows_of(name, count, start=0):
    return "".join(
        json.dumps({"question": f"{name} {i}?", "answer": f"#### {i}"}) + "\n"
        for i in range(start, start + count)
    )


def test_offline_sets_stand_for_their_category_and_splits_do_not_meet():
    texts = read_texts("offline", train=30, validation=4)
    assert set(texts.train) == set(texts.validation) == set(STANDS_FOR)
    for name, category in STANDS_FOR.items():
        assert CORPORA[name].category == category
        assert {e.category for e in texts.train[name]} == {category}
        assert len(texts.validation[name]) == 4
        assert len(texts.train[name]) == 30 or category == "language"
        held = {content(e) for e in texts.validation[name]}
        assert held.isdisjoint(content(e) for e in texts.train[name])
    # windows of one story share sentences: those that do are gone from the training set
    sentences = {s for e in texts.validation["wikitext"] for s in e.answer.split(". ")}
    long = [s for s in sentences if len(s.split()) > 13]
    assert long
    assert not any(s in e.answer for s in long for e in texts.train["wikitext"])


def test_a_question_in_two_sets_is_learned_from_neither():
    def ask(text, name):
        return Example(f"Q: {text}\nA: ", "4", "math", name)

    train = {"gsm8k": [ask("What is 2+2?", "gsm8k"), ask("And 3?", "gsm8k")]}
    held = {"svamp": [ask("what is 2 + 2", "svamp")]}
    assert without_overlap(train, held) == {"gsm8k": train["gsm8k"][1:]}
    language = list(islice(standins("language", 0), 3))
    cut = language[0]._replace(answer="It begins so. " + language[0].answer[10:])
    assert cut not in without_overlap({"wikitext": [cut]}, {"x": [language[0]]})["wikitext"]


def test_a_directory_is_read_with_its_own_validation_or_a_hash(tmp_path):
    (tmp_path / "gsm8k.jsonl").write_text(rows_of("a", 60))
    found = read_texts(str(tmp_path), train=40, validation=5)
    assert len(found.train["gsm8k"]) > 30
    assert 0 < len(found.validation["gsm8k"]) <= 5
    (tmp_path / "gsm8k.validation.jsonl").write_text(rows_of("b", 3) + rows_of("a", 1))
    found = read_texts(str(tmp_path), train=40, validation=5)
    assert [e.prompt[3] for e in found.validation["gsm8k"]] == ["b", "b", "b", "a"]
    assert len(found.train["gsm8k"]) == 39  # the 40 without the one that is in validation


@pytest.mark.parametrize(
    ("files", "only", "said"),
    [
        ({}, (), "holds none of the data sets gsm8k"),
        ({"gsm8k": rows_of("a", 9)}, ("svamp",), "there is no data set svamp; there are gsm8k"),
        ({"gsm8k": ""}, (), "gsm8k has no examples"),
        ({"gsm8k": '{"q": "?"}\n'}, (), "A row of gsm8k with the fields q does not fit"),
        ({"gsm8k": rows_of("a", 1)}, (), "No (validation )?examples"),
    ],
)
def test_a_directory_without_texts_is_refused(tmp_path, files, only, said):
    for name, text in files.items():
        (tmp_path / f"{name}.jsonl").write_text(text)
    with pytest.raises(ValueError, match=said):
        read_texts(str(tmp_path), train=9, validation=9, only=only)


def test_what_is_no_source_is_said():
    with pytest.raises(ValueError, match="must be offline, hub or a directory, got 'nowhere'"):
        read_texts("nowhere", train=1, validation=1)


def test_the_tokenizer_is_exact_small_and_saved(tmp_path):
    texts = [e.prompt + e.answer for e in islice(standins("math", 0), 30)]
    bpe = train_bpe(texts, 300, SPECIALS)
    assert bpe.get_vocab_size() == 300
    assert [bpe.token_to_id(t) for t in SPECIALS] == [0, 1]
    strange = "Größe 1234 = \t∑\n"
    assert bpe.decode(bpe.encode(strange).ids) == strange
    assert [t for t in bpe.encode("1234").tokens] == ["1", "2", "3", "4"]
    save_tokenizer(bpe, tmp_path / "t.json")
    again = load_tokenizer(tmp_path / "t.json", SPECIALS, 300)
    assert again.encode(texts[0]).ids == bpe.encode(texts[0]).ids
    with pytest.raises(ValueError, match="token ids up to 299, but the model has 299"):
        load_tokenizer(tmp_path / "t.json", SPECIALS, 299)
    with pytest.raises(ValueError, match="lacks the special tokens <bos>"):
        load_tokenizer(tmp_path / "t.json", ("<bos>",), 300)
    with pytest.raises(ValueError, match="at least 258"):
        train_bpe(texts, 257, SPECIALS)
