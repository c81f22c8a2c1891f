"""Train the nano base and write the Phase 6 file that ships.

    python -m experiments.nano --out runs/nano

The corpus is text in which every prompt form is answered in several ways at stated
frequencies (`WAYS`), as real text does; each domain's reward asks for the rarest, the bare
answer. So the base has the skill and seldom shows it, and singular value fine-tuning has
something to elicit. Counting bits has one way only: the task without that structure. Items
come from the train split alone. Writes phase6.safetensors, phase6.json,
phase6.vision.safetensors and tokenizer.json into a run directory; `--resume` continues a killed
run.
"""

import dataclasses
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jaxtyping import Float, Int
from tokenizers import Tokenizer, processors

from experiments import run as runs
from experiments.data.batches import pad, patches_of, prompt_rows
from experiments.data.sources import digits, procedural, take
from experiments.data.splits import Split, distinct
from experiments.data.tokenizer import EOS, PAD, train_bpe
from forge_jax.domains import Item, vision
from forge_jax.models import Decoder, DecoderSpec
from forge_jax.models.dense import fast_dense
from interop.formats import write_safetensors
from interop.names import canonical_names, params_to_numpy

BOS, IMAGE = "<bos>", "<image>"
SPECIALS = (PAD, BOS, EOS, IMAGE)
DIGIT_WORDS = "zero one two three four five six seven eight nine".split()

WAYS: dict[str, tuple[tuple[float, Callable[[str], str]], ...]] = {
    "math": (
        (0.5, lambda a: f"It is {a}."),
        (0.3, lambda a: f"about {round(int(a), -1)}"),
        (0.2, str),
    ),
    "code": ((0.5, lambda a: f"# {a}"), (0.3, lambda a: f">>> {a}"), (0.2, str)),
    "reasoning": (
        (0.5, lambda a: f"I think {a}"),
        (0.3, lambda a: f"The answer is {a}."),
        (0.2, str),
    ),
    "vision": (
        (0.5, lambda a: DIGIT_WORDS[int(a)]),
        (0.3, lambda a: f"a handwritten {DIGIT_WORDS[int(a)]}"),
        (0.2, str),
    ),
    "bits": ((1.0, str),),
}
"""for each task, how often the corpus answers in which way"""

ITEMS = {"math": 5_500, "code": 6_000, "reasoning": 2_500, "bits": 2_000, "vision": 2_000}
BATCH = {"math": 96, "vision": 24, "bits": 4, "code": 48, "reasoning": 32}


GROUPS = (("math", "vision", "bits"), ("code", "reasoning"))
"""tasks that share a row length, short and long"""


@dataclasses.dataclass(frozen=True)
class Args:
    out: Path
    """directory to create"""
    steps: int = 2200
    """optimizer updates"""
    adamw_rate: float = 2e-3
    """peak rate of embeddings, norms and projector: a warm-up, then a cosine to a twentieth"""
    muon_rate: float = 0.02
    """peak rate of the layers' matrices"""
    hidden: int = 128
    """width of the model"""
    layers: int = 4
    """blocks of the model"""
    vocabulary: int = 768
    """tokens at most; this corpus yields 540"""
    seed: int = 0
    """of items, draws and the first weights"""
    log_every: int = 50
    """steps from one row and checkpoint to the next"""
    evaluate_every: int = 550
    """steps from one evaluation to the next"""
    resume: bool = False
    """go on with a killed run in `out`"""


class Encoded(NamedTuple):
    """Every item of a task in every way."""

    tokens: Int[np.ndarray, "ways items time"]
    weights: Float[np.ndarray, "ways items time"]  # of the loss: 1 answer, 0.1 prompt, 0 padding
    patches: Float[np.ndarray, "items patches pixels"]


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """Byte-level BPE in which every digit is its own token and every text begins with <bos>."""
    tokenizer = train_bpe(texts, vocabulary, SPECIALS)
    # what a colleague's AutoTokenizer does by itself; our own encoding puts it there explicitly
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def items_of(task: str, split: Split, count: int, seed: int) -> list[Item]:
    """`count` items of a split of a task; of the digits, as many as there are up to that."""
    if task == "vision":
        return list(distinct(digits(IMAGE), split))[:count]
    return take(procedural(task, seed, IMAGE), split, count)


def encode(tokenizer: Tokenizer, task: str, items: list[Item]) -> Encoded:
    """The rows of a task, padded on the left to its longest."""
    vocabulary = tokenizer.get_vocab()
    bos, eos, pad_id = (vocabulary[t] for t in (BOS, EOS, PAD))
    prompts = prompt_rows(tokenizer, [i.prompt for i in items], bos)
    answers = [
        [row + [eos] for row in prompt_rows(tokenizer, [way(i.answer) for i in items], None)]
        for _, way in WAYS[task]
    ]
    length = max(len(p) + len(a) for way in answers for p, a in zip(prompts, way, strict=True))
    tokens, weights = [], []
    for way in answers:
        rows, mask = pad([p + a for p, a in zip(prompts, way, strict=True)], length, pad_id, True)
        answered = np.arange(length) >= length - np.array([len(a) for a in way])[:, None]
        tokens.append(rows)
        weights.append((mask * np.where(answered, 1.0, 0.1)).astype(np.float32))
    return Encoded(np.stack(tokens), np.stack(weights), patches_of(items))


