"""What every domain is made of: a prompt, the answer that earns the reward, perhaps an image."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

DOMAINS = ("math", "code", "reasoning", "vision")
"""the guide's four experts, in the order of every mixture"""


class Item(NamedTuple):
    """One task of one domain."""

    prompt: str
    answer: str
    image: Float[np.ndarray, "rows columns"] | None = None  # grey values in [0, 1]


def signed(correct: bool) -> float:
    """The guide's reward: +1 for a correct completion, -1 for any other."""
    return 1.0 if correct else -1.0


def exact(completion: str, answer: str) -> float:
    """+1 where the completion is the answer and nothing else, white space at its ends aside."""
    return signed(completion.strip() == answer)
