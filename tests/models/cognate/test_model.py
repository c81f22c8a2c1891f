"""The corrected model: causal, without leaks, trained in every tensor, the same in every form."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from forge_jax.models.cognate import (
    SPECIALIZATIONS,
    Cognate,
    CognateConfig,
    Controls,
    Thought,
    continue_tokens,
    count_parameters,
    halt_threshold,
    infer,
    init_carry,
    loss,
    next_token_labels,
    stack_controls,
    step_loss,
)

CONFIG = CognateConfig(
    vocab_size=19,
    d_model=16,
    layers=2,
    heads=2,
    d_ff=20,
    max_positions=16,
    window=4,
    d_mem=4,
    memory_chunk=4,
    gate_hidden=6,
    answer_heads=2,
    loss_rows=32,
)
MODEL = Cognate(CONFIG)
BATCH, TIME = 3, 12
# arrays, so that no other number is another program
CONTROLS: Any = jax.tree.map(np.float32, Controls())
QUICK = {"xla_backend_optimization_level": 0}  # half the time to compile
traces = []


@functools.cache
def make_params(seed=0) -> Any:
    params = init(jax.random.key(seed))
    # far from the small start of training, where every logit is near zero
    return jax.tree.map(lambda p: 3 * p if p.ndim > 1 else p, params)


@functools.partial(jax.jit, compiler_options=QUICK)
def init(key):
    return MODEL.init(key, jnp.zeros((1, 4), jnp.int32))["params"]


@functools.partial(jax.jit, compiler_options=QUICK)
def forward(params, tokens, segments):
    """The outputs, and the logits of every answer."""
    outputs: Any = MODEL.apply({"params": params}, tokens, segments)
    return outputs, MODEL.apply({"params": params}, outputs.answers, method="logits")


@functools.partial(jax.jit, compiler_options=QUICK)
def think(params, tokens, segments, carry, controls):
    return infer(MODEL, params, tokens, segments, carry, controls)


def step(params, tokens, controls):
    """Loss, metrics and gradient of one batch."""
    traces.append(None)
    labels = next_token_labels(tokens)
    return jax.value_and_grad(
        lambda p: loss(MODEL, p, tokens, labels, None, controls), has_aux=True
    )(params)


one_step = jax.jit(step, compiler_options=QUICK)


def draw(seed=0, batch=BATCH, time=TIME) -> Any:
    return np.random.default_rng(seed).integers(0, 19, (batch, time)).astype(np.int32)


def one_document(tokens):
    return np.zeros_like(tokens)


def logits_of(tokens, segments=None):
    segments = one_document(tokens) if segments is None else segments
    return np.asarray(forward(make_params(), tokens, segments)[1])


@pytest.mark.parametrize("j", [0, 5, 11])
def test_no_answer_sees_a_later_token(j):
    """Through attention, memory, gate and all recursion steps."""
    tokens = draw()
    changed = tokens.copy()
    changed[:, j] = (tokens[:, j] + 7) % 19
    before, after = logits_of(tokens), logits_of(changed)
    np.testing.assert_array_equal(before[:, :, :j], after[:, :, :j])
    assert np.abs(before - after)[:, :, j:].max(axis=(0, 1, 3)).min() > 1e-5


def test_nothing_leaks_between_rows_or_calls():
    tokens = draw()
    first = logits_of(tokens)
    np.testing.assert_array_equal(first, logits_of(tokens))
    np.testing.assert_allclose(logits_of(tokens[::-1]), first[:, ::-1], atol=1e-5)
    # the same row three times
    same = logits_of(np.repeat(tokens[:1], 3, axis=0))
    np.testing.assert_allclose(same[:, 1:], same[:, :1].repeat(2, axis=1), atol=1e-5)


def test_documents_in_one_row_do_not_see_each_other():
    tokens = draw()
    # the second document begins with a chunk of the memory: it is as if it stood alone
    segments = np.where(np.arange(TIME) < 4, 7, 8) + one_document(tokens)
    packed = logits_of(tokens, segments)
    alone = logits_of(np.roll(tokens, -4, axis=1))
    np.testing.assert_allclose(packed[:, :, 4:], alone[:, :, : TIME - 4], atol=1e-5)
    np.testing.assert_allclose(packed[:, :, :4], logits_of(tokens)[:, :, :4], atol=1e-5)
    # it begins within one: nothing of the first document can be seen
    segments = np.where(np.arange(TIME) < 6, 7, 8) + one_document(tokens)
    other = np.where(np.arange(TIME) < 6, (tokens + 5) % 19, tokens).astype(np.int32)
    before, after = logits_of(tokens, segments), logits_of(other, segments)
    np.testing.assert_array_equal(before[:, :, 6:], after[:, :, 6:])
    assert np.abs(before - after)[:, :, :6].max() > 1e-2


@pytest.mark.parametrize("quantile", [None, 0.6])
def test_token_by_token_is_the_whole(quantile):
    """With all steps, and with halting at a threshold that some tokens reach early."""
    params, tokens = make_params(), draw()
    outputs, logits = forward(params, tokens, one_document(tokens))
    probabilities = np.asarray(jax.nn.sigmoid(outputs.halt_logits))
    threshold = 1.0 if quantile is None else np.quantile(probabilities, quantile)
    controls = CONTROLS._replace(halt_threshold=np.float32(threshold))
    start = init_carry(CONFIG, params, BATCH)
    whole = think(params, tokens, one_document(tokens), start, controls)
    if quantile is None:
        np.testing.assert_allclose(whole.logits, logits[-1], atol=1e-4)
        assert (np.asarray(whole.answers) == CONFIG.steps + 1).all()
    else:
        # halting really differs from token to token
        assert len(np.unique(whole.answers)) >= 3
        assert np.abs(whole.logits - logits[-1]).max() > 1e-2
    carry, parts = start, []
    for t in range(TIME):
        now = tokens[:, t : t + 1]
        part = think(params, now, one_document(now), carry, controls)
        carry = part.carry
        parts.append(part)
    got = np.concatenate([p.logits for p in parts], axis=1)
    np.testing.assert_allclose(got, whole.logits, atol=1e-4)
    answers = np.concatenate([p.answers for p in parts], axis=1)
    np.testing.assert_array_equal(answers, whole.answers)
    # no step is run that no row asks for
    loops = [int(p.loops) for p in parts]
    assert loops == list(answers.max(axis=0) - 1)


def test_every_tensor_learns():
    (_, metrics), grads = one_step(make_params(), draw(), CONTROLS)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(grad).all(), path
        layers = grad if "layers" in str(path) else grad[None]
        norms = np.sqrt((np.asarray(layers) ** 2).sum(axis=tuple(range(1, layers.ndim))))
        assert (norms > 1e-9).all(), path
    assert float(metrics["labels"]) == BATCH * (TIME - 1)


def test_the_three_at_once_are_the_three_apart():
    three = list(SPECIALIZATIONS.values())
    models = [make_params(s.seed) for s in three]
    tokens = np.stack([draw(s.seed) for s in three])
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *models)
    together = jax.jit(jax.vmap(step), compiler_options=QUICK)
    (totals, _), grads = together(stacked, tokens, stack_controls(three))
    for i, s in enumerate(three):
        controls: Any = jax.tree.map(np.float32, s.controls)
        (total, _), grad = one_step(models[i], tokens[i], controls)
        np.testing.assert_allclose(totals[i], total, rtol=1e-5)

        def close(a, b, i=i):
            np.testing.assert_allclose(a[i], b, atol=1e-5 * max(1, float(jnp.abs(b).max())))

        jax.tree.map(close, grads, grad)


def test_random_tokens_are_not_predicted():
    """A model that saw the future or copied its input would go far below ln V."""
    tx = optax.adam(3e-3)
    update = jax.jit(tx.update)
    params = init(jax.random.key(1))
    state, losses = tx.init(params), []
    controls = CONTROLS
    before = len(traces)
    for i in range(150):
        (_, metrics), grads = one_step(params, draw(100 + i), controls)
        updates, state = update(grads, state)
        params = optax.apply_updates(params, updates)
        losses.append(float(metrics["loss_step_3"]))
    assert len(traces) <= before + 1
    assert np.mean(losses[-50:]) > np.log(19) - 0.02


def test_continuations_are_greedy_and_padding_is_not_seen():
    """With all steps made: a token that halts early leaves later ones another answer to see."""
    params, prompt = make_params(), draw(batch=2, time=6)
    controls = CONTROLS._replace(halt_threshold=np.float32(1))
    write = jax.jit(
        lambda prompt, segments: continue_tokens(
            *(MODEL, params, prompt, jax.random.key(0)),
            max_new_tokens=3,
            segments=segments,
            controls=controls,
        ),
        compiler_options=QUICK,
    )
    got = write(prompt, np.zeros((2, 6), np.int32))
    row = np.concatenate([prompt, got.tokens, prompt[:, :3]], axis=1)
    row = np.concatenate([row, row[:1]])
    want = logits_of(row)[-1].argmax(axis=-1)
    np.testing.assert_array_equal(got.answers, CONFIG.steps + 1)
    np.testing.assert_array_equal(got.tokens, want[:2, 5:8])
    padded = prompt.copy()
    padded[:, :2] = 3
    segments = np.where(np.arange(6) < 2, 0, 1) + np.zeros((2, 1), np.int32)
    other = padded.copy()
    other[:, :2] = 11
    np.testing.assert_array_equal(write(padded, segments)[0], write(other, segments)[0])


def test_steps_updated_one_by_one_are_the_summed_loss_at_fixed_weights():
    params, tokens = make_params(), draw()
    labels, controls = next_token_labels(jnp.array(tokens)), CONTROLS

    @functools.partial(jax.jit, compiler_options=QUICK)
    def step(params, thought):
        def of(p):
            return step_loss(MODEL, p, tokens, labels, thought, None, controls)

        return jax.value_and_grad(of, has_aux=True)(params)

    (_, metrics), _ = one_step(params, tokens, controls)
    outputs, _ = forward(params, tokens, one_document(tokens))
    thought = Thought(outputs.answers[0], outputs.latents[0])
    for k in range(1, CONFIG.steps + 1):
        (total, (thought, parts)), grads = step(params, thought)
        np.testing.assert_allclose(parts["loss_ce"], metrics[f"loss_step_{k}"], rtol=1e-5)
        np.testing.assert_allclose(thought.y, outputs.answers[k], atol=1e-4)
        np.testing.assert_allclose(total, sum(parts.values()), rtol=1e-5)
        # the features are attached in every step, the state that it begins with is not
        assert np.abs(grads["backbone"]["layers"]["mlp"]["w_down"]["kernel"]).max() > 1e-6
        assert not np.any(grads["trm"]["z0_proj"]["kernel"])
    other = Cognate(dataclasses.replace(CONFIG, halting="act"))
    with pytest.raises(ValueError, match="trm_bce"):
        step_loss(other, params, tokens, labels)


def test_the_seeds_configuration_has_its_count():
    assert count_parameters(CognateConfig(memory="ema", positions="learned")) == 26_974_561


def test_thresholds_mean_what_the_models_are_called():
    speed, reasoning, memory = (
        halt_threshold(SPECIALIZATIONS[n].confidence) for n in ("speed", "reasoning", "memory")
    )
    assert reasoning == pytest.approx(0.5)
    assert 0 < speed < 0.2 < 0.6 < memory < 1
    for s in SPECIALIZATIONS.values():
        assert sum(share for _, share in s.mix) == pytest.approx(1)
    with pytest.raises(ValueError, match="`confidence`"):
        halt_threshold(1.0)


def test_labels_are_shifted_once():
    tokens, segments = np.array([[5, 6, 7, 8]]), np.array([[0, 0, 1, 1]])
    np.testing.assert_array_equal(next_token_labels(jnp.array(tokens)), [[6, 7, 8, -100]])
    got = next_token_labels(jnp.array(tokens), jnp.array(segments))
    np.testing.assert_array_equal(got, [[6, -100, 8, -100]])
    learned = jnp.array([[False, True, False, True]])
    got = next_token_labels(jnp.array(tokens), None, learned)
    np.testing.assert_array_equal(got, [[6, -100, 8, -100]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 0}, "`window` must be at least 1"),
        ({"heads": 3}, "`d_model` must be a multiple of `heads`"),
        ({"heads": 16}, "even width per head"),
        ({"memory": "lstm"}, "`memory` must be one of ema, titans"),
        ({"step_weights": (1.0,)}, "`step_weights` must be 4 weights"),
        ({"step_weights": (1.0, 1.0, 1.0, 0.0)}, "last of `step_weights`"),
        ({"memory_decay": 1.0}, "`memory_decay` and `dropout`"),
        ({"compat": "reference"}, 'compat="reference" has memory="ema"'),
    ],
)
def test_bad_configurations_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)


@pytest.mark.parametrize(
    ("tokens", "segments", "message"),
    [
        (np.zeros((1, 17), np.int32), None, r"at most 16 positions .*, got 17"),
        (np.zeros((1, 4), np.float32), None, "must be integers"),
        (np.zeros(4, np.int32), None, r"shape \(batch, time\)"),
        (np.zeros((1, 4), np.int32), np.zeros((1, 3), np.int32), "`segments` must have"),
    ],
)
def test_bad_input_is_refused(tokens, segments, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda p: MODEL.apply({"params": p}, tokens, segments), make_params())
