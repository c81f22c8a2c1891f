"""Questions of several domains in one batch, each in one of several wordings.

A dispatcher that is only shown the wordings it was fitted on may read the template instead of the
question. So every domain has wordings that are fitted on and others that are held out, and there
are wordings that all domains share, in which only the content tells them apart.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from experiments.data.batches import encode, prompt_rows
from experiments.data.sources import procedural, take
from experiments.data.splits import Split
from experiments.model import check_length, images
from experiments.problem import Problem
from forge_jax.adapt import BASE
from forge_jax.domains import Item
from forge_jax.models import Questions


class Wordings(NamedTuple):
    """How a domain's questions may be put; {} is the content."""

    content: Callable[[str], str]  # of the prompt as the source words it
    fit: tuple[str, ...]
    held_out: tuple[str, ...]


def between(start: str, end: str) -> Callable[[str], str]:
    """What stands between the prompt's fixed beginning and its fixed end."""
    return lambda prompt: prompt.removeprefix(start).removesuffix(end)


WORDINGS = {
    "math": Wordings(
        between("Calculate ", ".\n"),
        (
            "Calculate {}.\n",
            "What is {}?\n",
            "{} =\n",
            "Compute the value of {}\n",
            "Please evaluate: {}\n",
            "Tell me the result of {}.\n",
            "{} equals\n",
        ),
        ("Work out {}.\n", "How much is {}?\n"),
    ),
    "code": Wordings(
        between("What does this program print?\n", "\n"),
        (
            "What does this program print?\n{}\n",
            "Output of this code:\n{}\n",
            "Run this:\n{}\n",
            "Execute these lines.\n{}\n",
            "{}\nOutput?\n",
            "{}\nTell me the result.\n",
            "I wrote a script.\n{}\nWhat comes out of it?\n",
        ),
        ("Say what the following prints.\n{}\n", "{}\nWhat is printed?\n"),
    ),
    "reasoning": Wordings(
        between("", "\n"),
        (
            "{}\n",
            "Riddle: {}\n",
            "Think about this. {}\n",
            "Consider a family. {}\n",
            "{} Please reply.\n",
            "{}\nHow many are there?\n",
            "Can you say it? {}\n",
        ),
        ("Solve the puzzle. {}\n", "{} Tell me.\n"),
    ),
    "vision": Wordings(
        between("", "\nWhich digit is this?\n"),
        (
            "{}\nWhich digit is this?\n",
            "{}\nRead the image.\n",
            "Look: {}\nWhat number?\n",
            "{}\nTell me the number.\n",
            "I see {}\n",
            "Please recognise {}\n",
            "{}\nWhat was written here?\n",
        ),
        ("{}\nWhat does the picture show?\n", "Name the digit in {}\n"),
    ),
    "sums": Wordings(
        between("Question: What is ", "?\nAnswer: "),
        (
            "Question: What is {}?\nAnswer: ",
            "Calculate {}.\n",
            "{} =\n",
            "Compute the value of {}\n",
            "Please evaluate: {}\n",
            "Tell me the result of {}.\n",
            "{} equals\n",
        ),
        ("Work out {}.\n", "How much is {}?\n"),
    ),
    "largest": Wordings(
        between("Question: What is the largest of ", "?\nAnswer: "),
        (
            "Question: What is the largest of {}?\nAnswer: ",
            "Largest of {}?\n",
            "Maximum: {}\n",
            "Of {}, say the highest.\n",
            "Which number comes last in order: {}?\n",
            "Compare {}.\n",
            "Tell me the top one of {}.\n",
        ),
        ("Which is the greatest: {}?\n", "Pick the biggest of {}.\n"),
    ),
    "quartz": Wordings(
        between("", "\nAnswer: "),
        (
            "{}\nAnswer: ",
            "Complete the sentence. {}\n",
            "{}\nWhich is it?\n",
            "Consider this. {}\n",
            "{} Please reply.\n",
            "What follows? {}\n",
            "{}\nTell me the right one.\n",
        ),
        ("Finish this: {}\n", "{}\nChoose.\n"),
    ),
}
SHARED_FIT = (
    "{}\n",
    "Input: {}\nOutput:\n",
    "User: {}\nAssistant:\n",
    "Exercise 7. {}\nSolution:\n",
    "Please help me with this.\n{}\n",
    "{}\nThank you.\n",
)
SHARED_HELD_OUT = ("Question: {}\nAnswer: ", "Here is a task.\n{}\nYour answer:\n")
"""wordings of all domains alike"""

Kind = str
"""plain (as the source words it), fit, reworded (held out), shared (held out, all domains alike)"""


