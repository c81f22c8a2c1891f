"""A search problem with a known answer: how far a document is from a planted one.

No model is built. The score falls with the steps as a learning curve does, and every (document,
steps) pair has noise of its own, so that a low rung can mislead.
"""

import math
import random

from forge_jax import arch
from forge_jax.evolve import Result
from forge_jax.evolve.tree import mixers_of, tree_of
from tests.arch.documents import edited

SEED = arch.from_dict(edited({"arch.d_model": 64, "arch.mix_unit.mixer.kv_heads": 4}))
PLANTED = arch.from_dict(
    edited(
        {
            "arch.d_model": 128,
            "arch.n_layers": 4,
            "arch.norm": "ScaleNorm",
            "arch.pos.kind": "alibi",
            "arch.ffn": {"kind": "dense", "mult": 3, "act": "geglu"},
            "arch.residual": {"kind": "dual"},
            "arch.mix_unit": {
                "kind": "par",
                "choices": [{"kind": "Attention", "heads": 8}, {"kind": "SSM", "d_state": 32}],
                "merge": "Concat",
            },
        }
    )
)


def traits(spec):
    tree = tree_of(spec)["arch"]
    sizes = [math.log2(tree["d_model"]), 0.5 * tree["n_layers"], tree["ffn"]["mult"] / 2]
    kinds = [
        tree["norm"],
        tree["pos"]["kind"],
        tree["ffn"]["act"],
        tree["ffn"]["kind"],
        tree.get("residual", {"kind": "single"})["kind"],
        tuple(sorted(m["kind"] for m in mixers_of(tree))),
        tree["mix_unit"].get("merge"),
        *(name in tree for name in ("kv_policy", "recurrence")),
    ]
    return sizes, kinds


GOAL = traits(PLANTED)


def distance(spec):
    sizes, kinds = traits(spec)
    far = sum(abs(a - b) for a, b in zip(sizes, GOAL[0], strict=True))
    return far + sum(a != b for a, b in zip(kinds, GOAL[1], strict=True))


def evaluate(spec, trial, done, steps):
    """The distance, behind noise that more training lowers."""
    noise = random.Random(f"{arch.fingerprint(spec)} {steps}").gauss(0, 0.5)
    return Result(distance(spec) + 10 / steps**0.5 * (1 + 0.2 * noise), (arch.cost(spec).flops,))
