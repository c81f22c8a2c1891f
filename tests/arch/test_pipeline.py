"""Stages that read each other, and the latent between them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from forge_jax import arch
from forge_jax.arch.latents import LatentSampler, drawn
from forge_jax.arch.pipeline import Code, active
from tests.arch.documents import BASE, PIPELINE, SMALL_STACK, edited
from tests.arch.programs import jitted, random_like, random_network, random_tokens

TOKENS = random_tokens(12)


def decoded(spec, network, params, **rngs):
    """Logits of one token at a time."""
    cache = arch.init_cache(spec, 2, 12)

    def one(cache, token):
        logits, cache = network.apply(params, token[:, None], cache, rngs=rngs)
        return cache, logits[:, 0]

    return jax.lax.scan(one, cache, TOKENS.T)[1].swapaxes(0, 1)


# Stages that read others in layers on blocks of tokens, and with a condition of their own.
COARSE = {
    "arch.modules.upper.n_layers": 2,
    "arch.modules.upper.hierarchy": {"levels": [{"every": 2, "downsample": 1 / 3}]},
    "arch.modules.upper.cond": {
        "source": {"kind": "pool-mlp", "H": 4},
        "ops": [{"where": "proj_v", "op": "lora", "r": 2}, {"where": "ln", "op": "film"}],
    },
}


@pytest.mark.parametrize(
    "changes", [{}, pytest.param(COARSE, marks=pytest.mark.slow)], ids=["plain", "coarse"]
)
def test_decoding_is_the_full_pass_and_nothing_looks_ahead_in_use(changes):
    spec, network, params = random_network(edited(changes, PIPELINE))
    key = jax.random.key(3)
    full = jitted(lambda tokens, key: network.apply(params, tokens, rngs={"latent": key})[0])
    one_by_one = jitted(lambda key: decoded(spec, network, params, latent=key))(key)
    np.testing.assert_allclose(one_by_one, full(TOKENS, key), atol=2e-4)
    assert sum(x.size for x in jax.tree.leaves(params)) == arch.cost(spec).params
    for at in range(1, 12):
        changed = full(TOKENS.at[:, at].add(1) % 11, key)
        np.testing.assert_array_equal(changed[:, :at], full(TOKENS, key)[:, :at])
        assert not np.array_equal(changed[:, at], full(TOKENS, key)[:, at])
    # another draw of the latents is another function, the same draw the same
    assert not np.allclose(full(TOKENS, key), full(TOKENS, jax.random.key(4)))
    fixed = jitted(lambda tokens: network.apply(params, tokens)[0])
    np.testing.assert_array_equal(fixed(TOKENS), fixed(TOKENS))
    prompt = jitted(lambda cache, tokens: network.apply(params, tokens, cache))
    first, cache = prompt(arch.init_cache(spec, 2, 12), TOKENS[:, :5])
    second, _ = prompt(cache, TOKENS[:, 5:])
    np.testing.assert_allclose(np.concatenate([first, second], 1), fixed(TOKENS), atol=2e-4)


def test_training_infers_latents_and_reaches_every_parameter():
    _, network, params = random_network(PIPELINE)

    def loss(params, tokens, key):
        given = {"train": True, "rngs": {"noise": key}, "mutable": ["losses"]}
        (logits, _), sown = network.apply(params, tokens, **given)
        return (logits[..., 0] ** 2).mean() + sum(map(jnp.sum, jax.tree.leaves(sown)))

    f = jitted(jax.value_and_grad(loss))
    one, gradient = f(params, TOKENS, jax.random.key(0))
    assert one != f(params, TOKENS, jax.random.key(1))[0]
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.abs(leaf).max() > 0, jax.tree_util.keystr(path)


def test_a_latent_costs_its_divergence_and_has_the_gradient_of_its_mean():
    """NumPy over all eight codes, and finite differences of the mean row."""
    rng, bits, dim = np.random.default_rng(0), 3, 4
    x = jnp.asarray(rng.standard_normal((2, 5, dim)), jnp.float32)
    module = LatentSampler(Code(bits, dim, 0.02), dim, "RMSNorm", jnp.dtype("float32"))
    at = jnp.arange(5)
    params = random_like(jax.eval_shape(module.init, jax.random.key(0), x, 2, at))["params"]

    def applied(params, key):
        rngs = {"noise": key}
        return module.apply({"params": params}, x, 2, at, rngs=rngs, mutable=["losses"])

    table = np.asarray(params["codes"], np.float64)
    normed = np.asarray(x, np.float64)
    normed = normed / np.sqrt((normed**2).mean(-1, keepdims=True) + 1e-6)
    normed = normed * np.asarray(params["norm"]["scale"])
    codes = np.arange(8)[:, None] >> np.arange(bits) & 1

    def by_hand(kernel):
        p = 1 / (1 + np.exp(-normed @ kernel))
        each = np.where(codes, p[:, :, None], 1 - p[:, :, None]).prod(-1)
        return p, each

    kernel = np.asarray(params["bits"]["kernel"], np.float64)
    p, each = by_hand(kernel)
    keys = jax.random.split(jax.random.key(1), 4000)
    z, sown = jitted(jax.vmap(lambda key: applied(params, key)))(keys)
    rows = np.abs(np.asarray(z)[..., None, :] - table).max(-1)
    assert rows.min(-1).max() < 1e-5  # every z is a row of the table
    share = np.eye(8)[rows.argmin(-1)].mean(0)
    np.testing.assert_allclose(share, each, atol=0.05)
    divergence = (p * np.log(2 * p) + (1 - p) * np.log(2 * (1 - p))).sum(-1)
    wanted = np.maximum(0, divergence - 0.02 * np.log(2)).mean()
    np.testing.assert_allclose(sown["losses"]["latent"][0][0], wanted, rtol=1e-4)
    assert wanted > 0

    weight = rng.standard_normal((2, 5, dim))

    def pulled(params):
        return (applied(params, keys[0])[0] * weight).sum()

    found = np.asarray(jax.grad(pulled)(params)["bits"]["kernel"])
    for i, j in np.ndindex(*kernel.shape):
        up, down = (by_hand(kernel + s * 1e-6 * np.eye(dim)[:, [i]] * np.eye(bits)[j])
                    for s in (1, -1))  # fmt: skip
        slope = (((up[1] - down[1]) @ table) * weight).sum() / 2e-6
        assert found[i, j] == pytest.approx(slope, rel=1e-3, abs=1e-5)


def test_codes_are_uniform_and_each_their_positions():
    key = jax.random.key(0)
    codes = drawn(key, 400, jnp.arange(20), 3)
    assert codes.shape == (400, 20)
    np.testing.assert_allclose(np.bincount(codes.ravel(), minlength=8) / 8000, 1 / 8, atol=0.015)
    np.testing.assert_array_equal(drawn(key, 400, jnp.arange(7, 9), 3), codes[:, 7:9])


def staged(*stages, **modules):
    """The base as the stages of a pipeline, each with its module's name."""
    first, last = {"name": "x", "kind": "embedding"}, {"name": "y", "kind": "readout"}
    return edited({"arch.modules": modules, "arch.pipeline": [first, *stages, last]})


