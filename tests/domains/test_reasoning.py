"""ARC's rows and the choice that a completion names."""

import pytest

from forge_jax.domains import reasoning

ROW = {
    "question": "Which is a source of light? ",
    "choices": {"text": ["the Moon", "the Sun", "a mirror"], "label": ["A", "B", "C"]},
    "answerKey": "B",
}


def test_arc_row():
    item = reasoning.from_arc(ROW)
    listed = "A. the Moon\nB. the Sun\nC. a mirror"
    assert item.prompt == f"Question: Which is a source of light?\n{listed}\nAnswer: "
    assert item.answer == "B"


def test_arc_row_with_numbered_choices():
    choices = {"text": ["x", "y"], "label": ["1", "2"]}
    item = reasoning.from_arc(ROW | {"choices": choices, "answerKey": "2"})
    assert "\n1. x\n2. y\n" in item.prompt
    assert reasoning.reward("2", item.answer) == 1


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("(C)", "C"),
        ("D. the Sun", "D"),
        ("The answer is E.", "E"),
        ("4) because 2", "4"),
        ("Both B and C", "B"),
        ("A good guess is B", "A"),  # documented
        ("Better Call", None),
        ("F", None),
        ("b", None),
        ("12", None),
        ("", None),
    ],
)
def test_choice_letter(text, letter):
    assert reasoning.choice_letter(text) == letter


def test_reward():
    assert reasoning.reward("I think B, not C", "B") == 1
    assert reasoning.reward("C", "B") == -1
    assert reasoning.reward("the Sun", "B") == -1
