"""Race a population of mixtures, scored and generated from, in one program against one by one.

    python -m experiments.bench.population runs/bench

The public way rebuilds every matrix for every candidate and runs the model on it.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
import tyro

from experiments.bench import decoders, race
from experiments.bench.race import OURS, PUBLIC, TORCH
from forge_jax import rl, search, svf
from forge_jax.models import Respond
from forge_jax.search.population import CHUNK

BROADCAST = "public way, no diagonal matrix"


@dataclasses.dataclass(frozen=True)
class Shape:
    """A decoder, its experts, and what each candidate runs."""

    hidden: int
    layers: int
    population: int
    experts: int = 4
    rows: int = 1
    tokens: int = 32
    new_tokens: int = 0
    """0 where the tokens are scored; else they are continued"""
    vocab: int = 2048
    family: Literal["llama", "gpt2"] = "llama"


FULL = (
    (Shape(256, 6, 50), {PUBLIC: 12.0, TORCH: 1.5}),
    (Shape(768, 2, 16), {PUBLIC: 15.0, TORCH: 0.95}),
    # matrices that are fused, and an MLP of two
    (Shape(256, 6, 50, family="gpt2"), {PUBLIC: 12.0, TORCH: 1.5}),
    (Shape(256, 6, 16, rows=4, new_tokens=16), {PUBLIC: 5.0}),
    # as many losses as one generation of few-shot adaptation takes on ten shots, at the width of
    # SmolLM2-135M, of GPT-2 and the other races, and of Qwen2-1.5B
    (Shape(576, 2, 32, rows=10, tokens=14), {PUBLIC: 10.0}),
    (Shape(768, 2, 32, rows=10, tokens=12), {PUBLIC: 10.0}),
    (Shape(1536, 1, 32, rows=10, tokens=12), {PUBLIC: 10.0}),
)


Ask = Callable[[Any, int], torch.Tensor]
"""`ask(model, times)`: what it makes of the batch repeated so many times, (times, ...)"""


class Batch(NamedTuple):
    """Prompts without padding."""

    tokens: Any  # (rows, time)
    mask: Any


def loss(apply, batch: Batch):
    """Mean negative log probability of each next token, nats."""
    logits, _ = apply(batch.tokens)
    return -rl.log_probability(logits[:, :-1], batch.tokens[:, 1:]).mean()


def ours(case: decoders.Case, shape: Shape, batch: Batch, alpha) -> race.Contender:
    """All candidates in one program."""
    adapted = svf.transform(case.decoder)
    score = Respond(case.spec, shape.new_tokens) if shape.new_tokens else loss

    def evaluate(factors, experts, alpha, batch):
        out = search.evaluate_population(adapted, factors, experts, alpha, score, batch, **options)
        return out.tokens if shape.new_tokens else out

    options: dict[str, Any] = {"form": "factored"} if shape.new_tokens else {}
    experts = jax.tree.map(jnp.asarray, case.experts)
    return race.jax_contender(
        evaluate, case.factors, experts, jnp.asarray(alpha), jax.tree.map(jnp.asarray, batch)
    )


def torch_loss(model, tokens, rows: int):
    """The loss of each of `rows` equal shares of a batch."""
    logits = model(tokens, use_cache=False).logits[:, :-1]
    nll = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
    )
    return nll.view(rows, -1).mean(dim=1)


def continued(model, tokens, new_tokens: int):
    """Greedy tokens of transformers' `generate`."""
    out = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        do_sample=False,
        max_new_tokens=new_tokens,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[:, tokens.shape[1] :]


def one_by_one(case: decoders.Case, alpha, ask: Ask, *, diagonal: bool) -> race.Contender:
    """Rebuild every matrix of a candidate, put it into the model, ask that."""
    model = decoders.torch_model(case.spec, case.params)
    matrices = decoders.torch_matrices(case)
    experts, alphas = decoders.to_torch(case.experts), torch.tensor(alpha, device=decoders.DEVICE)

    def candidate(a):
        for path, matrix in matrices.items():
            z = 1 + a @ (experts[path] - 1)
            decoders.put(model, matrix, decoders.rebuild(matrix, z, diagonal=diagonal))
        return ask(model, 1)[0]

    @torch.no_grad()
    def run():
        return torch.stack([candidate(a) for a in alphas]).cpu()

    held = sum(race.size(m[1:]) for m in matrices.values())
    return race.Contender(run, held_bytes=held + race.size(list(model.parameters())))


