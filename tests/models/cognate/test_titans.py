"""The neural memory against a loop over tokens in NumPy, and what its two thresholds do."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from forge_jax.models.cognate import SPECIALIZATIONS, CognateConfig, Controls
from forge_jax.models.cognate.memory import TitansMemory, convolved, init_stream
from forge_jax.models.cognate.titans import Writes, init_titans, recall_chunk

WIDTH, TIME = 5, 12
QUICK = {"xla_backend_optimization_level": 0}  # half the time to compile


def silu(x):
    return x / (1 + np.exp(-x))


def slope(x):
    s = 1 / (1 + np.exp(-x))
    return s * (1 + x * (1 - s))


def loop(weights, writes, queries, threshold, chunk):
    """Titans' equations 12-14 for a memory of two matrices, one token after the other.

    The gradient is taken at the weights before the chunk (and after the document's start).
    """
    keys, values, theta, eta, keep, is_first = (np.asarray(x, np.float64) for x in writes)
    initial = [np.asarray(w, np.float64) for w in weights]
    w, s = list(initial), [np.zeros_like(x) for x in initial]
    total = count = held = 0.0
    reads, relative, helds, seen = [], [], [], []
    for t in range(len(keys)):
        if t % chunk == 0:
            base, seen = list(w), []
        if is_first[t]:
            w, s, base, seen = list(initial), [0 * x for x in s], list(initial), []
            total = count = held = 0.0
        reads.append(silu(queries[t] @ w[0]) @ w[1])
        a = keys[t] @ base[0]
        error = 2 * (silu(a) @ base[1] - values[t])
        grads = [np.outer(keys[t], slope(a) * (base[1] @ error)), np.outer(silu(a), error)]
        surprise = np.sqrt(sum((g**2).sum() for g in grads))
        relative.append(surprise / (surprise + (total / count if count else 0)))
        total, count = total + surprise, count + 1
        gate = 1 / (1 + np.exp(-(relative[-1] - threshold) / 0.05))
        rate = theta[t] * gate
        step = rate * np.prod([1 - min(2 * r, 1) * abs(k @ keys[t]) for k, r in seen])
        step /= max(1, surprise**2 / (error**2).sum())
        seen.append((keys[t], rate))
        s = [eta[t] * old - step * g for old, g in zip(s, grads, strict=True)]
        w = [keep[t] * old + move for old, move in zip(w, s, strict=True)]
        held = keep[t] * held + gate
        helds.append(held)
    return np.array(reads), w, s, np.array(relative), np.array(helds)


def draw(seed=0, time=TIME) -> Any:
    rng = np.random.default_rng(seed)
    weights: Any = tuple(rng.standard_normal((2, WIDTH, WIDTH)).astype(np.float32) * 0.7)
    keys, queries = rng.standard_normal((2, time, WIDTH)).astype(np.float32)
    keys /= np.linalg.norm(keys, axis=1, keepdims=True)
    values: Any = rng.standard_normal((time, WIDTH)).astype(np.float32)
    theta, eta, keep = rng.uniform(0.05, 0.6, (3, time)).astype(np.float32)
    is_first = np.arange(time) == 0
    return weights, Writes(keys, values, theta, eta, 1 - keep / 5, is_first), queries


@functools.partial(jax.jit, static_argnames="chunk", compiler_options=QUICK)
def run(weights, writes, queries, threshold, chunk):
    """All chunks of a sequence."""

    def body(state, rows):
        row_writes, row_queries = rows
        read, state, measures = recall_chunk(state, weights, row_writes, row_queries, threshold)
        return state, (read, measures)

    rows = jax.tree.map(lambda x: x.reshape(-1, chunk, *x.shape[1:]), (writes, queries))
    state, out = jax.lax.scan(body, init_titans(weights), rows)
    read, measures = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), out)
    return read, state, measures


@pytest.mark.parametrize(
    ("chunk", "threshold", "firsts"),
    [(1, -np.inf, [0]), (4, -np.inf, [0]), (4, 0.5, [0]), (4, 0.5, [0, 6, 7, 8])],
)
def test_matches_the_loop(chunk, threshold, firsts):
    weights, writes, queries = draw()
    writes = writes._replace(is_first=np.isin(np.arange(TIME), firsts))
    read, state, measures = run(weights, writes, queries, threshold, chunk)
    reads, w, s, relative, held = loop(weights, writes, queries, threshold, chunk)
    np.testing.assert_allclose(read, reads, atol=1e-5)
    for got, want in zip((*state.weights, *state.momentum), (*w, *s), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_allclose(measures.relative, relative, atol=1e-5)
    np.testing.assert_allclose(measures.held, held, rtol=1e-5)
    # the memory does something: what is read at the end is not what was there before
    assert np.abs(reads[-1] - silu(queries[-1] @ weights[0]) @ weights[1]).max() > 0.05


def test_a_key_that_comes_again_is_learned_step_by_step_not_overshot():
    """A linear memory that sees one pair over and over, in chunks: the delta rule, one by one."""
    weights, writes, _ = draw()
    key, value = writes.keys[0], writes.values[0]
    ones: Any = np.ones(TIME, np.float32)
    pairs: Any = np.outer(ones, key), np.outer(ones, value)
    same = Writes(pairs[0], pairs[1], 0.3 * ones, 0 * ones, ones, writes.is_first)
    read, state, _ = run(weights[:1], same, pairs[0], -np.inf, 4)
    far = np.asarray(read) - value
    np.testing.assert_allclose(far, 0.4 ** np.arange(TIME)[:, None] * far[0], atol=1e-5)
    assert np.abs(np.asarray(state.weights[0]) - weights[0]).max() > 0.1


CONFIG = CognateConfig(vocab_size=9, d_model=8, d_mem=6, memory_chunk=4, heads=2, answer_heads=2)
ALONE = dataclasses.replace(CONFIG, memory_taps=1)


@functools.partial(jax.jit, static_argnames="config", compiler_options=QUICK)
def remember(params, x, is_first, carry, controls, config=CONFIG):
    return TitansMemory(config).apply({"params": params}, x, is_first, carry, controls)


@functools.cache
def make_params(config=CONFIG):
    args = jnp.zeros((1, 4, 8)), jnp.zeros((1, 4), bool), None, Controls()
    params = jax.jit(TitansMemory(config).init)(jax.random.key(0), *args)["params"]
    # larger than at the start of training, so that there is something to see
    return jax.tree.map(lambda p: p * 20 if p.shape == (8, 6) else p, params)


def make_stream(time, batch=2, seed=0):
    x = np.random.default_rng(seed).standard_normal((batch, time, 8)).astype(np.float32)
    return x, np.arange(time)[None] == np.zeros((batch, 1))


@pytest.mark.parametrize("config", [CONFIG, ALONE], ids=["taps", "alone"])
def test_a_stream_in_pieces_is_the_whole(config):
    params, (x, first), controls = make_params(config), make_stream(11), Controls()
    first[1, 6] = True
    whole, after, _ = remember(params, x, first, None, controls, config)
    weights = tuple(params[f"memory_{i}"] for i in range(2))
    carry, pieces = init_stream(weights, 2, config), []
    for start, end in ((0, 5), (5, 6), (6, 7), (7, 11)):
        rows = x[:, start:end], first[:, start:end]
        read, carry, _ = remember(params, *rows, carry, controls, config)
        pieces.append(read)
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), whole, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), carry.state, after.state)
    assert int(carry.count) == int(after.count) == 3


def test_a_query_begins_as_the_next_tokens_key():
    """For that token's own part, which is 0 here: whatever the four tokens before it are."""
    params, (x, first) = make_params(), make_stream(11)
    x[:, 8] = 0
    written, queries = TitansMemory(CONFIG).apply(
        {"params": params}, x, first, Controls(), method="writes"
    )
    row = 8 - (CONFIG.memory_taps - 1)
    np.testing.assert_allclose(queries[:, row - 1], written.keys[:, row], atol=1e-6)
    assert np.abs(queries[:, row] - written.keys[:, row]).max() > 0.1
    assert params["w_q"]["kernel"] is not params["w_k"]["kernel"]
    alone = make_params(ALONE)
    assert np.abs(alone["w_q"]["kernel"] - alone["w_k"]["kernel"]).max() > 0.1


def test_neighbours_are_convolved_within_their_document():
    """Against numpy.convolve, channel by channel and document by document."""
    rng = np.random.default_rng(0)
    x, taps = rng.standard_normal((2, 12, 5)), rng.standard_normal((3, 5))
    document = np.array([[0] * 2 + [1] * 10, [0] * 6 + [1] + [2] * 5])
    wanted = np.zeros_like(x)
    for row, which in enumerate(document):
        for number in np.unique(which):
            own = which == number
            for channel in range(5):
                full = np.convolve(x[row, own, channel], taps[:, channel])
                wanted[row, own, channel] = full[: own.sum()]
    found = convolved(jnp.asarray(x), jnp.asarray(taps), jnp.asarray(document))
    np.testing.assert_allclose(found, wanted[:, 2:], atol=1e-5)


def test_reads_see_the_past_only_and_not_the_document_before():
    params, (x, first) = make_params(), make_stream(11)
    base = np.asarray(remember(params, x, first, None, Controls())[0])
    changed = x.copy()
    changed[:, 5] += 1
    other = np.asarray(remember(params, changed, first, None, Controls())[0])
    np.testing.assert_array_equal(base[:, :5], other[:, :5])
    assert np.abs(base - other)[:, 6:].max(axis=(0, 2)).min() > 1e-5
    first[:, 6] = True
    a, b = (np.asarray(remember(params, v, first, None, Controls())[0]) for v in (x, changed))
    np.testing.assert_array_equal(a[:, 6:], b[:, 6:])


def test_the_threshold_and_the_capacity_are_real():
    """Over a long stream: fewer writes above a higher threshold, longer kept with more room."""
    params, (x, first) = make_params(), make_stream(256, batch=1)
    params = {**params, "w_rates": jax.tree.map(jnp.copy, params["w_rates"])}
    params["w_rates"]["bias"] = params["w_rates"]["bias"].at[2].set(-20)  # forgets by capacity only

    def held(threshold, capacity):
        controls = Controls(surprise_threshold=threshold, capacity=capacity)
        _, _, measures = remember(params, x, first, None, controls)
        return float(measures.held[0, -1])

    everything = held(-np.inf, 1e9)
    assert everything == pytest.approx(256, rel=1e-3)
    # a geometric series
    q = np.exp(-1 / 64)
    assert held(-np.inf, 64.0) == pytest.approx((1 - q**256) / (1 - q), rel=1e-3)
    some = [held(t, 1e9) for t in (0.3, 0.5, 0.7)]
    assert 256 > some[0] > 1.2 * some[1] > 1.44 * some[2] > 0
    # the three models, at a 64th of their capacities: on a stream of several lifetimes the memory
    # model holds the most, though the speed model writes more
    models = {n: held(s.surprise, s.capacity / 64) for n, s in SPECIALIZATIONS.items()}
    assert models["memory"] > 1.2 * max(models["speed"], models["reasoning"])
