"""Race greedy generation against transformers' `generate` and a bare loop over its model.

python -m experiments.bench.generation runs/bench
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Literal

import jax
import jax.numpy as jnp
import torch
import tyro

from experiments.bench import decoders, race
from experiments.bench.population import continued
from experiments.bench.race import OURS
from forge_jax.models import Decoder, generate

PEER = "transformers generate"
LOOP = "bare loop in torch"


@dataclasses.dataclass(frozen=True)
class Shape:
    """A decoder and what it continues, batch 1 unless `rows` says more."""

    family: Literal["llama", "gpt2"]
    hidden: int
    layers: int
    vocab: int
    rows: int = 1
    tokens: int = 32
    new_tokens: int = 64


FULL = (
    (Shape("llama", 256, 6, 2048), {PEER: 2.0}),
    (Shape("gpt2", 768, 12, 50257, new_tokens=32), {PEER: 1.7}),
)


def ours(spec, params, tokens, new_tokens: int, dtype: str) -> race.Contender:
    """Prefill and decoding in one program; the cache is float32."""

    def run(params, tokens):
        apply = functools.partial(Decoder(spec).apply, {"params": params})
        mask, key = jnp.ones(tokens.shape, bool), jax.random.key(0)  # greedy draws nothing
        knobs = {"max_new_tokens": new_tokens, "temperature": 0.0}
        return generate(apply, spec, tokens, mask, key, **knobs).tokens

    cast = jax.tree.map(lambda w: w.astype(dtype), params)
    return race.jax_contender(run, cast, jnp.asarray(tokens))


@torch.no_grad()
def looped(model, tokens, new_tokens: int):
    """Greedy tokens by calling the model with its own cache, and nothing around that."""
    cache, last, out = None, tokens, []
    for _ in range(new_tokens):
        step = model(last, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, last = step.past_key_values, step.logits[:, -1:].argmax(dim=-1)
        out.append(last)
    return torch.cat(out, dim=1)


def make(shape: Shape, floors: dict[str, float], dtype: str) -> race.Race:
    """One race of this module."""
    make_spec = decoders.gpt2_spec if shape.family == "gpt2" else decoders.llama_spec
    spec = make_spec(shape.hidden, shape.layers, shape.vocab)
    params = decoders.random_params(spec)
    tokens = decoders.tokens_of(spec, shape.rows, shape.tokens)
    model = decoders.torch_model(spec, params)
    theirs = torch.tensor(tokens, device=decoders.DEVICE).long()
    held = race.size(list(model.parameters()))
    args = (spec, params, tokens, shape.new_tokens)
    count = sum(w.size for w in jax.tree.leaves(params))
    # an untied table of embeddings is looked up, a tied one is multiplied with too
    looked_up = 0 if spec.tie_word_embeddings else spec.vocab_size * spec.hidden_size
    numbers = count - looked_up
    return race.Race(
        name=f"generation_{shape.family}_{shape.hidden}",
        title=(
            f"{shape.new_tokens} greedy tokens after {shape.tokens}, batch {shape.rows}, "
            f"{shape.family} of {count / 1e6:.1f} M parameters"
        ),
        settings=dataclasses.asdict(shape),
        entries={
            OURS: ours(*args, "float32"),
            PEER: race.Contender(
                lambda: continued(model, theirs, shape.new_tokens).cpu(), held_bytes=held
            ),
            LOOP: race.Contender(
                lambda: looped(model, theirs, shape.new_tokens).cpu(), held_bytes=held
            ),
        },
        difference=race.unequal,
        tolerance=0.0,
        floors=floors,
        work=race.Work(
            2.0 * numbers * shape.rows * (shape.tokens + shape.new_tokens - 1),
            float(jnp.dtype(dtype).itemsize * numbers * shape.new_tokens),
        ),
        units=shape.new_tokens * shape.rows,
        unit="token",
        timed=None if dtype == "float32" else ours(*args, dtype),
    )


def races(dtype: str) -> Iterator[race.Race]:
    """Every race of this module at full size."""
    for shape, floors in FULL:
        yield make(shape, floors, dtype)


if __name__ == "__main__":
    args = tyro.cli(race.Args, prog="python -m experiments.bench.generation", description=__doc__)
    race.command(args, races)