def folded(case: decoders.Case, alpha, rows: int, ask: Ask) -> race.Contender:
    """The factored form in torch: each of a batch's `rows` once with every candidate's scales."""
    model, layers = decoders.factored_model(case)
    experts, alphas = decoders.to_torch(case.experts), torch.tensor(alpha, device=decoders.DEVICE)
    base = {path: layer.s for path, layer in layers.items()}

    @torch.no_grad()
    def run():
        for path, layer in layers.items():
            s = base[path] * (1 + alphas @ (experts[path] - 1))
            layer.s = s.repeat_interleave(rows, dim=0)[:, None]
        return ask(model, len(alphas)).cpu()

    held = race.size([(f.u, f.vt) for f in layers.values()])
    return race.Contender(run, held_bytes=held + race.size(list(model.parameters())))


def asking(shape: Shape, batch: Batch) -> Ask:
    """The loss of each candidate, or its greedy tokens."""
    tokens = torch.tensor(batch.tokens, device=decoders.DEVICE).long()

    def ask(model, times: int):
        repeated = tokens.repeat(times, 1)
        if shape.new_tokens:
            return continued(model, repeated, shape.new_tokens).view(times, len(tokens), -1)
        return torch_loss(model, repeated, times)

    return ask


def title(shape: Shape) -> str:
    """What each candidate does, in words."""
    who = f"{shape.population} mixtures of {shape.experts} experts"
    if shape.new_tokens:
        return f"{who}, each continues {shape.rows} prompts by {shape.new_tokens} greedy tokens"
    rows = f"{shape.rows} shots of " * (shape.rows > 1)
    return f"{who}, causal loss on {rows}{shape.tokens} tokens each"


def name(shape: Shape) -> str:
    """What is raced, the family if it is not Llama's, and the width."""
    what = "generation" if shape.new_tokens else "few_shot" if shape.rows > 1 else "scoring"
    family = "_gpt2" * (shape.family == "gpt2")
    return f"population_{what}{family}_{shape.hidden}"


def work(case: decoders.Case, shape: Shape) -> race.Work:
    """Count the factored form: a chunk of candidates reads the weights once at every step."""
    chunks = math.ceil(shape.population / CHUNK)
    length = shape.tokens + max(shape.new_tokens - 1, 0)
    return decoders.decoder_work(
        case,
        shape.population * shape.rows,
        length,
        factored=True,
        passes=chunks * max(shape.new_tokens, 1),
    )


def make(shape: Shape, floors: dict[str, float], dtype: str) -> race.Race:
    """One race of this module."""
    make_spec = decoders.gpt2_spec if shape.family == "gpt2" else decoders.llama_spec
    spec = make_spec(shape.hidden, shape.layers, shape.vocab)
    case = decoders.make_case(spec, shape.experts)
    cased = decoders.cast(case, dtype)
    tokens = decoders.tokens_of(spec, shape.rows, shape.tokens)
    batch = Batch(tokens, np.ones(tokens.shape, bool))
    alpha = np.random.default_rng(2).uniform(0, 1, (shape.population, shape.experts))
    alpha, ask = alpha.astype(np.float32), asking(shape, batch)
    entries = {
        OURS: ours(case, shape, batch, alpha),
        PUBLIC: one_by_one(case, alpha, ask, diagonal=True),
        BROADCAST: one_by_one(case, alpha, ask, diagonal=False),
        TORCH: folded(case, alpha, shape.rows, ask),
    }
    return race.Race(
        name=name(shape),
        title=title(shape),
        settings=dataclasses.asdict(shape),
        entries=entries,
        difference=race.unequal if shape.new_tokens else race.relative,
        tolerance=0.0 if shape.new_tokens else 1e-5,
        floors=floors,
        work=work(cased, shape),
        unit="population",
        timed=None if dtype == "float32" else ours(cased, shape, batch, alpha),
    )


def races(dtype: str) -> Iterator[race.Race]:
    """Every race of this module at full size."""
    for shape, floors in FULL:
        yield make(shape, floors, dtype)


if __name__ == "__main__":
    args = tyro.cli(race.Args, prog="python -m experiments.bench.population", description=__doc__)
    race.command(args, races)
