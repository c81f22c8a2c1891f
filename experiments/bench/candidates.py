"""Training steps of candidates against eager PyTorch: a small GPT, and a stack of retentions.

    python -m experiments.bench.candidates runs/bench

Both sides start from the same weights, see the same batches, and take the same AdamW steps behind
the same clip; what is compared is the mean loss of the steps. The PyTorch side is written as one
writes it: fused attention for the GPT; for retention a loop over time, as the public toolkit has.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
import torch.nn.functional as F
import tyro

from experiments.bench import race
from experiments.evolution import candidates, tasks, training
from forge_jax import arch

EAGER = "eager PyTorch"
LOOP = "eager PyTorch, a loop over time"
# Steps whose mean loss is compared. A retention's first output is (q k) v over its length, which
# jumps where q k changes sign: over more steps rounding can grow to 1e-3.
AGREED = 3
ARCHS = Path(__file__).resolve().parent.parent / "archs"
RETENTION = {"kind": "single", "mixer": {"kind": "Retention", "heads": 6}}

Tensors = dict[str, Any]  # path -> one tensor, or one per layer


class Shape(NamedTuple):
    """Sizes of a race."""

    rows: int = 4
    length: int = 128
    steps: int = 5  # of a run
    changes: Mapping[str, Any] = {}  # of the document's `arch`


def document(shape: Shape, task: tasks.Task, retention: bool) -> arch.Spec:
    """nanogpt_tiny on the task, its attention perhaps exchanged for retention."""
    tree = arch.to_dict(arch.parse((ARCHS / "nanogpt_tiny.yaml").read_text()))
    tree["arch"] |= shape.changes
    if retention:
        tree["arch"]["mix_unit"] = RETENTION
        tree["arch"]["pos"] = {"kind": "rope"}
    return candidates.adapted(arch.from_dict(tree), task, shape.length)


def tensors(params: Any, layers: int) -> Tensors:
    """Trainable copies of Flax parameters; stacked ones as one tensor per layer."""
    out: Tensors = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/").removeprefix("stack/")
        x = np.array(leaf)
        parts = x if name.startswith("body/") else [x]
        made = [torch.tensor(part, requires_grad=True) for part in parts]
        out[name] = made if name.startswith("body/") else made[0]
    assert all(len(x) == layers for x in out.values() if isinstance(x, list))
    return out


def split(x: torch.Tensor, heads: int) -> torch.Tensor:
    """(rows, time, width) -> (rows, heads, time, size)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def turned(x: torch.Tensor, theta: float) -> torch.Tensor:
    """Rotary positions on all features of a head, halves paired."""
    half = x.shape[-1] // 2
    at, pair = (torch.arange(n, dtype=torch.float32) for n in (x.shape[2], half))
    angles = torch.outer(at, theta ** (-pair / half))
    cos, sin = angles.cos(), angles.sin()
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def attention(x: torch.Tensor, p: Tensors, layer: int, heads: int) -> torch.Tensor:
    """Causal attention with rotary positions."""
    q, k, v = (split(x @ p[f"body/mix/mixer_0/{n}/kernel"][layer], heads) for n in "qkv")
    q, k = turned(q, 10000.0), turned(k, 10000.0)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
    return out @ p["body/mix/mixer_0/out/kernel"][layer]


