"""Program-output prediction: the generator's grammar, MBPP's rows, and nothing is executed."""

import contextlib
import io
import re
from random import Random

import pytest

from forge_jax.domains import code

LIST = r"\[\d{1,2}(, \d{1,2}){2,3}\]"
GRAMMAR = re.compile(
    rf"print\((max|min|sorted)\({LIST}\)\)"
    rf"|print\({LIST}\[(::-1|[0-2])\]\)"
    r"|([abcdnxy]) = \d\n\5 \+= \d\nprint\(\5\)"
    r"|([abcdnxy]) = \d\n([abcdnxy]) = \6 - \d\nprint\(\7\)"
    r"|([abcdnxy]), ([abcdnxy]) = \d+, \d+\n\8, \9 = \9, \8\nprint\(\8\)"
    r"|print\(\d if \d+ > \d+ else \d\)"
)


def programs(seed, count):
    rng = Random(seed)
    return [code.program(rng) for _ in range(count)]


def test_programs_come_from_a_closed_grammar():
    """What `experiments` executes is one of a few forms that can do nothing but print."""
    found = [GRAMMAR.fullmatch(source) for source in programs(0, 2000)]
    assert all(found)
    # every form comes up, and few programs twice
    forms = {re.sub(r"\d+", "0", re.sub(r"\b[abcdnxy]\b", "v", s)) for s in programs(0, 2000)}
    assert len(forms) >= 9
    assert len(set(programs(0, 2000))) > 1500


def test_programs_are_a_function_of_the_seed():
    assert programs(3, 50) == programs(3, 50)
    assert programs(3, 50) != programs(4, 50)


def test_programs_print_one_line():
    for source in programs(1, 300):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(source, {})
        item = code.from_program(source, printed.getvalue())
        assert item.prompt == f"What does this program print?\n{source}\n"
        assert item.answer == printed.getvalue().removesuffix("\n")
        assert "\n" not in item.answer
        assert code.reward(printed.getvalue(), item.answer) == 1


def mbpp(*tests, source="def f(x):\r\n  return x", **fields):
    return {"code": source, "test_list": list(tests), "task_id": 1, **fields}


@pytest.mark.parametrize(
    ("test", "call", "output"),
    [
        ("assert f((3, 4),[5]) == (4, 5)", "f((3, 4), [5])", "(4, 5)"),
        ("assert f(1)==True", "f(1)", "True"),
        ("assert f(-1) == -2.50", "f(-1)", "-2.5"),
        ('assert f("a") == "python"', "f('a')", "python"),  # print shows no quotes
        ("assert f('x') == ['a', 1]", "f('x')", "['a', 1]"),
        ("assert set(f(2)) == {'a': None}", "set(f(2))", "{'a': None}"),
        ("assert f('\\d') == 1, 'message'", "f('\\\\d')", "1"),
    ],
)
def test_mbpp_row(test, call, output):
    item = code.from_mbpp(mbpp(test))
    assert item == code.from_program(f"def f(x):\n  return x\nprint({call})", output)


@pytest.mark.parametrize(
    "test",
    [
        "assert f(1) == f(2)",
        "assert not f(1)",
        "assert f(1)",
        "assert f(1) != 2",
        "assert 1 < f(1) < 3",
        "assert f(1) == 2 == 2",
        "assert f(1) == {1, 2}",  # a set prints in no fixed order
        "assert f(1) == [{'a'}]",
        "assert f(1) == {[1]: 2}",
        "assert f(1) == 'two\\nlines'",
        "assert f(1) == ''",
        "assert f(1) == (",
        "assert f(1) == '\0'",
        "f(1) == 2",
        "",
    ],
)
def test_mbpp_tests_that_predict_no_line_are_passed_over(test):
    assert code.from_mbpp(mbpp(test)) is None
    item = code.from_mbpp(mbpp(test, "assert f(7) == 8"))
    assert item is not None
    assert item.prompt.endswith("print(f(7))\n")


def test_mbpp_set_up_follows_the_code_that_it_needs():
    source, setup = "class Node: pass\r\ndef f(n): return 1", "root = Node()\r\nroot.left = 1"
    item = code.from_mbpp(mbpp("assert f(root) == 1", source=source, test_setup_code=setup))
    assert item is not None
    assert "f(n): return 1\nroot = Node()\nroot.left = 1\nprint(f(root))" in item.prompt
    assert "\r" not in item.prompt


def test_mbpp_function_to_write():
    row = mbpp("assert f(1) == 1", "assert f(2) == 2 ", text="Say x. ", test_setup_code="import re")
    item = code.to_write(row)
    assert item is not None
    prompt, answer, image = item
    assert prompt == (
        "Say x.\nYour code should pass these tests:\nassert f(1) == 1\nassert f(2) == 2\n"
    )
    assert answer == "import re\nassert f(1) == 1\nassert f(2) == 2"
    assert image is None
    assert row["code"] not in prompt + answer


def test_mbpp_is_never_executed(tmp_path):
    trap = tmp_path / "trap"
    act = f"open({str(trap)!r}, 'w').write('x')"
    item = code.from_mbpp(
        mbpp(f"assert f({act}) == {act}", f"assert f({act}) == 1", source=act, test_setup_code=act)
    )
    assert item is not None
    assert code.reward(act, "1") == -1
    assert code.reward(f"[{act}]", "[1]") == -1
    assert not trap.exists()


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        ("[1,2]", "[1, 2]", 1),
        (" [1, 2]\nand so on", "[1, 2]", 1),
        ("{'a': 1}", '{"a": 1}', 1),
        ("abc", "abc", 1),
        ("16", "0x10", 1),
        ("'abc'", "abc", -1),
        ("True", "1", -1),  # equal in Python, but not what is printed
        ("1.0", "1", -1),
        ("(1, 2)", "[1, 2]", -1),
        ("# 5", "5", -1),
        (">>> 5", "5", -1),
        ("", "5", -1),
        ("5\n6", "6", -1),
        ("'\\d' 1if", "5", -1),  # Python would warn about this
        ("[" * 300, "5", -1),
        ("9" * 5000, "5", -1),
        ("\0", "5", -1),
        ("{[1]: 2}", "5", -1),
    ],
)
def test_reward(completion, answer, reward):
    assert code.reward(completion, answer) == reward
