"""Every family against transformers: scoring, generation, and the way there and back.

python -m pytest tests/interop/test_families.py -s    # prints the largest errors
"""

import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from forge_jax import svf
from forge_jax.models import Decoder, generate, init_cache, response_logits
from interop import (
    formats,
    load_huggingface,
    load_low_rank,
    load_phase6,
    load_phase8,
    params_to_torch,
    save_huggingface,
    write_phase8,
)
from interop.config import hf_config, spec_from_config
from interop.lowrank import factor_tensors
from interop.names import convert, flatten

NAMES = ["llama", "llama3", "mistral", "qwen2", "qwen2 window", "qwen3", "gpt2", "gpt2 split"]
TIME, NEW = 13, 10
families = pytest.mark.parametrize("name", NAMES)


@functools.cache
def rows() -> Any:
    """Four rows of 13, 12, 8 and 1 tokens, padded on the left."""
    tokens = np.random.default_rng(0).integers(3, 67, (4, TIME))
    mask = np.arange(TIME) >= np.array([0, 1, 5, 12])[:, None]
    return np.where(mask, tokens, 0).astype(np.int32), mask


@pytest.fixture
def opened(make_family):
    """Return a function: the transformers model of a family, our spec, params and names."""

    def opened(name):
        model = make_family(name.removesuffix(" split"))
        fused = False if name.endswith("split") else None
        config = json.loads(model.config.to_json_string())
        has_head = "lm_head.weight" in dict(model.named_parameters())
        spec = spec_from_config(config, name, has_lm_head=has_head, fused_qkv=fused)
        return model, spec, *convert(model.state_dict(), spec)

    return opened


@functools.cache
def compiled(spec):
    """The compiled pass of a spec."""
    return jax.jit(Decoder(spec).apply)


def score(spec, params, tokens, mask=None):
    return np.asarray(compiled(spec)({"params": params}, tokens, mask)[0])


@families
def test_padded_logits_equal_transformers(opened, torch_logits, name):
    model, spec, params, _ = opened(name)
    tokens, mask = rows()
    want, got = torch_logits(model, tokens, mask), score(spec, params, tokens, mask)
    error = np.abs(got - want)[mask].max()
    print(f"scoring     {name:13}{error:.1e} of logits up to {np.abs(want).max():.1f}")
    assert np.abs(want).max() > 1
    assert error <= 1e-4
    assert np.isfinite(got).all()