def retention(x: torch.Tensor, p: Tensors, layer: int, heads: int) -> torch.Tensor:
    """S <- gamma S + k v, o = q S, token by token; then a norm per head and a gate."""
    q, k, v = (split(x @ p[f"body/mix/mixer_0/{n}/kernel"][layer], heads) for n in "qkv")
    k = k * k.shape[-1] ** -0.5
    gamma = (1 - 2.0 ** (-5 - torch.arange(heads)))[:, None, None]
    state, outs = torch.zeros(*k.shape[:2], k.shape[-1], v.shape[-1]), []
    for t in range(x.shape[1]):
        state = gamma * state + k[:, :, t, :, None] * v[:, :, t, None, :]
        outs.append((q[:, :, t, None, :] @ state).squeeze(-2))
    out = torch.stack(outs, dim=2)
    out = out * (out.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()
    gate = F.silu(x @ p["body/mix/mixer_0/gate/kernel"][layer])
    return (gate * out.transpose(1, 2).flatten(2)) @ p["body/mix/mixer_0/out/kernel"][layer]


def logits(tokens: torch.Tensor, p: Tensors, heads: Any, mixer: Callable) -> torch.Tensor:
    """The whole network."""

    def normed(x: torch.Tensor, name: str, layer: int | None = None) -> torch.Tensor:
        scale, bias = (p[f"{name}/{n}"] for n in ("scale", "bias"))
        if layer is not None:
            scale, bias = scale[layer], bias[layer]
        return F.layer_norm(x, x.shape[-1:], scale, bias, 1e-5)

    x = p["embed/embedding"][tokens]
    for layer in range(len(p["body/ffn/up/kernel"])):
        x = x + mixer(normed(x, "body/mix_pre", layer), p, layer, heads)
        inner = normed(x, "body/ffn_pre", layer) @ p["body/ffn/up/kernel"][layer]
        x = x + F.gelu(inner, approximate="tanh") @ p["body/ffn/down/kernel"][layer]
    return normed(x, "norm") @ p["head/kernel"]


def trainer(
    params: Any, spec: arch.Spec, chunk: tasks.Batches, rates: training.Rates, mixer: Callable
) -> Callable[[], float]:
    """A function that goes on training, one pass over the chunk, and returns the mean loss."""
    heads, layers = arch.canonical(spec).arch.mix_unit.mixer.heads, spec.arch.n_layers  # type: ignore[union-attr]
    p, step = tensors(params, layers), 0
    decays, others = [], []
    for name, x in p.items():
        matrix = name.endswith(("kernel", "embedding"))
        (decays if matrix else others).extend(x if isinstance(x, list) else [x])
    groups = [{"params": decays}, {"params": others, "weight_decay": 0.0}]
    given: dict[str, Any] = {"betas": (rates.b1, rates.b2), "weight_decay": rates.wd}
    tx = torch.optim.AdamW(groups, lr=rates.lr, **given)
    tokens, scored = torch.tensor(chunk.tokens).long(), torch.tensor(chunk.scored)

    def run() -> float:
        nonlocal step
        total = torch.tensor(0.0)
        for batch, mask in zip(tokens, scored, strict=True):
            found = logits(batch[:, :-1], p, heads, mixer)
            loss = F.cross_entropy(found[mask], batch[:, 1:][mask])
            tx.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_([*decays, *others], rates.clip)
            for group in tx.param_groups:
                group["lr"] = rates.lr * min(1.0, (step + 1) / training.WARM_UP)
            tx.step()
            step += 1
            total += loss.detach()
        return float(total / len(tokens))

    return run


def ours(
    state: training.State,
    spec: arch.Spec,
    chunk: tasks.Batches,
    rates: training.Rates,
) -> tuple[Callable[..., float], race.Program]:
    """The same of a candidate's compiled program."""
    network, knobs, key = training.network_of(spec), arch.knobs(spec), jax.random.key(0)
    rest = (key, knobs, rates)
    function = functools.partial(training.train, network)
    program = race.compiled(function, state, chunk, len(chunk.tokens), *rest)

    def run(steps: int = len(chunk.tokens)) -> float:
        nonlocal state
        state = program.call(state, chunk, steps, *rest)
        return float(state.last_loss)

    return run, program


def make(shape: Shape, floor: float, retained: bool) -> race.Race:
    """One race; every answer is the mean loss of the first steps from the same weights."""
    task = tasks.markov()
    spec = document(shape, task, retained)
    sizes = {"rows": shape.rows, "length": shape.length}
    chunk = tasks.batches(task, "train", 0, range(shape.steps), **sizes)
    rates = training.rates_of(spec, 1e-3)
    start = jax.jit(functools.partial(training.start, training.network_of(spec)))
    state = start(jax.random.key(0), rates)
    mixer = retention if retained else attention
    run, program = ours(state, spec, chunk, rates)
    agreed = min(AGREED, shape.steps)
    first, peer = run(agreed), LOOP if retained else EAGER

    def peers(steps: int = shape.steps) -> Callable[[], float]:
        few = tasks.Batches(*(x[:steps] for x in chunk))
        return trainer(state.params, spec, few, rates, mixer)

    return race.Race(
        "train_retention" if retained else "train_gpt",
        f"training steps of nanogpt_tiny{', retention in place of attention' * retained}",
        {**shape._asdict(), "parameters": arch.cost(spec).params},
        {
            race.OURS: race.Contender(run, program.compile_s, answer=lambda: first),
            peer: race.Contender(peers(), answer=lambda: peers(agreed)()),
        },
        lambda a, b: abs(a - b) / abs(b),
        1e-4,
        floors={peer: floor},
        work=race.Work(3 * arch.cost(spec).flops * shape.rows * shape.steps, 0.0),
        units=shape.rows * shape.length * shape.steps,
        unit="token",
    )


def races(dtype: str) -> Iterator[race.Race]:
    """Both."""
    del dtype  # float32 on both sides
    yield make(Shape(), 1.0, retained=False)
    yield make(Shape(), 3.0, retained=True)


if __name__ == "__main__":
    args = tyro.cli(race.Args, prog="python -m experiments.bench.candidates", description=__doc__)
    race.command(args, races)
