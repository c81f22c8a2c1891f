"""Checkpoints of pytrees: every leaf bit for bit, old ones removed, misfits named."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.run import opened, restore_latest, save


def every_kind():
    params = {"w": jnp.arange(6.0).reshape(2, 3), "half": jnp.full(4, 1 / 3, jnp.bfloat16)}
    return {
        "params": params,
        "opt": optax.adamw(1e-3).init(params),
        "key": jax.random.key(5),
        "keys": jax.random.split(jax.random.key(6, impl="rbg"), 3),
        "numpy": np.array([np.nan, -0.0, 1e-310]),
        "scalar": np.float32(0.1),
        "int": 2**40,
        "float": 0.1,
        "bool": True,
        "empty": jnp.zeros((0, 3)),
        "none": None,
    }


def bits(leaf):
    key = isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    array = np.asarray(jax.random.key_data(leaf) if key else leaf)
    return type(leaf), str(array.dtype), array.shape, array.tobytes()


def test_checkpoint_keeps_every_kind_of_leaf_bit_for_bit(tmp_path):
    tree = every_kind()
    template = jax.tree.map(
        lambda x: x if np.size(x) == 0 or hasattr(x, "dtype") else type(x)(0), tree
    )
    template["params"] = jax.tree.map(jnp.zeros_like, tree["params"])
    template["key"] = jax.random.key(0)
    with opened(tmp_path / "run", {}) as run:
        assert restore_latest(run, template) is None
        save(run, 3, template)
        save(run, 12, tree)
        found = restore_latest(run, template)
    assert found is not None
    step, back = found
    assert step == 12
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    assert jax.tree.map(bits, back) == jax.tree.map(bits, tree)
    assert jax.random.normal(back["key"]) == jax.random.normal(tree["key"])


def test_old_checkpoints_are_removed(tmp_path):
    with opened(tmp_path / "run", {}) as run:
        for step in (1, 2, 9, 10):
            save(run, step, {"x": step}, keep=2)
        assert restore_latest(run, {"x": 0}) == (10, {"x": 10})
    names = sorted(p.name for p in (run.path / "checkpoints" / "state").iterdir())
    assert names == ["00000009", "00000010"]


def test_a_checkpoint_that_does_not_fit_names_every_leaf(tmp_path):
    with opened(tmp_path / "run", {}) as run:
        save(run, 1, {"a": {"w": jnp.zeros((2, 3)), "b": jnp.zeros(3)}})
        with pytest.raises(ValueError) as caught:
            restore_latest(run, {"a": {"w": jnp.zeros((3, 2)), "c": jnp.zeros(3)}})
        with pytest.raises(ValueError, match="not: name"):
            save(run, 2, {"name": "math"})
    for line in (
        "a/w: have (2, 3) float32, want (3, 2)",
        "a/b: have (3,) float32, want nothing",
        "a/c",
    ):
        assert line in str(caught.value)
