"""GSM8K's answers: real rows' form, and numbers in free text."""

import pytest

from forge_jax.domains import math

ROW = {
    "question": " Natalia sold clips to 48 friends in April, and half as many in May. How many? ",
    "answer": "She sold 48/2 = <<48/2=24>>24 in May.\nAltogether 48+24 = <<48+24=72>>72.\n#### 72",
}


def test_gsm8k_row():
    item = math.from_gsm8k(ROW)
    assert item.answer == "72"
    assert item.prompt.startswith("Question: Natalia")
    assert item.prompt.endswith("How many?\nAnswer: ")
    assert "72" not in item.prompt
    assert item.image is None


def test_gsm8k_row_without_a_number_is_refused():
    with pytest.raises(ValueError, match="must hold a number, got 'none'"):
        math.from_gsm8k({"question": "?", "answer": "none"})


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 1,234", "1234"),
        ("12 and 7 #### -5 dollars", "-5"),
        ("#### 3 #### 4", "4"),
        ("so 12 #### none", "12"),  # nothing after the mark: the last number at all
        ("The answer is $18.50.", "18.5"),
        ("18.00", "18"),
        ("100", "100"),
        ("007", "7"),
        (".5", "0.5"),
        ("It takes 10-3 days", "3"),  # a minus between numbers is no sign
        ("it fell to -3", "-3"),
        ("[1,2,3]", "3"),  # commas that are not for thousands
        ("1,000,000 or 2000", "2000"),
        ("12345678901234567890123456789012", "12345678901234567890123456789012"),
        ("no idea", None),
        ("", None),
    ],
)
def test_final_number(text, number):
    assert math.final_number(text) == number


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        ("48 + 24 = 72, so #### 72", "72", 1),
        ("It is 72.00.", "72", 1),
        ("1,072", "1072", 1),
        ("72 or 71", "72", -1),
        ("-72", "72", -1),
        ("", "72", -1),
        ("no number", "none either", -1),
    ],
)
def test_reward(completion, answer, reward):
    assert math.reward(completion, answer) == reward
