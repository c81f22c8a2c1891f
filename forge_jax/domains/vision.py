"""Vision: questions on a small grey image, read by a patch projector or as text."""

import re
from collections import Counter
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from forge_jax.domains.item import Item, signed

PATCH = 4
"""side of a patch, in pixels"""
SIDE = 8
"""side of an image, in pixels"""
PATCHES = (SIDE // PATCH) ** 2
QUESTION = "Which digit is this?"


def patches(image: Float[np.ndarray, "side side"]) -> Float[np.ndarray, "patches pixels"]:
    """The image's square patches, row by row, each flattened.

    Raises:
      ValueError: the image is not 8 x 8.
    """
    if image.shape != (SIDE, SIDE):
        raise ValueError(f"An image must have shape {(SIDE, SIDE)}, got {image.shape}.")
    blocks = image.reshape(SIDE // PATCH, PATCH, SIDE // PATCH, PATCH)
    return blocks.swapaxes(1, 2).reshape(PATCHES, PATCH * PATCH).astype(np.float32)


def init_projector(key: Array, hidden_size: int) -> dict[str, Float[Array, "..."]]:
    """Parameters of `project`, at random."""
    keys = jax.random.split(key)
    return {
        "kernel": nn.initializers.lecun_normal()(keys[0], (PATCH**2, hidden_size)),
        "bias": jnp.zeros(hidden_size),
        "place": 0.02 * jax.random.normal(keys[1], (PATCHES, hidden_size)),
    }


def project(
    projector: Mapping[str, Float[Array, "..."]], x: Float[Array, "batch patches pixels"]
) -> Float[Array, "batch patches hidden"]:
    """Patches to the decoder's embedding space: one dense layer and a learnt place."""
    return x @ projector["kernel"] + projector["bias"] + projector["place"]


def as_text(image: Float[np.ndarray, "side side"]) -> str:
    """The image as lines of digits 0 to 9, for checkpoints without a projector."""
    levels = np.clip((image * 10).astype(int), 0, 9)
    return "\n".join("".join(map(str, row)) for row in levels)


def question(text: str, image_token: str | None, image: Float[np.ndarray, "side side"]) -> str:
    """`text` below the image: as many image tokens as patches, or the image as text."""
    shown = as_text(image) if image_token is None else image_token * PATCHES
    return f"{shown}\n{text}\n"


def from_digit(image: Float[np.ndarray, "side side"], digit: int, image_token: str | None) -> Item:
    """A handwritten digit, grey values in [0, 1], and the question which one it is."""
    pixels = None if image_token is None else image
    return Item(question(QUESTION, image_token, image), str(digit), pixels)


def from_textvqa(row: Mapping, image_token: str | None) -> Item | None:
    """A row of the hub's `textvqa` (fields image, question, answers): the commonest answer.

    None where nothing is left of the answers after `normalise`.

    The photograph is shrunk to the projector's grey 8 x 8, which loses its text: this reads
    the set's real form, and a checkpoint with a larger projector is what it is for.
    """
    grey = np.asarray(row["image"].convert("L").resize((SIDE, SIDE)), np.float32) / 255
    answers = Counter(filter(None, map(normalise, row["answers"])))
    if not answers:
        return None
    answer = answers.most_common(1)[0][0]
    pixels = None if image_token is None else grey
    return Item(question(row["question"].strip(), image_token, grey), answer, pixels)


def normalise(text: str) -> str:
    """Lower case without articles and punctuation (Antol et al. 2015, VQA accuracy)."""
    words = re.sub(r"[^\w\s.:-]", "", text.lower()).split()
    return " ".join(w for w in words if w not in ("a", "an", "the")).rstrip(".")


def reward(completion: str, answer: str) -> float:
    """+1 where the normalised completion is the normalised answer, else -1."""
    return signed(normalise(completion) == normalise(answer) != "")
