"""The hidden state behind the logits, on request."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from forge_jax import svf
from forge_jax.models import Decoder, DecoderSpec, response_logits, with_hidden

SPEC = DecoderSpec(
    vocab_size=23,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
)
DECODER = Decoder(SPEC)
TOKENS = np.random.default_rng(0).integers(0, 23, (3, 6)).astype(np.int32)


@functools.cache
def variables():
    return jax.jit(DECODER.init)(jax.random.key(1), TOKENS)


def test_the_logits_are_made_of_it():
    """Tied embeddings: one product away."""
    apply = with_hidden(functools.partial(DECODER.apply, variables()))
    (logits, hidden), cache = apply(TOKENS, logits_from=-2)
    assert cache is None
    assert hidden.shape == (3, 2, 16)
    table = variables()["params"]["embed_tokens"]["embedding"]
    np.testing.assert_allclose(logits, hidden @ table.T, atol=1e-5)
    np.testing.assert_allclose(logits, DECODER.apply(variables(), TOKENS)[0][:, -2:], atol=1e-6)


def test_unasked_there_is_none():
    """Neither among the parameters nor in what comes back, nor in the program."""
    assert set(variables()) == {"params"}
    out = DECODER.apply(variables(), TOKENS)
    assert len(out) == 2
    plain = jax.make_jaxpr(lambda v: DECODER.apply(v, TOKENS)[0])(variables())
    asked = jax.make_jaxpr(lambda v: with_hidden(functools.partial(DECODER.apply, v))(TOKENS)[0])(
        variables()
    )
    assert len(plain.jaxpr.outvars) == 1
    assert len(plain.jaxpr.eqns) == len(asked.jaxpr.eqns)


@pytest.mark.parametrize("length", [1, 3])
def test_responses_have_the_hidden_states_of_a_full_pass(length):
    """Read once with the cache, and all at once: the state in which each token was chosen."""
    responses = np.random.default_rng(1).integers(0, 23, (6, length)).astype(np.int32)
    apply = with_hidden(functools.partial(DECODER.apply, variables()))
    args = (TOKENS, np.ones(TOKENS.shape, bool), responses, np.ones(responses.shape, bool))
    logits, hidden = response_logits(apply, SPEC, *args)
    whole = np.concatenate([np.repeat(TOKENS, 2, axis=0), responses], axis=1)
    (want_logits, want), _ = apply(whole[:, :-1])
    np.testing.assert_allclose(hidden, want[:, 5:], atol=1e-5)
    np.testing.assert_allclose(logits, want_logits[:, 5:], atol=1e-5)


def test_it_carries_a_gradient_to_z():
    factors, z = svf.decompose(variables()["params"], svf.is_attention_or_mlp)
    adapted = svf.transform(DECODER)

    def loss(z):
        s = {k: v[None, None] for k, v in svf.scales(factors, z).items()}
        apply = functools.partial(adapted.apply, {"params": factors}, scales=s)
        (_, hidden), _ = with_hidden(apply)(jnp.asarray(TOKENS))
        return jnp.sum(hidden[..., :3] ** 2)

    grads = jax.grad(loss)(z)
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(grads))
