"""GGUF files that we write, read by us and by transformers."""

import dataclasses

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from interop import load_gguf, load_huggingface, save_gguf
from interop.names import flatten

TOKENS = np.random.default_rng(0).integers(3, 67, (2, 11))
# what transformers' reader leaves at its defaults, although the file has it; llama3 is not here,
# because that reader passes rope_freqs over
BY_TRANSFORMERS = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 10},
    "gpt2": {"vocab_size": 67, "n_positions": 40},
}


@pytest.fixture
def checkpoint(tmp_path, make_family):
    def checkpoint(name, **kwargs):
        make_family(name).save_pretrained(tmp_path / "in")
        return load_huggingface(tmp_path / "in", **kwargs)

    return checkpoint


def open_in_torch(path, **more):
    """As a user does."""
    fields = load_gguf_checkpoint(str(path))["config"]
    config = AutoConfig.for_model(**fields, **more)
    given = {"gguf_file": path.name, "config": config, "dtype": torch.float32}
    return AutoModelForCausalLM.from_pretrained(path.parent, **given).eval()


@pytest.mark.parametrize("name", ["llama", "llama3", "qwen2", "qwen3", "gpt2"])
def test_file_is_read_by_us_and_by_transformers(
    tmp_path, checkpoint, make_family, torch_logits, name
):
    before = checkpoint(name)
    save_gguf(tmp_path / "m.gguf", before.params, before)
    after = load_gguf(tmp_path / "m.gguf")
    assert after.spec == before.spec
    a, b = dict(flatten(after.params)), dict(flatten(before.params))
    assert a.keys() == b.keys()
    assert all(np.array_equal(a[p], b[p]) for p in a)
    assert after.config["eos_token_id"] == 2
    assert after.tokenizer is None

    if name in BY_TRANSFORMERS:
        model = open_in_torch(tmp_path / "m.gguf", **BY_TRANSFORMERS[name])
        want = torch_logits(make_family(name), TOKENS)
        error = np.abs(torch_logits(model, TOKENS) - want).max()
        print(f"GGUF {name}: {error:.1e} when re-opened in torch")
        assert error <= 1e-4


def test_split_gpt2_is_fused_in_the_file(tmp_path, checkpoint):
    split = checkpoint("gpt2", fused_qkv=False)
    save_gguf(tmp_path / "m.gguf", split.params, split)
    kernel = load_gguf(tmp_path / "m.gguf").params["layers_0"]["self_attn"]["qkv_proj"]["kernel"]
    parts = [split.params["layers_0"]["self_attn"][f"{n}_proj"]["kernel"] for n in "qkv"]
    np.testing.assert_array_equal(kernel, np.concatenate(parts, axis=1))


def test_scaling_reads_back_as_its_decimals(tmp_path, checkpoint):
    before = checkpoint("llama3")
    scaling = dataclasses.replace(
        before.spec.rope_scaling, factor=4.1, low_freq_factor=1.1, high_freq_factor=4.3
    )
    before = before._replace(spec=dataclasses.replace(before.spec, rope_scaling=scaling))
    save_gguf(tmp_path / "m.gguf", before.params, before)
    after = load_gguf(tmp_path / "m.gguf")
    assert after.spec == before.spec
    assert isinstance(after.config["rope_scaling"]["original_max_position_embeddings"], int)


def test_llama3_files_of_others_have_only_the_divisors(tmp_path, checkpoint):
    """Without our fields the scaling is Llama 3's own, or the file is refused."""
    before = checkpoint("llama3")
    path = tmp_path / "m.gguf"
    save_gguf(path, before.params, before)
    data = path.read_bytes()
    # another name for the field is as good as no field
    path.write_bytes(data.replace(b"original_context_length", b"original_context_lengtX"))
    with pytest.raises(ValueError, match="rope_freqs of another rule than Llama 3's"):
        load_gguf(path)


def test_half_precision_rounds_matrices_only(tmp_path, checkpoint):
    before = checkpoint("llama")
    save_gguf(tmp_path / "m.gguf", before.params, before, kind="F16")
    after = load_gguf(tmp_path / "m.gguf")
    for path, leaf in flatten(before.params):
        got = dict(flatten(after.params))[path]
        want = leaf.astype(np.float16).astype(np.float32) if leaf.ndim == 2 else leaf
        np.testing.assert_array_equal(got, want)
    types = {t.tensor_type.name for t in gguf.GGUFReader(str(tmp_path / "m.gguf")).tensors}
    assert types == {"F16", "F32"}


@pytest.mark.parametrize("digits", [False, True])
def test_tokenizer_goes_along(tmp_path, checkpoint, digits):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<pad>", "<s>", "</s>", "a", "b", "1", "2", "ab", "12", *alphabet[:40]]
    vocab = {w: i for i, w in enumerate(dict.fromkeys(words))}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b"), ("1", "2")]))
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
    single = pre_tokenizers.Digits(individual_digits=True)
    made.pre_tokenizer = pre_tokenizers.Sequence([single, bytes_]) if digits else bytes_
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<pad>", "<s>", "</s>"])
    before = checkpoint("llama")._replace(tokenizer=made)
    save_gguf(tmp_path / "m.gguf", before.params, before)
    after = load_gguf(tmp_path / "m.gguf")
    assert after.tokenizer is not None
    for text in ("ab12</s>", "abab21", "<s>a"):
        assert after.tokenizer.encode(text).ids == made.encode(text).ids
    assert len(made.encode("12").ids) == (2 if digits else 1)
    assert after.tokenizer_config is not None
    assert after.tokenizer_config["eos_token"] == "</s>"


def test_what_the_format_has_no_place_for_is_refused(tmp_path, checkpoint, tokenizer):
    path = tmp_path / "m.gguf"
    window = checkpoint("mistral")
    with pytest.raises(ValueError, match="no sliding window"):
        save_gguf(path, window.params, window)
    plain = checkpoint("llama")
    other = Tokenizer.from_str(tokenizer.to_str())
    other.normalizer = normalizers.Lowercase()
    with pytest.raises(ValueError, match="no byte-level BPE"):
        save_gguf(path, plain.params, plain._replace(tokenizer=other))
    save_gguf(path, plain.params, plain._replace(tokenizer=other), with_tokenizer=False)
    path.unlink()
    plain.params["layers_0"]["mlp"]["up_proj"]["kernel"][0, 0] = 1e6
    with pytest.raises(ValueError, match=r"up_proj\.weight: too large for float16"):
        save_gguf(path, plain.params, plain, kind="F16")
    with pytest.raises(ValueError, match="`kind` must be"):
        save_gguf(path, plain.params, plain, kind="Q4_0")  # pyright: ignore
    assert not path.exists()
