"""Race one batch whose rows belong to different experts through one matrix.

    python -m experiments.bench.rows runs/bench

The public way groups the rows by expert and rebuilds each expert's matrix.
"""

import dataclasses
from collections.abc import Iterator

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import torch
import tyro

from experiments.bench import decoders, race
from experiments.bench.race import OURS, PUBLIC, TORCH
from forge_jax import svf

KEPT = "grouped, dense matrices kept"


@dataclasses.dataclass(frozen=True)
class Shape:
    """A matrix, and a batch of one token a row."""

    inputs: int = 768
    outputs: int = 3072
    rows: int = 16
    experts: int = 4


FULL = (Shape(), {PUBLIC: 5.0})


def make(shape: Shape, floors: dict[str, float], dtype: str) -> race.Race:
    """The race of this module."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((shape.inputs, shape.outputs), np.float32)
    factors, ones = svf.decompose({"kernel": weight}, lambda path, leaf: True)
    leaf = factors["kernel"]
    z = 1 + 0.2 * rng.standard_normal((shape.experts, *ones["kernel"].shape), np.float32)
    x = rng.standard_normal((shape.rows, 1, shape.inputs), np.float32)
    share = shape.rows // shape.experts
    adapted = svf.transform(nn.Dense(shape.outputs, use_bias=False))

    def serve(factors, z, x):
        s = svf.scales(factors, {"kernel": z})
        return svf.apply_rows(adapted, factors, s)(x)[:, 0]

    def ours(dtype):
        layout = dataclasses.replace(leaf.layout, dtype=jnp.dtype(dtype))
        u, vt = leaf.u.astype(dtype), leaf.vt.astype(dtype)
        cast = {"kernel": dataclasses.replace(leaf, u=u, vt=vt, layout=layout)}
        return race.jax_contender(serve, cast, jnp.asarray(z), jnp.asarray(x, dtype))

    parts = (leaf.u, leaf.s, leaf.vt)
    u, s, vt = (torch.from_numpy(np.array(p)).to(decoders.DEVICE) for p in parts)
    matrix = decoders.Matrix("", u, s, vt)
    scales = torch.from_numpy(z).to(decoders.DEVICE)
    rows = torch.from_numpy(x[:, 0]).to(decoders.DEVICE)
    kept = [decoders.rebuild(matrix, k).T.contiguous() for k in scales]
    repeated = (s * scales).repeat_interleave(share, dim=0)

    def rebuilt():
        groups = zip(rows.split(share), scales, strict=True)
        return torch.cat([g @ decoders.rebuild(matrix, k).T for g, k in groups]).cpu()

    def grouped():
        return torch.cat([g @ w for g, w in zip(rows.split(share), kept, strict=True)]).cpu()

    def folded():
        return (((rows @ u) * repeated) @ vt).cpu()

    held = race.size((u, s, vt))
    numbers = len(s) * (shape.inputs + shape.outputs)
    itemsize = jnp.dtype(dtype).itemsize
    return race.Race(
        name="rows_of_experts",
        title=(
            f"{shape.rows} rows with {shape.experts} experts through "
            f"{shape.inputs} x {shape.outputs}"
        ),
        settings=dataclasses.asdict(shape),
        entries={
            OURS: ours("float32"),
            PUBLIC: race.Contender(rebuilt, held_bytes=held),
            KEPT: race.Contender(grouped, held_bytes=race.size(kept)),
            TORCH: race.Contender(folded, held_bytes=held),
        },
        difference=race.relative,
        tolerance=1e-5,
        floors=floors,
        work=race.Work(2.0 * numbers * shape.rows, float(itemsize * numbers)),
        unit="batch",
        timed=None if dtype == "float32" else ours(dtype),
    )


def races(dtype: str) -> Iterator[race.Race]:
    """Every race of this module at full size."""
    yield make(*FULL, dtype)


if __name__ == "__main__":
    race.command(tyro.cli(race.Args), races)
