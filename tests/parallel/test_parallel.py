"""Sharded programs against one device, in processes with eight devices; rules and errors here."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from forge_jax import models, parallel, svf

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("sharded.py")


def started(devices, *arguments):
    """The script in a process of its own that believes in so many devices."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": flags,
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }
    line = [sys.executable, str(SCRIPT), *map(str, arguments)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(line, env=environment, **pipes)


def finish(process):
    said, _ = process.communicate(timeout=900)
    assert process.returncode == 0, said[-3000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("shapes")
    finish(started(8, "shapes", out))
    return out


@pytest.fixture(scope="module")
def found(folder):
    return json.loads((folder / "shapes.json").read_text())


# Fractions that one device of (data, model, population) holds: kernels by model, rows by data and
# population, z (of two experts) by population where that divides two.
HELD = {
    "2,2,2": {"kernels": 1 / 2, "rows": 1 / 4, "delta": 1 / 2, "embedding": 1 / 2},
    "8,1,1": {"kernels": 1, "rows": 1 / 8, "delta": 1, "embedding": 1},
    "1,8,1": {"kernels": 1 / 8, "rows": 1, "delta": 1, "embedding": 1 / 8},
    "1,1,8": {"kernels": 1, "rows": 1 / 8, "delta": 1, "embedding": 1},
}


@pytest.mark.slow
@pytest.mark.parametrize("shape", HELD)
def test_a_mesh_of_eight_devices_equals_one_device(found, shape):
    """A training step on fixed rollouts, teacher-forced logits, the scores of a population."""
    difference = found[shape]["difference"]
    assert set(difference) == {"delta", "loss", "kl_div", "logits", "scores"}
    assert all(d < 1e-5 for d in difference.values())  # `max` loses a NaN
    assert found["zero"]["z"] > 0.01  # the step did move z
    assert set(found[shape]["devices"]) == {8}
    for what, fraction in HELD[shape].items():
        assert found[shape]["held"][what] == pytest.approx(fraction), what


@pytest.mark.slow
def test_both_forms_and_text_are_those_of_one_device(found):
    assert found["dense"]["dense"] < 1e-5
    assert found["text"] == [True, True]
    assert len({length for row in found["stops"] for length in row}) > 1  # rows stop on their own


@pytest.mark.slow
def test_the_example_of_the_documentation_runs_on_eight_devices(found):
    shape, devices, factors = found["example"]
    assert shape == [2, 4]
    assert devices == 8
    assert factors < 0.6


@pytest.mark.slow
def test_each_group_runs_its_own_candidates(found):
    """A step of all groups costs a device what a step of its own candidates costs: 1/8 of it."""
    (alone, wanted), (shared, got) = found["work"]
    assert shared < 1.2 * alone
    assert got == wanted


@pytest.mark.slow
def test_a_checkpoint_moves_to_another_mesh_bit_for_bit(found):
    assert all(found["restored"]["bits"])
    assert all(found["restored"]["shardings"])
    assert found["restored"]["held"] < 0.6


@pytest.mark.slow
def test_two_processes_equal_one_device(folder):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    hosts = [started(4, "host", folder, port, number) for number in range(2)]
    for host in hosts:
        finish(host)
    for number in range(2):
        seen = json.loads((folder / f"host{number}.json").read_text())
        assert seen["devices"] == [4, 8]
        assert seen["addressable"] == [False]
        assert all(d < 1e-5 for d in seen["difference"].values())


SPEC = models.DecoderSpec(
    vocab_size=19,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=4,
    is_gpt2=True,
    tie_word_embeddings=False,
)


MESH: Any = SimpleNamespace(shape={"data": 1, "model": 2, "population": 1})
"""as much of a mesh as rules need: no device has to be there"""


def specs(params, **options):
    """Path -> spec; those of factors by their field."""
    found = parallel.param_specs(MESH, params, **options)
    leaves = jax.tree_util.tree_leaves_with_path(found, is_leaf=lambda x: isinstance(x, P))
    return {svf.path_name(path): leaf for path, leaf in leaves}


def params_of(spec):
    init = models.Decoder(spec).init
    return jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]


def test_rules_of_a_decoder():
    """By hand; GPT-2's biases are split with the columns, an odd vocabulary stays whole."""
    got = specs(params_of(SPEC))
    attention, mlp = "layers_0/self_attn", "layers_0/mlp"
    split = {
        **{f"{attention}/{n}_proj/kernel": P(None, "model") for n in "qkv"},
        **{f"{attention}/{n}_proj/bias": P("model") for n in "qkv"},
        f"{attention}/o_proj/kernel": P("model", None),
        f"{mlp}/up_proj/kernel": P(None, "model"),
        f"{mlp}/up_proj/bias": P("model"),
        f"{mlp}/down_proj/kernel": P("model", None),
    }
    assert {k: v for k, v in got.items() if v != P()} == split


def test_factors_split_as_their_kernel():
    kernels = {n: {"kernel": jnp.ones((4, 6))} for n in ("up_proj", "down_proj")}
    kernels["embed_tokens"] = {"embedding": jnp.ones((4, 2))}
    factors, _ = svf.decompose(kernels, svf.is_mlp, max_full=2, rank=2, key=jax.random.key(0))
    got = specs(factors)
    for part in ("u", "vt", "rest"):
        assert got[f"up_proj/kernel/{part}"] == P(None, "model")
        assert got[f"down_proj/kernel/{part}"] == P("model", None)
    assert got["up_proj/kernel/s"] == got["down_proj/kernel/s"] == P()
    assert got["embed_tokens/embedding"] == P("model", None)


def test_stacked_layers_are_whole_along_the_stack():
    got = specs({"up_proj": {"kernel": jnp.ones((3, 4, 6))}})
    assert got == {"up_proj/kernel": P(None, None, "model")}


def test_rules_of_ones_own():
    got = specs({"w": jnp.ones((4, 6))}, rules=[("w", P("model", None))])
    assert got == {"w": P("model", None)}
    with pytest.raises(ValueError, match="None of the `rules` matches a path, so model=2"):
        specs({"w": jnp.ones((4, 6))})


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"data": 2, "model": 4}, "data=2 x model=4 x population=1 needs 8 devices, got 6"),
        ({"data": 6, "rows": 1}, "may name the axes data, model, population, got rows"),
        ({"data": 0}, "must be at least 1, got data=0"),
    ],
)
def test_a_mesh_that_cannot_be(sizes, said):
    with pytest.raises(ValueError, match=said):
        parallel.make_mesh(sizes, jax.devices() * 6)