def stack(layers=1, **more):
    return {**SMALL_STACK, "n_layers": layers, **more}


def test_one_stack_as_a_pipeline_is_the_plain_network():
    plain = arch.from_dict(BASE)
    piped = arch.from_dict(staged({"name": "s", "module": "m"}, m=stack(2)))
    assert arch.fingerprint(plain) == arch.fingerprint(piped)
    assert arch.canonical(plain) == arch.canonical(piped)


def test_a_readout_of_more_than_the_stack_is_another_network():
    stage, both = {"name": "s", "module": "m"}, {"inputs": ["x", "s"]}
    plain, piped = staged(stage, m=stack()), staged(stage, m=stack())
    piped["arch"]["pipeline"][-1] |= both
    one, two = arch.from_dict(plain), arch.from_dict(piped)
    assert arch.fingerprint(one) != arch.fingerprint(two)
    _, network, params = random_network(piped)
    alone = arch.build(one)
    renamed = {"stack" if n == "module_0" else n: v for n, v in params["params"].items()}
    logits = jitted(lambda p, q: (network.apply(p, TOKENS)[0], alone.apply(q, TOKENS)[0]))
    head = params["params"]["head"]["kernel"]
    both, one = logits(params, {"params": renamed})
    embedded = params["params"]["embed"]["embedding"][TOKENS] @ head
    np.testing.assert_allclose(both, (one + embedded) / 2, atol=1e-5)


def test_latents_without_a_module_each_draw_their_own_codes():
    """Neither is taken for the module that has its name."""
    latents = [{"name": name, "kind": "latent_sampler", "inputs": ["x"]} for name in "mn"]
    last = {"name": "s", "module": "m", "inputs": ["x"], "mem_from": ["m", "n"]}
    spec, network, params = random_network(staged(*latents, last, m=stack()))
    modules = arch.to_dict(arch.canonical(spec))["arch"]["modules"].values()
    assert [module["kind"] for module in modules if "kind" in module] == ["latent_sampler"] * 2
    # the same table for both: the same codes would give the same rows
    tree = params["params"]
    tree["module_1"]["codes"] = tree["module_0"]["codes"]
    _, seen = network.apply(params, TOKENS, capture_intermediates=True)
    one, two = (seen["intermediates"][f"module_{i}"]["__call__"][0] for i in range(2))
    same = np.isclose(one, two).all(-1).mean()
    assert same < 0.1  # one in 256 is expected


