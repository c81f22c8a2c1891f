"""One batch of several candidates against each candidate's own materialized model."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from forge_jax import svf
from forge_jax.models import Decoder, DecoderSpec, generate, response_logits

SPEC = DecoderSpec(
    vocab_size=19,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
)
DECODER = Decoder(SPEC)
CANDIDATES = 3


@functools.cache
def setup() -> Any:
    """Factors, and z of three candidates of which the first is the base."""
    params = jax.jit(DECODER.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    factors, z = jax.jit(lambda p: svf.decompose(p, svf.is_attention_or_mlp))(params)
    rng = np.random.default_rng(0)
    noise = {k: rng.normal(size=(CANDIDATES, *v.shape)).astype(np.float32) for k, v in z.items()}
    scale = np.array([0, 0.5, 1], np.float32)[:, None]
    return params, factors, {k: 1 + scale * v for k, v in noise.items()}


def draw(rows, time, seed=0):
    return np.random.default_rng(seed).integers(0, 19, (rows, time)).astype(np.int32)


@functools.cache
def one_by_one(function):
    """Call `function(apply, rows, ...)` with each candidate's dense model and its share of rows."""
    _, factors, z = setup()

    @jax.jit
    def run(factors, z, *args):
        params = svf.materialize(factors, z)
        return function(functools.partial(DECODER.apply, {"params": params}), *args)

    def every(*args):
        shares = [np.split(a, CANDIDATES) for a in args]
        out = [
            run(factors, {k: v[p] for k, v in z.items()}, *(s[p] for s in shares)) for p in range(3)
        ]
        return np.concatenate(out)

    return every


def together(function, *args):
    _, factors, z = setup()

    @jax.jit
    def run(factors, s, *args):
        return function(svf.apply_rows(svf.transform(DECODER), factors, s), *args)

    return np.asarray(run(factors, svf.scales(factors, z), *args))


def logits(apply, tokens):
    return apply(tokens)[0]


def test_rows_run_with_their_candidate():
    tokens = np.tile(draw(2, 5), (CANDIDATES, 1))  # the same items for all
    got = together(logits, tokens)
    np.testing.assert_allclose(got, one_by_one(logits)(tokens), atol=2e-5)
    # the first candidate is the base, the others are not
    base = np.asarray(jax.jit(DECODER.apply)({"params": setup()[0]}, tokens)[0])
    np.testing.assert_allclose(got[:2], base[:2], atol=2e-5)
    assert np.abs(got[2:] - base[2:]).reshape(4, -1).max(axis=1).min() > 0.1


def written(apply, tokens, mask):
    knobs = {"max_new_tokens": 4, "temperature": 0.0, "samples": 2}
    return generate(apply, SPEC, tokens, mask, jax.random.key(0), **knobs).tokens


def test_samples_stay_with_their_candidate():
    """Through prefill, repeated cache and decoding, where a candidate's share of rows grows."""
    tokens, mask = draw(6, 4), np.arange(4) >= np.array([0, 2, 1, 3, 0, 1])[:, None]
    got = together(written, tokens, mask)
    np.testing.assert_array_equal(got, one_by_one(written)(tokens, mask))
    assert len(np.unique(got, axis=0)) > 3


def read(apply, tokens, mask, responses):
    live = jnp.ones(responses.shape, bool)
    return response_logits(apply, SPEC, tokens, mask, responses, live)


def test_responses_stay_with_their_candidate():
    tokens, mask, responses = draw(3, 4), np.ones((3, 4), bool), draw(6, 3, seed=1)
    got = together(read, tokens, mask, responses)
    np.testing.assert_allclose(got, one_by_one(read)(tokens, mask, responses), atol=2e-5)


def test_refuses_rows_that_cannot_be_shared_out():
    _, factors, z = setup()
    apply = svf.apply_rows(svf.transform(DECODER), factors, svf.scales(factors, z))
    for rows in (4, 2, 0):
        with pytest.raises(ValueError, match=f"multiple of 3 rows.* got {rows}"):
            apply(np.zeros((rows, 5), np.int32))


def test_refuses_paths_that_disagree():
    _, factors, z = setup()
    s = svf.scales(factors, z)
    path = next(iter(s))
    for broken in ({**s, path: s[path][:2]}, {}):
        with pytest.raises(ValueError, match="same number of candidates"):
            svf.apply_rows(svf.transform(DECODER), factors, broken)
