"""Layers on blocks of tokens: which they are, what they hand back, and what decoding keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from forge_jax import arch
from forge_jax.arch import levels, positions
from forge_jax.arch.block import Block
from forge_jax.arch.hierarchy import Coarse
from forge_jax.arch.knobs import arch_knobs
from forge_jax.arch.levels import Level, plan, runs_of
from forge_jax.arch.mixers.frame import Frame
from tests.arch.documents import BASE, edited
from tests.arch.programs import jitted, random_like, random_network, random_tokens

MIXER = "arch.mix_unit.mixer"
A = {"kind": "Attention", "heads": 4, "kv_heads": 2}
LOCAL = {"kind": "local", "window": 2}
MOE = {"kind": "moe", "mult": 1, "act": "relu", "experts": 3, "topk": 2}
ROUTER = {"kind": "token", "budget": 0.5}
LOOPS = {"prelude": 1, "body": 2, "coda": 1, "loops": {"train": 2, "eval": 2}}


def coarse(*rows, layers=4, **changes):
    """The base with levels (every, tokens of a block, and whether changes are mapped)."""
    nodes = [{"every": e, "downsample": 1 / n, "up_proj": bool(up)} for e, n, *up in rows]
    given = {"arch.n_layers": layers, "arch.hierarchy": {"levels": nodes}}
    return edited(given | changes)


def test_the_largest_divisor_decides():
    rng = np.random.default_rng(0)
    for _ in range(50):
        every = sorted(
            rng.choice(np.arange(1, 14), size=rng.integers(1, 6), replace=False).tolist()
        )
        tokens = {e: int(rng.integers(1, 4)) for e in every}
        layers = int(rng.integers(1, 40))
        spec = arch.from_dict(coarse(*tokens.items(), layers=layers))
        wanted: list[Level | None] = []
        for layer in range(1, layers + 1):
            own = [e for e in every if layer % e == 0 and tokens[e] > 1]
            wanted.append(Level(tokens[own[-1]], False) if own else None)
        full = arch.canonical(spec).arch
        assert plan(spec.arch) == plan(full) == wanted
        assert (full.hierarchy is None) == (not any(wanted))
        first, rows = layers // 3, []
        for start, count in ((0, first), (first, layers - first)):
            for run in runs_of(full, start, count):
                assert run.first == len(rows)
                rows += [run.level] * run.layers
        assert rows == wanted


def reference(f, stream, tokens, up):
    """The layer's definition, token by token, each array of the stream alike."""
    time = stream[0].shape[1]
    blocks = range(time // tokens)
    means = [
        np.stack([x[:, j * tokens : (j + 1) * tokens].mean(1) for j in blocks], 1) for x in stream
    ]
    out = []
    for x, mean, after in zip(stream, means, f(means), strict=True):
        y = x.copy()
        for t in range(time):
            j = (t + 1) // tokens - 1
            if j >= 0:
                y[:, t] = x[:, t] + (after[:, j] - mean[:, j]) @ up
        out.append(y)
    return out


@pytest.mark.parametrize("tokens", [2, 3, 5])
@pytest.mark.parametrize("up", [False, True])
@pytest.mark.parametrize("residual", ["single", "dual"])
def test_a_layer_is_its_definition(tokens, up, residual):
    """Rotary positions and a window, which count blocks."""
    changes = {"arch.residual": {"kind": residual}, f"{MIXER}.stencil": LOCAL}
    spec = arch.canonical(arch.from_dict(coarse((1, tokens, up), layers=1, **changes)))
    rng, places = np.random.default_rng(tokens), jnp.arange(32)
    draw = rng.standard_normal((2 if residual == "dual" else 1, 2, 12, 16))
    stream = tuple(draw.astype(np.float32))
    knobs = arch_knobs(spec.arch)
    table = (positions.turns(spec.arch.pos, places, 4, knobs, 32),)
    frame = Frame(jnp.arange(12), table, knobs, 0)  # pyright: ignore[reportArgumentType]
    layer = Coarse(spec.arch, jnp.dtype("float32"), Level(tokens, up))
    params = random_like(jax.eval_shape(layer.init, jax.random.key(0), stream, frame)["params"])
    got, _ = layer.apply({"params": params}, stream, frame)

    def f(means):
        turn = (table[0][:, :, : means[0].shape[1]],)
        own = frame._replace(positions=jnp.arange(means[0].shape[1]), turn=turn)  # pyright: ignore
        block = Block(spec.arch, jnp.dtype("float32"))
        after, _ = block.apply({"params": params["block"]}, tuple(means), own, None)
        return [np.asarray(x) for x in after]

    wanted = reference(f, stream, tokens, np.asarray(params["up"]["kernel"]) if up else np.eye(16))
    for one, two in zip(got, wanted, strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5)


DECODED = {
    "rotary windows in a quantised ring": coarse(
        (2, 2, True),
        (3, 5),
        **{f"{MIXER}.stencil": LOCAL},
        **{"arch.kv_policy": {"cache": "ring", "window": 2, "quant": "int8"}},
    ),
    "latents of every second block": coarse(
        (1, 2),
        layers=2,
        **{"arch.pos.kind": "xpos"},
        **{"arch.kv_policy": {"cache": "latent", "latent": {"dim": 6, "update": {"freq": 2}}}},
    ),
    "Performer, state space and convolution": coarse(
        (2, 3),
        layers=2,
        **{
            "arch.mix_unit": {
                "kind": "par",
                "merge": "Add",
                "choices": [
                    {**A, "softmax": {"type": "kernel", "kernel": {"features": 8}}},
                    {"kind": "SSM", "heads": 2, "d_state": 4},
                    {"kind": "LongConv", "kernel_len": 3},
                ],
            }
        },
    ),
    "loops of routed experts of limited capacity": coarse(
        (3, 2, True),
        **{"arch.ffn": MOE | {"capacity": 0.7}, "arch.recurrence": LOOPS},
        **{"arch.depth_router": ROUTER},
    ),
}


@pytest.mark.parametrize("name", DECODED)
def test_a_prompt_may_come_in_parts(name):
    """Cut within blocks and between them, with the scalars as arguments of the program."""
    spec, network, params = random_network(DECODED[name])
    tokens, knobs = random_tokens(13), arch.knobs(spec)
    full, _ = jitted(network.apply)(params, tokens, knobs=knobs)
    read = jitted(network.apply)
    cache, outs = arch.init_cache(spec, 2, 13), []
    for part in jnp.split(tokens, [5, 6, 8], axis=1):
        logits, cache = read(params, part, cache, knobs=knobs)
        outs.append(logits)
    np.testing.assert_allclose(jnp.concatenate(outs, 1), full, atol=2e-4)


def test_half_precision_is_decoded_as_it_is_read():
    spec, network, params = random_network(coarse((2, 2, True), **{"train.dtype": "bf16"}))
    tokens = random_tokens(12)
    full, _ = jitted(network.apply)(params, tokens)
    cache = arch.init_cache(spec, 2, 12)
    logits, after = jitted(network.apply)(params, tokens, cache)
    np.testing.assert_allclose(logits, full, atol=0.05 * float(jnp.abs(full).max()))
    assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, cache)