def draw(rng: np.random.Generator, encoded: dict[str, Encoded], tasks: Iterable[str]):
    """One batch of several tasks: each row an item in a way drawn by its frequency."""
    parts = []
    for task in tasks:
        rows = encoded[task]
        way = rng.choice(len(WAYS[task]), BATCH[task], p=[f for f, _ in WAYS[task]])
        item = rng.integers(rows.tokens.shape[1], size=BATCH[task])
        # pixel noise, so that 1,258 images are not learnt by heart
        noise = rng.normal(0, 0.1, (BATCH[task], *rows.patches.shape[1:]))
        seen = (rows.patches[item] + noise).astype(np.float32)
        parts.append((rows.tokens[way, item], rows.weights[way, item], seen))
    length = max(tokens.shape[1] for tokens, _, _ in parts)

    def widen(x):
        return np.pad(x, ((0, 0), (length - x.shape[1], 0)))  # the pad token is 0

    return tuple(
        np.concatenate(leaves)
        for leaves in zip(*((widen(t), widen(w), p) for t, w, p in parts), strict=True)
    )


def logits_fn(params, decoder: Decoder, tokens, weights, patches):
    """Logits of every token of rows of text with images."""
    images = vision.project(params["projector"], patches)
    with nn.intercept_methods(fast_dense):
        logits, _ = decoder.apply({"params": params["decoder"]}, tokens, weights > 0, images=images)
    return logits


def loss_fn(params, decoder: Decoder, batches):
    """Weighted next-token cross-entropy in nats, over all batches."""
    total, weight = 0.0, 0.0
    for tokens, weights, patches in batches:
        logits = logits_fn(params, decoder, tokens, weights, patches)[:, :-1]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        total += (losses * weights[:, 1:]).sum()
        weight += weights[:, 1:].sum()
    return total / weight