def test_a_cache_may_be_given_at_the_start():
    spec = arch.from_dict(PIPELINE)
    network, cache = arch.build(spec), arch.init_cache(spec, 2, 12)
    shapes = jax.eval_shape(network.init, jax.random.key(0), TOKENS, cache)
    assert sum(x.size for x in jax.tree.leaves(shapes["params"])) == arch.cost(spec).params


def test_a_stack_without_a_cache_leaves_the_network_without():
    spec = arch.from_dict(edited({"arch.modules.lower.kv_policy": {"cache": "none"}}, PIPELINE))
    assert arch.cost(spec).kv_bytes == arch.cost(spec).cache_bytes == 0
    with pytest.raises(ValueError, match="keeps no cache"):
        arch.init_cache(spec, 1, 8)


def test_scalars_of_modules_share_one_program():
    window = {"kind": "local", "window": 3}
    documents = [edited({f"{Q}.stencil": window | {"window": n}}, PIPELINE) for n in (3, 5)]
    specs = [arch.from_dict(document) for document in documents]
    assert len({arch.compile_key(spec) for spec in specs}) == 1
    _, network, params = random_network(documents[0])
    shared = jitted(lambda knobs: network.apply(params, TOKENS, knobs=knobs)[0])
    own = jitted(lambda: arch.build(specs[1]).apply(params, TOKENS)[0])()
    np.testing.assert_allclose(shared(arch.knobs(specs[1])), own, atol=1e-5)
    assert not np.allclose(shared(arch.knobs(specs[0])), own)


Q = "arch.modules.lower.mix_unit.mixer"


def test_names_and_inherited_fields_mean_nothing():
    one = arch.from_dict(PIPELINE)
    tree = arch.to_dict(one)
    tree["arch"] |= {"n_layers": 7, "norm": "RMSNorm"}
    for module in tree["arch"]["modules"].values():
        module["norm"] = "RMSNorm"
    text = arch.emit(arch.from_dict(tree)).replace("lower", "second").replace("memory", "zeroth")
    two = arch.parse(text)
    assert arch.fingerprint(one) == arch.fingerprint(two)
    assert arch.canonical(arch.canonical(one)) == arch.canonical(one)
    assert arch.compile_key(one) == arch.compile_key(two)
    other = edited({"arch.modules.upper.n_layers": 2}, PIPELINE)
    assert arch.fingerprint(one) != arch.fingerprint(arch.from_dict(other))


def test_what_a_stage_reads_is_what_the_stages_gave():
    """Two stages by hand: the second's queries from the first, keys and values from tokens."""
    second = {"name": "b", "module": "m", "kv_from": ["x"], "mem_from": ["a"], "repeat": 2}
    document = staged({"name": "a", "module": "n"}, second, m=stack(), n=stack())
    _, network, params = random_network(document)
    tree = params["params"]

    def attended(p, x, asked):
        def normed(name, t):
            return t / np.sqrt((t**2).mean(-1, keepdims=True) + 1e-6) * p[name]["scale"][0]

        mixer = jax.tree.map(lambda leaf: np.asarray(leaf[0], np.float64), p["mix"]["mixer_0"])
        h = normed("mix_pre", x)
        asked = h if asked is None else asked[0] + asked[1] @ mixer["mem"]["kernel"]
        q, k, v = (
            (t @ mixer[n]["kernel"]).reshape(*t.shape[:2], -1, 4).swapaxes(1, 2)
            for n, t in (("q", h), ("k", asked), ("v", asked))
        )
        angle = np.arange(t_) [:, None] * 10000.0 ** (-np.arange(2) / 2)  # fmt: skip
        turn = np.exp(1j * angle)
        q, k = ((t[..., :2] + 1j * t[..., 2:]) * turn for t in (q, k))
        k, v = (np.repeat(t, 2, axis=1) for t in (k, v))
        score = np.einsum("bhtd,bhsd->bhts", q, k.conj()).real / 2
        score = np.where(np.tril(np.ones((t_, t_))), score, -np.inf)
        weight = np.exp(score - score.max(-1, keepdims=True))
        weight /= weight.sum(-1, keepdims=True)
        out = (weight @ v).swapaxes(1, 2).reshape(*x.shape)
        x = x + out @ mixer["out"]["kernel"]
        f = jax.tree.map(lambda leaf: np.asarray(leaf[0], np.float64), p["ffn"])
        h = normed("ffn_pre", x)
        gate = h @ f["gate"]["kernel"]
        up = gate / (1 + np.exp(-gate)) * (h @ f["up"]["kernel"])
        return x + up @ f["down"]["kernel"]

    def ended(name, x):
        scale = np.asarray(tree[name]["norm"]["scale"])
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale

    t_ = TOKENS.shape[1]
    # canonical modules are numbered by their first stage
    one, two = tree["module_0"]["body"], tree["module_1"]["body"]
    x = np.asarray(tree["embed"]["embedding"], np.float64)[np.asarray(TOKENS)]
    a = ended("module_0", attended(one, x, None))
    b = ended("module_1", attended(two, a, (x, a)))
    b = ended("module_1", attended(two, b, (x, a)))
    wanted = b @ np.asarray(tree["head"]["kernel"])
    np.testing.assert_allclose(jitted(network.apply)(params, TOKENS)[0], wanted, atol=2e-4)


