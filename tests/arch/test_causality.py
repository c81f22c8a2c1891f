"""No network of the language sees a later token, and none learns what cannot be known."""

import itertools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from forge_jax import arch, evolve
from forge_jax.arch.pipeline import steps_of
from tests.arch.documents import BASE, PIPELINE, edited
from tests.arch.programs import random_like, random_tokens

TIME = 9
MIXER = "arch.mix_unit.mixer"
STENCILS = [
    {"kind": "full"},
    {"kind": "local", "window": 3},
    {"kind": "local", "window": 2, "globals": 2},
    {"kind": "sliding", "window": 3, "stride": 2},
    {"kind": "dilated", "dilation": 2},
    {"kind": "dilated", "dilation": 3, "window": 2},
    {"kind": "block", "block": 4},
    {"kind": "ring", "block": 2},
    {"kind": "hybrid", "window": 2, "dilation": 3},
]
OTHERS = {
    "kernel": {f"{MIXER}.softmax": {"type": "kernel", "kernel": {"features": 8}}},
    "low rank": {f"{MIXER}.projection": {"type": "low_rank", "rank": 10}},
    "latent": {"arch.kv_policy": {"cache": "latent", "latent": {"dim": 6, "update": {"freq": 3}}}},
    "Retention": {MIXER: {"kind": "Retention", "heads": 2, "chunk": 4}},
    "SSM": {MIXER: {"kind": "SSM", "heads": 2, "d_state": 4}},
    "LongConv": {MIXER: {"kind": "LongConv", "kernel_len": 3}},
}
POSITIONS = ["rope", "alibi", "relbias", "learned", "xpos"]
MIXERS = {str(s): {f"{MIXER}.stencil": s} for s in STENCILS} | OTHERS


def sees_only_the_past(spec):
    """In use, and in training too but where latents are inferred from all of a row."""
    unseen(spec)
    if all(step.code is None for step in steps_of(spec.arch)):
        unseen(spec, train=True, step=3, rngs={"noise": jax.random.key(0)})


def unseen(spec, **given):
    """Change each token in a row of its own; nothing is compiled."""
    network = arch.build(spec, unroll=True)
    row = random_tokens(TIME, batch=1)
    shapes = jax.eval_shape(network.init, jax.random.key(0), row)["params"]
    params = {"params": random_like(shapes)}
    rows = jnp.concatenate([row, (row + jnp.eye(TIME, dtype=row.dtype)) % 11])

    def logits_of(one):
        (out, _), _ = network.apply(params, one[None], mutable=["losses"], **given)
        return out[0]

    with jax.disable_jit():
        # mapped, not batched: every row has the same draws
        logits = np.asarray(jax.vmap(logits_of)(rows))
    gap = np.abs(logits[1:] - logits[0]).max(-1)  # (changed, place)
    changed, place = np.indices(gap.shape)
    assert gap[place < changed].max() < 1e-5, arch.emit(spec)
    assert (gap[place == changed] > 0).all(), arch.emit(spec)


def slow_but_for_rope(kind):
    return () if kind == "rope" else pytest.mark.slow


PAIRS = itertools.product(MIXERS, POSITIONS)


@pytest.mark.parametrize(
    ("name", "kind"), [pytest.param(n, k, marks=slow_but_for_rope(k)) for n, k in PAIRS]
)
def test_every_mixer_with_every_kind_of_positions(name, kind):
    changes = {"arch.n_layers": 1, "arch.pos": {"kind": kind}} | MIXERS[name]
    try:
        spec = arch.from_dict(edited(changes))
    except arch.DocumentError:
        # only these do not go together
        assert kind in {"alibi", "relbias", "xpos"}
        assert name in OTHERS
        return
    sees_only_the_past(spec)


DOCUMENTS = [edited({"arch.n_layers": 1}), BASE, PIPELINE]


def mutants(count):
    """A test of so many documents made by hypothesis."""
    settings = hypothesis.settings(max_examples=count, deadline=None, derandomize=True)
    drawn = hypothesis.given(st.sampled_from(DOCUMENTS), st.integers(1, 4), st.randoms())
    return settings(drawn(mutant_sees_only_the_past))


def mutant_sees_only_the_past(document, steps, rng):
    spec = evolve.mutate(arch.from_dict(document), rng, steps=steps).spec
    hypothesis.assume(arch.cost(spec).params < 100_000)
    sees_only_the_past(spec)


test_ten_mutants = mutants(10)
test_two_hundred_mutants = pytest.mark.slow(mutants(200))
FLOORS = {s["kind"]: edited({f"{MIXER}.stencil": s}) for s in STENCILS}
FLOORS |= {name: edited(changes) for name, changes in OTHERS.items()}
FLOORS |= {"hierarchy": edited({"arch.hierarchy": {"levels": [{"every": 2}]}}), "stages": PIPELINE}


@pytest.mark.slow
@pytest.mark.parametrize("name", FLOORS)
def test_random_tokens_stay_at_their_entropy(name):
    """ln 11 nats, whatever was trained for 300 steps: leaks of a later token show here."""
    network = arch.build(arch.from_dict(FLOORS[name]), unroll=True)
    rows = jax.random.randint(jax.random.key(0), (300, 32, 17), 0, 11)
    params = network.init(jax.random.key(1), rows[0, :1, :-1])["params"]
    tx = optax.adam(3e-3)

    def nats(params, row, **given):
        (logits, _), _ = network.apply({"params": params}, row[:, :-1], mutable=["losses"], **given)
        return optax.softmax_cross_entropy_with_integer_labels(logits, row[:, 1:]).mean()

    def step(carry, row):
        params, state = carry
        given = {"train": True, "rngs": {"noise": jax.random.key(row[0, 0])}}
        updates, state = tx.update(jax.grad(nats)(params, row, **given), state)
        return (optax.apply_updates(params, updates), state), nats(params, row)

    _, found = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), rows))(params)
    assert float(found[-100:].mean()) >= np.log(11) - 0.02