def test_fewer_tokens_than_a_block_are_left_alone():
    """And neither length nor cache of the first call decides what is learned."""
    spec, network, params = random_network(coarse((1, 8, True), layers=2))
    shapes = jax.tree.map(lambda x: x.shape, params["params"])
    for time in (1, 7, 9):
        for cache in (None, arch.init_cache(spec, 1, 9)):
            tokens = jnp.zeros((1, time), jnp.int32)
            found = jax.eval_shape(network.init, jax.random.key(0), tokens, cache)["params"]
            assert jax.tree.map(lambda x: x.shape, found) == shapes
    stack = jax.tree.map(jnp.zeros_like, params["params"]["stack"])
    stack["norm"] = params["params"]["stack"]["norm"]
    nothing = {"params": params["params"] | {"stack": stack}}
    tokens = random_tokens(8)
    with jax.disable_jit():
        short, without = (network.apply(p, tokens[:, :7])[0] for p in (params, nothing))
        whole, none = (network.apply(p, tokens)[0] for p in (params, nothing))
    np.testing.assert_array_equal(short, without)
    np.testing.assert_array_equal(whole[:, :7], none[:, :7])
    assert not np.allclose(whole[:, 7], none[:, 7])


def sown(variables):
    return jax.tree.leaves(variables["losses"])


def test_losses_of_all_layers_are_counted():
    """A balance loss per layer and loop, fine or coarse, each at least its weight."""
    changes = {"arch.ffn": MOE, "arch.recurrence": LOOPS}
    _, network, params = random_network(coarse((2, 2), (4, 3), **changes))
    _, losses = jitted(lambda p, t: network.apply(p, t, mutable=["losses"]))(
        params, random_tokens(12)
    )
    assert sum(x.size for x in sown(losses)) == 1 + 2 * 2 + 1
    assert all(np.all(x >= 0.01 - 1e-6) for x in sown(losses))


