"""The offline stand-ins: one stream for every category, by seed."""

from itertools import islice

import pytest

from experiments.data.corpora import CATEGORIES
from experiments.data.standins import standins


@pytest.mark.parametrize("category", CATEGORIES)
def test_every_category_has_a_stream(category):
    first = list(islice(standins(category, 0), 20))
    assert first == list(islice(standins(category, 0), 20))
    assert {(e.category, e.source) for e in first} == {(category, f"offline:{category}")}
    assert all(e.answer.strip() for e in first)
    assert len({(e.prompt, e.answer) for e in first}) > 10
    other = list(islice(standins(category, 1), 20))
    assert len(set(first) & set(other)) < 10
    if category == "language":
        assert all(not e.prompt and "GUTENBERG" not in e.answer for e in first)
    else:
        assert all(e.prompt.startswith("Q: ") and e.prompt.endswith("\nA: ") for e in first)


def test_sums_are_right():
    for example in islice(standins("math", 3), 20):
        terms = example.prompt.partition("problem:")[2].partition("=")[0]
        assert eval(terms) == int(example.answer)


def test_an_unknown_category_is_refused():
    with pytest.raises(ValueError, match="There is no category 'x'; there are math"):
        next(standins("x", 0))
