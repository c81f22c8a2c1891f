"""Predicates over paths."""

import jax.numpy as jnp
import pytest

from forge_jax import svf

MATRIX, VECTOR = jnp.ones((2, 2)), jnp.ones(2)


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj", "o_proj"])
def test_llama_attention(name):
    path = f"layers_0/self_attn/{name}/kernel"
    assert svf.is_attention(path, MATRIX)
    assert svf.is_attention_or_mlp(path, MATRIX)
    assert not svf.is_mlp(path, MATRIX)


@pytest.mark.parametrize("name", ["gate_proj", "up_proj", "down_proj"])
def test_llama_mlp(name):
    path = f"layers_11/mlp/{name}/kernel"
    assert svf.is_mlp(path, MATRIX)
    assert svf.is_attention_or_mlp(path, MATRIX)
    assert not svf.is_attention(path, MATRIX)


def test_the_block_decides_about_a_shared_name():
    assert svf.is_attention("h_0/attn/c_proj/kernel", MATRIX)
    assert not svf.is_mlp("h_0/attn/c_proj/kernel", MATRIX)
    assert svf.is_mlp("h_0/mlp/c_proj/kernel", MATRIX)


@pytest.mark.parametrize(
    ("path", "leaf"),
    [
        ("embed_tokens/embedding", MATRIX),
        ("lm_head/kernel", MATRIX),
        ("layers_0/input_layernorm/scale", VECTOR),
        ("layers_0/self_attn/q_proj/bias", VECTOR),
        ("layers/self_attn/q_proj/bias", MATRIX),
        ("layers_0/self_attn/my_q_proj_norm/kernel", MATRIX),
        ("monkey/kernel", MATRIX),
    ],
)
def test_others_are_not_selected(path, leaf):
    assert not svf.is_attention_or_mlp(path, leaf)
