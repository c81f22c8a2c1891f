"""The sixteen data sets of phase 1, each as (prompt, answer, category, source).

examples("gsm8k")                           # from the hub
examples("gsm8k", directory="copies")  # copies/gsm8k.jsonl, or the folder copies/gsm8k
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

Row = Mapping[str, Any]
CATEGORIES = ("math", "code", "science", "reasoning", "qa", "commonsense", "language")


class Example(NamedTuple):
    """A text to learn from: the answer is to be written after the prompt, which may be empty."""

    prompt: str
    answer: str
    category: str
    source: str


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Where a data set lies, and what makes a prompt and an answer of its rows."""

    name: str
    category: str
    path: str
    read: Callable[[Row], tuple[str, str]]
    configuration: str | None = None
    train: str = "train"
    validation: str | None = None
    """the set's own held-out split that has labels; without one, a hash of the prompt decides"""
    revision: str | None = None
    streaming: bool = False
    """too large to be copied whole"""


def question(text: str) -> str:
    """The frame in which every question is put."""
    return f"Q: {text.strip()}\nA: "


def _choices(text: str, options: list[str], right: int) -> tuple[str, str]:
    listed = "\n".join(f"- {option.strip()}" for option in options)
    return question(f"{text.strip()}\n{listed}"), options[right].strip()


def _gsm8k(row):
    return question(row["question"]), row["answer"]


def _svamp(row):
    return question(f"{row['Body'].strip()} {row['Question']}"), str(row["Answer"])


def _asdiv(row):
    return question(f"{row['body'].strip()} {row['question']}"), row["answer"]


def _mbpp(row):
    return question(row["text"]), row["code"].replace("\r\n", "\n")


def _codexglue(row):
    return question(f"Write this function: {row['docstring']}"), row["code"]


def _arc(row):
    labels = list(row["choices"]["label"])
    return _choices(row["question"], list(row["choices"]["text"]), labels.index(row["answerKey"]))


def _hotpotqa(row):
    context = row["context"]
    texts = [
        f"{title}: {''.join(sentences).strip()}"
        for title, sentences in zip(context["title"], context["sentences"], strict=True)
    ]
    return question("\n".join([*texts, row["question"]])), row["answer"]


def _drop(row):
    return question(f"{row['passage']}\n{row['question']}"), row["answers_spans"]["spans"][0]


def _strategyqa(row):
    return question(row["question"]), "yes" if row["answer"] else "no"


def _boolq(row):
    return question(f"{row['passage']}\n{row['question']}?"), "yes" if row["answer"] else "no"


def _piqa(row):
    return _choices(row["goal"], [row["sol1"], row["sol2"]], int(row["label"]))


def _hellaswag(row):
    return _choices(row["ctx"], list(row["endings"]), int(row["label"]))


def _text(row):
    return "", row["text"]


_OWN: dict[str, Any] = {"validation": "validation"}
CORPORA: dict[str, Corpus] = {
    corpus.name: corpus
    for corpus in (
        Corpus("gsm8k", "math", "openai/gsm8k", _gsm8k, "main"),
        Corpus("svamp", "math", "ChilleD/SVAMP", _svamp),
        Corpus("asdiv", "math", "EleutherAI/asdiv", _asdiv, train="validation"),
        Corpus("mbpp", "code", "google-research-datasets/mbpp", _mbpp, "full", **_OWN),
        Corpus(
            *("codexglue", "code", "google/code_x_glue_ct_code_to_text", _codexglue, "python"),
            **_OWN,
        ),
        Corpus("arc_easy", "science", "allenai/ai2_arc", _arc, "ARC-Easy", **_OWN),
        Corpus("arc_challenge", "science", "allenai/ai2_arc", _arc, "ARC-Challenge", **_OWN),
        Corpus("hotpotqa", "qa", "hotpotqa/hotpot_qa", _hotpotqa, "distractor", **_OWN),
        Corpus("drop", "reasoning", "ucinlp/drop", _drop, **_OWN),
        Corpus("strategyqa", "reasoning", "ChilleD/StrategyQA", _strategyqa),
        Corpus("boolq", "qa", "google/boolq", _boolq, **_OWN),
        # the default branch is a loading script, which `datasets` no longer runs
        Corpus(
            *("piqa", "commonsense", "ybisk/piqa", _piqa),
            revision="refs/convert/parquet",
            **_OWN,
        ),
        Corpus("hellaswag", "commonsense", "Rowan/hellaswag", _hellaswag, **_OWN),
        Corpus("wikitext", "language", "Salesforce/wikitext", _text, "wikitext-2-raw-v1", **_OWN),
        Corpus(
            *("fineweb_edu", "language", "HuggingFaceFW/fineweb-edu", _text, "sample-10BT"),
            streaming=True,
        ),
        Corpus(
            *("openwebtext", "language", "Skylion007/openwebtext", _text),
            revision="refs/convert/parquet",
            streaming=True,
        ),
    )
}


