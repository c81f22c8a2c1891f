"""The whole chain against NumPy in float64: filter, Muon, AdamW, decay and projection together."""

from typing import Any

import jax
import numpy as np
import optax
import pytest

from forge_jax import optim

STEPS, HEADS = 20, 3
SHAPES = {"q_proj": (4, 24), "up": (20, 5), "bias": (6,)}
# Keeps rounding below the threshold; see `qk_clip`.
MARGIN = 1 - 2.0**-20


def jordan(m):
    """Five steps on a matrix, its longer side first or last."""
    x = m / np.linalg.norm(m)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def project(w, threshold):
    parts = np.split(w, HEADS, axis=1)
    return np.concatenate([p * min(1, threshold * MARGIN / np.linalg.norm(p)) for p in parts], 1)


def reference(w, grads, path, config):
    """Return one leaf after every gradient, and how often a head of it was outside."""
    (b1, b2), beta = config.fallback_betas, config.muon_momentum
    h, m, v, w, outside, out = 0.0, 0.0, 0.0, w.astype(np.float64), 0, []
    for t, g in enumerate(grads.astype(np.float64), start=1):
        h = config.grokfast_alpha * h + (1 - config.grokfast_alpha) * g
        g = g + config.grokfast_lambda * h
        if g.ndim == 2:
            m = beta * m + (1 - beta) * g
            w = w - config.muon_lr * 0.2 * np.sqrt(max(g.shape)) * jordan(m)
        else:
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
            adam = m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + 1e-8)
            w = w - config.fallback_lr * (adam + config.fallback_weight_decay * w)
        if path == "q_proj":
            heads = np.split(w, HEADS, axis=1)
            outside += sum(np.linalg.norm(p) > config.qk_clip_threshold for p in heads)
            w = project(w, config.qk_clip_threshold)
        out.append(w)
    return np.stack(out), outside


def test_20_steps_of_the_chain():
    rng = np.random.default_rng(0)
    start = {n: 0.3 * rng.standard_normal(s).astype(np.float32) for n, s in SHAPES.items()}
    grads = {n: rng.standard_normal((STEPS, *s)).astype(np.float32) for n, s in SHAPES.items()}
    config = optim.MuGrokConfig(
        muon_lr=0.05,
        grokfast_alpha=0.8,
        grokfast_lambda=2.0,
        qk_clip_threshold=1.5,
        fallback_lr=0.01,
        # optax takes 1 - b2^t in float32: at 0.999 that alone is wrong by 6e-5 in the first step.
        fallback_betas=(0.9, 0.98),
        fallback_weight_decay=0.1,
    )
    tx = optim.mugrok(config, num_heads=HEADS, update_scale="rms")

    def step(carry, g):
        params, state = carry
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    got: Any = jax.lax.scan(step, (start, tx.init(start)), grads)[1]
    for name, w in start.items():
        want, outside = reference(w, grads[name], name, config)
        axes = tuple(range(1, want.ndim))
        norms = [np.sqrt(np.sum(np.square(x), axes)) for x in (got[name] - want, want)]
        error = (norms[0] / norms[1]).max()
        print(f"{name}: largest relative difference in {STEPS} steps {error:.1e}")
        assert error <= 1e-6
        assert np.linalg.norm(want[-1] - w) > 0.1 * np.linalg.norm(w)
        if name == "q_proj":
            assert 0 < outside < STEPS * HEADS
    with pytest.raises(ValueError, match="24 outputs of q_proj, got 7"):
        optim.mugrok(config, num_heads=7).update(start, tx.init(start), start)
