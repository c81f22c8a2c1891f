"""Rows drawn from a state of integers: the shares, every document once a pass, resumption."""

from collections import Counter

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from experiments.data.corpora import Example
from experiments.data.cursor import Documents, encode_all, fit, next_rows, start_cursor
from experiments.data.packing import Document

LENGTH = 8


def make_documents(first, count, sizes=(3, 5)):
    """Documents whose every token is the document's own number."""
    ids = [[first + i] * sizes[i % len(sizes)] for i in range(count)]
    starts = np.cumsum([0, *map(len, ids)])
    tokens = np.concatenate([np.array(x, np.int32) for x in ids])
    return Documents(tokens, starts, np.ones(count, np.int32))


SETS = {"a": make_documents(100, 5), "b": make_documents(200, 7)}
SHARES = {"a": 0.5, "b": 0.5}


def draw(cursor, shares=SHARES, rows=4, seed=(1, 2)):
    return next_rows(SETS, shares, cursor, rows=rows, length=LENGTH, pad=0, seed=seed)


def documents_of(rows):
    """The numbers of the documents in the rows, in order."""
    found = []
    for tokens, segments in zip(rows.tokens, rows.segments, strict=True):
        found += [tokens[segments == s][0] for s in range(1, segments.max() + 1)]
    return found


def test_the_same_state_gives_the_same_rows_and_nothing_is_lost():
    cursor, seen = start_cursor(2), []
    for _ in range(30):
        before = {k: v.copy() for k, v in cursor.items()}
        rows, after = draw(cursor)
        again, _ = draw(before)
        np.testing.assert_array_equal(rows.tokens, again.tokens)
        assert {k: v.tolist() for k, v in before.items()} == {
            k: v.tolist() for k, v in cursor.items()
        }
        assert rows.tokens.shape == (4, LENGTH)
        seen, cursor = seen + documents_of(rows), after
    assert cursor["draws"] == 30
    # all that was taken is in the rows, but for the one that begins the next
    counts = Counter(seen)
    assert sum(counts.values()) == cursor["taken"].sum() - 1
    for first, count in ((100, 5), (200, 7)):
        own = [counts[first + i] for i in range(count)]
        assert max(own) - min(own) <= 1
    # the order of a pass is its own
    own = [n for n in seen if n >= 200]
    assert own[:7] != own[7:14]
    assert sorted(own[:7]) == list(range(200, 207))


def test_shares_are_followed_and_seeds_differ():
    rows, cursor = draw(start_cursor(2), {"a": 0.8, "b": 0.2}, rows=400)
    share = cursor["taken"][0] / cursor["taken"].sum()
    assert abs(share - 0.8) < 0.04
    only, _ = draw(start_cursor(2), {"b": 1.0})
    assert min(documents_of(only)) >= 200
    other, _ = draw(start_cursor(2), {"a": 0.8, "b": 0.2}, rows=400, seed=(1, 3))
    assert (rows.tokens != other.tokens).any()


def test_a_text_is_cut_in_pieces_and_a_question_keeps_its_answer():
    text = Document(list(range(20)), 1)
    pieces = list(fit(text, True, 8))
    assert [p.tokens for p in pieces] == [[*range(8)], [*range(8, 16)], [*range(16, 20)]]
    assert [p.learned_from for p in pieces] == [1, 1, 1]
    (question,) = fit(Document(list(range(20)), 17), False, 8)
    assert question == Document([*range(12, 20)], 5)
    assert list(fit(Document([1, 2, 3], 2), False, 8)) == [Document([1, 2, 3], 2)]


def test_examples_are_encoded_one_after_the_other():
    words = {w: i for i, w in enumerate(["<pad>", "<eos>", "<unk>", "Q", ":", "A", "x", "y"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    found = [Example("Q: x\nA: ", "y", "math", "gsm8k"), Example("", "x y", "language", "wikitext")]
    encoded = encode_all(tokenizer, found, 1, 12, 8)
    assert len(encoded) == 2
    assert encoded.document(0) == Document([3, 4, 6, 5, 4, 7, 1], 5)
    assert encoded.document(1) == Document([6, 7, 1], 1)
    with pytest.raises(ValueError, match=r"below 7 \(`vocabulary`\), got 7"):
        encode_all(tokenizer, found, 1, 12, 7)
