"""Predicates that say which leaves to decompose, by whole components of the path."""

from typing import Any

_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "c_attn"}
_ATTENTION |= {"w_q", "w_k", "w_v", "w_o"}
_MLP = {"gate_proj", "up_proj", "down_proj", "gate_up_proj", "c_fc", "fc1", "fc2"}
_MLP |= {"w_gate", "w_up", "w_down"}
# GPT-2 calls the last matrix of both blocks c_proj: there the block decides.
_SHARED = {"c_proj", "out_proj"}
_ATTENTION_BLOCKS = {"attn", "self_attn", "attention"}
_MLP_BLOCKS = {"mlp", "feed_forward"}


def is_attention(path: str, leaf: Any) -> bool:
    """Say whether a leaf is a matrix of an attention block (Llama, GPT-2 and Cognate names)."""
    return _matches(path, leaf, _ATTENTION, _ATTENTION_BLOCKS)


def is_mlp(path: str, leaf: Any) -> bool:
    """Say whether a leaf is a matrix of an MLP block (Llama, GPT-2 and Cognate names)."""
    return _matches(path, leaf, _MLP, _MLP_BLOCKS)


def is_attention_or_mlp(path: str, leaf: Any) -> bool:
    """Say whether a leaf is a matrix of an attention or an MLP block."""
    return is_attention(path, leaf) or is_mlp(path, leaf)


def _matches(path: str, leaf: Any, names: set[str], blocks: set[str]) -> bool:
    parts = set(path.split("/"))
    if leaf.ndim < 2 or "bias" in parts:  # stacked layers give biases two axes
        return False
    return bool(parts & names) or bool(parts & _SHARED and parts & blocks)
