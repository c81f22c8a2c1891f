"""The two QK-clips against NumPy, and the bounds they promise."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from forge_jax import optim
from forge_jax.optim import QkClipState


def project(w, u, threshold, heads):
    """Project W + U head by head in float64; heads are runs of columns."""
    stepped = np.asarray(w, np.float64) + np.asarray(u, np.float64)
    parts = np.split(stepped, heads, axis=-1)
    parts = [p * min(1, threshold / np.linalg.norm(p)) for p in parts]
    return np.concatenate(parts, axis=-1)


def apply(tx, w, u, path="q_proj", **extra) -> Any:
    params, updates = {path: {"kernel": w}}, {path: {"kernel": u}}
    new, state = tx.update(updates, tx.init(params), params, **extra)
    moved: Any = optax.apply_updates(params, new)
    return moved[path]["kernel"], state


def test_500_random_draws_end_inside():
    tx = optim.qk_clip(10.0)
    step = jax.jit(jax.vmap(lambda w, u: apply(tx, w, u)[0]))
    keys = jax.random.split(jax.random.key(0))
    w, u = (jax.random.normal(key, (500, 100, 100)) for key in keys)
    norms = np.linalg.norm(np.asarray(step(w, 100 * u), np.float64), axis=(-2, -1))
    inside = int((norms <= 10 * (1 + 1e-6)).sum())
    print(
        f"{inside} of 500 draws end at a norm of at most 10 (1 + 1e-6); largest {norms.max():.8f}"
    )
    assert inside == 500


def test_1000_equal_pushes_stay_inside():
    tx = optim.qk_clip(10.0)
    push = jnp.full((20, 20), 0.5 / 20)

    def step(w, _):
        w, state = apply(tx, w, push)
        return w, (w, state.num_clipped)

    _, (weights, clipped) = jax.lax.scan(step, jnp.zeros((20, 20)), None, 1000)
    norms = np.linalg.norm(np.asarray(weights, np.float64), axis=(-2, -1))
    print(f"largest norm of 1000 pushes of 0.5: {norms.max():.7f} (threshold 10)")
    assert norms.max() <= 10.0
    assert clipped.sum() > 950


@pytest.mark.parametrize("heads", [1, 2, 5])
def test_matches_reference_per_head_over_20_steps(heads):
    rng = np.random.default_rng(0)
    w = 0.2 * rng.standard_normal((12, 20)).astype(np.float32)
    pushes = 0.1 * rng.standard_normal((20, 12, 20)).astype(np.float32)
    tx = optim.qk_clip(1.0, heads)
    step = jax.jit(lambda w, u: apply(tx, w, u))
    got, want = jnp.asarray(w), w.astype(np.float64)
    for u in pushes:
        norms = [np.linalg.norm(p) for p in np.split(want + u, heads, axis=1)]
        got, state = step(got, jnp.asarray(u))
        want = project(want, u, 1.0, heads)
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)
        assert state.num_clipped == sum(n > 1.0 for n in norms)
        np.testing.assert_allclose(state.max_norm, max(norms), rtol=1e-5)


def test_inside_the_ball_the_update_is_kept_bit_for_bit():
    w, u = jnp.full((4, 4), 0.1), jnp.full((4, 4), 1 / 3)
    tx = optim.qk_clip(10.0)
    params, updates = {"w_q": w}, {"w_q": u}
    new: Any = tx.update(updates, tx.init(params), params)[0]
    np.testing.assert_array_equal(new["w_q"], u)
    clipped, _ = apply(tx, 100 * w, u)
    again, state = apply(tx, clipped, jnp.zeros((4, 4)))
    np.testing.assert_array_equal(again, clipped)
    assert state.num_clipped == 0


def test_stacked_layers_torch_layout_and_fused_projections():
    w = np.random.default_rng(2).standard_normal((3, 8, 12)).astype(np.float32)
    zeros = jnp.zeros(w.shape)
    got, state = apply(optim.qk_clip(2.0, 2), jnp.asarray(w), zeros)
    want = np.stack([project(layer, 0, 2.0, 2) for layer in w])
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    assert state.num_clipped == 6
    got, _ = apply(optim.qk_clip(2.0, 2, layout=optim.torch_layout), jnp.asarray(w), zeros)
    want = np.stack([project(layer.T, 0, 2.0, 2).T for layer in w])
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    # Queries and keys are the first 8 of 12 outputs, 4 heads; values keep their weights.
    fused = optim.qk_clip(1.0, 4, lambda path, leaf: "q_proj" in path and slice(0, 8))
    got, _ = apply(fused, jnp.asarray(w[0]), zeros[0])
    np.testing.assert_allclose(got[:, :8], project(w[0][:, :8], 0, 1.0, 4), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(got[:, 8:], w[0][:, 8:])


def test_head_counts_may_differ_by_leaf():
    params = {"q_proj": jnp.ones((4, 8)), "k_proj": jnp.ones((4, 4))}
    tx = optim.qk_clip(1.0, lambda path, leaf: {"q_proj": 4, "k_proj": 2}[path])
    updates = jax.tree.map(jnp.zeros_like, params)
    new = optax.apply_updates(params, tx.update(updates, tx.init(params), params)[0])
    for leaf in jax.tree.leaves(new):
        np.testing.assert_allclose(leaf, 1 / np.sqrt(8), rtol=1e-5)


@pytest.mark.parametrize(
    ("path", "yes"),
    [
        ("layers_0/attn/q_proj/kernel", True),
        ("layers.0.attention.w_k.weight", True),
        ("attn/query/kernel", True),
        ("attn/key", True),
        ("attn/keyboard/kernel", False),
        ("attn/monkey/kernel", False),
        ("attn/v_proj/kernel", False),
        ("attn/in_proj_weight", False),
        ("layers/attn/q_proj/bias", False),
        ("attn.w_k.bias", False),
    ],
)
def test_default_selection_is_by_whole_components(path, yes):
    assert optim.is_qk(path, jnp.ones((2, 2))) is yes
    assert not optim.is_qk(path, jnp.ones(2))


@pytest.mark.parametrize(
    "tx",
    [
        optim.qk_clip(1.0),
        optim.qk_clip_logits(1.0, 1),
        optim.mugrok(optim.MuGrokConfig()),
        optim.mugrok(optim.MuGrokConfig(), diagnostics=True),
        optim.with_hyperparams(optim.MuGrokConfig()),
        optim.master_copy(optim.mugrok(optim.MuGrokConfig())),
    ],
    ids=["qk_clip", "logits", "mugrok", "measured", "with_hyperparams", "master_copy"],
)
def test_matching_nothing_warns_once(tx):
    params = {"dense": jnp.ones(2)}
    with pytest.warns(UserWarning, match="matches no leaf") as caught:
        state = tx.init(params)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        updates: Any = tx.update(params, state, params)[0]
    assert updates["dense"].shape == (2,)
    if isinstance(state, QkClipState):
        np.testing.assert_array_equal(updates["dense"], params["dense"])


def test_stacked_biases_are_left_alone():
    params = {"q_proj": {"kernel": jnp.ones((3, 4, 4)), "bias": jnp.full((3, 4), 9.0)}}
    zeros, logits = jax.tree.map(jnp.zeros_like, params), {"": jnp.full((3, 2), 4.0)}
    for tx in (optim.qk_clip(1.0), optim.qk_clip_logits(1.0, 2)):
        new: Any = tx.update(zeros, tx.init(params), params, max_logits=logits)[0]
        assert np.all(new["q_proj"]["kernel"] < 0)
        np.testing.assert_array_equal(new["q_proj"]["bias"], 0)


def test_flax_attention_has_to_be_declared():
    """Its kernels are (inputs, heads, width), which is no stack of (heads, width) matrices."""
    model = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8, out_features=6)
    params: Any = model.init(jax.random.key(0), jnp.ones((1, 3, 6)))["params"]
    assert params["query"]["kernel"].shape == (6, 2, 4)
    zeros, logits = jax.tree.map(jnp.zeros_like, params), {"": jnp.array([1.0, 4.0])}
    for tx in (optim.qk_clip(1.0, 2), optim.qk_clip_logits(1.0, 2)):
        with pytest.raises(ValueError, match=r"`layout` must declare the axes of key/kernel"):
            tx.init(params)
        state = QkClipState(jnp.zeros((), jnp.int32), jnp.zeros(()))
        with pytest.raises(ValueError, match=r"got the default for \(6, 2, 4\)"):
            tx.update(zeros, state, params, max_logits=logits)
    layout = optim.flax_attention_layout
    by_norm, by_logit = (
        optim.qk_clip(1.0, 2, layout=layout),
        optim.qk_clip_logits(1.0, 2, layout=layout),
    )
    new: Any = optax.apply_updates(params, by_norm.update(zeros, by_norm.init(params), params)[0])
    for part in ("query", "key"):
        flat = params[part]["kernel"].reshape(6, 8)
        got = new[part]["kernel"].reshape(6, 8)
        np.testing.assert_allclose(got, project(flat, 0, 1.0, 2), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(new["out"]["kernel"], params["out"]["kernel"])
    updates: Any = by_logit.update(zeros, by_logit.init(params), params, max_logits=logits)[0]
    new = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(new["key"]["kernel"][:, 0], params["key"]["kernel"][:, 0])
    np.testing.assert_allclose(new["key"]["kernel"][:, 1], 0.5 * params["key"]["kernel"][:, 1])


def attention(q, k, x, heads, kv_heads):
    """Return the largest |q k| logit of every query head."""
    queries = np.split(x @ q, heads, axis=-1)
    keys = np.repeat(np.split(x @ k, kv_heads, axis=-1), heads // kv_heads, axis=0)
    pairs = zip(queries, keys, strict=True)
    return np.array([np.max(a @ b.T) / np.sqrt(a.shape[-1]) for a, b in pairs])


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
def test_logits_come_down_to_the_threshold(heads, kv_heads):
    rng = np.random.default_rng(3)
    q, k = rng.standard_normal((16, 4 * heads)), rng.standard_normal((16, 4 * kv_heads))
    x = rng.standard_normal((10, 16))
    logits = attention(q, k, x, heads, kv_heads)
    threshold = float(np.median(logits))
    tx = optim.qk_clip_logits(threshold, heads, kv_heads)
    params = {"attn": {"q_proj": jnp.asarray(q), "k_proj": jnp.asarray(k), "v": jnp.ones((2, 2))}}
    zeros = jax.tree.map(jnp.zeros_like, params)
    state: Any
    updates, state = tx.update(
        zeros, tx.init(params), params, max_logits={"attn": jnp.asarray(logits)}
    )
    new: Any = optax.apply_updates(params, updates)
    new_q, new_k = (np.asarray(new["attn"][part]) for part in ("q_proj", "k_proj"))
    after = attention(new_q, new_k, x, heads, kv_heads)
    groups = logits.reshape(kv_heads, -1).max(1)
    gamma = np.repeat(np.minimum(1, threshold / groups), heads // kv_heads)
    np.testing.assert_allclose(after, gamma * logits, rtol=1e-4)
    assert after.max() <= threshold * (1 + 1e-4)
    np.testing.assert_array_equal(new["attn"]["v"], 1)
    assert state.num_clipped == (logits > threshold).sum()


def test_logits_follow_their_formula_over_20_steps():
    """Four query heads share two key heads; a head's factor is that of its group."""
    rng = np.random.default_rng(5)
    start = {
        "q_proj": 0.3 * rng.standard_normal((6, 8)).astype(np.float32),
        "k_proj": 0.3 * rng.standard_normal((6, 4)).astype(np.float32),
    }
    pushes = {
        n: 0.1 * rng.standard_normal((20, *w.shape)).astype(np.float32) for n, w in start.items()
    }
    seen = rng.uniform(0.5, 2.0, (20, 4)).astype(np.float32)
    tx = optim.qk_clip_logits(1.0, 4, 2)

    def step(params, inputs):
        u, s = inputs
        updates = tx.update(u, tx.init(params), params, max_logits={"": s})[0]
        params = optax.apply_updates(params, updates)
        return params, params

    got: Any = jax.lax.scan(step, start, (pushes, seen))[1]
    want = {n: w.astype(np.float64) for n, w in start.items()}
    for t in range(20):
        gamma = np.minimum(1, 1 / seen[t].astype(np.float64).reshape(2, 2).max(1))
        for n, w in want.items():
            per_output = np.repeat(np.sqrt(gamma), w.shape[1] // 2)
            want[n] = (w + pushes[n][t]) * per_output
            error = np.linalg.norm(got[n][t] - want[n]) / np.linalg.norm(want[n])
            assert error <= 1e-6


def test_logits_of_stacked_layers_and_their_errors():
    params = {"attn": {"q_proj": jnp.ones((3, 4, 8)), "k_proj": jnp.ones((3, 4, 4))}}
    zeros = jax.tree.map(jnp.zeros_like, params)
    tx = optim.qk_clip_logits(1.0, 4, 2)
    state = tx.init(params)
    logits = jnp.ones((3, 4)).at[1, 0].set(4.0)
    new: Any = optax.apply_updates(
        params, tx.update(zeros, state, params, max_logits={"attn": logits})[0]
    )
    np.testing.assert_allclose(new["attn"]["q_proj"][1, 0], [0.5] * 4 + [1] * 4)
    np.testing.assert_allclose(new["attn"]["k_proj"][1, 0], [0.5] * 2 + [1] * 2)
    np.testing.assert_array_equal(new["attn"]["q_proj"][0], 1)
    with pytest.raises(ValueError, match=r"max_logits.*\['attn'\]"):
        tx.update(zeros, state, params)
    with pytest.raises(ValueError, match=r"\(3, 4\), got \(4,\)"):
        tx.update(zeros, state, params, max_logits={"attn": jnp.ones(4)})
    with pytest.raises(ValueError, match="`params`"):
        tx.update(zeros, state, max_logits={"attn": logits})


def test_wrong_head_counts_and_missing_params():
    w = jnp.ones((4, 6))
    for heads in (4, 0, -1):
        with pytest.raises(ValueError, match=rf"6 outputs of q_proj/kernel, got {heads}"):
            apply(optim.qk_clip(1.0, heads), w, w)
    with pytest.raises(ValueError, match=r"6 outputs of q_proj/kernel, got 4"):
        apply(optim.qk_clip_logits(1.0, 4), w, w, max_logits={"": jnp.ones(4)})
    tx = optim.qk_clip(1.0)
    with pytest.raises(ValueError, match="`params` must be given"):
        tx.update({"q_proj": w}, tx.init({"q_proj": w}))
    for threshold in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="threshold"):
            optim.qk_clip(threshold)
    with pytest.raises(ValueError, match="threshold"):
        optim.qk_clip_logits(0.0, 4)
    with pytest.raises(ValueError, match=r"num_kv_heads.*3"):
        optim.qk_clip_logits(1.0, 4, 3)
