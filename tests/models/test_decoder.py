"""The decoder against itself (causal, padded, cached) and against NumPy transcriptions."""

import dataclasses
import functools
import math
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from forge_jax.models import Cache, Decoder, DecoderSpec, init_cache, repeat_cache
from forge_jax.models.attention import attend, rotary, rotate
from forge_jax.models.decoder import place_images

SPEC = DecoderSpec(
    vocab_size=23,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    image_token_id=3,
)
DECODER = Decoder(SPEC)
traces = []


@functools.partial(jax.jit, static_argnames="logits_from")
def forward(*args, **kwargs) -> Any:
    traces.append(None)
    return DECODER.apply(*args, **kwargs)


@functools.cache
def make_params(spec=SPEC) -> Any:
    return jax.jit(Decoder(spec).init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]


def logits(tokens, mask=None, **kwargs):
    """Logits of a pass without a cache, NumPy."""
    return np.asarray(forward({"params": make_params()}, tokens, mask, **kwargs)[0])


def draw(batch, time, seed=0) -> Any:
    return np.random.default_rng(seed).integers(4, 23, (batch, time)).astype(np.int32)


def left_padded(lengths, time, seed=0) -> Any:
    mask = np.arange(time) >= time - np.array(lengths)[:, None]
    return np.where(mask, draw(len(lengths), time, seed), 0).astype(np.int32), mask


@pytest.mark.parametrize("j", [0, 3, 6])
def test_logits_do_not_see_later_tokens(j):
    tokens = draw(2, 7)
    changed = tokens.copy()
    changed[:, j] = 4 + (tokens[:, j] - 3) % 19
    before, after = logits(tokens), logits(changed)
    np.testing.assert_array_equal(before[:, :j], after[:, :j])
    assert np.abs(before[:, j:] - after[:, j:]).max(axis=-1).min() > 1e-4


def test_left_padding_changes_no_real_token():
    tokens, mask = left_padded([7, 4, 1], 7)
    got = logits(tokens, mask)
    assert np.isfinite(got).all()
    # the same rows without padding; what follows them is invisible, so one shape does for all
    alone = np.stack([np.roll(row, -np.argmax(m)) for row, m in zip(tokens, mask, strict=True)])
    want = logits(alone)
    for row, length in enumerate([7, 4, 1]):
        np.testing.assert_allclose(got[row, 7 - length :], want[row, :length], atol=1e-5)
    # what the padding is made of does not matter, but that it is padding does
    other = np.where(mask, tokens, 9).astype(np.int32)
    np.testing.assert_allclose(logits(other, mask)[mask], got[mask], atol=1e-6)
    assert np.abs(logits(tokens)[1, -1] - got[1, -1]).max() > 1e-2


def cached(tokens, mask, pieces, slots):
    """Logits of a pass in pieces through a cache of `slots` slots."""
    cache, out, start = init_cache(SPEC, len(tokens), slots), [], 0
    for size in pieces:
        piece = slice(start, start + size)
        got, cache = forward({"params": make_params()}, tokens[:, piece], mask[:, piece], cache)
        out.append(got)
        start += size
    assert isinstance(cache, Cache)
    assert int(cache.index) == start
    return np.concatenate(out, axis=1)


@pytest.mark.parametrize(("pieces", "slots"), [((7,), 7), ((4, 3), 9)])
def test_cached_passes_equal_the_full_pass(pieces, slots):
    """All at once, and several tokens after the prefill; free slots are not seen."""
    tokens, mask = left_padded([7, 5, 2], 7)
    got = cached(tokens, mask, pieces, slots)
    np.testing.assert_allclose(got[mask], logits(tokens, mask)[mask], atol=1e-5)


def test_masked_tokens_after_the_prefill_are_not_seen():
    """What a stopped row is fed in the decoding loop leaves no trace."""
    tokens, mask = left_padded([4, 4, 4], 7)
    held, gap = mask.copy(), slice(5, 6)
    tokens[:, gap], held[:, gap] = 9, False
    other = tokens.copy()
    other[:, gap] = 11
    got = [cached(t, held, (4, 3), 9)[:, 6] for t in (tokens, other)]
    np.testing.assert_allclose(got[0], got[1], atol=1e-6)