@families
def test_greedy_generation_equals_transformers(opened, name):
    model, spec, params, _ = opened(name)
    tokens, mask = rows()
    with torch.no_grad():
        out = model.generate(
            torch.as_tensor(tokens).long(),
            attention_mask=torch.as_tensor(mask).long(),
            do_sample=False,
            max_new_tokens=NEW,
            eos_token_id=None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
    want = out.sequences[:, TIME:].numpy()
    top = torch.stack(out.logits, dim=1).topk(2).values.numpy()
    # once the largest two logits tie, either token may follow
    clear = np.cumprod(top[..., 0] - top[..., 1] > 1e-4, axis=1).astype(bool)

    # rows are arguments: as constants of the program XLA carries them into the loop, over and over
    @jax.jit
    def greedy(params, tokens, mask):
        apply = functools.partial(Decoder(spec).apply, {"params": params})
        key = jax.random.key(0)
        return generate(apply, spec, tokens, mask, key, max_new_tokens=NEW, temperature=0.0).tokens

    got = np.asarray(greedy(params, tokens, mask))
    same = (got == want)[clear].mean()
    print(f"generation  {name:13}{same:.0%} of {clear.sum()} clear tokens equal")
    assert same == 1
    assert clear.mean() > 0.9
    assert len(np.unique(want)) > 5


@families
def test_cached_passes_and_responses_equal_the_full_pass(opened, name):
    """A prefill, then pieces, over padded rows; and the logits from which responses are drawn."""
    _, spec, params, _ = opened(name)
    tokens, mask = rows()
    want = score(spec, params, tokens, mask)
    cache, pieces = init_cache(spec, len(tokens), TIME + 2), []
    for piece in (slice(0, 9), slice(9, 10), slice(10, 13)):
        args = (tokens[:, piece], mask[:, piece], cache)
        got, cache = compiled(spec)({"params": params}, *args)
        pieces.append(got)
    np.testing.assert_allclose(np.concatenate(pieces, axis=1)[mask], want[mask], atol=2e-5)

    @jax.jit
    def responses(params, tokens, mask):
        apply = functools.partial(Decoder(spec).apply, {"params": params})
        return response_logits(apply, spec, tokens[:, :9], mask[:, :9], tokens[:, 9:], mask[:, 9:])

    # the last row's prompt is all padding: nothing is drawn from it
    np.testing.assert_allclose(responses(params, tokens, mask)[:3], want[:3, 8:-1], atol=2e-5)


@families
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_dict_there_and_back_is_bit_exact(opened, name, dtype):
    model, spec, _, _ = opened(name)
    before = {n: t.to(dtype) for n, t in model.state_dict().items()}
    params, names = convert(before, spec)
    after = params_to_torch(params, names)
    assert list(after) == list(before)
    assert all(torch.equal(after[n], before[n]) and after[n].dtype == dtype for n in before)
    assert set(params_to_torch(params, spec)) == {n for n, _ in model.named_parameters()}


@families
def test_directories_are_opened_and_written_for_transformers(
    tmp_path, make_family, torch_logits, name
):
    """In as shards, out as one file, in again by both; nothing is lost on the way."""
    model = make_family(name.removesuffix(" split"))
    model.save_pretrained(tmp_path / "in", max_shard_size="5KB")
    assert len(list((tmp_path / "in").glob("model-*.safetensors"))) > 1
    fused = False if name.endswith("split") else None
    checkpoint = load_huggingface(tmp_path / "in", fused_qkv=fused)
    save_huggingface(tmp_path / "out", checkpoint.params, checkpoint)

    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(again) is type(model)
    tokens, mask = rows()
    want = torch_logits(model, tokens, mask)
    error = np.abs(torch_logits(again, tokens, mask) - want)[mask].max()
    print(f"directory   {name:13}{error:.1e} when re-opened in torch")
    assert error <= 1e-4

    ours = load_phase6(tmp_path / "out")
    assert ours.spec == checkpoint.spec
    a, b = dict(flatten(ours.params)), dict(flatten(checkpoint.params))
    assert a.keys() == b.keys()
    assert all(np.array_equal(a[p], b[p]) for p in a)


@families
def test_low_rank_file_of_every_family(tmp_path, opened, torch_logits, name):
    """Truncated at 0.4, written, read and run factored; torch runs the same matrices dense."""
    model, spec, params, names = opened(name)
    factors, z = svf.decompose(params, svf.is_attention_or_mlp)
    small = svf.truncate(factors, z, 0.4)
    tensors = factor_tensors(small, names)
    assert any(n.endswith(".vh") for n in tensors)
    formats.write_safetensors(tmp_path / "m.safetensors", tensors)
    config = hf_config(spec, json.loads(model.config.to_json_string()))
    formats.write_json(tmp_path / "m.json", {"config": config})
    checkpoint = load_low_rank(tmp_path / "m.safetensors")
    assert checkpoint.spec == spec

    tokens, mask = rows()
    run = jax.jit(svf.transform(Decoder(spec)).apply)
    got = np.asarray(run({"params": checkpoint.params}, tokens, mask)[0])
    kept = {path: v.at[int(np.ceil(0.4 * v.size)) :].set(0) for path, v in z.items()}
    dense = params_to_torch(svf.materialize(factors, kept), spec)
    twin = AutoModelForCausalLM.from_config(model.config).eval()
    twin.load_state_dict(dense, strict=False)
    error = np.abs(got - torch_logits(twin, tokens, mask))[mask].max()
    print(f"low rank    {name:13}{error:.1e} against the dense matrices in torch")
    assert error <= 1e-4
    assert np.abs(torch_logits(twin, tokens, mask) - torch_logits(model, tokens, mask)).max() > 0.1


def test_fused_and_split_qkv_are_one_function_and_other_factors(opened):
    (_, fused, a, names), (_, split, b, _) = opened("gpt2"), opened("gpt2 split")
    tokens, mask = rows()
    np.testing.assert_allclose(
        score(fused, a, tokens, mask), score(split, b, tokens, mask), atol=1e-5
    )
    sizes = [
        {p.split("/", 1)[1]: v.size for p, v in svf.decompose(x, svf.is_attention)[1].items()}
        for x in (a, b)
    ]
    assert sizes[0] == {"self_attn/qkv_proj/kernel": 24, "self_attn/o_proj/kernel": 24}
    assert sizes[1] == {f"self_attn/{n}_proj/kernel": 24 for n in "qkvo"}
    back = params_to_torch(b, names)
    assert all(torch.equal(t, params_to_torch(a, names)[n]) for n, t in back.items())


def test_the_choice_about_qkv_is_stored(tmp_path, make_family):
    make_family("gpt2").save_pretrained(tmp_path / "in")
    for fused in (True, False):
        checkpoint = load_phase6(tmp_path / "in", fused_qkv=fused)
        out = save_huggingface(tmp_path / f"out{fused}", checkpoint.params, checkpoint)
        assert load_phase6(out).spec.fused_qkv is fused
        assert load_phase6(out, fused_qkv=not fused).spec.fused_qkv is not fused
    assert load_phase6(tmp_path / "in").spec.fused_qkv is True


def test_old_gpt2_files_have_other_names_and_masks(opened):
    model, spec, params, _ = opened("gpt2")
    old = {n.removeprefix("transformer."): t for n, t in model.state_dict().items()}
    old["h.0.attn.bias"], old["h.1.attn.masked_bias"] = torch.ones(1, 1, 40, 40), torch.ones(())
    again, names = convert(old, spec)
    assert all(
        np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (again, params)), strict=True)
    )
    assert not [n for n in names if n.endswith("masked_bias")]


