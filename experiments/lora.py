"""A LoRA by peft beside the experts: the same questions, for as many seconds.

    python -m experiments.lora --experts runs/smollm2 --seconds 300 --out runs/lora
    python -m experiments.exams --adapted runs/smollm2 --others runs/lora/merged

What a user would do without this project: rank 16 on every linear layer but the head, AdamW,
cross-entropy on the answers of all the run's domains together, in PyTorch. `--seconds` is for what
the experts took; only steps count, no validation. The weights of the lowest validation loss are
kept. Writes config.json, metrics.jsonl, lora.json and `merged`, a Hugging Face directory with the
LoRA added to the weights.
"""

import dataclasses
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from experiments import model as models
from experiments import run as runs
from experiments.data.batches import encode
from experiments.data.splits import Split
from experiments.data.tasks import load_items
from forge_jax.domains import Item
from interop import Checkpoint, params_from_torch, save_huggingface

IGNORED = -100
"""label of a token that no loss is taken of, in transformers"""

Row = tuple[list[int], list[int]]
"""a prompt and its answer, in tokens"""


@dataclasses.dataclass(frozen=True)
class Args:
    experts: Path
    """directory of a phase7 run: its base, its domains, its questions"""
    seconds: float
    """of training steps"""
    out: Path = Path("runs/lora")
    """run directory to create"""
    steps: int | None = None
    """at most"""
    rank: int = 16
    learning_rate: float = 2e-4
    batch: int = 16
    """questions in a step"""
    validate_every: int = 20
    """steps from one validation to the next"""
    seed: int = 0
    replace: bool = False
    """take the place of an earlier run in `out` once this one is whole"""

    def check(self) -> None:
        """Raise a ValueError that lists every setting out of its range."""
        counts = ("rank", "batch", "validate_every")
        wrong = [f"`{n}` must be at least 1" for n in counts if getattr(self, n) < 1]
        rates = ("seconds", "learning_rate")
        wrong += [f"`{n}` must be positive" for n in rates if not getattr(self, n) > 0]
        if wrong:
            raise ValueError(", ".join(wrong) + ".")


def base_of(config: dict[str, Any]) -> Checkpoint:
    """The checkpoint of a phase7 run.

    Raises:
      ValueError: it is another kind of run, the file is another by now, or the run's questions show
        images to the base, which transformers' model cannot see.
    """
    if not {"checkpoint", "stop_token", "train_items", "base_sha256"} <= config.keys():
        raise ValueError("`--experts` must be the directory of a phase7 run, this is another one.")
    own = {"nano": lambda: models.NANO, "smollm2": models.smollm2}
    path = Path(config["checkpoint"]) if config["checkpoint"] else own[config["base"]]()
    found = models.read(path)
    if found.sha256 != config["base_sha256"]:
        raise ValueError(f"The experts are of another base than {path}.")
    has_eyes = found.projector is not None and found.spec.image_token_id is not None
    if has_eyes and "vision" in config["domains"]:
        raise ValueError(f"{path} sees images by its projector, which the LoRA's model lacks.")
    return found


def items_of(config: dict[str, Any], split: Split) -> list[Item]:
    """The questions of a split that the experts of a run were trained or chosen on."""
    counts: dict[Split, int] = {
        "train": config["train_items"],
        "validation": config["validation_items"],
        "test": config["test_items"],
    }
    given = (config["source"], config["data"], None, counts)
    return [item for name in config["domains"] for item in load_items(name, *given)[split]]


def rows_of(checkpoint: Checkpoint, items: Sequence[Item], stop_token: bool) -> list[Row]:
    """The tokens that an expert is given of every question."""
    assert checkpoint.tokenizer is not None
    eos = models.end_token(checkpoint) if stop_token else None
    batch = encode(checkpoint.tokenizer, items, bos=models.first_token(checkpoint), eos=eos)
    models.check_length(checkpoint.spec, batch.tokens.shape[1], batch.answers.shape[1])
    return [
        (tokens[mask].tolist(), answer[answered].tolist())
        for tokens, mask, _, answer, answered in zip(*batch, strict=True)
    ]


