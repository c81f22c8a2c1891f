"""What a phase 1 run starts from: models, tokenizer, encoded documents, validation rows."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array
from tokenizers import Tokenizer

from experiments.cognate.training import Batch
from experiments.cognate.validation import Held, pack_held
from experiments.data.curriculum import shares
from experiments.data.cursor import Cursor, Documents, encode_all, next_rows, start_cursor
from experiments.data.texts import read_texts
from experiments.data.tokenizer import EOS, PAD, load_tokenizer, train_bpe
from forge_jax.models.cognate import (
    SPECIALIZATIONS,
    Cognate,
    CognateConfig,
    Controls,
    Specialization,
    stack_controls,
)

SPECIALS = (PAD, EOS)
TOKENIZER_TEXTS = 20_000
"""examples of each data set that the tokenizer is trained on"""


class Problem(NamedTuple):
    """Models to train and what they learn from."""

    model: Cognate
    specializations: list[Specialization]
    tokenizer: Tokenizer
    train: dict[str, Documents]
    held: Held
    steps: int
    seed: int

    @property
    def controls(self) -> Controls:
        """The thresholds and capacities of the models, (models,) each."""
        return stack_controls(self.specializations)

    @property
    def pad(self) -> int:
        """The id of the padding token."""
        return id_of(self.tokenizer, PAD)

    def digest(self) -> str:
        """A hash of all tokens, by which a resumed run knows its texts again."""
        digest = hashlib.sha256()
        for name, documents in self.train.items():
            digest.update(name.encode())
            for leaf in documents:
                digest.update(np.ascontiguousarray(leaf).tobytes())
        for leaf in self.held.rows:
            digest.update(leaf.tobytes())
        return digest.hexdigest()

    def keys(self) -> Array:
        """The key from which each model is drawn: its documents' seed and the run's."""
        keys = [jax.random.fold_in(jax.random.key(s.seed), self.seed) for s in self.specializations]
        return jax.numpy.stack(keys)

    def start(self) -> Cursor:
        """The data cursors of all models, the models first."""
        cursors = [start_cursor(len(self.train)) for _ in self.specializations]
        return {k: np.stack([c[k] for c in cursors]) for k in cursors[0]}


def load(
    config: CognateConfig,
    names: Sequence[str],
    *,
    data: str,
    datasets: Sequence[str],
    train: int,
    validation: int,
    tokenizer: Path | None,
    length: int,
    held_rows: int,
    steps: int,
    seed: int,
) -> Problem:
    """Read the texts, train or read the tokenizer, and encode.

    Raises:
        ValueError: the texts or the tokenizer do not do; see `read_texts` and `load_tokenizer`.
    """
    texts = read_texts(data, train=train, validation=validation, only=datasets, seed=seed)
    if tokenizer is None:
        some = (e for found in texts.train.values() for e in found[:TOKENIZER_TEXTS])
        bpe = train_bpe((e.prompt + e.answer for e in some), config.vocab_size, SPECIALS)
    else:
        bpe = load_tokenizer(tokenizer, SPECIALS, config.vocab_size)
    eos, pad = (id_of(bpe, t) for t in (EOS, PAD))

    def encoded(by_set):
        return {n: encode_all(bpe, e, eos, length, config.vocab_size) for n, e in by_set.items()}

    train_documents = encoded(texts.train)
    sizes = {n: len(d) for n, d in train_documents.items()}
    for step in range(steps):  # a stage without a data set is said before the run begins
        shares(step, steps, names[0], sizes)
    held = pack_held(encoded(texts.validation), length, pad, held_rows)
    found = [SPECIALIZATIONS[n] for n in names]
    return Problem(Cognate(config), found, bpe, train_documents, held, steps, seed)


def id_of(tokenizer: Tokenizer, token: str) -> int:
    """The id of a token that every tokenizer here has."""
    found = tokenizer.token_to_id(token)
    assert found is not None
    return found


def shares_at(problem: Problem, step: int, name: str) -> dict[str, float]:
    """From which data sets a model's documents are drawn at a step."""
    sizes = {n: len(d) for n, d in problem.train.items()}
    return shares(step, problem.steps, name, sizes)


def next_batch(
    problem: Problem, cursor: Cursor, step: int, *, parts: int, rows: int, length: int
) -> tuple[Batch, Cursor]:
    """Every model's own rows for one update, (models, parts, rows, length), and the cursors."""
    drawn, cursors = [], []
    for k, model in enumerate(problem.specializations):
        got, after = next_rows(
            problem.train,
            shares_at(problem, step, model.name),
            {name: leaf[k] for name, leaf in cursor.items()},
            rows=parts * rows,
            length=length,
            pad=problem.pad,
            seed=(model.seed, problem.seed),
        )
        drawn.append([x.reshape(parts, rows, length) for x in got])
        cursors.append(after)
    batch: Any = tuple(np.stack(leaves) for leaves in zip(*drawn, strict=True))
    return batch, {name: np.stack([c[name] for c in cursors]) for name in cursor}
