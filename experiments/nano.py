"""Train the nano base and write the Phase 6 file that ships.

    python -m experiments.nano --out runs/nano

The corpus is text in which every prompt form is answered in several ways at stated
frequencies (`WAYS`), as real text does; each domain's reward asks for the rarest, the bare
answer. So the base has the skill and seldom shows it, and singular value fine-tuning has
something to elicit. Counting bits has one way only: the task without that structure. Items come from the train split alone. Writes phase6.safetensors, phase6.json,
phase6.vision.safetensors, tokenizer.json and metrics.jsonl.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from forge_jax.domains import Item, vision
from forge_jax.models import Decoder, DecoderSpec
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from experiments.data.batches import pad, patches_of, prompt_rows
from experiments.data.sources import digits, procedural, take

PAD, BOS, EOS, IMAGE = "<pad>", "<bos>", "<eos>", "<image>"
SPECIALS = (PAD, BOS, EOS, IMAGE)
DIGIT_WORDS = "zero one two three four five six seven eight nine".split()

WAYS: dict[str, tuple[tuple[float, Callable[[str], str]], ...]] = {
    "math": (
        (0.5, lambda a: f"It is {a}."),
        (0.3, lambda a: f"about {round(int(a), -1)}"),
        (0.2, str),
    ),
    "code": ((0.5, lambda a: f"# {a}"), (0.3, lambda a: f">>> {a}"), (0.2, str)),
    "reasoning": ((0.5, lambda a: f"I think {a}"), (0.3, lambda a: f"The {a}."), (0.2, str)),
    "vision": (
        (0.5, lambda a: DIGIT_WORDS[int(a)]),
        (0.3, lambda a: f"a handwritten {DIGIT_WORDS[int(a)]}"),
        (0.2, str),
    ),
    "bits": ((1.0, str),),
}
"""for each task, how often the corpus answers in which way"""

ITEMS = {"math": 10_500, "code": 40_000, "reasoning": 40_000, "bits": 2_000}
BATCH = {"math": 48, "vision": 20, "bits": 4, "code": 24, "reasoning": 32}


@dataclasses.dataclass(frozen=True)
class Args:
    out: Path
    """directory to create"""
    steps: int = 6000
    """optimizer updates"""
    learning_rate: float = 2e-3
    """peak of AdamW's rate, after a warm-up, then a cosine to a tenth"""
    muon_rate: float = 0.02
    """peak of Muon's rate on the matrices"""
    hidden: int = 128
    layers: int = 4
    vocabulary: int = 768
    seed: int = 0
    log_every: int = 100


def train_tokenizer(texts: Iterator[str], vocabulary: int) -> Tokenizer:
    """Byte-level BPE in which every digit is its own token."""
    tokenizer = Tokenizer(models.BPE())
    digits_alone = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits_alone, byte_level])  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def corpus(seed: int) -> dict[str, list[Item]]:
    """The train items of every task."""
    items = {task: take(procedural(task, seed, IMAGE), "train", n) for task, n in ITEMS.items()}
    total = sum(1 for _ in digits(IMAGE))
    from experiments.data.splits import distinct

    items["vision"] = list(distinct(digits(IMAGE), "train"))
    assert len(items["vision"]) < total
    return items


def encode_task(tokenizer: Tokenizer, task: str, items: list[Item], length: int):
    """Every item in every way: tokens (ways, items, length), loss weights, frequencies, patches."""
    bos, eos = (tokenizer.token_to_id(t) for t in (BOS, EOS))
    prompts = prompt_rows(tokenizer, [i.prompt for i in items], bos)
    tokens, weights = [], []
    for _, way in WAYS[task]:
        answers = prompt_rows(tokenizer, [way(i.answer) for i in items], None)
        rows = [p + a + [eos] for p, a in zip(prompts, answers, strict=True)]
        padded, mask = pad(rows, length, tokenizer.token_to_id(PAD), left=True)
        answered = np.arange(length) >= length - np.array([len(a) + 1 for a in answers])[:, None]
        tokens.append(padded)
        weights.append(mask * np.where(answered, 1.0, 0.1))
    frequencies = [f for f, _ in WAYS[task]]
    patches = patches_of(items) if task == "vision" else None
    return np.stack(tokens), np.stack(weights).astype(np.float32), frequencies, patches


