"""Small documents that the tests of this folder vary."""

import json
from typing import Any

BASE: dict[str, Any] = {
    "arch": {
        "d_model": 16,
        "n_layers": 2,
        "mix_unit": {"kind": "single", "mixer": {"kind": "Attention", "heads": 4, "kv_heads": 2}},
        "ffn": {"kind": "dense", "mult": 2, "act": "swiglu"},
        "norm": "RMSNorm",
        "pos": {"kind": "rope"},
    },
    "train": {"ctx_len": 32, "vocab_size": 11},
}


def unshared(tree: Any) -> Any:
    """A copy in which no two places are one object, as they are in a deep copy."""
    return json.loads(json.dumps(tree))


def edited(changes: dict[str, Any], base: dict[str, Any] = BASE) -> dict[str, Any]:
    """A copy with values put at dotted paths ("arch.mix_unit.choices.0.heads"); None removes."""
    out = unshared(base)
    for path, value in changes.items():
        *parents, last = path.split(".")
        value = unshared(value)  # a later path may reach into it
        here: Any = out
        for part in parents:
            here = here[int(part)] if isinstance(here, list) else here.setdefault(part, {})
        if value is None:
            here.pop(last, None)
        elif isinstance(here, list):
            here[int(last)] = value
        else:
            here[last] = value
    return out


def mixer(**fields: Any) -> dict[str, Any]:
    """The base with another single mixer."""
    return edited({"arch.mix_unit": {"kind": "single", "mixer": fields}})


SMALL_STACK = {"n_layers": 1, "mix_unit": BASE["arch"]["mix_unit"]}
RETAINING = {"kind": "single", "mixer": {"kind": "Retention", "heads": 2}}
# An encoder that sees ahead, a latent inferred from it, and a decoder in three stages.
PIPELINE: dict[str, Any] = edited(
    {
        "arch.modules": {
            "tokens": {"kind": "embedding", "params": {"vocab_size": 11}},
            "encoder": {**SMALL_STACK, "pos": {"kind": "learned"}, "params": {"causal": False}},
            "bits": {
                "kind": "latent_sampler",
                "cond": {
                    "source": {"kind": "pool-mlp", "H": 3},
                    "reg": {"kind": "freebits", "kappa": 0.1},
                },
                "params": {"latent_dim": 6},
            },
            "lower": SMALL_STACK,
            "memory": {**SMALL_STACK, "mix_unit": RETAINING, "ffn": {**BASE["arch"]["ffn"]}},
            "upper": {**SMALL_STACK, "kv_policy": {"cache": "full", "quant": "int8"}},
            "logits": {"kind": "readout", "output_dim": 11},
        },
        "arch.pipeline": [
            {"name": "tokens", "module": "tokens"},
            {"name": "encoder", "module": "encoder"},
            {"name": "bits", "module": "bits"},
            {"name": "lower", "module": "lower", "inputs": ["tokens"], "repeat": 2},
            {"name": "memory", "module": "memory", "kv_from": ["tokens", "lower"]},
            {
                "name": "upper",
                "module": "upper",
                "inputs": ["lower", "memory"],
                "kv_from": ["memory"],
                "mem_from": ["bits", "lower"],
            },
            {"name": "logits", "module": "logits"},
        ],
    }
)
