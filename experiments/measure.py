"""Latency, throughput and memory of a model on this machine, measured and modelled.

Latency is one forward pass, batch 1, 512 tokens; throughput is greedy decoding, batch 1, after
a prompt of 16 tokens. Memory is what XLA allots to that forward pass: arguments (the weights),
temporaries and output. On a CPU it is main memory; the guide's name for it is vram_gb.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.model import Model
from forge_jax import search, svf
from forge_jax.models import generate

LENGTH, PROMPT, DECODED = 512, 16, 32


class Timings(NamedTuple):
    """Repeated measurements of one model."""

    forward: list[float]  # seconds a forward pass of 512 tokens
    decode: list[float]  # seconds a decoded token, its share of the prompt of 16 included
    memory: float  # bytes


def once(function: Callable[[], Any]) -> float:
    """Wall-clock seconds of a call."""
    started = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - started


def seconds(function: Callable[[], Any], budget: float = 2.0) -> list[float]:
    """Wall-clock seconds of each of some calls, after one that is not counted.

    Between 3 and 15 calls: as many as `budget` seconds allow.
    """
    jax.block_until_ready(function())
    out = []
    while len(out) < 3 or (sum(out) < budget and len(out) < 15):
        out.append(once(function))
    return out


def measure(model: Model, params: Any) -> Timings:
    """Time a tree of parameters, dense or with `svf.Factors` leaves."""
    spec = model.decoder.spec
    tokens = jnp.ones((1, LENGTH), jnp.int32)
    prompt, mask = jnp.ones((1, PROMPT), jnp.int32), jnp.ones((1, PROMPT), bool)

    def apply(params, tokens, *args, **kwargs):
        return model.adapted.apply({"params": params}, tokens, *args, **kwargs)

    forward = jax.jit(lambda p: apply(p, tokens, logits_from=-1)[0]).lower(params).compile()

    def decode(params):
        return generate(
            lambda *a, **k: apply(params, *a, **k),
            spec,
            prompt,
            mask,
            jax.random.key(0),
            max_new_tokens=DECODED,
            temperature=0.0,
        )

    decode = jax.jit(decode).lower(params).compile()
    used = forward.memory_analysis()
    assert used is not None  # every backend this project runs on has it
    memory = used.argument_size_in_bytes + used.temp_size_in_bytes + used.output_size_in_bytes
    per_token = [s / DECODED for s in seconds(lambda: decode(params))]
    return Timings(seconds(lambda: forward(params)), per_token, float(memory))


def metrics(timings: Timings) -> dict[str, float]:
    """The guide's figures from medians: milliseconds, 1e9 bytes, tokens a second."""
    return {
        "latency_ms": 1e3 * float(np.median(timings.forward)),
        "vram_gb": timings.memory / 1e9,
        "throughput_tps": 1 / float(np.median(timings.decode)),
    }


class CostModel(NamedTuple):
    """What a rank fraction costs."""

    shapes: list[tuple[int, int]]  # of the decomposed matrices
    forward: search.cost.LatencyModel
    decode: search.cost.LatencyModel
    other_bytes: float  # of the full-rank program, beyond those matrices: compiled analysis
    forward_falls: bool  # with rank, beyond the noise of the measurement
    decode_falls: bool

    def predict(self, rank: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Latency in ms, memory in 1e9 bytes, minus tokens a second: all to be minimised."""
        rank = rank.astype(np.float64)

        def time_of(model, falls, tokens) -> Any:
            work = search.cost.counts(self.shapes, rank if falls else np.ones_like(rank), tokens)
            return np.maximum(search.cost.predict(model, work), 1e-9)

        latency = 1e3 * time_of(self.forward, self.forward_falls, LENGTH)
        memory: Any = search.cost.memory(self.shapes, rank, self.other_bytes) / 1e9
        return latency, memory, -1 / time_of(self.decode, self.decode_falls, 1)


def calibrate(model: Model, factors: Any, ranks: Sequence[float]) -> dict[str, Any]:
    """Measure truncated models of a few rank fractions; what `cost_model` needs, as JSON."""
    z = svf.identity(factors)
    return {str(r): measure(model, svf.truncate(factors, z, r))._asdict() for r in ranks}


def cost_model(factors: Any, measured: dict[str, Any]) -> CostModel:
    """Fit the cost model to what `calibrate` measured."""
    shapes = [(leaf.u.shape[0], leaf.vt.shape[1]) for _, leaf in svf.named_factors(factors)]
    ranks = [float(r) for r in measured]
    timings = list(measured.values())

    def fit(which: str, tokens: int):
        medians = [float(np.median(t[which])) for t in timings]
        work = [
            search.cost.Counts(*map(float, search.cost.counts(shapes, r, tokens))) for r in ranks
        ]
        return search.cost.calibrate(work, medians)

    full, lowest = measured[str(max(ranks))], measured[str(min(ranks))]
    return CostModel(
        shapes,
        fit("forward", LENGTH),
        fit("decode", 1),
        full["memory"] - float(search.cost.memory(shapes, 1.0, 0.0)),
        search.cost.exceeds_noise(full["forward"], lowest["forward"]),
        search.cost.exceeds_noise(full["decode"], lowest["decode"]),
    )
