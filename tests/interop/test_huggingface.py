"""Hugging Face directories, written by transformers and opened by transformers."""

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from interop import load_gguf, load_huggingface, save_gguf, save_huggingface
from interop.names import flatten

TOKENS = np.random.default_rng(0).integers(3, 67, (2, 11))


@pytest.mark.parametrize("tied", [True, False])
def test_directory_of_transformers_there_and_back(
    tmp_path, make_llama, tokenizer, torch_logits, jax_logits, tied
):
    model = make_llama(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "in")
    tokenizer.save(str(tmp_path / "in" / "tokenizer.json"))
    checkpoint = load_huggingface(tmp_path / "in")
    np.testing.assert_allclose(
        jax_logits(checkpoint, TOKENS), torch_logits(model, TOKENS), atol=1e-4, rtol=0
    )

    save_huggingface(tmp_path / "out", checkpoint.params, checkpoint)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name
    np.testing.assert_array_equal(torch_logits(again, TOKENS), torch_logits(model, TOKENS))
    assert again.generation_config.eos_token_id == 2

    text = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert text("ABC").input_ids == tokenizer.encode("ABC").ids
    assert (text.eos_token, text.pad_token) == ("</s>", "<pad>")


def test_half_precision_and_shards(tmp_path, make_llama):
    model = make_llama().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="5KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    whole, shards = (load_huggingface(tmp_path / d) for d in ("whole", "shards"))
    assert whole.names["model.norm.weight"].dtype == "bfloat16"
    a, b = dict(flatten(whole.params)), dict(flatten(shards.params))
    assert a.keys() == b.keys()
    assert all(np.array_equal(a[p], b[p]) for p in a)
    assert whole.sha256 != shards.sha256


def test_missing_and_foreign_shards_are_named(tmp_path, llama):
    llama.save_pretrained(tmp_path, max_shard_size="5KB")
    shard = next(tmp_path.glob("model-*.safetensors"))
    shard.unlink()
    with pytest.raises(ValueError, match=f"lacks the shards {shard.name}"):
        load_huggingface(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(ValueError, match="names files outside its directory"):
        load_huggingface(tmp_path)


def test_shards_of_pickles(tmp_path, llama):
    """As transformers wrote them: pytorch_model-*.bin and their index."""
    llama.save_pretrained(tmp_path / "whole")
    (tmp_path / "parts").mkdir()
    shutil.copy(tmp_path / "whole" / "config.json", tmp_path / "parts")
    weights = llama.state_dict()
    files = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    places = {name: files[i % 2] for i, name in enumerate(weights)}
    for file in files:
        part = {name: weights[name] for name in weights if places[name] == file}
        torch.save(part, tmp_path / "parts" / file)
    index = tmp_path / "parts" / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    parts, whole = (
        dict(flatten(load_huggingface(tmp_path / d).params)) for d in ("parts", "whole")
    )
    assert parts.keys() == whole.keys()
    assert all(np.array_equal(parts[p], whole[p]) for p in whole)

    index.write_text(json.dumps({"weight_map": {**places, "extra": files[1]}}))
    with pytest.raises(ValueError, match=rf"extra: not in {files[1]}"):
        load_huggingface(tmp_path / "parts")
    (tmp_path / "parts" / files[1]).unlink()
    with pytest.raises(ValueError, match=f"lacks the shards {files[1]}"):
        load_huggingface(tmp_path / "parts")


def test_ids_that_mean_no_token(tmp_path, llama, tokenizer):
    """Some configs say -1, which neither the tokenizer nor GGUF takes."""
    llama.save_pretrained(tmp_path / "in")
    tokenizer.save(str(tmp_path / "in" / "tokenizer.json"))
    checkpoint = load_huggingface(tmp_path / "in")
    config = {**checkpoint.config, "pad_token_id": -1, "eos_token_id": [2, 1]}
    checkpoint = checkpoint._replace(config=config)
    save_huggingface(tmp_path / "out", checkpoint.params, checkpoint)
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["eos_token"] == "</s>"
    assert "pad_token" not in settings
    save_gguf(tmp_path / "m.gguf", checkpoint.params, checkpoint, with_tokenizer=False)
    assert "pad_token_id" not in load_gguf(tmp_path / "m.gguf").config


def test_directories_that_are_none(tmp_path, config):
    with pytest.raises(ValueError, match="absent is no directory"):
        load_huggingface(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"config\.json does not exist"):
        load_huggingface(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"has none of model\.safetensors, .*bin\.index\.json"):
        load_huggingface(tmp_path)


def test_existing_directory_is_refused_untouched(tmp_path, llama):
    llama.save_pretrained(tmp_path / "in")
    checkpoint = load_huggingface(tmp_path / "in")
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="out already exists"):
        save_huggingface(tmp_path / "out", checkpoint.params, checkpoint)
    assert list((tmp_path / "out").iterdir()) == []
    checkpoint.params["norm"]["scale"][0] = np.nan
    with pytest.raises(ValueError, match="norm/scale: holds NaN"):
        save_huggingface(tmp_path / "new", checkpoint.params, checkpoint)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]
