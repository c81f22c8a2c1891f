"""Every child is valid, another network, and the same again from the same seed."""

import random

import jax
import jax.numpy as jnp
import pytest

from forge_jax import arch, evolve
from forge_jax.arch.pipeline import steps_of
from forge_jax.evolve.tree import difference, tree_of
from tests.arch.documents import BASE, PIPELINE, edited

ROUTE = {
    "kind": "route",
    "choices": [
        {"kind": "Attention", "heads": 4, "stencil": {"kind": "local", "window": 4}},
        {"kind": "SSM", "heads": 2},
        {"kind": "LongConv"},
    ],
    "router": {"topk": 2, "balance": 0.01},
}
SEEDS = [
    BASE,
    edited({"arch.mix_unit": ROUTE, "arch.ffn.act": "gelu"}),
    edited({"arch.recurrence": {"body": 2, "loops": {"train": 2}}, "arch.norm": "LayerNorm"}),
    PIPELINE,
]


def walk(children, seed=1):
    """Children of children: a random walk from every seed."""
    rng = random.Random(seed)
    spec = arch.from_dict(SEEDS[0])
    for i in range(children):
        if i % (children // len(SEEDS) + 1) == 0:
            spec = arch.from_dict(SEEDS[i // (children // len(SEEDS) + 1)])
        parent, child = spec, evolve.mutate(spec, rng)
        yield parent, child
        spec = child.spec
        if arch.cost(spec).params > 300_000:  # back to small ones
            spec = arch.from_dict(SEEDS[0])


def buildable(spec):
    """Trace the network, forward and cached, without compiling."""
    network = arch.build(spec)
    tokens = jnp.zeros((1, 8), jnp.int32)
    variables = jax.eval_shape(network.init, jax.random.key(0), tokens)
    policies = [step.arch.kv_policy for step in steps_of(spec.arch)]
    if all(policy is None or policy.cache != "none" for policy in policies):
        cache = arch.init_cache(spec, 1, 8)
        jax.eval_shape(network.apply, {"params": variables["params"]}, tokens, cache)
    found = sum(x.size for x in jax.tree.leaves(variables["params"]))
    assert found == arch.cost(spec).params


def test_five_hundred_children_are_valid_and_different():
    seen = set()
    for i, (parent, child) in enumerate(walk(500)):
        read = arch.from_dict(arch.to_dict(child.spec), strict=True)
        if i % 20 == 0:
            assert arch.parse(arch.emit(child.spec), strict=True) == read
        assert arch.fingerprint(read) == arch.fingerprint(child.spec) != arch.fingerprint(parent)
        assert child.diff
        seen |= set(child.operator.split("+"))
    assert seen == set(evolve.OPERATORS)


def test_children_can_be_built():
    for i, (_, child) in enumerate(walk(60, seed=2)):
        if i % 5 == 4:
            buildable(child.spec)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_all_of_five_hundred_children_can_be_built(part):
    """Eight minutes on two cores, in four parts that two workers share."""
    for i, (_, child) in enumerate(walk(500)):
        if i % 4 == part:
            buildable(child.spec)


@pytest.mark.parametrize("name", evolve.OPERATORS)
def test_an_operator_is_a_pure_function(name):
    """It leaves its parent alone, and the same generator makes the same child."""
    made = 0
    for seed in range(30):
        for document in SEEDS:
            spec = arch.from_dict(document)
            before = arch.emit(spec)
            one, two = (evolve.OPERATORS[name](spec, random.Random(seed)) for _ in range(2))
            assert one == two
            assert arch.emit(spec) == before
            made += one is not None
        if made > 2:
            break
    assert made or name in {"window", "no_positions"}


def test_names_and_known_children_are_kept_out():
    spec, rng = arch.from_dict(BASE), random.Random(0)
    only = evolve.mutate(spec, rng, operators=["norm"])
    assert only.operator == "norm"
    other = evolve.mutate(spec, rng, operators=["norm"], known=[arch.fingerprint(only.spec)])
    assert arch.fingerprint(other.spec) != arch.fingerprint(only.spec)
    known = [arch.fingerprint(child.spec) for child in (only, other)]
    with pytest.raises(ValueError, match="made a new child in 200 tries"):
        evolve.mutate(spec, rng, operators=["norm"], known=known)
    with pytest.raises(ValueError, match="names of OPERATORS"):
        evolve.mutate(spec, rng, operators=["nothing"])
    assert evolve.mutate(spec, rng, steps=3).operator.count("+") == 2


def test_a_child_of_two_has_genes_of_both():
    one, two = (arch.from_dict(document) for document in SEEDS[1:3])
    trees = [tree_of(spec)["arch"] for spec in (one, two)]
    for seed in range(10):
        child = evolve.crossover(one, two, random.Random(seed))
        assert child is not None
        genes = tree_of(child.spec)["arch"]
        assert all(genes[k] in [t.get(k) for t in trees] for k in ("ffn", "norm", "n_layers"))
        assert arch.fingerprint(child.spec) not in {arch.fingerprint(s) for s in (one, two)}
    assert evolve.crossover(one, one, random.Random(0)) is None


def test_a_difference_names_its_path():
    old = {"a": [{"b": 1}], "c": 2}
    assert difference(old, {"a": [{"b": 3}], "d": 4}) == [
        "a[0].b: 1 -> 3",
        "c: 2 -> None",
        "d: None -> 4",
    ]
