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
    """From PyTorch's logits in float64: the largest difference, over max(1, |logit|)."""

    jax: float  # in float32
    torch: float  # in float32: what rounding alone does


def differences(directory: Path, rows: int = 8, length: int = 32) -> Differences:
    """How far the logits of random tokens are from those that transformers computes in float64."""
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
    difference = differences(directory)
    # a single random token can be so placed that float32 itself is off by 1e-4
    if difference.jax > max(1e-4, 4 * difference.torch):
        raise ValueError(
            f"{directory} computes other logits in PyTorch: off by {difference.jax:.1e}."
        )
    return (
        f"re-opened in PyTorch: {len(found.experts)} experts of {len(z)} z vectors, model logits "
        f"equal to JAX within {difference.jax:.1e} (float32 in PyTorch: {difference.torch:.1e})"
    )


@clean_errors()
def main(args: Args) -> None:
    """Print the verdict."""
    print(check(args.run))


if __name__ == "__main__":
    main(tyro.cli(Args, prog="python -m experiments.reopen", description=__doc__))