def test_samples_share_the_prompt_of_a_repeated_cache():
    tokens, mask = left_padded([4], 4)
    later, all_real = draw(3, 3, seed=1), np.ones((3, 3), bool)
    params = {"params": make_params()}
    _, cache = forward(params, tokens, mask, init_cache(SPEC, 1, 9))
    got, _ = forward(params, later, all_real, repeat_cache(cache, 3))
    rows = np.concatenate([np.repeat(tokens, 3, axis=0), later], axis=1)
    rows_mask = np.concatenate([np.repeat(mask, 3, axis=0), all_real], axis=1)
    np.testing.assert_allclose(got, logits(rows, rows_mask)[:, 4:], atol=1e-5)
    two = repeat_cache(init_cache(SPEC, 2, 3)._replace(mask=np.eye(2, 3, dtype=bool)), 2)
    np.testing.assert_array_equal(two.mask, np.eye(2, 3, dtype=bool)[[0, 0, 1, 1]])


@pytest.mark.parametrize("start", [4, -1])
def test_logits_from_keeps_the_last(start):
    tokens = draw(2, 7)
    np.testing.assert_allclose(
        logits(tokens, logits_from=start), logits(tokens)[:, start:], atol=1e-6
    )


def test_images_stand_in_the_order_of_their_tokens():
    """The pass with images is the pass of an embedding table that holds them as extra words."""
    tokens = draw(2, 7)
    tokens[0, [1, 2, 5]], tokens[1, [0, 6]] = 3, 3
    images = np.random.default_rng(2).normal(size=(2, 3, 16)).astype(np.float32)
    got = logits(tokens, images=images)

    params, wide = make_params(), tokens.copy()
    wide[0, [1, 2, 5]], wide[1, [0, 6]] = [23, 24, 25], [26, 27]
    table = np.concatenate([params["embed_tokens"]["embedding"], images.reshape(6, 16)])
    model = Decoder(dataclasses.replace(SPEC, vocab_size=29))
    want, _ = jax.jit(model.apply)(
        {"params": params | {"embed_tokens": {"embedding": table}}}, wide
    )
    np.testing.assert_allclose(got, want[..., :23], atol=1e-5)
    assert np.abs(got - logits(tokens)).max() > 0.1
    swapped = logits(tokens, images=images[:, ::-1])
    assert np.abs(got - swapped).max() > 0.1


def test_place_images_leaves_rows_without_image_tokens():
    x, is_image = jnp.ones((1, 3, 2)), jnp.zeros((1, 3), bool)
    np.testing.assert_array_equal(place_images(x, is_image, jnp.zeros((1, 2, 2))), x)


def test_every_parameter_gets_a_gradient():
    spec = dataclasses.replace(SPEC, tie_word_embeddings=False)
    params, tokens = make_params(spec), draw(2, 7)
    tokens[:, 2] = 3
    images = jnp.ones((2, 1, 16))

    @jax.jit
    def grads(params, images):
        def loss(params, images):
            out, _ = Decoder(spec).apply({"params": params}, tokens, images=images)
            logp = jax.nn.log_softmax(out[:, :-1])
            return -jnp.take_along_axis(logp, tokens[:, 1:, None], axis=-1).mean()

        return jax.grad(loss, argnums=(0, 1))(params, images)

    leaves = jax.tree_util.tree_leaves_with_path(grads(params, images))
    assert len(leaves) == 2 * 9 + 3 + 1
    weak = [jax.tree_util.keystr(path) for path, g in leaves if not float(jnp.abs(g).max()) > 1e-6]
    assert weak == []


def test_an_untrained_decoder_knows_nothing():
    losses = []
    for seed in range(20):
        tokens = draw(3, 7, seed)
        out = logits(tokens)[:, :-1].astype(np.float64)
        chosen = np.take_along_axis(out, tokens[:, 1:, None], axis=-1)[..., 0]
        losses.append((np.log(np.exp(out).sum(-1)) - chosen).mean())
    assert math.log(23) - 0.1 < np.mean(losses) < math.log(23) + 1.5