def test_what_does_not_divide_is_listed():
    tree = {"a": np.ones((4, 3)), "b": np.ones((5, 2)), "c": np.ones(7), "d": np.float32(1)}
    given = {"a": P(None, "model"), "b": P(("data", "model")), "c": P(), "d": P("data")}
    with pytest.raises(ValueError) as caught:
        parallel.shard(MESH, tree, given)
    assert str(caught.value) == (
        "The mesh does not fit: axis 1 of a, 3, is no multiple of model=2; axis 0 of b, 5, is no "
        "multiple of data=1 x model=2; d has shape (), too few axes for ('data',)."
    )


def test_fitting_falls_back_to_whole():
    assert parallel.fitting(MESH, P("model"), 4) == P("model")
    assert parallel.fitting(MESH, P("model"), 5) == P()
    assert parallel.fitting(None, P("model"), 4) == P()


def test_one_device_is_a_mesh_too():
    """Sizes of one, and no mesh at all, leave values as they are."""
    tree = {"up_proj": {"kernel": np.arange(6.0, dtype=np.float32).reshape(2, 3)}}
    assert parallel.shard_params(None, tree) is tree
    assert parallel.shard(None, tree, P("data")) is tree
    placed = parallel.shard_params(parallel.make_mesh({}, jax.devices()[:1]), tree)
    np.testing.assert_array_equal(placed["up_proj"]["kernel"], tree["up_proj"]["kernel"])


@pytest.mark.parametrize("chunk", [None, 2, 5])
def test_candidates_without_a_mesh(chunk):
    mapped = jax.jit(
        lambda x, y: parallel.map_candidates(lambda c, y: (c * y).sum(), x, y, chunk=chunk)
    )
    x, y = np.arange(10.0).reshape(5, 2), np.array([1.0, 3.0])
    np.testing.assert_allclose(mapped(x, y), x @ y)