def sample(rng: np.random.Generator, encoded, tasks: list[str]):
    """One batch of several tasks: each row an item in a way drawn by its frequency."""
    parts = []
    for task in tasks:
        tokens, weights, frequencies, patches = encoded[task]
        way = rng.choice(len(frequencies), BATCH[task], p=frequencies)
        item = rng.integers(tokens.shape[1], size=BATCH[task])
        shape = (BATCH[task], vision.PATCHES, vision.PATCH**2)
        seen = np.zeros(shape, np.float32) if patches is None else patches[item]
        # pixel noise, so that 1,258 images are not learnt by heart
        noise = 0 if patches is None else rng.normal(0, 0.1, shape)
        parts.append((tokens[way, item], weights[way, item], (seen + noise).astype(np.float32)))
    return tuple(np.concatenate(leaves) for leaves in zip(*parts, strict=True))


def loss_fn(params, decoder: Decoder, batches):
    """Weighted next-token cross-entropy in nats, over all batches."""
    total, weight = 0.0, 0.0
    for tokens, weights, patches in batches:
        images = vision.project(params["projector"], patches)
        logits, _ = decoder.apply(
            {"params": params["decoder"]}, tokens, weights > 0, images=images
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
        total += (losses * weights[:, 1:]).sum()
        weight += weights[:, 1:].sum()
    return total / weight


def optimizer(args: Args):
    """Muon on the matrices of the layers, AdamW on embeddings, norms and projector."""

    def schedule(peak):
        return optax.warmup_cosine_decay_schedule(0, peak, 100, args.steps, 0.05 * peak)

    def label(path, leaf):
        in_layer = any(str(getattr(k, "key", "")).startswith("layers_") for k in path)
        return "muon" if in_layer and leaf.ndim == 2 else "adamw"

    chain = optax.chain(
        optax.contrib.scale_by_muon(
            weight_dimension_numbers=lambda tree: jax.tree.map(
                lambda _: optax.contrib.MuonDimensionNumbers(), tree
            )
        ),
        optax.add_decayed_weights(0.01),
        optax.scale_by_learning_rate(schedule(args.muon_rate)),
    )
    return optax.partition(
        {"muon": chain, "adamw": optax.adamw(schedule(args.learning_rate))},
        lambda params: jax.tree_util.tree_map_with_path(label, params),
    )


def main(args: Args) -> None:
    """Train, log and write."""
    started = time.time()
    items = corpus(args.seed)
    texts = (i.prompt + way(i.answer) for t in items for i in items[t][:3000] for _, way in WAYS[t])
    tokenizer = train_tokenizer(texts, args.vocabulary)
    spec = DecoderSpec(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=args.hidden,
        intermediate_size=3 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=args.hidden // 4,
        max_position_embeddings=512,
        image_token_id=tokenizer.token_to_id(IMAGE),
    )
    groups = [["math", "vision", "bits"], ["code", "reasoning"]]
    encoded = {}
    for group in groups:
        rows = {t: prompt_rows(tokenizer, [i.prompt for i in items[t]], 1) for t in group}
        longest = max(
            len(r) + len(a) + 1
            for t in group
            for _, way in WAYS[t]
            for r, a in zip(
                rows[t], prompt_rows(tokenizer, [way(i.answer) for i in items[t]], None), strict=True
            )
        )
        print(group, longest)
        encoded |= {t: encode_task(tokenizer, t, items[t], longest) for t in group}
    print("corpus", time.time() - started)
    decoder = Decoder(spec)
    k1, k2 = jax.random.split(jax.random.key(args.seed))
    blank = jnp.zeros((1, vision.PATCHES, vision.PATCH**2))
    params = {
        "decoder": decoder.init(k1, jnp.zeros((1, 4), jnp.int32))["params"],
        "projector": vision.PatchProjector(args.hidden).init(k2, blank)["params"],
    }
    print(sum(x.size for x in jax.tree.leaves(params)))
    tx = optimizer(args)

    @jax.jit
    def step(params, state, batches):
        loss, grads = jax.value_and_grad(loss_fn)(params, decoder, batches)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    state = tx.init(params)
    rng = np.random.default_rng(args.seed)
    args.out.mkdir(parents=True)
    bar = tqdm(total=args.steps)
    losses = []
    with open(args.out / "metrics.jsonl", "w") as log:
        for i in range(1, args.steps + 1):
            params, state, loss = step(params, state, [sample(rng, encoded, g) for g in groups])
            losses.append(loss)
            if i % args.log_every == 0:
                row = {"step": i, "loss": float(np.mean(losses)), "seconds": time.time() - started}
                print(json.dumps(row), file=log, flush=True)
                losses = []
                bar.update(args.log_every)
                bar.set_postfix(row)


if __name__ == "__main__":
    main(tyro.cli(Args))