def test_grouped_heads_equal_full_heads_with_repeated_keys():
    full = dataclasses.replace(SPEC, num_key_value_heads=4)
    params, tokens = make_params(), draw(2, 7)

    def widen(path, leaf):
        if not any(key.key in ("k_proj", "v_proj") for key in path):
            return leaf
        return jnp.repeat(leaf.reshape(16, 2, 6), 2, axis=1).reshape(16, 24)

    wide = jax.tree_util.tree_map_with_path(widen, params)
    want, _ = jax.jit(Decoder(full).apply)({"params": wide}, tokens)
    np.testing.assert_allclose(logits(tokens), want, atol=1e-5)


def test_rotary_positions_multiply_by_complex_units():
    rng = np.random.default_rng(0)
    x, positions = rng.normal(size=(2, 3, 5, 8)).astype(np.float32), rng.integers(0, 50, (2, 5))
    got = rotate(jnp.asarray(x), rotary(jnp.asarray(positions), 50, 8, 500.0))
    angles = positions[:, None, :, None] * 500.0 ** (-2 * np.arange(4) / 8)
    want = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angles)
    np.testing.assert_allclose(got, np.concatenate([want.real, want.imag], -1), atol=1e-5)


def attention_by_loops(q, k, v, mask):
    """Every query head by itself; head h reads key head h // (heads / kv_heads)."""
    out, groups = np.zeros_like(q), q.shape[1] // k.shape[1]
    for b, h, t in np.ndindex(q.shape[:3]):
        scores = k[b, h // groups] @ q[b, h, t] / math.sqrt(q.shape[-1])
        weights = np.where(mask[b, t], np.exp(scores - scores[mask[b, t]].max()), 0)
        out[b, h, t] = weights @ v[b, h // groups] / weights.sum()
    return out


def test_attention_equals_loops():
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=s).astype(np.float32) for s in ((2, 4, 3, 6), *[(2, 2, 5, 6)] * 2))
    mask = rng.random((2, 3, 5)) < 0.6
    mask[..., 0] = True
    got = attend(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), jnp.asarray(mask))
    np.testing.assert_allclose(got, attention_by_loops(q, k, v, mask), atol=1e-5)


def test_half_precision_parameters_give_float32_logits():
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), make_params())
    cache = init_cache(SPEC, 2, 8, jnp.bfloat16)
    call = functools.partial(DECODER.apply, {"params": params}, draw(2, 7), None, cache)
    out, after = jax.eval_shape(call)
    assert out.dtype == jnp.float32
    chex.assert_trees_all_equal_shapes_and_dtypes(after, cache)


def test_one_trace_for_every_step_of_a_cache():
    tokens, mask = left_padded([7, 4, 1], 7)
    before = len(traces)
    got = cached(tokens, mask, (4, 1, 1, 1), 8)
    assert len(traces) - before == 2  # the prefill and the steps
    np.testing.assert_allclose(got[mask], logits(tokens, mask)[mask], atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_key_value_heads": 3}, "multiple of `num_key_value_heads`, got 4 and 3"),
        ({"head_dim": 5}, "even `head_dim`, got 5"),
    ],
)
def test_refuses_impossible_shapes(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SPEC, **fields)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mask": jnp.ones((2, 6), bool)}, r"shape \(2, 7\), got \(2, 6\)"),
        ({"cache": init_cache(SPEC, 3, 9)}, r"2 rows and room for 7 tokens, got \(3, 9\)"),
        ({"cache": init_cache(SPEC, 2, 6)}, r"2 rows and room for 7 tokens, got \(2, 6\)"),
        ({"images": jnp.ones((2, 4, 8))}, r"\(2, 'patches', 16\), got \(2, 4, 8\)"),
        ({"images": jnp.ones((1, 4, 16))}, r"\(2, 'patches', 16\), got \(1, 4, 16\)"),
        ({"images": jnp.ones((2, 0, 16))}, r"got \(2, 0, 16\)"),
    ],
)
def test_refuses_arguments_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(DECODER.apply, {"params": make_params()}, draw(2, 7), **arguments)


def test_refuses_images_without_an_image_token():
    blind = Decoder(dataclasses.replace(SPEC, image_token_id=None))
    with pytest.raises(ValueError, match="image_token_id"):
        jax.eval_shape(
            blind.apply, {"params": make_params()}, draw(2, 7), images=jnp.ones((2, 1, 16))
        )
