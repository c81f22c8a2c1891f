"""Race one batch whose rows belong to different experts through one matrix.

    python -m experiments.bench.rows runs/bench

The public way groups the rows by expert and rebuilds each expert's matrix. Grouped dense keeps the
matrices, as many as there are experts, and multiplies the rows of each by its own: one group after
another in torch, by `jax.lax.ragged_dot`, and as one batched product, which needs groups of equal
size. A run is `TIMES` batches one after another, as decoding has them.
"""

import dataclasses
from collections.abc import Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
import tyro

from experiments.bench import decoders, race
from experiments.bench.race import OURS, PUBLIC, TORCH
from forge_jax import svf

KEPT = "grouped dense, torch"
RAGGED = "grouped dense, ragged_dot"
EQUAL = "grouped dense, equal groups at once"
TIMES = 20


@dataclasses.dataclass(frozen=True)
class Shape:
    """A matrix, and a batch of one token a row."""

    inputs: int = 768
    outputs: int = 3072
    rows: int = 16
    experts: int = 4


FULL = (Shape(), {KEPT: 5.0})


def repeated(one: race.Contender) -> race.Contender:
    """`TIMES` batches, each waited for."""

    def run():
        for _ in range(TIMES - 1):
            one.run()
        return one.run()

    return one._replace(run=run)


def ours(leaf: svf.Factors, z, x, dtype: str) -> race.Contender:
    """Every row with its expert's singular values, in one product."""
    adapted = svf.transform(nn.Dense(leaf.vt.shape[-1], use_bias=False))

    def serve(factors, z, x):
        s = svf.scales(factors, {"kernel": z})
        return svf.apply_rows(adapted, factors, s)(x)[:, 0]

    layout = dataclasses.replace(leaf.layout, dtype=jnp.dtype(dtype))
    u, vt = leaf.u.astype(dtype), leaf.vt.astype(dtype)
    factors = {"kernel": dataclasses.replace(leaf, u=u, vt=vt, layout=layout)}
    return race.jax_contender(serve, factors, jnp.asarray(z), jnp.asarray(x[:, None], dtype))


def theirs(leaf: svf.Factors, z, x) -> dict[str, race.Contender]:
    """The rows of an expert as one product, its matrix rebuilt or kept; and the factored form."""

    def tensor(x):
        return torch.from_numpy(np.array(x)).to(decoders.DEVICE)

    matrix = decoders.Matrix("", *map(tensor, (leaf.u, leaf.s, leaf.vt)))
    scales, rows = tensor(z), tensor(x)
    groups = rows.split(len(x) // len(z))
    kept = [decoders.rebuild(matrix, k).T.contiguous() for k in scales]
    own = (matrix.s * scales).repeat_interleave(len(x) // len(z), dim=0)

    def rebuilt():
        pairs = zip(groups, scales, strict=True)
        return torch.cat([g @ decoders.rebuild(matrix, k).T for g, k in pairs]).cpu()

    def grouped():
        return torch.cat([g @ w for g, w in zip(groups, kept, strict=True)]).cpu()

    def folded():
        return (((rows @ matrix.u) * own) @ matrix.vt).cpu()

    held = race.size(matrix[1:])
    return {
        PUBLIC: race.Contender(rebuilt, held_bytes=held),
        KEPT: race.Contender(grouped, held_bytes=race.size(kept)),
        TORCH: race.Contender(folded, held_bytes=held),
    }


def in_jax(leaf: svf.Factors, z, x) -> dict[str, race.Contender]:
    """Dense matrices that are kept, (experts, inputs, outputs), with rows in order of experts."""
    kept = jnp.einsum("mr,kr,rn->kmn", leaf.u, leaf.s * z, leaf.vt, precision="highest")
    sizes = jnp.full(len(z), len(x) // len(z))

    def equal(kept, x):
        return jnp.einsum("gbm,gmn->gbn", x.reshape(len(z), -1, x.shape[-1]), kept).reshape(
            len(x), -1
        )

    return {
        RAGGED: race.jax_contender(jax.lax.ragged_dot, jnp.asarray(x), kept, sizes),
        EQUAL: race.jax_contender(equal, kept, jnp.asarray(x)),
    }


def make(shape: Shape, floors: dict[str, float], dtype: str) -> race.Race:
    """The race of this module."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((shape.inputs, shape.outputs), np.float32)
    factors, ones = svf.decompose({"kernel": weight}, lambda path, leaf: True)
    leaf, rank = factors["kernel"], ones["kernel"].shape[0]
    z = 1 + 0.2 * rng.standard_normal((shape.experts, rank), np.float32)
    x = rng.standard_normal((shape.rows, shape.inputs), np.float32)
    numbers = rank * (shape.inputs + shape.outputs)
    flops, moved = 2.0 * numbers * shape.rows, float(jnp.dtype(dtype).itemsize * numbers)
    entries = {OURS: ours(leaf, z, x, "float32"), **theirs(leaf, z, x), **in_jax(leaf, z, x)}
    return race.Race(
        name="rows_of_experts",
        title=(
            f"{shape.rows} rows with {shape.experts} experts through "
            f"{shape.inputs} x {shape.outputs}"
        ),
        settings=dataclasses.asdict(shape),
        entries={name: repeated(one) for name, one in entries.items()},
        difference=race.relative,
        tolerance=1e-5,
        floors=floors,
        work=race.Work(TIMES * flops, TIMES * moved),
        units=TIMES,
        unit="batch",
        timed=None if dtype == "float32" else repeated(ours(leaf, z, x, dtype)),
    )


def races(dtype: str) -> Iterator[race.Race]:
    """The race of this module at full size."""
    yield make(*FULL, dtype)


if __name__ == "__main__":
    args = tyro.cli(race.Args, prog="python -m experiments.bench.rows", description=__doc__)
    race.command(args, races)
