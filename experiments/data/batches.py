"""Items to arrays: token rows padded on the left, patches, answers."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from tokenizers import Tokenizer

from forge_jax.domains import Item, vision


class Batch(NamedTuple):
    """Prompts as the decoder takes them, and their answers: NumPy, JAX where it is traced."""

    tokens: Int[Any, "items time"]  # padded on the left
    mask: Bool[Any, "items time"]
    patches: Float[Any, "items patches pixels"]  # zeros where there is no image
    answers: Int[Any, "items answer_time"]  # with the stop token, padded on the right
    answer_mask: Bool[Any, "items answer_time"]


def pad(rows: Sequence[Sequence[int]], length: int, fill: int, left: bool):
    """Token rows and their mask as (rows, length) arrays."""
    tokens = np.full((len(rows), length), fill, np.int32)
    mask = np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        if len(row) > length:
            raise ValueError(f"A row has {len(row)} tokens, `length` allows {length}.")
        place = slice(length - len(row), None) if left else slice(0, len(row))
        tokens[i, place], mask[i, place] = row, True
    return tokens, mask


def prompt_rows(tokenizer: Tokenizer, texts: Sequence[str], bos: int | None) -> list[list[int]]:
    """Token ids of each text, after `bos` where there is one."""
    start = [] if bos is None else [bos]
    rows = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    return [start + row.ids for row in rows]


def patches_of(items: Sequence[Item]) -> Float[np.ndarray, "items patches pixels"]:
    """The patches of every item's image; zeros for an item without one."""
    blank = np.zeros((vision.SIDE, vision.SIDE), np.float32)
    return np.stack([vision.patches(blank if i.image is None else i.image) for i in items])


def encode(
    tokenizer: Tokenizer,
    items: Sequence[Item],
    *,
    bos: int | None,
    eos: int | None,
    pad_id: int = 0,
    prompt_length: int | None = None,
    answer_length: int | None = None,
) -> Batch:
    """`items` as one batch; lengths default to the longest row.

    An answer ends with `eos`; without one it is a prefix of what may follow.

    Raises:
      ValueError: there is no item, a prompt or answer without a token, or one over its length.
    """
    prompts = prompt_rows(tokenizer, [i.prompt for i in items], bos)
    stop = [] if eos is None else [eos]
    answers = [row + stop for row in prompt_rows(tokenizer, [i.answer for i in items], None)]
    if not items or not all(prompts) or not all(answers):
        raise ValueError(f"Wanted prompts and answers that have tokens, got {len(items)} items.")
    tokens, mask = pad(prompts, prompt_length or max(map(len, prompts)), pad_id, left=True)
    wanted, wanted_mask = pad(answers, answer_length or max(map(len, answers)), pad_id, left=False)
    return Batch(tokens, mask, patches_of(items), wanted, wanted_mask)


def stack(batches: Sequence[Batch]) -> Batch:
    """Batches of equal shapes along a new first axis, one entry an expert.

    Raises:
      ValueError: the shapes differ.
    """
    shapes = [tuple(leaf.shape for leaf in batch) for batch in batches]
    if len(set(shapes)) != 1:
        raise ValueError(f"Batches must have equal shapes to be stacked, got {shapes}.")
    return Batch(*(np.stack(leaves) for leaves in zip(*batches, strict=True)))