GRADIENTS = [
    coarse((2, 2, True), (3, 4), layers=4, **{"arch.residual": {"kind": "dual"}}),
    coarse((2, 3, True), **{"arch.recurrence": LOOPS, "arch.ffn": MOE}),
    coarse((1, 2, True), layers=2, **{"arch.depth_router": ROUTER, "arch.pos.kind": "relbias"}),
]


@pytest.mark.parametrize("document", GRADIENTS)
def test_a_gradient_reaches_every_parameter(document):
    _, network, params = random_network(document)

    def loss(params):
        (logits, _), variables = network.apply(params, random_tokens(12), mutable=["losses"])
        return jnp.square(logits).mean() + sum(x.sum() for x in jax.tree.leaves(variables))

    gradient = jitted(jax.grad(loss))(params)["params"]
    # of the embedding only the rows that are read
    rest = {k: v for k, v in gradient.items() if k != "embed"}
    for path, leaf in jax.tree_util.tree_leaves_with_path(rest):
        by_layer = leaf.reshape(leaf.shape[0], -1) if "stack" in str(path[0]) else leaf
        assert np.all(np.abs(by_layer).max(-1) > 0), jax.tree_util.keystr(path)


def test_a_depth_router_counts_layers_over_the_stack():
    """The first two of four work on all tokens, the second on blocks of them."""
    router = {"arch.depth_router": ROUTER | {"min_layers": 2}}
    _, network, params = random_network(coarse((2, 2), **router))
    out = jitted(jax.grad(lambda p: jnp.square(network.apply(p, random_tokens(12))[0]).mean()))
    stack = out(params)["params"]["stack"]
    gates = {
        "body_1": stack["body_1"]["depth"],
        "body_2": stack["body_2"]["block"]["depth"],
        "body_3": stack["body_3"]["depth"],
        "body_4": stack["body_4"]["block"]["depth"],
    }
    moved = [float(jnp.abs(gates[name]["kernel"]).max()) > 0 for name in sorted(gates)]
    assert moved == [False, False, True, True]


def test_a_coarse_layer_costs_its_share():
    plain, blocks = (arch.from_dict(d) for d in (edited({}), coarse((1, 4), layers=2)))
    one, two = arch.cost(plain), arch.cost(blocks)
    assert two.params == one.params
    assert two.kv_bytes == one.kv_bytes / 4
    ends = 2 * 32 * 16 * 11  # the head
    assert 0.15 < (two.flops - ends) / (one.flops - ends) < 0.3


def test_blocks_are_as_long_as_the_context_at_most():
    spec = arch.from_dict(coarse((2, 32, True)))
    assert levels.plan(spec.arch)[1] == Level(32, True)
    with pytest.raises(arch.DocumentError, match="longer than"):
        arch.from_dict(coarse((2, 33, True)))


PUBLIC = [
    {
        "arch.n_layers": 24,
        "arch.hierarchy.levels": [
            {"every": 4, "downsample": 0.5, "up_proj": False},
            {"every": 8, "downsample": 0.25, "up_proj": True},
        ],
    },
    {
        "arch.n_layers": 18,
        "arch.hierarchy.levels": [
            {"every": 3, "downsample": 0.5},
            {"every": 6, "downsample": 0.25, "up_proj": True},
        ],
        "arch.depth_router": {"kind": "token", "budget": 0.6, "tau": 0.7, "min_layers": 3},
    },
]


@pytest.mark.parametrize("changes", PUBLIC)
def test_deep_stacks_are_traced(changes):
    """At the sizes of published documents, without running them."""
    wide = {
        "arch.d_model": 512,
        MIXER: {
            "kind": "Attention",
            "heads": 8,
            "stencil": {"kind": "sliding", "window": 128, "stride": 64},
        },
        "train.ctx_len": 2048,
        "train.vocab_size": 32000,
    }
    spec = arch.from_dict(edited(wide | changes, BASE), strict=True)
    network, tokens = arch.build(spec), jnp.zeros((1, 256), jnp.int32)
    variables = jax.eval_shape(network.init, jax.random.key(0), tokens)
    found = sum(x.size for x in jax.tree.leaves(variables["params"]))
    assert found == arch.cost(spec).params
    cache = arch.init_cache(spec, 1, 256)
    logits, _ = jax.eval_shape(network.apply, {"params": variables["params"]}, tokens, cache)
    assert logits.shape == (1, 256, 32000)
