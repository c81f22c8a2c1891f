"""Race one SVF step of REINFORCE against the public way and the same algebra in torch.

    python -m experiments.bench.rl_step runs/bench

A step is: loss of the sampled responses and its gradient in z, clipped to a norm of 1e-3, then
Adam at 2e-3 (the settings of Transformer-Squared's public code, without its KL term, which is off
there). The public way rebuilds the weights, runs one response after another, adds up the gradient
of every dense weight, and pulls it back to z.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import tyro

from experiments.bench import decoders, race
from experiments.bench.race import OURS, PUBLIC, TORCH
from forge_jax import rl, svf

CLIP, RATE = 1e-3, 2e-3
DENSE = "forge_jax, dense form"


@dataclasses.dataclass(frozen=True)
class Shape:
    """A decoder and the responses of one expert's step."""

    hidden: int
    layers: int
    rows: int = 4
    time: int = 64
    vocab: int = 2048
    experts: int = 1


FULL = (Shape(768, 2), {PUBLIC: 5.0, TORCH: 1.0})


def case_of(shape: Shape) -> decoders.Case:
    """The decoder, with the z that each expert starts from."""
    return decoders.make_case(
        decoders.llama_spec(shape.hidden, shape.layers, shape.vocab), shape.experts
    )


def data(shape: Shape, spec) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (experts, rows, time), and the reward of every response, 1 or -1."""
    tokens = decoders.tokens_of(spec, shape.experts * shape.rows, shape.time)
    signs = np.random.default_rng(2).choice([-1.0, 1.0], (shape.experts, shape.rows))
    return tokens.reshape(shape.experts, shape.rows, shape.time), signs.astype(np.float32)


def reinforce(apply, tokens, reward):
    """Mean loss of the responses; every token but the first was sampled."""
    logits, _ = apply(tokens)
    logp = rl.log_probability(logits[:, :-1], tokens[:, 1:])
    zero, mask = jnp.zeros(logp.shape[1]), jnp.ones(logp.shape[1], bool)

    def one(logp, reward):
        return rl.reinforce_loss(logp, zero, mask, reward, kl_coefficient=0.0)

    return jax.vmap(one)(logp, reward).mean()


def optimizer() -> optax.GradientTransformation:
    """Clip by the norm of the whole gradient, then Adam."""
    return optax.chain(optax.clip_by_global_norm(CLIP), optax.adam(RATE))


def make_step(case: decoders.Case, *, dense: bool = False) -> Callable[..., Any]:
    """`step(factors, (z, state), tokens, reward) -> (z, state), (loss, gradient)` of one expert."""
    adapted = svf.transform(case.decoder)
    tx = optimizer()

    def loss(z, factors, tokens, reward):
        def factored(x):
            return adapted.apply({"params": factors}, x, scales=svf.scales(factors, z))

        def materialized(x):
            return case.decoder.apply({"params": svf.materialize(factors, z)}, x)

        return reinforce(materialized if dense else factored, tokens, reward)

    def step(factors, carry, tokens, reward):
        z, state = carry
        value, grads = jax.value_and_grad(loss)(z, factors, tokens, reward)
        updates, state = tx.update(grads, state, z)
        return (optax.apply_updates(z, updates), state), (value, grads)

    return step


def start(z: Any) -> Any:
    """z and a fresh state of the optimizer."""
    return z, optimizer().init(z)


def stepping(program: race.Program, factors, carry, *args) -> race.Contender:
    """A contender whose z and optimizer state go on from run to run.

    What is compared is the step from the start: Adam divides by gradients that are next to nothing,
    so that after some steps two sides differ by more than rounding.
    """
    kept = [carry]

    def run():
        kept[0], out = jax.block_until_ready(program.call(factors, kept[0], *args))
        return out

    def answer():
        return program.call(factors, carry, *args)[1]

    held = race.size((factors, carry, args))
    return race.Contender(run, program.compile_s, held, program.temporary_bytes, answer)


def compiled(function, *args) -> race.Contender:
    """Compile a step and start it."""
    return stepping(race.compiled(function, *args), *args)


def torch_loss(model, tokens, reward):
    """Summed over the responses given, as in `reinforce`, but not yet divided by their number."""
    logp = torch.log_softmax(model(tokens, use_cache=False).logits[:, :-1], dim=-1)
    chosen = logp.gather(-1, tokens[:, 1:, None])[..., 0]
    return -(reward * chosen.sum(dim=1)).sum()


def torch_contender(case, expert: int, tokens, reward, *, public: bool) -> race.Contender:
    """One expert's step in torch: the public way, or on factors."""
    first = {path: z[expert] for path, z in case.experts.items()}
    z = {k: v.requires_grad_(True) for k, v in decoders.to_torch(first).items()}
    adam = torch.optim.Adam(list(z.values()), lr=RATE)
    tokens = torch.tensor(tokens, device=decoders.DEVICE).long()
    reward = torch.tensor(reward, device=decoders.DEVICE)
    backward = public_backward if public else factored_backward
    step, held = backward(case, z, tokens, reward)

    def gradients():
        adam.zero_grad()
        value = step()
        grads: Any = {path: v.grad for path, v in z.items()}
        return value.cpu(), {path: g.detach().cpu().clone() for path, g in grads.items()}

    def answer():
        with torch.no_grad():
            for path, start in first.items():
                z[path].copy_(torch.from_numpy(start))
        return gradients()

    def run():
        out = gradients()
        torch.nn.utils.clip_grad_norm_(list(z.values()), CLIP)
        adam.step()
        return out

    return race.Contender(run, held_bytes=held, answer=answer)