def test_more_slots_than_learned_positions_are_refused(opened):
    _, spec, params, _ = opened("gpt2")
    with pytest.raises(ValueError, match="at most 40 slots"):
        jax.eval_shape(Decoder(spec).apply, {"params": params}, np.zeros((1, 41), np.int32))


def test_window_and_scaling_matter(opened):
    """The tests above would not notice a mask or a table that changes nothing."""
    import dataclasses

    tokens, mask = rows()
    for name, fields in (
        ("mistral", {"sliding_window": None}),
        ("qwen2 window", {"max_window_layers": 2}),
        ("llama3", {"rope_scaling": None}),
        ("qwen3", {"rms_norm_eps": 0.5}),
    ):
        _, spec, params, _ = opened(name)
        other = dataclasses.replace(spec, **fields)
        change = score(spec, params, tokens, mask) - score(other, params, tokens, mask)
        assert np.abs(change[mask]).max() > 1e-2, name


BAD = {
    "qwen2": {"layer_types": ["sliding_attention", "full_attention"], "use_sliding_window": True},
    "gpt2": {"scale_attn_by_inverse_layer_idx": True, "activation_function": "relu", "n_head": 5},
    "mistral": {"sliding_window": 0},
    "llama3": {"rope_parameters": {"rope_type": "llama3", "factor": -1}},
}


@pytest.mark.parametrize("name", BAD)
def test_what_a_family_cannot_do_is_said(make_family, name):
    config = json.loads(make_family(name).config.to_json_string())
    with pytest.raises(ValueError, match="config of x does not fit") as caught:
        spec_from_config({**config, **BAD[name]}, "x")
    said = {
        "activation_function": "hidden_act",
        "use_sliding_window": "layer_types",
        "rope_parameters": "rope scaling: factor is -1",
    }
    for field in BAD[name]:
        assert str(said.get(field, field)) in str(caught.value)


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({"model_type": "mistral"}, {"sliding_window": 4096, "num_key_value_heads": 8}),
        ({"model_type": "mistral", "sliding_window": None}, {"sliding_window": None}),
        ({"model_type": "qwen3"}, {"head_dim": 128, "qk_norm": True, "sliding_window": None}),
        ({"architectures": ["Qwen2ForCausalLM"]}, {"qkv_bias": True, "head_dim": 4}),
        ({}, {"num_key_value_heads": 16, "qkv_bias": False}),
    ],
)
def test_fields_left_out_have_the_familys_defaults(config, wanted):
    shape = {"vocab_size": 9, "hidden_size": 64, "intermediate_size": 8}
    shape |= {"num_hidden_layers": 1, "num_attention_heads": 16}
    spec = spec_from_config({**shape, **config}, "x")
    assert {field: getattr(spec, field) for field in wanted} == wanted


@pytest.mark.parametrize("name", ["gpt2", "gpt2 split", "qwen3"])
def test_phase8_artifacts_of_other_families(tmp_path, make_family, torch_logits, name):
    """Experts, mixture per weight, low-rank twin and the directory for torch come back."""
    make_family(name.removesuffix(" split")).save_pretrained(tmp_path / "in")
    fused = False if name.endswith("split") else None
    checkpoint = load_phase6(tmp_path / "in", fused_qkv=fused)
    factors, ones = svf.decompose(checkpoint.params, svf.is_attention_or_mlp)
    rng = np.random.default_rng(0)
    experts = {
        domain: {p: np.float32(1 + 0.2 * rng.standard_normal(z.shape)) for p, z in ones.items()}
        for domain in ("math", "code")
    }
    stacked = {p: jnp.stack([z[p] for z in experts.values()]) for p in ones}
    z = svf.mix(stacked, jnp.array([0.5, 1.0]))
    metrics = {"latency_ms": 1.0, "accuracy": 0.5, "vram_gb": 0.1, "throughput_tps": 9.0}
    out = write_phase8(
        tmp_path / "out",
        checkpoint,
        experts,
        [0.5, 1.0],
        adapted_params=svf.materialize(factors, z),
        measure=lambda path: metrics,
        succeeded=lambda found, path: True,
        alpha_by_path={path: [0.5, 1.0] for path in ones},
        low_rank_params=svf.truncate(factors, z, 0.4),
        rank_fraction=0.4,
    )
    back = load_phase8(out)
    assert back.experts.keys() == experts.keys()
    for domain, own in experts.items():
        assert back.experts[domain].keys() == own.keys()
        assert all(np.array_equal(back.experts[domain][p], own[p]) for p in own)
    assert back.alpha_by_path is not None
    assert back.alpha_by_path.keys() == ones.keys()
    assert back.low_rank is not None
    assert back.low_rank.checkpoint.spec == checkpoint.spec == back.checkpoint.spec

    tokens, mask = rows()
    model = AutoModelForCausalLM.from_pretrained(out / "huggingface")
    want = torch_logits(model, tokens, mask)
    got = score(checkpoint.spec, back.params, tokens, mask)
    assert np.abs(got - want)[mask].max() <= 1e-4
    split = "transformer.h.0.attn.c_attn.weight.q"
    assert (split in torch.load(out / "z_vectors_math.pt", weights_only=True)) == (
        name == "gpt2 split"
    )
