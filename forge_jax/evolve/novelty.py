"""How unlike the others a document is: distance to its nearest in standardised features."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from forge_jax import arch
from forge_jax.arch.pipeline import steps_of
from forge_jax.arch.schema import Arch
from forge_jax.arch.sizes import hidden_of, mixers

KINDS = ("Attention", "Retention", "SSM", "LongConv")
UNITS = ("single", "par", "route")
NORMS = ("LayerNorm", "RMSNorm", "ScaleNorm")
POSITIONS = ("rope", "alibi", "relbias", "learned", "xpos")
ACTS = ("relu", "gelu", "silu", "swiglu", "geglu")
RESIDUALS = ("single", "dual", "deepnet")


def features(spec: arch.Spec) -> Float[np.ndarray, " features"]:
    """Sizes as logarithms, kinds as counts; one row of `novelty`'s input.

    Those of a pipeline's stacks are added, a stack that runs twice counts twice.
    """
    steps = steps_of(arch.canonical(spec).arch)
    spent, stacks = arch.cost(spec), [s for s in steps if s.code is None]
    rows = [s.repeat * _stack(s.arch) for s in stacks]
    reads = [sum(bool(getattr(s, name)) for s in steps) for name in ("kv_from", "mem_from")]
    graph = [len(rows), *reads, sum(s.code is not None for s in steps)]
    amounts = [spent.params, spent.flops, 1 + spent.cache_bytes]
    return np.concatenate([np.sum(rows, axis=0), np.log2(amounts), graph])


def _stack(a: Arch) -> Float[np.ndarray, " features"]:
    """The same of one canonical stack."""
    tree = a.model_dump(mode="json", exclude_none=True)
    found = mixers(a.mix_unit)
    loops = tree.get("recurrence", {}).get("loops", {"train": 1})["train"]
    kinds = [
        *(sum(m.kind == kind for m in found) for kind in KINDS),
        *(a.mix_unit.kind == kind for kind in UNITS),
        *(a.norm == kind for kind in NORMS),
        *(a.pos.kind == kind for kind in POSITIONS),
        *(a.ffn.act == kind for kind in ACTS),
        *(tree.get("residual", {"kind": "single"})["kind"] == kind for kind in RESIDUALS),
        *(a.ffn.kind == "moe", "kv_policy" in tree, "recurrence" in tree),
        *("depth_router" in tree, "latent" in tree.get("kv_policy", {})),
        "schedule" in tree.get("recurrence", {}).get("loops", {}),
        any(
            "stencil" in m for m in tree["mix_unit"].get("choices", [tree["mix_unit"].get("mixer")])
        ),
    ]
    amounts = [a.d_model, a.n_layers, hidden_of(a.ffn, a.d_model), loops]
    return np.array([*np.log2(amounts), *kinds], np.float64)


def novelty(
    rows: Float[np.ndarray, "rows features"], nearest: int = 5
) -> Float[np.ndarray, " rows"]:
    """Mean distance of every row to its `nearest` others, itself left out.

    Features are standardised over the rows, and those that do not vary are dropped; the distance
    is the root mean square over what remains. A single row has novelty 0.
    """
    if nearest < 1:
        raise ValueError(f"`nearest` must be at least 1, got {nearest}.")
    deviation = rows.std(axis=0)
    varied = deviation > 1e-12
    if len(rows) < 2 or not varied.any():
        return np.zeros(len(rows))
    unit = (rows[:, varied] - rows[:, varied].mean(axis=0)) / deviation[varied]
    distance = np.sqrt(((unit[:, None] - unit[None]) ** 2).mean(axis=-1))
    np.fill_diagonal(distance, np.inf)
    return np.sort(distance, axis=1)[:, : min(nearest, len(rows) - 1)].mean(axis=1)


def novelty_of(specs: Sequence[arch.Spec], nearest: int = 5) -> Float[np.ndarray, " specs"]:
    """The same of documents."""
    return novelty(np.stack([features(spec) for spec in specs]), nearest)
