"""Linformer by blocks, against one query at a time in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from forge_jax import arch
from tests.arch.documents import edited
from tests.arch.programs import jitted, random_network, random_tokens
from tests.arch.test_mixers import TIME, attending, heads_of, run, turned

M = "arch.mix_unit.mixer"
BLOCK = 4  # of the context of 32, of nine tokens two blocks are whole
PUBLIC = {
    "arch": {
        "d_model": 384,
        "n_layers": 8,
        "mix_unit": {
            "kind": "single",
            "mixer": {
                "kind": "Attention",
                "heads": 6,
                "groups": 6,
                "projection": {"type": "low_rank", "rank": 128, "shared": True},
                "softmax": {"type": "standard", "qk_scale": "sqrt_d"},
            },
        },
        "ffn": {"kind": "dense", "mult": 4, "act": "gelu"},
        "norm": "LayerNorm",
        "pos": {"kind": "rope", "rope": {"theta": 10000, "dims": 48}},
    },
    "train": {"ctx_len": 2048, "dtype": "fp16"},
}


def low_rank(shared=False, **sizes):
    return {"type": "low_rank", "shared": shared, **(sizes or {"rank": 8})}


def reference(x, p, heads, kv_heads, block):
    """One query at a time: what is summed up of ended blocks, then its own block's tokens."""
    q = heads_of(x, p["q/kernel"], heads)
    k, v = (heads_of(x, p[f"{n}/kernel"], kv_heads) for n in "kv")
    out = np.zeros_like(q)
    for h in range(heads):
        g = h // (heads // kv_heads)
        query, keys = turned(q[h], 4), turned(k[g], 4)
        e, f = p["E"][g], p.get("F", p["E"])[g]
        for i in range(len(x)):
            own = i // block * block
            ended = [slice(at, at + block) for at in range(0, own, block)]
            seen = np.array([e @ keys[b] for b in ended] + [*keys[own : i + 1]])
            values = np.array([f @ v[g][b] for b in ended] + [*v[g][own : i + 1]])
            s = seen @ query[i] / query.shape[1] ** 0.5
            w = np.exp(s - s.max())
            out[h, i] = (w / w.sum()) @ values
    return out.swapaxes(0, 1).reshape(len(x), -1) @ p["out/kernel"]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_blocks_that_ended_are_one_key_each(shared, kv_heads):
    x, p, y = run(attending(kv_heads=kv_heads, projection=low_rank(shared)))
    assert p["E"].shape == (kv_heads, BLOCK)
    assert ("F" in p) != shared
    np.testing.assert_allclose(y, reference(x, p, 4, kv_heads, BLOCK), atol=2e-5)
    assert len(x) == TIME


def test_summaries_begin_near_the_mean_and_learn():
    spec = arch.from_dict(edited({f"{M}.projection": low_rank()}))
    network, tokens = arch.build(spec), random_tokens(12)
    params = jitted(network.init)(jax.random.key(0), tokens)
    e = params["params"]["stack"]["body"]["mix"]["mixer_0"]["E"]
    np.testing.assert_allclose(e, 1 / BLOCK, atol=0.5 / BLOCK)
    assert np.std(e) > 0
    gradient = jitted(jax.grad(lambda p: network.apply(p, tokens)[0].var()))(params)
    found = gradient["params"]["stack"]["body"]["mix"]["mixer_0"]
    assert all(np.abs(found[name]).min() > 0 for name in "EF")


def test_a_prompt_may_come_in_parts():
    """A block is cut by the first part."""
    spec, network, params = random_network(edited({f"{M}.projection": low_rank()}))
    tokens, read = random_tokens(12), jitted(network.apply)
    cache, parts = arch.init_cache(spec, 2, 13), []
    for part in (tokens[:, :3], tokens[:, 3:9], tokens[:, 9:]):
        logits, cache = read(params, part, cache)
        parts.append(logits)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), read(params, tokens)[0], atol=2e-4)


def test_the_length_of_a_block_is_the_network():
    """Context and rank decide no more than it; blocks of one token, or of all, are attention."""

    def fingerprint(context=32, **sizes):
        document = edited({f"{M}.projection": low_rank(**sizes), "train.ctx_len": context})
        return arch.fingerprint(arch.from_dict(document))

    plain = arch.fingerprint(arch.from_dict(edited({})))
    assert fingerprint(rank=8) == fingerprint(rank=10) == fingerprint(64, rank=16)
    assert fingerprint(rank=8) == fingerprint(block=4) != fingerprint(rank=16)
    assert fingerprint(rank=32) == fingerprint(rank=99) == fingerprint(rank=1) == plain
    for sizes in ({"rank": 99}, {"rank": 1}, {"block": 40}):
        spec = arch.from_dict(edited({f"{M}.projection": low_rank(**sizes)}))
        assert any("has no effect with blocks" in said for said in arch.notes(spec))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({f"{M}.projection": {"type": "low_rank"}}, "one of the two, is needed"),
        ({f"{M}.projection.block": 4}, "one of the two, is needed"),
        ({f"{M}.stencil": {"kind": "local", "window": 3}}, "not a local stencil"),
        ({f"{M}.softmax": {"type": "kernel", "kernel": {"features": 8}}}, "no kernel softmax"),
        ({"arch.pos": {"kind": "alibi"}}, "no alibi positions"),
        ({"arch.pos": {"kind": "relbias"}}, "no relbias positions"),
        ({"arch.kv_policy": {"cache": "ring", "window": 4}}, "kv_policy must be full"),
        ({"arch.kv_policy": {"quant": "int8"}}, "kv_policy must be full"),
    ],
)
def test_what_does_not_go_together_is_refused(changes, said):
    with pytest.raises(arch.DocumentError, match=said):
        arch.from_dict(edited(changes, edited({f"{M}.projection": low_rank()})))


def test_the_public_document_is_built():
    spec = arch.from_dict(PUBLIC)
    network = arch.build(spec)
    tokens = jnp.zeros((1, 2048), jnp.int32)
    shapes = jax.eval_shape(network.init, jax.random.key(0), tokens)["params"]
    assert shapes["stack"]["body"]["mix"]["mixer_0"]["E"].shape == (8, 6, 16)
    found = arch.cost(spec)
    assert found.params == sum(x.size for x in jax.tree.leaves(shapes))
    full = arch.cost(arch.from_dict(edited({f"{M}.projection": None}, PUBLIC)))
    assert found.flops < 0.7 * full.flops
    assert found.kv_bytes == full.kv_bytes