def batch_of(rows: Sequence[Row], device: Any = None) -> dict[str, torch.Tensor]:
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
    whole = {"input_ids": tokens, "attention_mask": mask, "labels": labels}
    return {name: x.to(device) for name, x in whole.items()}


def epochs(rows: Sequence[Row], size: int, rng: np.random.Generator) -> Iterator[list[Row]]:
    """Batches of at most `size` without end, every question once before any comes again."""
    while True:
        order = rng.permutation(len(rows))
        for start in range(0, len(order), size):
            yield [rows[i] for i in order[start : start + size]]


@torch.no_grad()
def validate(model: Any, rows: Sequence[Row], size: int) -> float:
    """Cross-entropy a token of the answers, nats."""
    total, count = 0.0, 0
    for start in range(0, len(rows), size):
        batch = batch_of(rows[start : start + size], model.device)
        labelled = int((batch["labels"] != IGNORED).sum())
        total += float(model(**batch).loss) * labelled
        count += labelled
    return total / count


def train(run: runs.Run, args: Args, model: Any, rows: dict[Split, list[Row]]) -> dict[str, Any]:
    """Train until the seconds or the steps are used up; the model ends with its best weights."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, weight_decay=0.0)
    given = epochs(rows["train"], args.batch, np.random.default_rng(args.seed))
    last = math.inf if args.steps is None else args.steps
    used, steps, lowest, best = 0.0, 0, math.inf, []
    while True:
        loss = validate(model, rows["validation"], args.batch)
        runs.log(run, {"step": steps, "seconds": used, "validation_loss": loss})
        print(f"{steps} steps, {used:.0f} s: validation loss {loss:.4f}", flush=True)
        if not math.isfinite(loss) and not best:
            raise ValueError(f"The base's validation loss is {loss}: there is nothing to train.")
        if loss < lowest:
            lowest, best = loss, [p.detach().clone() for p in trained]
        if used >= args.seconds or steps >= last or not math.isfinite(loss):
            break
        for part in islice(given, args.validate_every):
            began = time.perf_counter()
            optimizer.zero_grad()
            model(**batch_of(part, model.device)).loss.backward()
            optimizer.step()
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            used, steps = used + time.perf_counter() - began, steps + 1
            if used >= args.seconds or steps >= last:
                break
    for parameter, value in zip(trained, best, strict=True):
        parameter.data.copy_(value)
    count = sum(p.numel() for p in trained)
    return {"parameters": count, "steps": steps, "seconds": used, "validation_loss": lowest}


def with_lora(args: Args, checkpoint: Checkpoint) -> Any:
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
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return get_peft_model(base, config).to(device)


@runs.clean_errors()
def main(args: Args) -> None:
    """Train, merge, write."""
    args.check()
    if not args.replace:
        runs.refuse_existing(args.out, resumable=False)
    config = runs.read_json(args.experts / "config.json")
    checkpoint = base_of(config)
    splits: tuple[Split, ...] = ("train", "validation")
    rows: dict[Split, list[Row]] = {
        split: rows_of(checkpoint, items_of(config, split), config["stop_token"])
        for split in splits
    }
    recorded = {**runs.plain(args), "base_sha256": checkpoint.sha256}
    with runs.opened(args.out, recorded, replace=args.replace) as run:
        model = with_lora(args, checkpoint)
        found = train(run, args, model, rows)
        merged = params_from_torch(model.merge_and_unload().cpu().state_dict(), checkpoint.spec)
        save_huggingface(run.path / "merged", merged, checkpoint)
        runs.write_json(run.path / "lora.json", found)
        done = runs.finish(run)
    print(", ".join(f"{name} {value:.4g}" for name, value in found.items()))
    print(f"written: {done / 'merged'}")


if __name__ == "__main__":
    main(tyro.cli(Args, prog="python -m experiments.lora", description=__doc__))