def to_example(name: str, row: Row) -> Example | None:
    """One row of a data set; None if it holds no text or no answer.

    Raises:
        ValueError: the row's fields are not those that the data set had.
    """
    corpus = CORPORA[name]
    try:
        prompt, answer = corpus.read(row)
        is_empty = not prompt.strip() and corpus.category != "language"
        if is_empty or not answer.strip():
            return None
        return Example(prompt, answer, corpus.category, name)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        fields = ", ".join(sorted(map(str, row)))
        what = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"A row of {name} with the fields {fields} does not fit ({what})."
        ) from error


def examples(
    name: str,
    *,
    directory: str | Path | None = None,
    split: str = "train",
    limit: int | None = None,
) -> Iterator[Example]:
    """The examples of a data set's train or validation split, from the hub or from `directory`.

    In `directory` a file `<name>.jsonl` (or `<name>.validation.jsonl`) of the set's own rows is
    taken, or else a local copy in the folder `<name>`.

    Raises:
        ValueError: there is no such data set or split, or its fields have changed.
    """
    if name not in CORPORA:
        raise ValueError(f"There is no data set {name!r}; there are {', '.join(CORPORA)}.")
    corpus = CORPORA[name]
    of_file = directory is not None and Path(directory, f"{name}.{split}.jsonl").is_file()
    if split not in ("train", "validation") or (
        split == "validation" and not (corpus.validation or of_file)
    ):
        raise ValueError(f"The data set {name} has no split {split!r} of its own.")
    count = 0
    for row in _rows(corpus, directory, split):
        example = to_example(name, row)
        if example is None:
            continue
        yield example
        count += 1
        if count == limit:
            return
    if not count:
        raise ValueError(f"The data set {name} has no examples in its split {split!r}.")


def _rows(corpus: Corpus, directory: str | Path | None, split: str) -> Iterator[Row]:
    """Rows as they are stored."""
    infix = "" if split == "train" else ".validation"
    file = None if directory is None else Path(directory, f"{corpus.name}{infix}.jsonl")
    if file is not None and file.is_file():
        yield from _lines(file)
        return
    import datasets

    own = corpus.train if split == "train" else corpus.validation
    if directory is None:
        settings = {"revision": corpus.revision, "streaming": corpus.streaming}
        loaded = datasets.load_dataset(corpus.path, corpus.configuration, split=own, **settings)
    else:
        folder = Path(directory, corpus.name)
        if not folder.is_dir():
            raise ValueError(f"There is neither {file} nor a folder {folder}.")
        loaded = datasets.load_dataset(str(folder), split=own)
    yield from loaded  # type: ignore[misc]


def _lines(file: Path) -> Iterator[Row]:
    """The objects of a JSONL file."""
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"Line {number} of {file} is not JSON: {error}.") from error
            if not isinstance(row, dict):
                raise ValueError(f"Line {number} of {file} must be an object, got {line[:40]!r}.")
            yield row