def test_stages_of_one_module_share_their_weights():
    twice = staged({"name": "a", "module": "m"}, {"name": "b", "module": "m"}, m=stack())
    again = staged({"name": "a", "module": "m", "repeat": 2}, m=stack())
    _, one, params = random_network(twice)
    two = arch.build(arch.from_dict(again))
    shared = jitted(lambda p: (one.apply(p, TOKENS)[0], two.apply(p, TOKENS)[0]))(params)
    np.testing.assert_allclose(*shared, atol=1e-5)
    spec = arch.from_dict(twice)
    assert arch.cost(spec).params == arch.cost(arch.from_dict(again)).params
    assert arch.cost(spec).params == sum(x.size for x in jax.tree.leaves(params))


P = "arch.pipeline"
TOKENS_STAGE, READOUT = {"name": "x", "kind": "embedding"}, {"name": "y", "kind": "readout"}
LATENT = {"name": "bits", "kind": "latent_sampler"}
LOST = {"name": "lost", "module": "lower", "inputs": ["bits"]}
WRONG = [
    ({f"{P}.3.inputs": ["nobody"]}, r"arch\.pipeline\[3\]\.inputs: nobody is no earlier stage"),
    ({f"{P}.3.inputs": ["lower"]}, "lower is no earlier stage"),
    ({f"{P}.3.name": "bits"}, "two stages are called bits"),
    ({f"{P}.3.module": "nothing"}, "there is no module nothing"),
    ({f"{P}.3.inputs": ["encoder"]}, "encoder sees later tokens: only a latent sampler"),
    ({f"{P}.3.kv_from": ["encoder"]}, "encoder sees later tokens: only a latent sampler"),
    ({f"{P}.6": {"name": "end", "kind": "embedding"}}, "the first stage, and no other"),
    ({f"{P}.6": {"name": "end", "module": "lower"}}, "the last stage, and no other"),
    ({f"{P}.4.kind": "readout"}, "the module is of kind transformer, got readout"),
    ({f"{P}.2.repeat": 2}, "is for stacks, not for a stage of kind latent_sampler"),
    ({f"{P}.5.inputs": ["memory"], f"{P}.5.mem_from": None}, "no stage reads bits"),
    ({f"{P}.3.mode": "decode"}, "not trained as it is used"),
    ({f"{P}.3.prefill_only": True}, "not trained as it is used"),
    ({f"{P}.3.mode": "train"}, r"pipeline\[3\]\.mode: is for what only latents need"),
    ({f"{P}.2.train_only": True}, r"pipeline\[2\]\.train_only: is for what only latents need"),
    ({f"{P}.6.mode": "train"}, r"pipeline\[6\]\.mode: is for what only latents need"),
    ({f"{P}.1.mode": "all"}, r"pipeline\[1\]\.mode: must be train: only latents"),
    ({f"{P}.1.train_only": True, f"{P}.1.mode": "all"}, "must be train beside train_only"),
    ({f"{P}.3.params": {}}, "a module has params"),
    ({f"{P}.3.budget": {"tokens_multiplier": 2}}, "write it in train.budget"),
    ({"arch.modules.lower.budget": {"latency_ms": 9}}, "it depends on the machine"),
    ({"arch.modules.lower.budget": {"flops_per_token": 9}}, "flops_per_step limits the whole"),
    ({"arch.modules.tokens.budget": {"flops_per_token": 9}}, "must be 0, what an embedding costs"),
    ({f"{P}.4.module": "upper"}, "must have it, or none: they share weights"),
    ({"arch.modules.lower.kind": "custom"}, "custom is not supported"),
    ({"arch.modules.lower.latent": {}}, "is not supported"),
    ({"arch.modules.lower.d_model": 8}, "must be arch.d_model 16, got 8"),
    ({"arch.modules.lower.params": {"depth": 1}}, "is no parameter of a module of kind"),
    ({"arch.modules.bits.params.latent_dim": 0}, "must be a whole number of features, got 0"),
    ({"arch.modules.logits.output_dim": 12}, "must be the vocabulary's 11, got 12"),
    ({"arch.modules.tokens.params.vocab_size": 9}, "must be the vocabulary's 11, got 9"),
    ({"arch.modules.bits.cond.source.H": 30}, "must be at most 20 bits"),
    ({"arch.modules.bits.cond.reg.kappa": None}, "is needed by freebits"),
    (
        {"arch.modules.bits.cond.source": {"kind": "segment", "segment": 2}},
        "inferred token by token",
    ),
    ({"arch.modules.encoder.pos.kind": "alibi"}, "one full softmax attention"),
    ({"arch.recurrence": {"body": 2}}, "stands in the modules"),
    ({"arch.kv_policy": {"quant": "int8"}}, "stands in the modules"),
    ({f"{P}.3.name": "embedding"}, "is what the first stage may be called"),
    ({f"{P}.3.name": ""}, "at least 1 character"),
    ({"arch.modules.": SMALL_STACK}, "needs a name"),
    ({f"{P}.5.inputs": ["lower", "lower"]}, "names a stage twice, got lower, lower"),
    ({"arch.modules.lower.d_model": 4}, "must be arch.d_model 16, got 4"),
    ({P: [TOKENS_STAGE, LATENT, LOST, READOUT]}, "leads no token to the readout"),
    ({P: [TOKENS_STAGE, LATENT, READOUT | {"inputs": ["bits"]}]}, "has no stack"),
    (
        {"arch.modules.lower.mix_unit.mixer.heads": 3},
        r"arch\.modules\.lower\.mix_unit\.mixer\.heads: must divide d_model 16",
    ),
    ({P: [{"name": "a", "kind": "embedding"}, {"name": "b", "kind": "readout"}]}, "has no stack"),
]


