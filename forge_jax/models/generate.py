"""Sampling from a decoder: prefill and decode in one program, samples sharing their prompt."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from forge_jax.models.attention import Cache, init_cache, repeat_cache
from forge_jax.models.spec import DecoderSpec

Apply = Callable[..., Any]
"""`apply(tokens, mask, cache, images=..., logits_from=...) -> (logits, cache)`, as
`functools.partial(decoder.apply, {"params": params})`"""


class Generated(NamedTuple):
    """Tokens that followed the prompts."""

    tokens: Int[Array, "rows time"]  # pad token after the stop token
    mask: Bool[Array, "rows time"]  # True up to and with the stop token


def pad_left(
    tokens: Int[Array, "batch time"], mask: Bool[Array, "batch time"]
) -> tuple[Int[Array, "batch time"], Bool[Array, "batch time"]]:
    """The same rows with what padding stood behind them in front.

    Tokenizers pad behind unless told otherwise, and what follows a prompt follows its last slot.
    """
    behind = jnp.argmax(mask[:, ::-1], axis=1)
    return _rolled(tokens, behind), _rolled(mask, behind)


def pad_right(
    tokens: Int[Array, "batch time"], mask: Bool[Array, "batch time"]
) -> tuple[Int[Array, "batch time"], Bool[Array, "batch time"]]:
    """The same rows with what padding stood before them behind."""
    before = jnp.argmax(mask, axis=1)
    return _rolled(tokens, -before), _rolled(mask, -before)


def _rolled(x, shifts: Int[Array, " batch"]) -> Array:
    """Every row moved right by its own number of places, what falls off in front."""
    source = (np.arange(x.shape[1]) - shifts[:, None]) % x.shape[1]
    return jnp.take_along_axis(jnp.asarray(x), source, axis=1)


def keep_top_k(logits: Float[Array, "rows vocab"], k: int) -> Float[Array, "rows vocab"]:
    """Every logit below the k-th largest of its row to -inf; ties with it stay."""
    threshold = jax.lax.top_k(logits, min(k, logits.shape[-1]))[0][:, -1:]
    return jnp.where(logits < threshold, -jnp.inf, logits)


def keep_top_p(logits: Float[Array, "rows vocab"], p: float) -> Float[Array, "rows vocab"]:
    """The fewest most probable tokens with total probability of at least `p`; the others to -inf.

    Nucleus sampling (Holtzman et al. 2020, eq. 2); at least one token stays, and ties with the
    least probable of them.
    """
    ordered = jnp.sort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    kept = jnp.where((before < p).at[:, 0].set(True), ordered, jnp.inf)
    return jnp.where(logits < kept.min(axis=-1, keepdims=True), -jnp.inf, logits)


def next_token(
    logits: Float[Array, "rows vocab"], key: Array, temperature: float, top_k: int, top_p: float
) -> Int[Array, " rows"]:
    """Draw one token per row; `temperature` 0 takes the largest logit.

    Temperature, then `top_k` (0 is off), then `top_p` (1 is off), as in transformers.
    """
    if temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / temperature
    if top_k:
        logits = keep_top_k(logits, top_k)
    if top_p < 1:
        logits = keep_top_p(logits, top_p)
    return jax.random.categorical(key, logits).astype(jnp.int32)


def generate(
    apply: Apply,
    spec: DecoderSpec,
    tokens: Int[Array, "batch time"],
    mask: Bool[Array, "batch time"],
    key: Array,
    *,
    max_new_tokens: int,
    stop_tokens: Sequence[int] = (),
    pad_token: int = 0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    samples: int = 1,
    images: Float[Array, "batch patches hidden"] | None = None,
) -> Generated:
    """Continue every prompt `samples` times; padding may stand on either side of it.

    A prompt is read once, whatever the number of its samples. Rows of the result are the samples
    of the first prompt, then those of the second. The loop ends when every row has stopped. The
    knobs are Python numbers: under `jax.jit` they are static.

    Raises:
      ValueError: a knob is out of its range.
    """
    if max_new_tokens < 1 or samples < 1:
        raise ValueError(f"Wanted {max_new_tokens=} and {samples=} to be at least 1.")
    if temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(
            "Wanted temperature >= 0, top_k >= 0 and 0 < top_p <= 1, got "
            f"{temperature=}, {top_k=}, {top_p=}."
        )
    tokens, mask = pad_left(tokens, mask)
    batch, time = tokens.shape
    cache = init_cache(spec, batch, time + max_new_tokens - 1)
    logits, cache = apply(tokens, mask, cache, images=images, logits_from=-1)
    # a gather: XLA's CPU backend compiles argmax of jnp.repeat for minutes (vocabulary 19 or 23)
    prompt_of_row = np.repeat(np.arange(batch), samples)
    logits, cache = logits[prompt_of_row, -1], repeat_cache(cache, samples)
    stops, keys = jnp.asarray(stop_tokens, jnp.int32), jax.random.split(key, max_new_tokens)

    def choose(logits, done, step):
        token = next_token(logits, keys[step], temperature, top_k, top_p)
        token = jnp.where(done, pad_token, token)
        return token, done | jnp.isin(token, stops)

    return decode(apply, choose, logits, cache, max_new_tokens, pad_token)


def decode(
    apply: Apply,
    choose: Callable[..., tuple[Int[Array, " rows"], Bool[Array, " rows"]]],
    logits: Float[Array, "rows vocab"],
    cache: Cache,
    max_new_tokens: int,
    pad_token: int,
) -> Generated:
    """Continue rows whose prompts are in the cache, until all are done.

    `choose(logits, done, step) -> (token, done)` picks each row's token and says where it was
    the last; `logits` are those that follow the prompts.
    """
    rows = logits.shape[0]
    out = jnp.full((rows, max_new_tokens), pad_token, jnp.int32)
    live = jnp.zeros((rows, max_new_tokens), bool)
    first, done = choose(logits, jnp.zeros(rows, bool), 0)
    carry = (1, done, out.at[:, 0].set(first), live.at[:, 0].set(True), cache)

    def unfinished(carry):
        step, done, *_ = carry
        return (step < max_new_tokens) & ~jnp.all(done)

    def body(carry):
        step, done, out, live, cache = carry
        logits, cache = apply(out[:, step - 1][:, None], ~done[:, None], cache)
        token, stopped = choose(logits[:, -1], done, step)
        return step + 1, stopped, out.at[:, step].set(token), live.at[:, step].set(~done), cache

    _, _, out, live, _ = jax.lax.while_loop(unfinished, body, carry)
    return Generated(out, live)


def response_logits(
    apply: Apply,
    spec: DecoderSpec,
    tokens: Int[Array, "batch time"],
    mask: Bool[Array, "batch time"],
    responses: Int[Array, "rows response_time"],
    response_mask: Bool[Array, "rows response_time"],
    *,
    images: Float[Array, "batch patches hidden"] | None = None,
) -> Float[Array, "rows response_time vocab"]:
    """The logits from which every token of the responses was (or would be) drawn.

    There are rows / batch responses to every prompt, in the order of `generate`; the prompt, whose
    padding may stand on either side, is read once for all of them. Responses are right-padded.
    Differentiable in whatever `apply` closes over. Logits after the end of a response mean nothing.
    An `apply` that returns a tree of arrays (batch, time, ...) in place of logits, as `with_hidden`
    makes one, has the same tree returned.

    Raises:
      ValueError: the responses are no multiple of the prompts.
    """
    (batch, time), (rows, length) = tokens.shape, responses.shape
    if rows % batch or not rows or not length:
        raise ValueError(
            f"`responses` must have a multiple of {batch} rows and a token, got {responses.shape}."
        )
    tokens, mask = pad_left(tokens, mask)
    cache = init_cache(spec, batch, time + length - 1)
    first, cache = apply(tokens, mask, cache, images=images, logits_from=-1)
    prompt_of_row = np.repeat(np.arange(batch), rows // batch)
    first = jax.tree.map(lambda x: x[prompt_of_row], first)
    if length == 1:
        return first
    cache = repeat_cache(cache, rows // batch)
    later, _ = apply(responses[:, :-1], response_mask[:, :-1], cache)
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), first, later)


def with_hidden(apply: Apply) -> Apply:
    """`apply(tokens, ...) -> ((logits, hidden), cache)` of a decoder's `apply`.

    `hidden` (batch, kept, hidden) is what the logits are computed from: the last layer's output
    after the last norm. A value head or a classifier reads it.
    """

    def both(*args, **kwargs):
        (logits, cache), found = apply(*args, mutable=["intermediates"], **kwargs)
        return (logits, found["intermediates"]["hidden"][0]), cache

    return both
