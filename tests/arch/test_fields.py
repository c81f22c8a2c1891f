"""Every field of the language does something, or is refused where it stands.

The list of fields is read from the schema: a field that is added without an effect, or without an
entry in `CASES`, fails here.
"""

import types
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pydantic import BaseModel

from experiments.evolution.training import rates_of, steps_of
from forge_jax import arch
from forge_jax.arch.schema import Spec
from tests.arch.documents import edited
from tests.arch.fields import CASES, RATES, REFUSED
from tests.arch.programs import random_like, random_tokens


def nodes_of(annotation, found):
    """Every node class that an annotation reaches."""
    for part in (annotation, *typing.get_args(annotation)):
        if isinstance(part, type) and not isinstance(part, types.GenericAlias):
            if issubclass(part, BaseModel) and part not in found:
                found.add(part)
                for field in part.model_fields.values():
                    nodes_of(field.annotation, found)
        elif part is not annotation:
            nodes_of(part, found)
    return found


NODES = {node.__name__: node for node in nodes_of(Spec, set())}
FIELDS = [(name, field) for name, node in sorted(NODES.items()) for field in node.model_fields]


def test_the_list_is_the_schemas():
    assert set(CASES) == set(FIELDS)
    assert len(NODES) == len(Spec.model_json_schema()["$defs"]) + 1
    assert all(NODES[node].model_fields[field].description for node, field in FIELDS)


def drawn(spec):
    """The network, tokens, and parameters of the right shapes."""
    network, tokens = arch.build(spec, unroll=True), random_tokens(12)
    shapes = jax.eval_shape(network.init, jax.random.key(0), tokens)["params"]
    return network, tokens, {"params": random_like(shapes)}


def trained(network, tokens, params):
    """Logits of training step 7, and the losses beside."""
    rngs = {"noise": jax.random.key(0)}
    return network.apply(params, tokens, train=True, rngs=rngs, step=7, mutable=["losses"])


def outputs(spec):
    """Logits in training and in use, and the losses beside; nothing is compiled."""
    network, tokens, params = drawn(spec)
    with jax.disable_jit():
        (one, _), losses = trained(network, tokens, params)
        two, _ = network.apply(params, tokens)
    return [one, two, *(jnp.asarray(x) for x in jax.tree.leaves(losses))]


def gradient(spec):
    """Of a sum of the logits in training."""
    network, tokens, params = drawn(spec)
    found = jax.grad(lambda p: jnp.sin(trained(network, tokens, p)[0][0]).sum())(params)
    return jax.tree.leaves(found)


def differ(one, two):
    """Whether costs, budgets, parameters or outputs differ, the cheaper looked at first."""
    costs = arch.cost(one), arch.cost(two)
    if costs[0] != costs[1]:
        return True
    if arch.over_budget(one, costs[0]) != arch.over_budget(two, costs[1]):
        return True
    return any(apart(read(one), read(two)) for read in (outputs, gradient))


def apart(one, two):
    """Whether two lists of arrays differ."""
    if len(one) != len(two):
        return True
    pairs = zip(one, two, strict=True)
    return any(a.shape != b.shape or np.abs(a - b).max() > 1e-4 for a, b in pairs)


@pytest.mark.parametrize(("node", "field"), FIELDS)
def test_a_field_has_an_effect_or_is_refused(node, field):
    needed, change = CASES[node, field]
    if needed == REFUSED:
        where = "stencil.kind: cross is" if node == "Stencil" else rf"\.{field}: "
        with pytest.raises(arch.DocumentError, match=where):
            arch.from_dict(edited(change))
        return
    if needed == RATES:
        specs = [arch.from_dict(edited(tree)) for tree in (change, {})]
        one, two = ((rates_of(spec), steps_of(spec, 100)) for spec in specs)
        assert one != two
        return
    base = edited(needed)
    one, two = arch.from_dict(base), arch.from_dict(edited(change, base))
    budget = "Budget" in node or (field == "budget" and node != "DepthRouter")
    assert (arch.fingerprint(one) == arch.fingerprint(two)) is budget
    assert differ(one, two)
