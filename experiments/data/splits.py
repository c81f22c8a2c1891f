"""Train, validation and test by the content of the item, so that they can never mix.

An item's split is a function of its prompt (and image) alone. Whatever generator, seed or
run it comes from, it falls into the same split, also in the corpus of the nano base.
"""

import hashlib
from collections.abc import Iterable, Iterator
from typing import Literal

from forge_jax.domains import Item

Split = Literal["train", "validation", "test"]
SHARES: dict[Split, range] = {
    "train": range(0, 70),
    "validation": range(70, 80),
    "test": range(80, 100),
}
"""hundredths of all items"""


def split_of(item: Item) -> Split:
    """The split an item belongs to."""
    content = item.prompt.encode() + (b"" if item.image is None else item.image.tobytes())
    hundredth = int.from_bytes(hashlib.sha256(content).digest()[:8], "big") % 100
    return next(split for split, share in SHARES.items() if hundredth in share)


PATIENCE = 20_000
"""items without a new one after which an endless source counts as exhausted"""


def distinct(items: Iterable[Item], split: Split) -> Iterator[Item]:
    """The items of one split, each prompt (and image) once, until none of `PATIENCE` is new."""
    seen, stale = set(), 0
    for item in items:
        key = (item.prompt, None if item.image is None else item.image.tobytes())
        stale += 1
        if key not in seen and split_of(item) == split:
            seen.add(key)
            stale = 0
            yield item
        elif stale == PATIENCE:
            return