@pytest.mark.parametrize(("changes", "sentence"), WRONG)
def test_a_wrong_pipeline_is_located(changes, sentence):
    with pytest.raises(arch.DocumentError, match=sentence):
        arch.from_dict(edited(changes, PIPELINE))


IDLE = {
    "arch.modules.spare": SMALL_STACK,
    "arch.modules.tokens.norm": "RMSNorm",
    "arch.modules.lower.output_dim": 11,
    "arch.modules.bits.cond.source.segment": 3,
    "arch.modules.bits.cond.ops": [{"where": "pre_mixer", "op": "film"}],
}


@pytest.mark.parametrize("path", IDLE)
def test_what_has_no_effect_is_noted_and_refused_when_strict(path):
    document = edited({path: IDLE[path]}, PIPELINE)
    spec = arch.from_dict(document)
    assert arch.fingerprint(spec) == arch.fingerprint(arch.from_dict(PIPELINE))
    assert len(arch.notes(spec)) == 1
    with pytest.raises(arch.DocumentError, match="has no effect"):
        arch.from_dict(document, strict=True)


def test_a_stage_may_say_that_it_is_for_training_alone():
    """True of what only latents need; `train_prefill` is cut, as rope's dims to a head."""
    plain = arch.from_dict(PIPELINE)
    for change in ({f"{P}.1.mode": "train"}, {f"{P}.1.train_only": True}, {f"{P}.3.mode": "all"}):
        spec = arch.from_dict(edited(change, PIPELINE), strict=True)
        assert arch.canonical(spec) == arch.canonical(plain)
    assert {step.name for step in active(plain.arch, train=True)} >= {"encoder", "lower"}
    assert "encoder" not in {step.name for step in active(plain.arch, train=False)}
    for i, meant in ((1, "train: only latents need"), (3, "all: the readout needs")):
        cut = edited({f"{P}.{i}.mode": "train_prefill"}, PIPELINE)
        note = f"arch.pipeline[{i}].mode: read as {meant} this stage"
        assert arch.notes(arch.from_dict(cut)) == (note,)
        with pytest.raises(arch.DocumentError, match="read as"):
            arch.from_dict(cut, strict=True)
