"""Cognate's torch names, layouts and files."""

import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from forge_jax.models.cognate import Cognate, CognateConfig
from interop.cognate import (
    cognate_from_torch,
    cognate_names,
    cognate_to_numpy,
    cognate_to_torch,
    load_cognate,
    save_cognate,
)
from interop.formats import write_json, write_safetensors, write_torch

torch = pytest.importorskip("torch")

SEED = CognateConfig(memory="ema", positions="learned")
SMALL = dataclasses.replace(
    SEED, vocab_size=11, d_model=8, layers=3, heads=2, d_ff=12, max_positions=9, d_mem=3
)
SMALL = dataclasses.replace(SMALL, gate_hidden=5)


def published(c):
    """Names and shapes of the reference's tensors, by module of torch."""
    d = c.d_model

    def linear(name, out, inputs, bias=True):
        return {f"{name}.weight": (out, inputs), **({f"{name}.bias": (out,)} if bias else {})}

    def mha(name):
        fused = {f"{name}.in_proj_weight": (3 * d, d), f"{name}.in_proj_bias": (3 * d,)}
        return fused | linear(f"{name}.out_proj", d, d)

    def norm(name):
        return {f"{name}.weight": (d,), f"{name}.bias": (d,)}

    out = {
        "backbone.token_emb.weight": (c.vocab_size, d),
        "backbone.pos_emb.weight": (c.max_positions, d),
        "backbone.norm.weight": (d,),
    }
    for i in range(c.layers):
        layer = f"backbone.layers.{i}"
        out |= {f"{layer}.norm1.weight": (d,), f"{layer}.norm2.weight": (d,)}
        for name in "qkvo":
            out |= linear(f"{layer}.attention.w_{name}", d, d, False)
        out |= linear(f"{layer}.mlp.w_gate", c.d_ff, d, False)
        out |= linear(f"{layer}.mlp.w_up", c.d_ff, d, False)
        out |= linear(f"{layer}.mlp.w_down", d, c.d_ff, False)
    out |= linear("backbone.ltm.w_down", c.d_mem, d, False)
    out |= linear("backbone.ltm.w_up", d, c.d_mem, False)
    out |= linear("backbone.mag_gate.w_concat", c.gate_hidden, 2 * d)
    out |= linear("backbone.mag_gate.w_gate", d, c.gate_hidden)
    out |= mha("trm.refiner.feature_attn") | mha("trm.refiner.answer_attn")
    out |= linear("trm.refiner.mlp.0", 2 * d, 3 * d) | linear("trm.refiner.mlp.2", d, 2 * d)
    out |= linear("trm.updater.mlp.0", 2 * d, 2 * d) | linear("trm.updater.mlp.2", d, 2 * d)
    out |= norm("trm.refiner.norm") | norm("trm.updater.norm")
    out |= linear("trm.z0_proj", d, d) | linear("trm.y0_proj", d, d)
    return out | linear("act_head.w_halt", 1, d)


@functools.cache
def make_params(config=SMALL):
    """Random leaves; kept as they are by every test."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    shapes = jax.eval_shape(Cognate(config).init, jax.random.key(0), tokens)["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: rng.standard_normal(s.shape).astype(np.float32), shapes)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("config", [SEED, SMALL])
def test_the_names_are_the_published_ones(config):
    names = {name: slot.shape for name, slot in cognate_names(config).items()}
    assert names == published(config)


def test_the_seeds_configuration_has_its_count():
    shapes = [slot.shape for slot in cognate_names(SEED).values()]
    assert len(shapes) == 107
    assert sum(int(np.prod(shape)) for shape in shapes) == 26_974_561


def test_every_mode_stays_within_the_documents_range():
    for memory in ("ema", "titans"):
        for positions in ("learned", "rope"):
            names = cognate_names(CognateConfig(memory=memory, positions=positions))
            count = sum(int(np.prod(slot.shape)) for slot in names.values())
            assert 22_500_000 <= count <= 27_500_000


@pytest.mark.parametrize("memory", ["ema", "titans"])
def test_there_and_back_is_bit_exact(memory):
    config = dataclasses.replace(SMALL, memory=memory)
    params = make_params(config)
    tensors = cognate_to_torch(params, config)
    assert_same(cognate_from_torch(tensors, config), params)
    assert tensors["lm_head.weight"].data_ptr() == tensors["backbone.token_emb.weight"].data_ptr()


def test_layouts_are_torchs():
    """What torch computes with the tensors is what the model computes with the leaves."""
    params, tensors = make_params(), cognate_to_torch(make_params(), SMALL)
    x = np.random.default_rng(1).standard_normal((2, 4, 8)).astype(np.float32)
    weight = tensors["backbone.layers.2.attention.w_q.weight"]
    kernel = params["backbone"]["layers"]["attention"]["w_q"]["kernel"][2]
    got = torch.nn.functional.linear(torch.tensor(x), weight)
    np.testing.assert_allclose(got, x @ kernel, atol=1e-5)
    attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    prefix = "trm.refiner.answer_attn."
    own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    attention.load_state_dict(own)


def test_files_come_back(tmp_path):
    save_cognate(tmp_path / "model.v1", make_params(), SMALL)
    for suffix in (".pt", ".safetensors"):
        params, config = load_cognate(tmp_path / f"model.v1{suffix}")
        assert config == SMALL
        assert_same(params, make_params())
    state = torch.load(tmp_path / "model.v1.pt", weights_only=True)["model_state_dict"]
    assert set(state) == {*published(SMALL), "lm_head.weight"}


def test_a_file_of_the_reference_is_read(tmp_path):
    """With buffers, a tied head, half precision, a wrapper's prefix and no configuration."""
    params = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), make_params())
    state = {f"module.{k}": v for k, v in cognate_to_torch(params, SMALL).items()}
    state |= {"backbone.ltm.memory_state": torch.zeros(1, 1, 3)}
    state |= {"act_head.ema_step_acc": torch.zeros(10), "act_head.step_count": torch.zeros(10)}
    write_torch(tmp_path / "x.pt", state)
    got, _ = load_cognate(tmp_path / "x.pt", SMALL)
    assert_same(got, jax.tree.map(lambda x: x.astype(np.float32), params))
    with pytest.raises(ValueError, match="carries no configuration"):
        load_cognate(tmp_path / "x.pt")


