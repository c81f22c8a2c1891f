"""Open a run's artifacts in PyTorch and transformers; compare their logits with JAX's.

python -m experiments.reopen runs/demo
"""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from experiments.run import clean_errors
from forge_jax.models import Decoder
from interop import load_phase8


@dataclasses.dataclass(frozen=True)
class Args:
    run: tyro.conf.Positional[Path]
    """directory with phase7.json"""


class Differences(NamedTuple):
    """From PyTorch's logits by products in float64, over the largest |logit| (at least 1)."""

    jax: float  # all in float32
    torch: float  # all in float32: what rounding does there


def differences(directory: Path, rows: int = 8, length: int = 32) -> Differences:
    """How far logits of random tokens are from transformers' with float64 products."""
    import torch
    from transformers import AutoModelForCausalLM

    adapted = load_phase8(directory).checkpoint
    tokens = np.random.default_rng(0).integers(0, adapted.spec.vocab_size, (rows, length))
    theirs = AutoModelForCausalLM.from_pretrained(directory / "huggingface", dtype=torch.float32)
    with torch.inference_mode():
        rounded = theirs(torch.from_numpy(tokens)).logits.numpy()
        wanted = theirs.double()(torch.from_numpy(tokens)).logits.numpy()
    # a GPU's default products keep ten bits, torch's all: the files would seem to differ
    with jax.default_matmul_precision("highest"):
        got, _ = Decoder(adapted.spec).apply({"params": adapted.params}, jnp.asarray(tokens))  # pyright: ignore
    scale = max(1, np.abs(wanted).max())
    return Differences(
        *(float(np.abs(x - wanted).max() / scale) for x in (np.asarray(got), rounded))
    )


def check(directory: Path) -> str:
    """Re-open all artifacts and say what was found.

    Raises:
      ValueError: a file is damaged, or PyTorch computes something else.
    """
    import torch

    found = load_phase8(directory)  # compares every .pt with its twin and every hash
    for domain, z in found.experts.items():
        loaded = torch.load(directory / f"z_vectors_{domain}.pt", weights_only=True)
        if len(loaded) != len(z):
            raise ValueError(f"z_vectors_{domain}.pt holds {len(loaded)} vectors, not {len(z)}.")
    off = differences(directory)
    # Among random tokens SmolLM2 has one at which PyTorch's own float32 is 8e-5 off.
    limit = min(1e-3, max(1e-4, 4 * off.torch))
    if not off.jax <= limit:
        raise ValueError(
            f"{directory} computes other logits in PyTorch: {off.jax:.1e} off, where {limit:.1e} "
            f"is allowed and PyTorch's own float32 is {off.torch:.1e} off."
        )
    return (
        f"re-opened in PyTorch: {len(found.experts)} experts of {len(z)} z vectors, JAX's logits "
        f"within {off.jax:.1e} of PyTorch's"
    )


@clean_errors()
def main(args: Args) -> None:
    """Print the verdict."""
    print(check(args.run))


if __name__ == "__main__":
    main(tyro.cli(Args, prog="python -m experiments.reopen", description=__doc__))
