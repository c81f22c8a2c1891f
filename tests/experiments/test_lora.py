"""The peer's LoRA: what it is trained on, and that what it learned is in the merged weights."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from experiments import lora, phase7
from experiments.files import plain
from forge_jax.domains import Item
from interop import load_phase6


@pytest.fixture
def experts(checkpoint, tmp_path):
    """What is read of a phase7 run."""
    args = dataclasses.replace(
        phase7.Args(), checkpoint=checkpoint, domains=("math",), train_items=64, validation_items=16
    )
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(plain(args)))
    return tmp_path / "run"


def test_only_the_answers_have_labels(checkpoint):
    tokenizer = load_phase6(checkpoint).tokenizer
    items = [Item("Calculate 1 + 2.\n", "3"), Item("Calculate 30 + 12.\n", "42")]
    batch = lora.batch_of(lora.rows_of(tokenizer, items, 1, 2))
    for row, item in zip(range(2), items, strict=True):
        live = batch["attention_mask"][row].bool()
        labels = batch["labels"][row]
        own = labels[labels != lora.IGNORED].tolist()
        assert own[-1] == 2
        assert tokenizer.decode(own[:-1]) == item.answer
        whole = batch["input_ids"][row][live].tolist()
        assert whole[0] == 1
        assert tokenizer.decode(whole[1:-1]) == item.prompt + item.answer
        assert (labels[~live] == lora.IGNORED).all()


# peft asks transformers for what it calls otherwise now
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_what_is_written_is_the_trained_model(experts, checkpoint, tmp_path):
    from transformers import AutoModelForCausalLM

    out = tmp_path / "lora"
    lora.main(lora.Args(experts, seconds=4.0, out=out, learning_rate=3e-3, validate_every=5))
    found = json.loads((out / "lora.json").read_text())
    assert found["best"] < found["validation_loss"][0] - 0.1
    assert found["best"] == min(found["validation_loss"])

    config = json.loads((experts / "config.json").read_text())
    base = load_phase6(checkpoint)
    eos, bos = base.config["eos_token_id"], lora.models.first_token(base)
    rows = lora.rows_of(base.tokenizer, lora.items_of(config, "validation"), bos, eos)
    model = AutoModelForCausalLM.from_pretrained(out / "merged", dtype=torch.float32)
    np.testing.assert_allclose(lora.validate(model, rows, 16), found["best"], rtol=1e-4)

    merged = load_phase6(out / "merged")
    assert merged.spec == base.spec
    assert merged.tokenizer.to_str() == base.tokenizer.to_str()