def put_config(path, **changes):
    """A file whose configuration is not the one that was saved."""
    save_cognate(path, make_params(), SMALL)
    record = {"config": {**dataclasses.asdict(SMALL), **changes}}
    write_json(path.with_name(f"{path.name}.json"), record)
    return path.with_name(f"{path.name}.safetensors")


BAD = {
    "layers below": ({"layers": -1}, "layers: have -1, want a whole number from 1 to 1000"),
    "layers above": ({"layers": 10**7}, "layers: have 10000000, want a whole number"),
    "layers beyond": ({"layers": 10**400}, "layers: have 1000"),
    "layers of another type": ({"layers": 2.5}, "layers: have 2.5"),
    "a word": ({"d_model": "8"}, "d_model: have '8'"),
    "no word": ({"memory": []}, r"memory: have \[\], want a word"),
    "no flag": ({"detach_steps": 1}, "detach_steps: have 1, want true or false"),
    "no number": ({"dropout": None}, "dropout: have None, want a number"),
    "huge": ({"gate_entropy": 10**400}, "gate_entropy: have 1000"),
    "no list": ({"step_weights": 1.0}, "step_weights: have 1.0, want a list of numbers"),
    "unknown": ({"colour": 1}, "colour: unknown setting"),
    "contradictory": ({"heads": 3}, "`d_model` must be a multiple of `heads`"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_configuration_that_does_not_fit_names_its_file(tmp_path, case):
    changes, sentence = BAD[case]
    path = put_config(tmp_path / "x", **changes)
    with pytest.raises(ValueError, match=rf"^configuration of .*x\.safetensors(?s:.)*{sentence}"):
        load_cognate(path)


@pytest.mark.parametrize(
    "changes", [{"layers": 1000}, {"micro_steps": 1000}, {"max_positions": 2**31 - 1}]
)
def test_a_configuration_of_any_size_is_judged_at_once(changes):
    """The names are found without the refinements and tables, which would fill the memory."""
    one = {"heads": 1, "answer_heads": 1}  # rotary positions need an even width
    config = dataclasses.replace(SMALL, positions="rope", **one, **changes)
    start = time.monotonic()
    assert len(cognate_names(config)) >= len(cognate_names(SMALL)) - 1
    assert time.monotonic() - start < 10


def test_sparse_tensors_are_refused():
    tensors = cognate_to_torch(make_params(), SMALL)
    name = "trm.z0_proj.weight"
    tensors[name] = tensors[name].to_sparse()
    with pytest.raises(ValueError, match=f"{name}: have a sparse, quantized or empty tensor"):
        cognate_from_torch(tensors, SMALL)


def test_every_problem_is_named_at_once(tmp_path):
    tensors = cognate_to_numpy(make_params(), SMALL)
    tensors["trm.z0_proj.bias"] = np.full(8, np.nan, np.float32)
    tensors["backbone.norm.weight"] = np.ones(7, np.float32)
    tensors["extra"] = np.ones(1, np.float32)
    del tensors["act_head.w_halt.bias"]
    write_safetensors(tmp_path / "x.safetensors", tensors)
    with pytest.raises(ValueError) as raised:
        load_cognate(tmp_path / "x.safetensors", SMALL)
    for part in (
        "trm.z0_proj.bias: holds NaN",
        r"backbone.norm.weight: have (7,), want (8,)",
        "extra: unknown key",
        "act_head.w_halt.bias: missing",
    ):
        assert part in str(raised.value)


def test_a_head_that_is_not_tied_is_refused():
    state = dict(cognate_to_numpy(make_params(), SMALL))
    state["lm_head.weight"] = state["backbone.token_emb.weight"] + 1
    with pytest.raises(ValueError, match="differs from backbone"):
        cognate_from_torch(state, SMALL)


def test_parameters_of_another_configuration_are_refused():
    other = dataclasses.replace(SMALL, d_mem=4)
    with pytest.raises(ValueError, match=r"ltm/w_down/kernel: have \(8, 3\), want \(8, 4\)"):
        cognate_to_numpy(make_params(), other)
