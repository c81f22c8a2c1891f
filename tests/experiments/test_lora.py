"""The peer's LoRA: what it is trained on, and that what it learned is in the merged weights."""

import dataclasses
import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
from experiments import exams, lora, model, phase7  # noqa: E402
from experiments.files import plain  # noqa: E402
from experiments.run import read_json, rows  # noqa: E402
from interop import load_phase6, save_huggingface  # noqa: E402

pytestmark = pytest.mark.torch
SMALL = {"train_items": 64, "validation_items": 16, "test_items": 2, "unplanted": ()}


@pytest.fixture
def args(checkpoint):
    """Of the run whose experts are compared."""
    domains = ("math", "reasoning")
    return dataclasses.replace(phase7.Args(), checkpoint=checkpoint, domains=domains, **SMALL)


@pytest.fixture
def experts(args, checkpoint, tmp_path):
    """What is read of that run."""
    (tmp_path / "run").mkdir()
    config = {**plain(args), "base_sha256": load_phase6(checkpoint).sha256}
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    return tmp_path / "run"


def test_questions_and_tokens_are_those_of_the_experts(args, experts):
    problem = phase7.load(dataclasses.replace(args, mixing=phase7.mixture.Settings(search_items=2)))
    config = read_json(experts / "config.json")
    base = lora.base_of(config)
    for split in ("train", "validation"):
        items = lora.items_of(config, split)
        assert items == [item for task in problem.tasks for item in task.items[split]]
        batches = [task.batches[split] for task in problem.tasks]
        wanted = [
            (row[mask].tolist(), answer[answered].tolist())
            for batch in batches
            for row, mask, _, answer, answered in zip(*batch, strict=True)
        ]
        assert lora.rows_of(base, items, stop_token=True) == wanted


def test_only_the_answers_have_labels():
    batch = lora.batch_of([([5, 6, 7], [8]), ([5], [9, 2])])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [5, 9, 2, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, -100, -100, 8], [-100, 9, 2, -100]]


@pytest.mark.parametrize("size", [3, 5, 16])
def test_an_epoch_has_every_question_once(size):
    questions = [([i], [i]) for i in range(10)]
    drawn = []
    for batch in lora.epochs(questions, size, np.random.default_rng(0)):
        drawn += batch
        if len(drawn) >= 20:
            break
    assert sorted(drawn[:10]) == sorted(drawn[10:20]) == questions


# peft reads transformers' `is_gradient_checkpointing`, which has another name now
quiet = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def opened(folder):
    """The merged model in transformers."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@quiet
def test_what_is_written_is_the_trained_model(experts, checkpoint, tmp_path):
    out = tmp_path / "lora"
    settings = {"learning_rate": 1e-2, "validate_every": 10}
    lora.main(lora.Args(experts, seconds=1e9, steps=25, out=out, **settings))
    found, seen = read_json(out / "lora.json"), rows(out)
    assert [row["step"] for row in seen] == [0, 10, 20, 25]
    assert found["validation_loss"] == min(row["validation_loss"] for row in seen)
    assert found["validation_loss"] < seen[0]["validation_loss"] - 0.1

    config = read_json(experts / "config.json")
    base = lora.base_of(config)
    questions = lora.rows_of(base, lora.items_of(config, "validation"), config["stop_token"])
    loss = lora.validate(opened(out / "merged"), questions, 16)
    np.testing.assert_allclose(loss, found["validation_loss"], rtol=1e-4)

    sitting = exams.candidates(
        exams.Args(others=(out / "merged",)), *model.load(checkpoint, "both")
    )
    assert list(sitting) == ["base", "lora-merged"]


@quiet
def test_the_seconds_end_it_and_what_got_worse_is_not_kept(experts, tmp_path):
    out = tmp_path / "lora"
    lora.main(lora.Args(experts, seconds=1e-9, learning_rate=3.0, out=out))
    first, second = rows(out)
    assert (first["step"], second["step"]) == (0, 1)
    assert second["validation_loss"] is None or second["validation_loss"] > first["validation_loss"]
    base = lora.base_of(read_json(experts / "config.json"))
    save_huggingface(tmp_path / "base", base.params, base)
    ours, theirs = (opened(x).state_dict() for x in (out / "merged", tmp_path / "base"))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"base_sha256": "0"}, "of another base"),
        (None, "must be the directory of a phase7 run"),
        ({"domains": ["vision"]}, "sees images by its projector"),
    ],
)
def test_a_run_it_cannot_compare_with_is_refused(experts, tmp_path, capsys, change, said):
    config = {} if change is None else read_json(experts / "config.json") | change
    (experts / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit):
        lora.main(lora.Args(experts, seconds=1.0, out=tmp_path / "lora"))
    assert said in capsys.readouterr().err
    assert not (tmp_path / "lora").exists()


def test_settings_out_of_their_range_are_listed(experts, tmp_path, capsys):
    with pytest.raises(SystemExit):
        lora.main(lora.Args(experts, seconds=0.0, rank=0, out=tmp_path / "lora"))
    said = capsys.readouterr().err
    assert "`rank` must be at least 1, `seconds` must be positive." in said