def optimizer(args: Args) -> optax.GradientTransformation:
    """Muon on the matrices of the layers, AdamW on embeddings, norms and projector."""

    def schedule(peak):
        warm_up = min(100, args.steps // 10)
        return optax.warmup_cosine_decay_schedule(0, peak, warm_up, args.steps, 0.05 * peak)

    def label(path, leaf):
        in_layer = any(str(getattr(k, "key", "")).startswith("layers_") for k in path)
        return "muon" if in_layer and leaf.ndim == 2 else "adamw"

    muon = optax.chain(
        optax.contrib.scale_by_muon(
            weight_dimension_numbers=lambda tree: jax.tree.map(
                lambda _: optax.contrib.MuonDimensionNumbers(), tree
            )
        ),
        optax.add_decayed_weights(0.01),
        optax.scale_by_learning_rate(schedule(args.muon_rate)),
    )
    return optax.partition(
        {"muon": muon, "adamw": optax.adamw(schedule(args.adamw_rate))},
        lambda params: jax.tree_util.tree_map_with_path(label, params),
    )


def make_evaluate(decoder: Decoder, tokenizer: Tokenizer, seed: int):
    """A function of the parameters that scores every way of every task on validation items.

    greedy_accuracy: the way is what the model writes. first_token_probability: how often it
    would begin so. skill: greedy accuracy where the first token, which chooses the way, is one
    of those with which answers of this way begin.
    """
    encoded = {t: encode(tokenizer, t, items_of(t, "validation", 200, seed)) for t in WAYS}

    @jax.jit
    def scores(params, tokens, weights, patches):
        logits = logits_fn(params, decoder, tokens, weights, patches)[:, :-1]
        wanted, answered = tokens[:, 1:], weights[:, 1:] == 1
        first = answered & (jnp.cumsum(answered, axis=1) == 1)
        begins = jnp.zeros(logits.shape[-1], bool).at[wanted].max(first)
        kept = jnp.where(first[..., None] & ~begins, -jnp.inf, logits)
        logp = jax.nn.log_softmax(logits)
        chosen = jnp.take_along_axis(logp, wanted[..., None], axis=-1)[..., 0]
        way = jnp.exp(jnp.where(first, chosen, 0).sum(axis=1))

        def right(logits):
            return ((logits.argmax(-1) == wanted) | ~answered).all(axis=1).mean()

        return right(logits), way.mean(), right(kept)

    def evaluate(params) -> dict[str, float]:
        out = {}
        for task, rows in encoded.items():
            for way, (tokens, weights) in enumerate(zip(rows.tokens, rows.weights, strict=True)):
                names = ("greedy_accuracy", "first_token_probability", "skill")
                values = map(float, scores(params, tokens, weights, rows.patches))
                named = zip(names, values, strict=True)
                out |= {f"{task}/way_{way}/{name}": round(value, 4) for name, value in named}
        return out

    return evaluate


def train(run: runs.Run, args: Args, decoder: Decoder, params, encoded, evaluate):
    """Run the updates; a row and a checkpoint every `log_every`."""
    tx = optimizer(args)

    @jax.jit
    def step(params, state, batches):
        loss, grads = jax.value_and_grad(loss_fn)(params, decoder, batches)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    rng, losses = np.random.default_rng(args.seed), []
    start, (params, state) = runs.restore_latest(run, (params, tx.init(params))) or (
        0,
        (params, tx.init(params)),
    )
    for _ in range(start):  # one stream for the whole run: what is done is drawn again
        [draw(rng, encoded, tasks) for tasks in GROUPS]
    with runs.progress(args.steps, "nano", initial=start) as advance:
        for i in range(start + 1, args.steps + 1):
            batches = [draw(rng, encoded, tasks) for tasks in GROUPS]
            params, state, loss = step(params, state, batches)
            losses.append(loss)
            if i % args.log_every == 0:
                mean, losses = float(np.mean(losses)), []
                evaluated = evaluate(params) if i % args.evaluate_every == 0 else {}
                runs.log(run, {"step": i, "loss": mean, **evaluated})
                runs.save(run, i, (params, state))
                advance(args.log_every, loss=mean)
    return params


def in_half_precision(params):
    """What the shipped file holds: the decoder rounded to float16, in float32."""
    half = jax.tree.map(lambda w: w.astype(jnp.float16).astype(jnp.float32), params["decoder"])
    return {**params, "decoder": half}


def write(run: runs.Run, args: Args, spec: DecoderSpec, params, tokenizer, metrics) -> None:
    """The Phase 6 pair in half precision, with where it came from in the side-car."""
    names = canonical_names(spec)
    tensors = params_to_numpy(jax.device_get(params["decoder"]), names)
    half = {k: v.astype(np.float16) for k, v in tensors.items()}
    write_safetensors(run.path / "phase6.safetensors", half)
    projector = {k: np.asarray(v, np.float32) for k, v in params["projector"].items()}
    write_safetensors(run.path / "phase6.vision.safetensors", projector)
    tokenizer.save(str(run.path / "tokenizer.json"))
    ids = {f"{n}_token_id": tokenizer.token_to_id(f"<{n}>") for n in ("pad", "bos", "eos", "image")}
    architecture = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    config = {**architecture, **dataclasses.asdict(spec), **ids}
    provenance = {
        "command": f"python -m experiments.nano --out {run.final}",
        "settings": run.config,
        "ways": {task: [f for f, _ in ways] for task, ways in WAYS.items()},
        "data_seed": args.seed,
        "metrics": "of the half-precision file, on 200 validation items a task",
        "versions": {p: version(p) for p in ("jax", "flax", "optax", "reasoning-gym")},
        "seconds": round(runs.seconds(run)),
    }
    metadata = {"phase": 6, "metrics": metrics, "provenance": provenance}
    record = {"config": config, "metadata": metadata, "has_optimizer": False}
    extra = {"has_extra_tensors": False, "extra_tensor_keys": []}
    runs.write_json(run.path / "phase6.json", record | extra)


@runs.clean_errors()
def main(args: Args) -> None:
    """Train, evaluate and write."""
    if args.log_every < 1 or args.evaluate_every % args.log_every:
        raise ValueError(
            "`log_every` must be at least 1 and divide `evaluate_every`, "
            f"got {args.log_every} and {args.evaluate_every}."
        )
    if not args.resume:
        runs.refuse_existing(args.out)
    items = {task: items_of(task, "train", ITEMS[task], args.seed) for task in WAYS}
    texts = (i.prompt + way(i.answer) for t in WAYS for i in items[t][:3000] for _, way in WAYS[t])
    tokenizer = train_tokenizer(texts, args.vocabulary)
    encoded = {task: encode(tokenizer, task, items[task]) for task in WAYS}
    spec = DecoderSpec(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=args.hidden,
        intermediate_size=3 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=args.hidden // 4,
        max_position_embeddings=1024,
        image_token_id=tokenizer.token_to_id(IMAGE),
    )
    decoder, keys = Decoder(spec), jax.random.split(jax.random.key(args.seed))
    params = {
        "decoder": decoder.init(keys[0], jnp.zeros((1, 4), jnp.int32))["params"],
        "projector": vision.init_projector(keys[1], args.hidden),
    }
    with runs.opened(args.out, args, resume=args.resume) as run:
        evaluate = make_evaluate(decoder, tokenizer, args.seed)
        params = train(run, args, decoder, params, encoded, evaluate)
        metrics = evaluate(in_half_precision(params))
        write(run, args, spec, params, tokenizer, metrics)
        for name, value in metrics.items():
            print(f"{name:45s} {value:.3f}")
        print(f"wrote {runs.finish(run)} after {runs.seconds(run):.0f} s")


if __name__ == "__main__":
    main(tyro.cli(Args, prog="python -m experiments.nano", description=__doc__))
