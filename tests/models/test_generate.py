"""Generation against full forward passes, NumPy sampling rules and transformers."""

import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from forge_jax.models import Decoder, DecoderSpec, generate, pad_left, pad_right, response_logits
from forge_jax.models.generate import keep_top_k, keep_top_p, next_token
from interop import params_from_torch
from interop.config import spec_from_config

SPEC = DecoderSpec(
    vocab_size=23,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    image_token_id=3,
)
DECODER = Decoder(SPEC)
NEW, PAD = 5, 1
forward = jax.jit(DECODER.apply)


@functools.cache
def make_params() -> Any:
    params = jax.jit(DECODER.init)(jax.random.key(1), jnp.zeros((1, 2), jnp.int32))["params"]
    return jax.tree.map(lambda p: 2 * p, params)  # livelier than at the start


@functools.cache
def prompts() -> Any:
    """Three prompts of 4, 2 and 1 tokens, padded on the left."""
    mask = np.arange(4) >= np.array([0, 2, 3])[:, None]
    tokens = np.random.default_rng(0).integers(4, 23, (3, 4)).astype(np.int32)
    return np.where(mask, tokens, 0).astype(np.int32), mask


@functools.cache
def compiled(**knobs):
    """A compiled `generate` with fixed knobs, and the list of its traces."""
    traces = []

    @jax.jit
    def run(params, tokens, mask, key, images=None):
        traces.append(None)
        apply = functools.partial(DECODER.apply, {"params": params})
        return generate(
            apply,
            SPEC,
            tokens,
            mask,
            key,
            max_new_tokens=NEW,
            pad_token=PAD,
            images=images,
            **knobs,
        )

    return run, traces


def run(tokens, mask, key=None, **knobs):
    key = jax.random.key(0) if key is None else key
    out = compiled(**knobs)[0](make_params(), tokens, mask, key)
    return np.asarray(out.tokens), np.asarray(out.mask)


def full_logits(tokens, mask, written):
    """Logits from which the written tokens follow, by one pass over prompts and tokens."""
    rows = len(written) // len(tokens)
    tokens = np.concatenate([np.repeat(tokens, rows, axis=0), written], axis=1)
    mask = np.concatenate([np.repeat(mask, rows, axis=0), np.ones(written.shape, bool)], axis=1)
    out, _ = forward({"params": make_params()}, tokens, mask)
    return np.asarray(out)[:, -written.shape[1] - 1 : -1]


@functools.cache
def step_by_step(stops=()):
    """Greedy tokens and mask: the largest logit of a full pass, one token at a time."""
    tokens, mask = prompts()
    out, live = np.full((3, NEW), PAD, np.int32), np.zeros((3, NEW), bool)
    done = np.zeros(3, bool)
    for i in range(NEW):
        chosen = full_logits(tokens, mask, out)[:, i].argmax(-1)
        out[:, i], live[:, i] = np.where(done, PAD, chosen), ~done
        done |= np.isin(out[:, i], stops)
    return out, live


def test_greedy_equals_full_passes():
    out, live = run(*prompts(), temperature=0.0)
    want, _ = step_by_step()
    np.testing.assert_array_equal(out, want)
    assert live.all()
    assert len(np.unique(want)) > 3


@pytest.mark.parametrize("dtype", [bool, np.int64])  # transformers' masks are integers
def test_padding_may_stand_behind_the_prompts(dtype):
    tokens, mask = prompts()
    behind = tuple(np.asarray(x) for x in pad_right(tokens, mask))
    assert behind[1][:, 0].all()
    assert not behind[1][1:, -1].any()
    again = pad_left(*behind)
    jax.tree.map(np.testing.assert_array_equal, (tokens, mask), tuple(again))
    out, live = run(behind[0], behind[1].astype(dtype), temperature=0.0)
    np.testing.assert_array_equal(out, step_by_step()[0])
    apply = functools.partial(DECODER.apply, {"params": make_params()})
    got = response_logits(apply, SPEC, *behind, out, live)
    np.testing.assert_allclose(got, full_logits(tokens, mask, out), atol=1e-5)


