"""Code, as program-output prediction: what does this program print?"""

import ast
import warnings
from collections.abc import Callable, Mapping
from random import Random
from typing import Any

from forge_jax.domains.item import Item, signed


def _list(rng: Random) -> str:
    return str([rng.randrange(10) for _ in range(3)])


def program(rng: Random) -> str:
    """A short Python program without side effects that prints one line."""
    name, other = rng.sample("abcdnxy", 2)
    p, q = rng.randrange(10), rng.randrange(10)
    swap = f"{name}, {other} = {other}, {name}"
    return rng.choice(
        [
            f"print(max({_list(rng)}))",
            f"print(min({_list(rng)}))",
            f"print(sorted({_list(rng)}))",
            f"print({_list(rng)}[::-1])",
            f"print({_list(rng)}[{rng.randrange(3)}])",
            f"{name} = {p}\n{name} += {q}\nprint({name})",
            f"{name} = {p}\n{other} = {name} - {q}\nprint({other})",
            f"{name}, {other} = {p}, {q}\n{swap}\nprint({name})",
            f"print({p} if {p} > {q} else {rng.randrange(10)})",
        ]
    )


def from_program(source: str, output: str) -> Item:
    """The item that asks for the `output` of `source`."""
    return Item(f"What does this program print?\n{source}\n", output.strip())


def from_mbpp(row: Mapping) -> Item | None:
    """A row of the hub's `mbpp` (fields code, test_list, test_setup_code) as output prediction.

    The first test of the form `assert call == literal` whose literal prints as one line gives
    call and output; None if there is none. Nothing is executed. The set's own task, writing the
    function, is `to_write`.
    """
    parts = (row["code"], row.get("test_setup_code") or "")
    source = "\n".join(p.replace("\r\n", "\n").strip() for p in parts if p.strip())
    for test in row["test_list"]:
        found = _call_and_output(test)
        if found is not None:
            return from_program(f"{source}\nprint({found[0]})", found[1])
    return None


def to_write(row: Mapping) -> Item | None:
    """A row of the hub's `mbpp` (fields text, test_list, test_setup_code) as a function to write.

    The prompt shows the tests, as the set's authors do (Austin et al. 2021, section 3); the answer
    is the tests, which a reward has to run. None without a text, or where no test asserts.
    """
    tests = "\n".join(test.replace("\r\n", "\n").strip() for test in row["test_list"])
    if not row["text"] or "assert" not in tests:
        return None
    parts = ((row.get("test_setup_code") or "").replace("\r\n", "\n").strip(), tests)
    prompt = f"{row['text'].strip()}\nYour code should pass these tests:\n{tests}\n"
    return Item(prompt, "\n".join(part for part in parts if part))


def _call_and_output(test: str) -> tuple[str, str] | None:
    """The call of `assert call == literal`, and the line that printing the literal gives."""
    try:
        match _quietly(ast.parse, test).body:
            case [ast.Assert(ast.Compare(call, [ast.Eq()], [literal]))]:
                output = str(ast.literal_eval(literal))
            case _:
                return None
    except _NO_LITERAL:
        return None
    # a set prints in an order that differs from process to process
    has_set = any(isinstance(node, ast.Set) for node in ast.walk(literal))
    if has_set or not output.strip() or len(output.splitlines()) > 1:
        return None
    return ast.unparse(call), output


def reward(completion: str, answer: str) -> float:
    """+1 where the first line of the completion is the printed line, else -1.

    Literals are compared as values, so that `[1,2]` equals `[1, 2]`.
    """
    lines = completion.strip().splitlines() or [""]
    return signed(_value(lines[0]) == _value(answer))


_NO_LITERAL = (ValueError, SyntaxError, MemoryError, RecursionError, TypeError)
"""what `ast.literal_eval` is documented to raise"""


def _value(text: str) -> str:
    try:
        return repr(_quietly(ast.literal_eval, text.strip()))
    except _NO_LITERAL:
        return text.strip()


def _quietly(parse: Callable[[str], Any], text: str) -> Any:
    """`parse(text)` of a stranger's text, without Python's warnings about its style."""
    with warnings.catch_warnings(action="ignore"):
        return parse(text)