def wordings_of(domain: str, kind: Kind) -> tuple[str, ...]:
    """The wordings of a kind; () is the source's own.

    Raises:
      ValueError: the domain has no wordings.
    """
    if domain not in WORDINGS:
        known = ", ".join(WORDINGS)
        raise ValueError(f"There are no wordings for the domain {domain!r}; there are for {known}.")
    own = WORDINGS[domain]
    return {
        "plain": (),
        "fit": own.fit + SHARED_FIT,
        "reworded": own.held_out,
        "shared": SHARED_HELD_OUT,
    }[kind]


def reworded(items: Sequence[Item], domain: str, kind: Kind) -> list[Item]:
    """The items in wordings of a kind, one after the other."""
    forms = wordings_of(domain, kind)
    if not forms:
        return list(items)
    contents = [WORDINGS[domain].content(item.prompt) for item in items]
    return [
        item._replace(prompt=forms[i % len(forms)].format(content))
        for i, (item, content) in enumerate(zip(items, contents, strict=True))
    ]


def asking(question: str, names: Sequence[str], boxed: bool = False) -> str:
    """The prompt that asks what kind of question this is; the label comes next."""
    listed = ", ".join(names)
    end = "\\boxed{" if boxed else ""
    return f"{question.rstrip()}\nKind: {listed} or other?\n{end}"


class Asked(NamedTuple):
    """Questions to be answered, the prompts that ask for their label, and the right label."""

    plain: Questions
    asking: Questions  # the label comes next
    boxing: Questions  # the label comes next, in a box that is opened already
    label: Int[np.ndarray, " batch"]

    def rows(self, index) -> "Asked":
        """Some of them."""
        return jax.tree.map(lambda x: x[index], self)


def questions(problem: Problem, items: Sequence[Item], length: int) -> Questions:
    """Items as arrays with their images, prompts padded to `length`.

    Raises:
      ValueError: prompt and answer are longer than the model's context.
    """
    model = problem.model
    check_length(model.decoder.spec, length, problem.new_tokens)
    first = problem.tasks[0].batches["test"]
    answers, answer_mask = first.answers, first.answer_mask  # of all tasks the same length
    eos = model.eos if ((answers == model.eos) & answer_mask).any() else None
    lengths = {"prompt_length": length, "answer_length": answers.shape[1]}
    batch = encode(model.tokenizer, items, bos=model.bos, eos=eos, **lengths)
    seen, answers = images(problem.weights, batch), batch.answers
    tokens, mask = jnp.asarray(batch.tokens), jnp.asarray(batch.mask)
    return Questions(tokens, mask, jnp.asarray(answers), jnp.asarray(batch.answer_mask), seen)


def longest(problem: Problem, texts: Sequence[str]) -> int:
    """Tokens of the longest text."""
    return max(map(len, prompt_rows(problem.model.tokenizer, texts, problem.model.bos)))


def strangers(count: int, answer: str) -> list[Item]:
    """Questions of bits, which has no wordings and is thus no domain here.

    They are dispatched, not answered: `answer` fits the other rows.
    """
    found = take(procedural("bits", 0, None), "test", count, "bits")
    return [item._replace(answer=answer) for item in found]


def make_sets(
    problem: Problem, wanted: dict[str, tuple[Split, Kind, int]], others: int = 0
) -> dict[str, Asked]:
    """Shuffled questions of all domains for each name: split, kind, items of each domain.

    All sets have the same prompt lengths, so that one compiled program serves them. With `others`
    the set "other" holds so many `strangers`, which are for the base.
    """
    names = [task.name for task in problem.tasks]
    rows: dict[str, list[tuple[Item, int]]] = {}
    for name, (split, kind, count) in wanted.items():
        rows[name] = [
            (item, label)
            for label, task in enumerate(problem.tasks)
            for item in reworded(task.items[split][:count], task.name, kind)
        ]
        np.random.default_rng(0).shuffle(rows[name])  # pyright: ignore[reportArgumentType]
    if others:
        answer = next(iter(rows.values()))[0][0].answer
        rows["other"] = [(item, BASE) for item in strangers(others, answer)]
    texts = [item.prompt for part in rows.values() for item, _ in part]
    ways: list[Callable[[str], str]] = [
        lambda text: text,
        lambda text: asking(text, names),
        lambda text: asking(text, names, boxed=True),
    ]
    lengths = [longest(problem, [way(text) for text in texts]) for way in ways]
    out = {}
    for name, part in rows.items():
        plain, bare, boxed = (
            questions(problem, [i._replace(prompt=way(i.prompt)) for i, _ in part], length)
            for way, length in zip(ways, lengths, strict=True)
        )
        labels = np.array([label for _, label in part], np.int32)
        out[name] = Asked(plain, bare, boxed, labels)
    return out