def test_greedy_stops_row_by_row():
    free, _ = step_by_step()
    stops = (int(free[0, 1]), int(free[2, 3]))
    want, want_live = step_by_step(stops)
    out, live = run(*prompts(), temperature=0.0, stop_tokens=stops)
    np.testing.assert_array_equal(out, want)
    np.testing.assert_array_equal(live, want_live)
    # some rows stop, not all at once, and nothing but padding follows
    assert len(set(live.sum(axis=1))) > 1
    assert (out[~live] == PAD).all()
    assert (~live).any()


def test_rows_may_all_stop_at_their_first_token():
    out, live = run(*prompts(), temperature=0.0, stop_tokens=tuple(range(23)))
    np.testing.assert_array_equal(out[:, 0], step_by_step()[0][:, 0])
    np.testing.assert_array_equal(live, np.arange(NEW) < np.ones((3, 1)))
    assert (out[:, 1:] == PAD).all()


def test_samples_share_their_prompt():
    """Samples of a prompt are what the prompt repeated gives, in its order."""
    tokens, mask = prompts()
    shared, _ = run(tokens, mask, samples=3)
    repeated, _ = run(np.repeat(tokens, 3, axis=0), np.repeat(mask, 3, axis=0))
    np.testing.assert_array_equal(shared, repeated)
    assert len(np.unique(shared, axis=0)) > 5
    other, _ = run(tokens, mask, jax.random.key(1), samples=3)
    assert (other != shared).any()


def test_one_trace_for_equal_shapes():
    tokens, mask = prompts()
    _, traces = compiled(samples=3)
    for seed in range(3):
        run(
            np.roll(tokens, seed, axis=0),
            np.roll(mask, seed, axis=0),
            jax.random.key(seed),
            samples=3,
        )
    assert len(traces) == 1


def test_sampled_tokens_follow_the_distribution():
    """First tokens of many samples against the softmax of a full pass, at temperature 1.5."""
    tokens, mask = prompts()
    out, _ = run(tokens[:1], mask[:1], temperature=1.5, top_k=6, samples=4000)
    logits = full_logits(tokens, mask, step_by_step()[0])[0, 0].astype(np.float64) / 1.5
    p = np.where(logits >= np.sort(logits)[-6], np.exp(logits), 0)
    p /= p.sum()
    found = np.bincount(out[:, 0], minlength=23) / 4000
    assert (found[p == 0] == 0).all()
    np.testing.assert_array_less(np.abs(found - p), 5 * np.sqrt(p * (1 - p) / 4000) + 1e-9)


@functools.cache
def compiled_response_logits():
    @jax.jit
    def run(params, tokens, mask, responses, response_mask, images=None):
        apply = functools.partial(DECODER.apply, {"params": params})
        return response_logits(apply, SPEC, tokens, mask, responses, response_mask, images=images)

    return run


@pytest.mark.parametrize("length", [1, NEW])
def test_response_logits_equal_the_full_pass(length):
    tokens, mask = prompts()
    responses = np.random.default_rng(1).integers(4, 23, (6, length)).astype(np.int32)
    live = np.ones((6, length), bool)
    got = compiled_response_logits()(make_params(), tokens, mask, responses, live)
    np.testing.assert_allclose(got, full_logits(tokens, mask, responses), atol=1e-5)


def test_response_logits_ignore_what_follows_the_end():
    tokens, mask = prompts()
    responses = np.random.default_rng(1).integers(4, 23, (6, NEW)).astype(np.int32)
    live = np.arange(NEW) < np.array([5, 1, 2, 3, 4, 5])[:, None]
    padded = np.where(live, responses, PAD).astype(np.int32)
    got = compiled_response_logits()(make_params(), tokens, mask, padded, live)
    want = full_logits(tokens, mask, responses)
    np.testing.assert_allclose(np.asarray(got)[live], want[live], atol=1e-5)


