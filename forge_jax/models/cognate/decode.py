"""Inference that stops: recursion in a `while_loop`, and tokens one after the other.

A token that has halted keeps its answer; later tokens that recurse further attend to it. So one
pass over a row and token-by-token decoding give the same logits.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from forge_jax.models.cognate.attention import KeysValues, behind
from forge_jax.models.cognate.config import Controls
from forge_jax.models.cognate.model import Carry, Cognate, empty_carry, init_carry


class Inference(NamedTuple):
    """Logits of every token's last answer, and what they took."""

    logits: Float[Array, "batch time vocab"]
    answers: Int[Array, "batch time"]  # made by each token, the first among them: 1 .. steps + 1
    loops: Int[Array, ""]  # recursion steps that were run, for the slowest token
    carry: Carry


class _Loop(NamedTuple):
    step: Int[Array, ""]
    y: Float[Array, "batch time d"]
    z: Float[Array, "batch time d"]
    running: Array  # (batch, time) bool
    answers: Int[Array, "batch time"]
    caches: KeysValues  # with the steps as first axis


def infer(
    model: Cognate,
    params: Any,
    tokens: Int[Array, "batch time"],
    segments: Int[Array, "batch time"] | None = None,
    carry: Carry | None = None,
    controls: Controls = Controls(),  # noqa: B008  a tuple of numbers
) -> Inference:
    """Recurse until every token has halted, each once its halting probability is above threshold.

    With a threshold of 1 all steps are made, and the logits are those of the model's last answer.
    Errors are those of calling the model.
    """
    config = model.config

    def call(method, *args) -> Any:
        return model.apply({"params": params}, *args, method=method)

    features, new = call("features", tokens, segments, carry, controls)
    if carry is None:
        carry = empty_carry(config, tokens.shape[0], 0, None)
    time, place = tokens.shape[1], features.place
    y, z, own, turn = call("begin", features.values, place.positions)
    seen = behind(carry.features, own)

    def halts(z):
        return jax.nn.sigmoid(call("halt_logits", z)) > controls.halt_threshold

    def is_open(loop: _Loop):
        return (loop.step < config.steps) & loop.running.any()

    def body(loop: _Loop) -> _Loop:
        keys, values = carry.answers
        answers = behind((keys[loop.step], values[loop.step]), call("answer_keys", loop.y, turn))
        moved = call("step", loop.y, loop.z, seen, answers, place, turn)
        go = loop.running[..., None]
        y, z = (jnp.where(go, a, b) for a, b in zip(moved, (loop.y, loop.z), strict=True))
        keys, values = (
            c.at[loop.step].set(a[:, :, time:].astype(c.dtype))
            for c, a in zip(loop.caches, answers, strict=True)
        )
        count = loop.answers + loop.running
        return _Loop(loop.step + 1, y, z, loop.running & ~halts(z), count, (keys, values))

    # what the steps that are not run would have seen: the answers that did not change
    begun = _Loop(jnp.int32(0), y, z, ~halts(z), jnp.ones(tokens.shape, jnp.int32), carry.answers)
    loop = jax.lax.while_loop(is_open, body, begun)
    final = call("answer_keys", loop.y, turn)
    unused = jnp.arange(config.steps).reshape(-1, 1, 1, 1, 1) >= loop.step

    def fill(old, used, current):
        rest = jnp.concatenate(
            [old, jnp.broadcast_to(current, (len(old), *current.shape)).astype(old.dtype)], axis=3
        )
        return jnp.where(unused, rest[:, :, :, time:], used)

    keys, values = map(fill, carry.answers, loop.caches, final)
    kept = tuple(k[:, :, time:] for k in seen)
    new = new._replace(features=kept, answers=(keys, values))
    return Inference(call("logits", loop.y), loop.answers, loop.step, new)


class Continuation(NamedTuple):
    """Tokens written after the prompts."""

    tokens: Int[Array, "batch new"]
    answers: Int[Array, "batch new"]  # made before each was written


def continue_tokens(
    model: Cognate,
    params: Any,
    prompts: Int[Array, "batch time"],
    key: Array,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    segments: Int[Array, "batch time"] | None = None,
    controls: Controls = Controls(),  # noqa: B008
) -> Continuation:
    """Write `max_new_tokens` after each prompt, greedily or sampled at `temperature`.

    Prompts of different lengths are padded on the left, the padding being a document of its own
    in `segments`.

    Raises:
      ValueError: prompt and continuation do not fit into `max_positions`, or `temperature` is
        negative.
    """
    config = model.config
    if max_new_tokens < 1 or prompts.shape[1] + max_new_tokens > config.max_positions:
        raise ValueError(
            f"A prompt and its continuation of at least 1 token must fit into "
            f"{config.max_positions} positions (`max_positions`), got {prompts.shape[1]} and "
            f"{max_new_tokens}."
        )
    if temperature < 0:
        raise ValueError(f"`temperature` must be at least 0, got {temperature}.")

    def choose(logits, key):
        if temperature == 0:
            return jnp.argmax(logits, axis=-1).astype(prompts.dtype)
        return jax.random.categorical(key, logits / temperature).astype(prompts.dtype)

    def write(state, key):
        out, carry = state
        token = choose(out[0], key)
        following = infer(model, params, token[:, None], carry.last[:, None], carry, controls)
        return ((following.logits[:, -1], following.answers[:, -1]), following.carry), (
            token,
            out[1],
        )

    start = init_carry(config, params, prompts.shape[0])
    first = infer(model, params, prompts, segments, start, controls)
    state = (first.logits[:, -1], first.answers[:, -1]), first.carry
    _, (tokens, answers) = jax.lax.scan(write, state, jax.random.split(key, max_new_tokens))
    return Continuation(tokens.T, answers.T)