def public_backward(case, z, tokens, reward):
    """Rebuild, a backward pass for each response into the dense weights, then back to z."""
    model, matrices = (
        decoders.torch_model(case.spec, case.params),
        decoders.torch_matrices(case),
    )
    weights = {path: model.get_submodule(m.module).weight for path, m in matrices.items()}
    for weight in weights.values():
        weight.requires_grad_(True)

    def step():
        built = {path: decoders.rebuild(m, z[path]) for path, m in matrices.items()}
        total = torch.zeros((), device=decoders.DEVICE)
        for path, weight in weights.items():
            weight.data.copy_(built[path].detach())
            weight.grad = None
        for row, sign in zip(tokens, reward, strict=True):
            value = torch_loss(model, row[None], sign[None]) / len(tokens)
            value.backward()
            total += value.detach()
        torch.autograd.backward(list(built.values()), [weights[p].grad for p in built])
        return total

    held = sum(race.size(m[1:]) for m in matrices.values())
    return step, held + race.size(list(model.parameters()))


def factored_backward(case, z, tokens, reward):
    """One pass over all responses on factors, straight to z."""
    model, layers = decoders.factored_model(case)
    base = {path: layer.s for path, layer in layers.items()}

    def step():
        for path, layer in layers.items():
            layer.s = base[path] * z[path]
        value = torch_loss(model, tokens, reward) / len(tokens)
        value.backward()
        return value.detach()

    held = race.size([(f.u, f.vt) for f in layers.values()])
    return step, held + race.size(list(model.parameters()))


def work(case: decoders.Case, shape: Shape) -> race.Work:
    """Forward, and as much again backward: U and Vt need no gradient, z next to nothing."""
    once = decoders.decoder_work(
        case, shape.experts * shape.rows, shape.time, factored=True, passes=2
    )
    return once._replace(flops=2 * once.flops)


def make(shape: Shape, floors: dict[str, float], dtype: str) -> race.Race:
    """The race of one step of one expert."""
    case = case_of(shape)
    (tokens,), (reward,) = data(shape, case.spec)
    z = {path: jnp.asarray(v[0]) for path, v in case.experts.items()}
    given = (start(z), jnp.asarray(tokens), jnp.asarray(reward))
    factored, dense = (
        compiled(make_step(case, dense=d), case.factors, *given) for d in (False, True)
    )
    entries = {
        OURS: factored,
        DENSE: dense,
        PUBLIC: torch_contender(case, 0, tokens, reward, public=True),
        TORCH: torch_contender(case, 0, tokens, reward, public=False),
    }
    bounds = {}
    if factored.temporary_bytes and dense.temporary_bytes:
        share = factored.temporary_bytes / dense.temporary_bytes
        bounds["temporary memory, factored / dense"] = (share, 0.5)
    cased = decoders.cast(case, dtype)
    timed = None if dtype == "float32" else compiled(make_step(cased), cased.factors, *given)
    return race.Race(
        name=f"rl_step_{shape.hidden}",
        title=f"one SVF step of REINFORCE, {shape.rows} responses of {shape.time} tokens",
        settings=dataclasses.asdict(shape),
        entries=entries,
        difference=race.relative,
        tolerance=1e-4,
        floors=floors,
        bounds=bounds,
        work=work(cased, shape),
        unit="step",
        timed=timed,
    )


def races(dtype: str) -> Iterator[race.Race]:
    """The race of this module at full size."""
    yield make(*FULL, dtype)


if __name__ == "__main__":
    args = tyro.cli(race.Args, prog="python -m experiments.bench.rl_step", description=__doc__)
    race.command(args, races)