def test_response_logits_carry_the_gradient_of_the_full_pass():
    """Prompt, cache and samples are all on the way of the gradient; one layer shows it."""
    spec = dataclasses.replace(SPEC, num_hidden_layers=1)
    params = {k: v for k, v in make_params().items() if k != "layers_1"}
    tokens, mask = (x[:2] for x in prompts())
    responses: Any = np.random.default_rng(1).integers(4, 23, (4, 3)).astype(np.int32)
    live, weights = (
        jnp.ones((4, 3), bool),
        np.random.default_rng(2).normal(size=(4, 3, 23)).astype(np.float32),
    )

    @jax.jit
    def grads(params):
        def shared(params):
            apply = functools.partial(Decoder(spec).apply, {"params": params})
            return (response_logits(apply, spec, tokens, mask, responses, live) * weights).sum()

        def full(params):
            rows = np.concatenate([np.repeat(tokens, 2, axis=0), responses], axis=1)
            rows_mask = np.concatenate([np.repeat(mask, 2, axis=0), live], axis=1)
            out, _ = Decoder(spec).apply({"params": params}, rows, rows_mask)
            return (out[:, 3:-1] * weights).sum()

        return jax.grad(shared)(params), jax.grad(full)(params)

    for got, want in zip(*map(jax.tree.leaves, grads(params)), strict=True):
        assert np.abs(want).max() > 1e-3
        np.testing.assert_allclose(got, want, atol=1e-4 * float(np.abs(want).max()))


def test_images_belong_to_the_prompt():
    tokens, mask = prompts()
    tokens = np.where(np.arange(4) == 3, 3, tokens).astype(np.int32)  # every prompt ends in one
    images = np.random.default_rng(3).normal(size=(3, 1, 16)).astype(np.float32)
    key = jax.random.key(0)
    greedy = compiled(temperature=0.0, samples=2)[0]
    out = np.asarray(greedy(make_params(), tokens, mask, key, images).tokens)
    logits = compiled_response_logits()
    rows = (make_params(), tokens, mask, out, np.ones_like(out, bool))
    np.testing.assert_array_equal(np.asarray(logits(*rows, images)).argmax(-1), out)
    assert (np.asarray(logits(*rows, images[::-1])).argmax(-1) != out).any()
    behind = pad_right(tokens, mask)
    again = np.asarray(greedy(make_params(), *behind, key, images).tokens)
    np.testing.assert_array_equal(again, out)


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def nucleus(row, p):
    """The fewest most probable tokens with total probability of at least p, one by one."""
    kept, total = [], 0.0
    for token in np.argsort(-row):
        kept.append(token)
        total += softmax(row)[token]
        if total >= p:
            break
    return np.where(np.isin(np.arange(len(row)), kept), row, -np.inf)


def rows(seed=0) -> Any:
    return (3 * np.random.default_rng(seed).normal(size=(40, 23))).astype(np.float32)


@pytest.mark.parametrize("k", [1, 4, 23, 50])
def test_top_k_keeps_the_k_largest(k):
    want = np.where(np.argsort(np.argsort(-rows())) < k, rows(), -np.inf)
    np.testing.assert_array_equal(keep_top_k(jnp.asarray(rows()), k), want)


@pytest.mark.parametrize("p", [1e-6, 0.3, 0.9, 0.999])
def test_top_p_keeps_the_nucleus(p):
    want = np.stack([nucleus(row, p) for row in rows().astype(np.float64)])
    np.testing.assert_allclose(keep_top_p(jnp.asarray(rows()), p), want, rtol=1e-6)


def test_next_token_after_both_filters():
    """Frequencies of many draws of one row: temperature, then top-k, then top-p of what is left."""
    row = rows()[0] / 3
    x = row.astype(np.float64) / 0.7
    x = np.where(x >= np.sort(x)[-8], x, -np.inf)
    p = softmax(nucleus(x, 0.8))
    draws = next_token(jnp.tile(row, (20_000, 1)), jax.random.key(3), 0.7, 8, 0.8)
    found = np.bincount(np.asarray(draws), minlength=23) / 20_000
    assert 2 < (p > 0).sum() < 8
    assert (found[p == 0] == 0).all()
    np.testing.assert_array_less(np.abs(found - p), 5 * np.sqrt(p * (1 - p) / 20_000) + 1e-9)


