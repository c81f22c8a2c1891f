"""A LoRA by peft beside the experts: the same questions, for as many seconds.

    python -m experiments.lora --experts runs/smollm2 --seconds 300 --out runs/lora
    python -m experiments.exams --adapted runs/smollm2 --others runs/lora/merged

What a user would do without this project: rank 16 on every linear layer, AdamW, cross-entropy on
the answers of all the run's domains together, in PyTorch. `--seconds` is how long the experts
trained, as their progress bar says; the weights of the lowest validation loss are kept. Writes
config.json, lora.json and `merged`, a Hugging Face directory with the LoRA added to the weights.
"""

import dataclasses
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from tokenizers import Tokenizer

from experiments import model as models
from experiments import run as runs
from experiments.data.batches import prompt_rows
from experiments.data.tasks import load_items
from experiments.exams import read
from forge_jax.domains import Item
from interop import Checkpoint, save_huggingface

IGNORED = -100
"""label of a token that no loss is taken of, in transformers"""


@dataclasses.dataclass(frozen=True)
class Args:
    experts: Path
    """directory of a phase7 run: its base, its domains, its questions"""
    seconds: float
    """of training, validation not counted"""
    out: Path = Path("runs/lora")
    """run directory to create"""
    rank: int = 16
    learning_rate: float = 2e-4
    batch: int = 16
    """questions in a step"""
    validate_every: int = 20
    """steps from one validation to the next"""
    seed: int = 0
    replace: bool = False
    """take the place of an earlier run in `out` once this one is whole"""


def checkpoint_of(config: dict[str, Any]) -> Checkpoint:
    """The base of a run."""
    named = config["checkpoint"]
    own = {"nano": lambda: models.NANO, "smollm2": models.smollm2}
    return read(Path(named) if named else own[config["base"]]())


def items_of(config: dict[str, Any], split: str) -> list[Item]:
    """The questions of a split that the experts of a run were trained or chosen on."""
    counts: Any = {
        "train": config["train_items"],
        "validation": config["validation_items"],
        "test": 1,
    }
    loaded = (
        load_items(name, config["source"], config["data"], None, counts)
        for name in config["domains"]
    )
    return [item for by_split in loaded for item in by_split[split]]  # pyright: ignore


def rows_of(
    tokenizer: Tokenizer, items: Sequence[Item], bos: int | None, eos: int | None
) -> list[tuple[list[int], list[int]]]:
    """Prompt and answer of every question, in tokens."""
    prompts = prompt_rows(tokenizer, [i.prompt for i in items], bos)
    answers = prompt_rows(tokenizer, [i.answer for i in items], None)
    stop = [] if eos is None else [eos]
    return [(p, a + stop) for p, a in zip(prompts, answers, strict=True)]


def batch_of(rows: Sequence[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
    """Padded on the right; only answers have labels."""
    longest = max(len(p) + len(a) for p, a in rows)
    tokens = torch.zeros(len(rows), longest, dtype=torch.long)
    labels = torch.full_like(tokens, IGNORED)
    mask = torch.zeros_like(tokens)
    for i, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        tokens[i, :end] = torch.tensor(prompt + answer)
        labels[i, len(prompt) : end] = torch.tensor(answer)
        mask[i, :end] = 1
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


def batches(rows: Sequence[Any], size: int, rng: np.random.Generator) -> Iterator[Any]:
    """Batches without end, each question once before any comes again."""
    while True:
        order = rng.permutation(len(rows))
        for start in range(0, len(order) - size + 1, size):
            yield batch_of([rows[i] for i in order[start : start + size]])


@torch.no_grad()
def validate(model: Any, rows: Sequence[Any], size: int) -> float:
    """Cross-entropy a token of the answers, nats."""
    total, count = 0.0, 0
    for start in range(0, len(rows), size):
        batch = batch_of(rows[start : start + size])
        labelled = int((batch["labels"] != IGNORED).sum())
        total += float(model(**batch).loss) * labelled
        count += labelled
    return total / count


def train(args: Args, model: Any, rows: dict[str, list[Any]]) -> dict[str, Any]:
    """Train until the seconds are used up; the model ends with its best weights."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, weight_decay=0.0)
    given = batches(rows["train"], args.batch, np.random.default_rng(args.seed))
    losses = [validate(model, rows["validation"], args.batch)]
    best = [p.detach().clone() for p in trained]
    used, steps = 0.0, 0
    while used < args.seconds:
        start = time.perf_counter()
        for batch, _ in zip(given, range(args.validate_every), strict=False):
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
            steps += 1
            if used + time.perf_counter() - start >= args.seconds:
                break
        used += time.perf_counter() - start
        losses.append(validate(model, rows["validation"], args.batch))
        print(f"{used:.0f} s, {steps} steps: validation loss {losses[-1]:.3f}", flush=True)
        if losses[-1] == min(losses):
            best = [p.detach().clone() for p in trained]
    for parameter, value in zip(trained, best, strict=True):
        parameter.data.copy_(value)
    return {"steps": steps, "seconds": used, "validation_loss": losses, "best": min(losses)}


def wrapped(args: Args, checkpoint: Checkpoint) -> Any:
    """The base in transformers with peft's LoRA on every linear layer but the head."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        path = save_huggingface(Path(folder) / "base", checkpoint.params, checkpoint)
        base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    config = LoraConfig(
        r=args.rank,
        lora_alpha=2 * args.rank,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(base, config)


@runs.clean_errors()
def main(args: Args) -> None:
    """Train, merge, write."""
    if args.rank < 1 or args.batch < 1 or args.validate_every < 1 or not args.seconds > 0:
        raise ValueError(
            "`rank`, `batch` and `validate_every` must be at least 1 and `seconds` positive."
        )
    if not args.replace:
        runs.refuse_existing(args.out)
    config = runs.read_json(args.experts / "config.json")
    checkpoint = checkpoint_of(config)
    assert checkpoint.tokenizer is not None
    eos = checkpoint.config["eos_token_id"] if config["stop_token"] else None
    bos = models.first_token(checkpoint)
    rows = {
        split: rows_of(checkpoint.tokenizer, items_of(config, split), bos, eos)
        for split in ("train", "validation")
    }
    recorded = {**runs.plain(args), "base_sha256": checkpoint.sha256}
    with runs.opened(args.out, recorded, resume=False, replace=args.replace) as run:
        model = wrapped(args, checkpoint)
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        found = train(args, model, rows)
        merged = model.merge_and_unload()
        merged.save_pretrained(run.path / "merged")
        checkpoint.tokenizer.save(str(run.path / "merged" / "tokenizer.json"))
        runs.write_json(run.path / "lora.json", {"parameters": count, **found})
        done = runs.finish(run)
    print(f"{count:,} parameters, {found['steps']} steps in {found['seconds']:.0f} s")
    print(f"written: {done / 'merged'}")


if __name__ == "__main__":
    main(tyro.cli(Args, prog="python -m experiments.lora", description=__doc__))
