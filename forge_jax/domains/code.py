"""Code, as program-output prediction: what does this program print?"""

import ast
from collections.abc import Mapping
from random import Random

from forge_jax.domains.item import Item, signed


def _list(rng: Random) -> str:
    return str([rng.randrange(100) for _ in range(rng.randint(3, 4))])


def program(rng: Random) -> str:
    """A short Python program without side effects that prints one line."""
    name, other = rng.sample("abcdnxy", 2)
    small = rng.randrange(10), rng.randrange(10)
    big = rng.randrange(100), rng.randrange(100)
    return rng.choice(
        [
            f"print(max({_list(rng)}))",
            f"print(min({_list(rng)}))",
            f"print(sorted({_list(rng)}))",
            f"print({_list(rng)}[::-1])",
            f"print({_list(rng)}[{rng.randrange(3)}])",
            f"{name} = {small[0]}\n{name} += {small[1]}\nprint({name})",
            f"{name} = {small[0]}\n{other} = {name} - {small[1]}\nprint({other})",
            f"{name}, {other} = {big[0]}, {big[1]}\n{name}, {other} = {other}, {name}\nprint({name})",
            f"print({small[0]} if {big[0]} > {big[1]} else {small[1]})",
        ]
    )


def from_program(source: str, output: str) -> Item:
    """The item that asks for the `output` of `source`."""
    return Item(f"What does this program print?\n{source}\n", output.strip())


def from_mbpp(row: Mapping) -> Item | None:
    """A row of the hub's `mbpp` (fields code, test_list) as output prediction.

    The first test of the form `assert call == literal` gives call and output; None if there
    is none. Nothing is executed. The set's own task, writing the function, needs a sandbox.
    """
    for test in row["test_list"]:
        try:
            statement = ast.parse(test).body[0]
        except SyntaxError:
            continue
        if not (isinstance(statement, ast.Assert) and isinstance(statement.test, ast.Compare)):
            continue
        comparison = statement.test
        if not isinstance(comparison.ops[0], ast.Eq):
            continue
        try:
            output = repr(ast.literal_eval(comparison.comparators[0]))
        except ValueError:
            continue
        source = row["code"].replace("\r\n", "\n").strip()
        return from_program(f"{source}\nprint({ast.unparse(comparison.left)})", output)
    return None


def reward(completion: str, answer: str) -> float:
    """+1 where the first line of the completion is the printed line, else -1.

    Literals are compared as values, so that `[1,2]` equals `[1, 2]`.
    """
    lines = completion.strip().splitlines() or [""]
    return signed(_value(lines[0]) == _value(answer))


def _value(text: str):
    try:
        return repr(ast.literal_eval(text.strip()))
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        return text.strip()
