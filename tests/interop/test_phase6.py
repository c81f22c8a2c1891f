"""Every form in which a Phase 6 checkpoint may come."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from interop import formats, load_phase6, params_to_torch
from interop.config import spec_from_config
from interop.names import flatten


def same(checkpoint, state_dict):
    """Whether the checkpoint gives back exactly this state_dict."""
    back = params_to_torch(checkpoint.params, checkpoint.names)
    return back.keys() == state_dict.keys() and all(
        torch.equal(back[n], state_dict[n]) and back[n].dtype == state_dict[n].dtype for n in back
    )


def write_pair(base, state_dict, config, **side_car):
    save_file(state_dict, f"{base}.safetensors")
    record = {"config": config, "metadata": {"phase": 6}, "has_optimizer": False, **side_car}
    base.parent.joinpath(f"{base.name}.json").write_text(json.dumps(record))


@pytest.mark.parametrize("name", ["baked", "phase6.v2", "phase6.v2.safetensors.old"])
@pytest.mark.parametrize("suffix", ["", ".safetensors", ".json"])
def test_form_a_with_dotted_names(tmp_path, state_dict, config, name, suffix):
    write_pair(tmp_path / name, state_dict, config)
    checkpoint = load_phase6(tmp_path / f"{name}{suffix}")
    assert same(checkpoint, state_dict)
    assert checkpoint.path == tmp_path / f"{name}.safetensors"
    assert checkpoint.sha256 == formats.sha256_file(checkpoint.path)
    assert checkpoint.spec.num_key_value_heads == 2
    assert checkpoint.spec.rope_theta == 500.0


def test_form_a_sets_extra_tensors_aside(tmp_path, state_dict, config):
    write_pair(
        tmp_path / "m",
        {**state_dict, "extra_mask": torch.ones(3)},
        config,
        extra_tensor_keys=["mask"],
    )
    assert same(load_phase6(tmp_path / "m"), state_dict)


@pytest.mark.parametrize("key", ["model_state_dict", "state_dict", None])
@pytest.mark.parametrize("suffix", [".pt", ".pth"])
def test_form_b(tmp_path, state_dict, config, key, suffix):
    path = tmp_path / f"legacy.v1{suffix}"
    if key is None:
        torch.save(state_dict, path)
        (tmp_path / "config.json").write_text(json.dumps(config))
    else:
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))]).state_dict()
        record = {key: state_dict, "config": config, "optimizer_state_dict": optimizer}
        torch.save({**record, "metadata": {"metrics": {"tool_success_rate": 0.9}}}, path)
    checkpoint = load_phase6(tmp_path / "legacy.v1")
    assert same(checkpoint, state_dict)
    assert checkpoint.metrics == ({} if key is None else {"tool_success_rate": 0.9})


def test_config_with_a_torch_dtype_becomes_plain(tmp_path, state_dict, config):
    record = {"state_dict": state_dict, "config": {**config, "torch_dtype": torch.float16}}
    torch.save(record, tmp_path / "m.pt")
    assert load_phase6(tmp_path / "m.pt").config["torch_dtype"] == "torch.float16"


@pytest.mark.parametrize("kind", ["safetensors", "pt", "whole name", "directory"])
def test_the_guides_json(tmp_path, llama, state_dict, config, kind):
    metrics = {"tool_success_rate": 0.94, "persona_consistency": 0.89}
    model = "baked_model.with_tools"
    if kind == "safetensors":
        write_pair(tmp_path / model, state_dict, config)
    elif kind == "directory":
        llama.save_pretrained(tmp_path / model)
    else:
        torch.save({"state_dict": state_dict, "config": config}, tmp_path / f"{model}.pt")
    name = f"{model}.pt" if kind == "whole name" else model
    (tmp_path / "phase6.json").write_text(json.dumps({"model": name, "metrics": metrics}))
    checkpoint = load_phase6(tmp_path / "phase6.json")
    assert same(checkpoint, state_dict)
    assert checkpoint.metrics == metrics


@pytest.mark.parametrize("copy", ["absent", "present"])
@pytest.mark.parametrize("said", [True, None])
def test_tied_head(tmp_path, llama, config, copy, said):
    """The copy may be there or not, and a config that is silent ties a model without a head."""
    state_dict = {n: t.clone() for n, t in llama.state_dict().items()}
    if copy == "absent":
        del state_dict["lm_head.weight"]
    config = {n: v for n, v in config.items() if n != "tie_word_embeddings" or said}
    torch.save({"state_dict": state_dict, "config": config}, tmp_path / "m.pt")
    checkpoint = load_phase6(tmp_path / "m.pt")
    assert same(checkpoint, state_dict)
    assert checkpoint.spec.tie_word_embeddings == (said is True or copy == "absent")


def test_untied_model_without_its_head_is_refused(tmp_path, state_dict, config):
    torch.save(
        {"state_dict": state_dict, "config": {**config, "tie_word_embeddings": False}},
        tmp_path / "m.pt",
    )
    with pytest.raises(ValueError, match="lm_head/kernel: no key maps to it"):
        load_phase6(tmp_path / "m.pt")


def test_tokenizer_and_projector_beside_the_weights(tmp_path, state_dict, config, tokenizer):
    write_pair(tmp_path / "nano.v1", state_dict, {**config, "image_token_id": 5})
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    other = {"kernel": np.ones((4, 24), np.float16), "bias": np.zeros(24, np.float16)}
    own = {"kernel": np.full((4, 24), 2, np.float16), "bias": np.zeros(24, np.float16)}
    formats.write_safetensors(tmp_path / "vision.safetensors", other)
    checkpoint = load_phase6(tmp_path / "nano.v1")
    assert checkpoint.projector is not None
    assert checkpoint.projector["kernel"][0, 0] == 1
    formats.write_safetensors(tmp_path / "nano.v1.vision.safetensors", own)
    checkpoint = load_phase6(tmp_path / "nano.v1")
    assert checkpoint.projector is not None
    assert checkpoint.tokenizer is not None
    assert checkpoint.projector["kernel"].dtype == np.float32
    assert checkpoint.projector["kernel"][0, 0] == 2
    assert checkpoint.tokenizer.encode("ABC").ids == tokenizer.encode("ABC").ids != []
    assert checkpoint.spec.image_token_id == 5


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        (
            {"kernel": np.ones((4, 23), np.float32), "bias": np.ones(24, np.float32)},
            "needs a kernel",
        ),
        ({"kernel": np.ones((4, 24), np.float32)}, "needs a bias"),
        (
            {"kernel": np.full((4, 24), np.nan, np.float32), "bias": np.ones(24, np.float32)},
            "holds NaN",
        ),
    ],
)
def test_projector_that_does_not_fit(tmp_path, state_dict, config, tensors, sentence):
    write_pair(tmp_path / "m", state_dict, config)
    formats.write_safetensors(tmp_path / "vision.safetensors", tensors)
    with pytest.raises(ValueError, match=rf"vision\.safetensors {sentence}"):
        load_phase6(tmp_path / "m")


def test_tokenizer_larger_than_the_embedding(tmp_path, make_llama, tokenizer):
    make_llama(vocab_size=40).save_pretrained(tmp_path / "small")
    tokenizer.save(str(tmp_path / "small" / "tokenizer.json"))
    with pytest.raises(ValueError, match="token ids up to 63, but the model has 40 tokens"):
        load_phase6(tmp_path / "small")


def test_broken_tokenizer_names_its_file(tmp_path, state_dict, config):
    write_pair(tmp_path / "m", state_dict, config)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(ValueError, match=r"tokenizer\.json holds no usable tokenizer"):
        load_phase6(tmp_path / "m")


BAD_FIELDS = {
    "model_type": ("mamba", "model_type: 'mamba' is not supported"),
    "architectures": (["MistralForCausalLM"], "architectures: "),
    "rope_parameters": ({"rope_type": "yarn", "factor": 8.0}, "rope scaling: 'yarn'"),
    "hidden_act": ("gelu", "hidden_act: 'gelu'"),
    "attention_bias": (True, "attention_bias"),
    "mlp_bias": (True, "mlp_bias"),
    "num_attention_heads": ("4", "num_attention_heads: have '4'"),
    "hidden_size": (-24, "hidden_size: have -24"),
    "rms_norm_eps": (float("nan"), "rms_norm_eps"),
    "num_key_value_heads": (3, "num_key_value_heads"),
    "quantization_config": ({"bits": 4}, "quantization_config"),
}


@pytest.mark.parametrize("field", BAD_FIELDS)
def test_unsupported_config(config, field):
    value, sentence = BAD_FIELDS[field]
    with pytest.raises(ValueError, match=r"config of the\.file does not fit") as caught:
        spec_from_config({**config, field: value}, "the.file")
    assert sentence in str(caught.value)


def test_all_bad_fields_are_listed_at_once(config):
    with pytest.raises(ValueError) as caught:
        spec_from_config({**config, **{f: v for f, (v, _) in BAD_FIELDS.items()}}, "x")
    missing = [f for f in BAD_FIELDS if BAD_FIELDS[f][1] not in str(caught.value)]
    # 3 kv heads are judged against the query heads once those are known
    assert missing == ["num_key_value_heads"]


@pytest.mark.parametrize("rope", [{"rope_scaling": None}, {"rope_scaling": {"type": "default"}}])
def test_older_spelling_of_rope(config, rope):
    old = {n: v for n, v in config.items() if n != "rope_parameters"}
    assert spec_from_config({**old, **rope, "rope_theta": 123.0}, "x").rope_theta == 123.0


def test_bad_files_are_named(tmp_path, state_dict, config):
    with pytest.raises(ValueError, match=r"absent does not exist, nor does any of absent\.safet"):
        load_phase6(tmp_path / "absent")
    (tmp_path / "lost.json").write_text('{"model": "nowhere", "metrics": {}}')
    with pytest.raises(ValueError, match="nowhere does not exist"):
        load_phase6(tmp_path / "lost.json")
    (tmp_path / "other.json").write_text('{"hello": 1}')
    with pytest.raises(ValueError, match="neither a `model` nor a `config`"):
        load_phase6(tmp_path / "other.json")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"notes\.txt must end in one of"):
        load_phase6(tmp_path / "notes.txt")
    torch.save(state_dict, tmp_path / "alone.pt")
    with pytest.raises(ValueError, match=r"alone\.pt comes without a config"):
        load_phase6(tmp_path / "alone.pt")
    torch.save({"config": config}, tmp_path / "empty.pt")
    with pytest.raises(ValueError, match=r"empty\.pt holds neither model_state_dict"):
        load_phase6(tmp_path / "empty.pt")
    save_file(state_dict, tmp_path / "bare.safetensors")
    with pytest.raises(ValueError, match=r"bare\.safetensors needs its config in bare\.json"):
        load_phase6(tmp_path / "bare.safetensors")


def test_hostile_values_are_refused_with_the_name_of_the_file(tmp_path, state_dict, config):
    nested = []
    for _ in range(50):
        nested = [nested]
    record = {"state_dict": state_dict, "config": config, "metadata": {"metrics": nested}}
    torch.save(record, tmp_path / "deep.pt")
    with pytest.raises(ValueError, match=r"^the metadata of .*deep\.pt is too large or too deep"):
        load_phase6(tmp_path / "deep.pt")
    rope = {"rope_type": "llama3", "factor": 10**400}
    changed = {**config, "rms_norm_eps": 10**400, "rope_parameters": rope}
    write_pair(tmp_path / "big", state_dict, changed)
    wanted = r"config of .*big\.safetensors does not fit:\n  rms_norm(?s:.)*factor is 1000"
    with pytest.raises(ValueError, match=wanted):
        load_phase6(tmp_path / "big")


def test_json_beside_a_pickle_of_the_same_name(tmp_path, state_dict, config):
    """`baked.json` is the guide's, not a side-car, and must not hide the config in the pickle."""
    torch.save({"state_dict": state_dict, "config": config}, tmp_path / "baked.pt")
    (tmp_path / "baked.json").write_text('{"model": "baked", "metrics": {"a": 1}}')
    for path in ("baked", "baked.json"):
        checkpoint = load_phase6(tmp_path / path)
        assert checkpoint.metrics == {"a": 1}
        assert len(list(flatten(checkpoint.params))) == len(state_dict)
