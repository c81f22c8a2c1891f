"""Byte-level tokenizers, trained on the text of a run and kept beside it."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from experiments.files import write_atomic
from interop.companions import make_tokenizer

PAD, EOS = "<pad>", "<eos>"


def train_bpe(texts: Iterable[str], vocabulary: int, specials: Sequence[str]) -> Tokenizer:
    """Byte-level BPE of at most `vocabulary` tokens in which every digit is its own token.

    The special tokens have the first ids. Little text gives fewer tokens.

    Raises:
        ValueError: `vocabulary` has no room for the bytes and the special tokens.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocabulary < len(alphabet) + len(specials):
        raise ValueError(
            f"`vocabulary` must be at least {len(alphabet) + len(specials)}, a token for every "
            f"byte and {len(specials)} special ones, got {vocabulary}."
        )
    tokenizer = Tokenizer(models.BPE())
    digits_alone = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits_alone, byte_level])  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(specials),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_tokenizer(
    path: Path, specials: Sequence[str] = (), vocabulary: int | None = None
) -> Tokenizer:
    """The tokenizer in the file `path`.

    Raises:
        ValueError: it is none, lacks a special token, or has ids of `vocabulary` or more.
    """
    if not path.is_file():
        raise ValueError(f"There is no tokenizer {path}.")
    tokenizer = make_tokenizer(lambda: Tokenizer.from_file(str(path)), path)
    known = tokenizer.get_vocab()
    if missing := [token for token in specials if token not in known]:
        raise ValueError(f"The tokenizer {path} lacks the special tokens {', '.join(missing)}.")
    if vocabulary is not None and max(known.values()) >= vocabulary:
        raise ValueError(
            f"The tokenizer {path} has token ids up to {max(known.values())}, but the model has "
            f"{vocabulary} tokens."
        )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Write the tokenizer to `path`, whole or not at all."""
    write_atomic(path, tokenizer.to_str(pretty=True) + "\n")