@pytest.mark.torch
@pytest.mark.parametrize(("temperature", "k", "p"), [(0.7, 5, 0.9), (1.3, 23, 0.6)])
def test_filters_equal_those_of_transformers(temperature, k, p):
    torch = pytest.importorskip("torch")
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    want: Any = torch.from_numpy(rows(1))
    no_tokens: Any = None  # the warpers do not look at them
    for warper in (TemperatureLogitsWarper(temperature), TopKLogitsWarper(k), TopPLogitsWarper(p)):
        want = warper(no_tokens, want)
    got = keep_top_p(keep_top_k(jnp.asarray(rows(1)) / temperature, k), p)
    np.testing.assert_allclose(got, want.numpy(), rtol=1e-6)


@functools.cache
def make_llama() -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    shape: dict[str, Any] = {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "head_dim": 8,
    }
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 67}
    config = LlamaConfig(
        **shape, **heads, initializer_range=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.torch
def test_greedy_equals_transformers():
    torch = pytest.importorskip("torch")
    model, lengths, new = make_llama(), np.array([9, 5, 2, 1]), 12
    mask = np.arange(9) >= 9 - lengths[:, None]
    tokens = np.where(mask, np.random.default_rng(0).integers(3, 67, (4, 9)), 0).astype(np.int32)

    def theirs(stop):
        with torch.no_grad():
            return model.generate(
                torch.as_tensor(tokens).long(),
                attention_mask=torch.as_tensor(mask).long(),
                do_sample=False,
                max_new_tokens=new,
                eos_token_id=stop,
                return_dict_in_generate=True,
                output_logits=True,
            )

    stop = int(theirs(None).sequences[1, 9 + 3])  # so that a row does stop
    out = theirs(stop)
    want = out.sequences[:, 9:].numpy()
    top = torch.stack(out.logits, dim=1).topk(2).values.numpy()
    # once the largest two logits tie, either token may follow
    clear = np.cumprod(top[..., 0] - top[..., 1] > 1e-4, axis=1).astype(bool)

    config = json.loads(model.config.to_json_string())
    spec = spec_from_config(config, "tiny", has_lm_head=True)
    decoder, params = Decoder(spec), params_from_torch(model.state_dict(), spec)
    apply = functools.partial(decoder.apply, {"params": params})
    knobs = {"max_new_tokens": new, "stop_tokens": (stop,), "temperature": 0.0}
    greedy = jax.jit(lambda t, m: generate(apply, spec, t, m, jax.random.key(0), **knobs))
    got = np.asarray(greedy(tokens, mask).tokens)[:, : want.shape[1]]
    np.testing.assert_array_equal(got[clear], want[clear])
    assert clear.mean() > 0.9
    assert (want == 0).any()
    assert len(np.unique(want[0])) > 3


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"samples": 0}, "samples=0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0.0}, r"top_p=0\.0"),
        ({"top_p": 1.5}, r"top_p=1\.5"),
    ],
)
def test_refuses_knobs_out_of_range(knobs, message):
    tokens, mask = prompts()
    apply = functools.partial(DECODER.apply, {"params": make_params()})
    with pytest.raises(ValueError, match=message):
        generate(apply, SPEC, tokens, mask, jax.random.key(0), **({"max_new_tokens": 2} | knobs))


@pytest.mark.parametrize("shape", [(4, 2), (0, 2), (3, 0)])
def test_refuses_responses_that_fit_no_prompt(shape):
    apply = functools.partial(DECODER.apply, {"params": make_params()})
    tokens, mask = prompts()
    responses, live = jnp.zeros(shape, jnp.int32), jnp.ones(shape, bool)
    with pytest.raises(ValueError, match="multiple of 3 rows"):
        response_logits(apply, SPEC, tokens, mask, responses, live)
