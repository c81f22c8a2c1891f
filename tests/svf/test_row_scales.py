"""A batch whose rows carry different experts or mixtures, against its rows one by one."""

import functools
from typing import Any

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest

from forge_jax import svf
from forge_jax.models import Decoder, DecoderSpec, LogLikelihood, Questions, generate

SPEC = DecoderSpec(
    vocab_size=29,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
)
DECODER = Decoder(SPEC)
ADAPTED = svf.transform(DECODER)
K, PLACES, ROWS, TIME, NEW, SAMPLES = 3, 5, 6, 5, 6, 2
TRACES = []


@functools.cache
def setup() -> Any:
    """Parameters, factors, three experts and their five places."""
    params = jax.jit(DECODER.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    params = jax.tree.map(lambda w: 2 * w if w.ndim == 2 else w, params)  # lively, few ties
    factors, z = jax.jit(lambda p: svf.decompose(p, svf.is_attention_or_mlp))(params)
    rng = np.random.default_rng(0)
    experts = {k: jnp.asarray(1 + rng.normal(0, 0.5, (K, *v.shape)), "f4") for k, v in z.items()}
    return params, factors, experts, svf.pad_experts(experts, PLACES)


@functools.cache
def batch() -> Any:
    """Six left-padded prompts, their answers, and a mixture for each: the second is the base."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 29, (ROWS, TIME)).astype(np.int32)
    mask = np.arange(TIME) >= np.array([0, 3, 1, 4, 0, 2])[:, None]
    answers = rng.integers(0, 29, (ROWS, 3)).astype(np.int32)
    alpha = rng.uniform(0, 2, (ROWS, PLACES)).astype(np.float32)
    alpha[1] = 0
    parts: Any = (np.where(mask, tokens, 0), mask, answers, np.ones((ROWS, 3), bool))
    return Questions(*parts), alpha


def read(apply, rows):
    """The logits, and beside them the score of the answers, in one program."""
    logits = apply(rows.tokens, rows.mask)[0]
    return logits, LogLikelihood(SPEC)(apply, rows)


def written(apply, rows):
    knobs: dict[str, Any] = {"max_new_tokens": NEW, "temperature": 0.0, "samples": SAMPLES}
    return generate(apply, SPEC, rows.tokens, rows.mask, jax.random.key(0), **knobs).tokens


@functools.partial(jax.jit, static_argnums=0)
def together(function, factors, experts, choice, rows):
    TRACES.append(function)
    scales = svf.row_scales(factors, experts, choice)
    return function(svf.apply_rows(ADAPTED, factors, scales), rows)


@functools.partial(jax.jit, static_argnums=0)
def alone(function, params, row):
    return function(functools.partial(DECODER.apply, {"params": params}), row)


def one_by_one(function, zs):
    """Each row through its own dense model, nothing of the other rows in the batch."""
    _, factors, *_ = setup()
    rows = [jax.tree.map(lambda x, i=i: x[i : i + 1], batch()[0]) for i in range(ROWS)]
    dense = jax.jit(svf.materialize)
    out = [alone(function, dense(factors, z), row) for z, row in zip(zs, rows, strict=True)]
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *out)


def mixtures():
    _, _, experts, _ = setup()
    return [svf.mix(experts, a[:K]) for a in batch()[1]]


def assert_close(got, wanted):
    """Logits of real tokens, and scores, to 1e-5 of the largest."""
    live = batch()[0].mask
    for g, w in zip((got[0][live], got[1]), (wanted[0][live], wanted[1]), strict=True):
        np.testing.assert_allclose(g, w, atol=1e-5 * np.abs(w).max())


def test_rows_with_mixtures_are_those_rows_alone():
    _, factors, _, padded = setup()
    rows, alpha = batch()
    got = together(read, factors, padded, alpha, rows)
    assert_close(got, one_by_one(read, mixtures()))
    difference = np.abs(got[1] - one_by_one(read, [svf.identity(factors)] * ROWS)[1])
    assert difference[1] < 1e-4  # alpha = 0
    assert np.delete(difference, 1).min() > 0.05


def test_rows_with_an_index_run_with_that_expert():
    _, factors, experts, padded = setup()
    index = np.array([2, -1, 0, 4, 1, 99], np.int32)  # -1, 99 and the free place 4 are the base
    got = together(read, factors, padded, index, batch()[0])
    rows = jnp.eye(K, 100)  # column i is expert i, and those from K on are nobody's
    own = [svf.mix(experts, rows[:, i]) for i in index]
    assert_close(got, one_by_one(read, own))


def test_greedy_text_of_rows_and_samples_is_that_of_the_rows_alone():
    """Identical up to the first place where the two largest logits are closer than 1e-4."""
    _, factors, _, padded = setup()
    rows, alpha = batch()
    got = np.asarray(together(written, factors, padded, alpha, rows))
    wanted = one_by_one(written, mixtures())
    assert got.shape == (ROWS * SAMPLES, NEW)
    sure = decided(wanted)
    assert sure.mean() > 0.9
    np.testing.assert_array_equal(got[sure], wanted[sure])
    np.testing.assert_array_equal(got[::SAMPLES], got[1::SAMPLES])  # greedy samples agree
    base = np.asarray(together(written, factors, padded, np.zeros_like(alpha), rows))
    assert (got != base).any(axis=1).sum() >= 6


@jax.jit
def forward(params, tokens, mask):
    return DECODER.apply({"params": params}, tokens, mask)[0]


def decided(tokens):
    """Where every choice up to and with this one is by more than 1e-4, by full passes."""
    rows, _ = batch()
    _, factors, *_ = setup()
    out = []
    for i, row in enumerate(tokens):
        params = svf.materialize(factors, mixtures()[i // SAMPLES])
        mask = np.concatenate([rows.mask[i // SAMPLES], np.ones(NEW, bool)])
        text = np.concatenate([rows.tokens[i // SAMPLES], row])
        logits = forward(params, text[None], mask[None])[0, TIME - 1 : -1]
        top = np.sort(logits, axis=-1)[:, -2:]
        out.append(np.cumprod(top[:, 1] - top[:, 0] > 1e-4).astype(bool))
    return np.stack(out)


def test_a_further_expert_compiles_nothing():
    _, factors, _, padded = setup()
    rows, alpha = batch()

    def added(padded, place, value):
        return {
            k: v.at[place].set(jnp.full(v.shape[1:], value, v.dtype)) for k, v in padded.items()
        }

    first = {f: together(f, factors, added(padded, 3, 1.5), alpha, rows) for f in (read, written)}
    traces, compiled = len(TRACES), []

    def listener(event: str, duration_secs: float, **_: str | int):
        if "backend_compile" in event:
            compiled.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        more = added(added(padded, 3, 1.5), 4, 0.7)
        for function, before in first.items():
            after = together(function, factors, more, alpha, rows)
            same = jax.tree.map(np.array_equal, after, before)
            assert not any(jax.tree.leaves(same))
            together(function, factors, more, alpha[::-1].copy(), rows)
        assert (len(TRACES), compiled) == (traces, [])
        jax.jit(lambda x: 3 * x + traces)(alpha)
        assert compiled  # a compilation would have been heard
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)


def test_padding_is_the_base():
    _, _, experts, padded = setup()
    for name, z in padded.items():
        np.testing.assert_array_equal(z[:K], experts[name])
        assert z.shape[0] == PLACES
        assert (z[K:] == 1).all()


def test_stacked_layers_take_rows():
    """Factors under nn.scan have a leading axis of layers."""
    w = jax.random.normal(jax.random.key(0), (4, 6, 5))
    axes = {"w": svf.Axes((0,), (1,), (2,))}
    factors, z = svf.decompose({"w": w}, lambda path, leaf: True, axes)
    experts = {"w": jnp.stack([2 * z["w"], 3 * z["w"]])}
    got = svf.row_scales(factors, experts, jnp.array([1, -1, 0]))["w"]
    np.testing.assert_allclose(got, factors["w"].s * np.array([3, 1, 2])[:, None, None])


def test_what_does_not_fit_is_refused():
    _, factors, experts, _ = setup()
    with pytest.raises(ValueError, match="at least 3, the number of experts, got 2"):
        svf.pad_experts(experts, 2)
    with pytest.raises(ValueError, match="one number per expert"):
        svf.row_scales(factors, experts, jnp.ones((2, K + 1)))
    for choice in (jnp.ones(K), {k: jnp.ones(K) for k in experts}):
        with pytest.raises(ValueError, match=r"\(rows, experts\) coefficients"):
            svf.row_scales(factors, experts, choice)
    with pytest.raises(ValueError, match="one index per row"):
        svf.row_scales(factors, experts, jnp.ones((2, K), int))
