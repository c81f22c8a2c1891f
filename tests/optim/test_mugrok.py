"""The optimizer of Phase 7, against torch and by its properties."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from forge_jax import optim

GRADS = {
    "z": jax.random.normal(jax.random.key(0), (20, 6)),
    "w": 1e-3 * jax.random.normal(jax.random.key(1), (20, 3, 4)),
}
PARAMS = {"z": jnp.linspace(-1.0, 1.0, 6), "w": jnp.full((3, 4), 0.5)}


def train(config, grads=GRADS, params: Any = PARAMS) -> Any:
    """Return the parameters after every gradient."""
    tx = optim.mugrok(config)

    def step(carry, g):
        params, state = carry
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    return jax.lax.scan(step, (params, tx.init(params)), grads)[1]


@pytest.mark.torch
@pytest.mark.parametrize("decay", [0.01, 0.5])
def test_without_grokfast_it_is_torch_adamw(decay):
    torch = pytest.importorskip("torch")
    config = optim.MuGrokConfig.from_phase(7, grokfast_lambda=0.0, fallback_weight_decay=decay)
    got = train(config)
    for name, start in PARAMS.items():
        p = torch.nn.Parameter(torch.tensor(np.asarray(start)))
        adamw = torch.optim.AdamW([p], lr=2e-3, betas=(0.9, 0.999), weight_decay=decay)
        for t in range(20):
            p.grad = torch.tensor(np.asarray(GRADS[name][t]))
            adamw.step()
            np.testing.assert_allclose(got[name][t], p.detach().numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.torch
def test_grokfast_filters_what_adamw_sees():
    torch = pytest.importorskip("torch")
    got = train(optim.MuGrokConfig.from_phase(7, grokfast_lambda=2.0, grokfast_alpha=0.8))
    p = torch.nn.Parameter(torch.tensor(np.asarray(PARAMS["z"])))
    adamw = torch.optim.AdamW([p], lr=2e-3, weight_decay=0.01)
    mean = np.zeros(6)
    for g in np.asarray(GRADS["z"]):
        mean = 0.8 * mean + 0.2 * g
        p.grad = torch.tensor((g + 2.0 * mean).astype(np.float32))
        adamw.step()
    np.testing.assert_allclose(got["z"][-1], p.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_lion_follows_its_formula():
    config = optim.MuGrokConfig.from_phase(
        7, fallback_type="lion", enable_grokfast=False, fallback_betas=(0.9, 0.99)
    )
    got = train(config)["z"]
    p, m = np.asarray(PARAMS["z"], np.float64), np.zeros(6)
    for t, g in enumerate(np.asarray(GRADS["z"], np.float64)):
        p = p - 2e-3 * (np.sign(0.9 * m + 0.1 * g) + 0.01 * p)
        m = 0.99 * m + 0.01 * g
        np.testing.assert_allclose(got[t], p, rtol=1e-5, atol=1e-6)


def test_the_grokfast_switch_is_lambda_zero():
    off = train(optim.MuGrokConfig.from_phase(7, enable_grokfast=False))
    zero = train(optim.MuGrokConfig.from_phase(7, grokfast_lambda=0.0))
    on = train(optim.MuGrokConfig.from_phase(7, grokfast_lambda=2.0))
    np.testing.assert_allclose(off["z"], zero["z"], rtol=1e-6)
    assert not np.allclose(off["z"], on["z"], atol=1e-4)


def test_a_schedule_changes_the_update():
    decaying: Any = optax.linear_schedule(2e-3, 0.0, 10)
    config = optim.MuGrokConfig.from_phase(7, fallback_lr=decaying, fallback_weight_decay=0.0)
    steps = np.abs(np.diff(np.asarray(train(config)["z"]), axis=0)).mean(1)
    constant = train(optim.MuGrokConfig.from_phase(7, fallback_weight_decay=0.0))["z"]
    full = np.abs(np.diff(np.asarray(constant), axis=0)).mean(1)
    want = np.array([float(decaying(t)) for t in range(1, 20)]) / 2e-3
    np.testing.assert_allclose(steps, full * want, rtol=1e-3, atol=1e-7)
    assert steps[0] > 0
    assert steps[-1] == 0


def test_scales_without_gradient_stay_at_the_base_and_others_decay_to_it():
    delta = {"unused": jnp.zeros(3), "used": jnp.full(3, 0.4)}  # z - 1
    nothing = jax.tree.map(lambda d: jnp.zeros((50, *d.shape)), delta)
    config = optim.MuGrokConfig.from_phase(7, fallback_weight_decay=1.0)
    z = jax.tree.map(lambda d: 1 + d[-1], train(config, nothing, delta))
    np.testing.assert_array_equal(z["unused"], np.ones(3))
    np.testing.assert_allclose(z["used"], 1 + 0.4 * (1 - 2e-3) ** 50, rtol=1e-5)


def test_the_config_is_read_once():
    config = optim.MuGrokConfig.from_phase(7)
    tx = optim.mugrok(config)
    config.fallback_lr, config.enable_grokfast, config.grokfast_lambda = 100.0, False, 9.0
    g = jax.tree.map(lambda x: x[0], GRADS)
    updates: Any = tx.update(g, tx.init(PARAMS), PARAMS)[0]
    assert float(jnp.abs(updates["z"]).max()) < 3e-3


def test_the_config_is_read_once_also_with_rates_in_the_state():
    """Those rates make optax build the chain again at every update."""
    config = optim.MuGrokConfig.from_phase(7)
    tx = optim.with_hyperparams(config)
    state = tx.init(PARAMS)
    g = jax.tree.map(lambda x: x[0], GRADS)
    want: Any = tx.update(g, state, PARAMS)[0]
    config.fallback_lr, config.enable_grokfast, config.fallback_betas = 9.0, False, (0.0, 0.0)
    got: Any = tx.update(g, state, PARAMS)[0]
    np.testing.assert_array_equal(got["z"], want["z"])


def test_traced_once_with_a_state_that_keeps_its_types():
    tx = optim.mugrok(optim.MuGrokConfig.from_phase(7))
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    traces = []

    @jax.jit
    def step(grads, state, params):
        traces.append(1)
        return tx.update(grads, state, params)

    state = tx.init(params)
    for t in range(2):
        g = jax.tree.map(lambda x: x[t].astype(jnp.bfloat16), GRADS)  # noqa: B023
        updates, state = step(g, state, params)
    assert len(traces) == 1
    assert all(u.dtype == jnp.bfloat16 for u in jax.tree.leaves(updates))


def route(tx, params) -> dict[str, str]:
    """Name the route that each leaf takes, from the state that it has."""
    leaves = jax.tree_util.tree_leaves_with_path(tx.init(params))
    found = {}
    for path, _ in leaves:
        text = jax.tree_util.keystr(path, simple=True, separator="/")
        for leaf in ("embed", "layers", "dense", "bias", "head"):
            if text.endswith(leaf) and ("muon" in text or "fallback" in text):
                found[leaf] = "muon" if "muon" in text else "fallback"
    return found


MODEL = {
    "embed": jnp.ones((8, 4)),
    "layers": jnp.ones((3, 4, 6)),
    "dense": jnp.ones((4, 6)),
    "bias": jnp.ones(6),
}


def test_routing():
    config = optim.MuGrokConfig(use_qk_clip=False)
    by_axes = {"embed": "muon", "layers": "muon", "dense": "muon", "bias": "fallback"}
    assert route(optim.mugrok(config), MODEL) == by_axes
    named = optim.mugrok(config, fallback=optim.is_embedding)
    assert route(named, MODEL) == by_axes | {"embed": "fallback"}
    config.enable_muon = False
    assert "muon" not in str(jax.tree.structure(optim.mugrok(config).init(MODEL)))


def test_without_muon_nothing_is_frozen():
    config = optim.MuGrokConfig.from_phase(6, enable_muon=False, use_qk_clip=False)
    tx = optim.mugrok(config)
    updates: Any = tx.update(jax.tree.map(jnp.ones_like, MODEL), tx.init(MODEL), MODEL)[0]
    assert all(np.all(u != 0) for u in jax.tree.leaves(updates))


def test_grokfast_filters_both_paths():
    """Muon sees directions only, so that what turns them shows the filter."""
    rng = np.random.default_rng(0)
    grads = {"w": rng.standard_normal((9, 3, 4)), "b": rng.standard_normal((9, 4))}
    grads = jax.tree.map(lambda g: jnp.asarray(g, jnp.float32), grads)
    params = {"w": jnp.zeros((3, 4)), "b": jnp.zeros(4)}
    config = optim.MuGrokConfig(grokfast_lambda=3.0, grokfast_alpha=0.5, use_qk_clip=False)
    got = train(config, grads, params)
    filtered = {}
    for name, g in grads.items():
        mean, out = np.zeros(g.shape[1:]), []
        for x in np.asarray(g, np.float64):
            mean = 0.5 * mean + 0.5 * x
            out.append(x + 3.0 * mean)
        filtered[name] = jnp.asarray(np.stack(out), jnp.float32)
    config.enable_grokfast = False
    want = train(config, filtered, params)
    for name in grads:
        np.testing.assert_allclose(got[name], want[name], atol=1e-5)


@pytest.mark.torch
@pytest.mark.parametrize("kind", ["adamw", "lion"])
def test_50_steps_of_the_fallback(kind):
    """AdamW is torch's; Lion, which torch has not, is NumPy's."""
    torch = pytest.importorskip("torch")
    grads = np.random.default_rng(1).standard_normal((50, 5, 7)).astype(np.float32)
    start = 0.1 * np.random.default_rng(2).standard_normal((5, 7)).astype(np.float32)
    config = optim.MuGrokConfig(
        enable_muon=False, fallback_type=kind, enable_grokfast=False, use_qk_clip=False
    )
    got = np.asarray(train(config, {"w": jnp.asarray(grads)}, {"w": jnp.asarray(start)})["w"])
    p = torch.nn.Parameter(torch.tensor(start))
    adamw = torch.optim.AdamW([p], lr=1e-4, weight_decay=0.01)
    lion, m, worst = start.astype(np.float64), np.zeros((5, 7)), 0.0
    for t, g in enumerate(grads.astype(np.float64)):
        p.grad = torch.tensor(grads[t])
        adamw.step()
        lion = lion - 1e-4 * (np.sign(0.9 * m + 0.1 * g) + 0.01 * lion)
        m = 0.999 * m + 0.001 * g
        want = p.detach().numpy() if kind == "adamw" else lion
        worst = max(worst, float(np.abs(got[t] - want).max()))
    print(f"largest difference in 50 steps, {kind}: {worst:.1e}")
    assert worst <= 1e-6


def test_a_muon_schedule_changes_the_update():
    decaying: Any = optax.linear_schedule(0.1, 0.0, 10)
    params = {"w": jnp.zeros((3, 4))}
    grads = {"w": jax.random.normal(jax.random.key(2), (20, 3, 4))}
    config = optim.MuGrokConfig(muon_lr=decaying, use_qk_clip=False, muon_ns_steps=0)
    steps = np.diff(np.asarray(train(config, grads, params)["w"]), axis=0)
    sizes = np.linalg.norm(steps.reshape(19, -1), axis=1) / np.sqrt(3)
    np.testing.assert_allclose(sizes, [float(decaying(t)) for t in range(1, 20)], atol=1e-6)
    assert sizes[0] > 0.08


def test_rates_can_be_read_and_set_in_the_state():
    decaying: Any = optax.linear_schedule(0.1, 0.0, 10)
    config = optim.MuGrokConfig(muon_lr=0.5, fallback_lr=decaying, use_qk_clip=False)
    tx = optim.with_hyperparams(config)
    params = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}
    state: Any = tx.init(params)
    update = jax.jit(tx.update)
    first: Any
    first, state = update(params, state, params)
    _, state = update(params, state, params)
    np.testing.assert_allclose(state.hyperparams["fallback_lr"], 0.09, rtol=1e-6)
    state = tx.init(params)
    state.hyperparams["muon_lr"] = jnp.asarray(0.25)
    second: Any = update(params, state, params)[0]
    np.testing.assert_allclose(second["w"], 0.5 * first["w"], rtol=1e-6)
    np.testing.assert_allclose(second["b"], first["b"])
    plain: Any = optim.mugrok(config)
    plain = plain.update(params, plain.init(params), params)[0]
    np.testing.assert_allclose(first["w"], plain["w"], rtol=1e-6)


def test_weight_decay_mask_covers_both_paths():
    config = optim.MuGrokConfig(fallback_weight_decay=1.0, fallback_lr=0.1, use_qk_clip=False)

    def decays(path, leaf):
        return path.startswith("yes")

    tx = optim.mugrok(config, muon_weight_decay=1.0, decay_mask=decays)
    params = {f"{n}_{k}": jnp.ones(s) for n in ("yes", "no") for k, s in (("w", (2, 2)), ("b", 2))}
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates: Any = tx.update(zeros, tx.init(params), params)[0]
    np.testing.assert_allclose(updates["yes_w"], -0.01)
    np.testing.assert_allclose(updates["yes_b"], -0.1)
    assert not np.any(updates["no_w"])
    assert not np.any(updates["no_b"])


@pytest.mark.parametrize(
    ("switches", "clips"),
    [({}, True), ({"use_qk_clip": False}, False), ({"enable_muon_clip": False}, False)],
)
def test_qk_clip_is_last_and_needs_both_switches(switches, clips):
    config = optim.MuGrokConfig(muon_lr=100.0, qk_clip_threshold=2.0, **switches)
    params = {"q_proj": jnp.zeros((4, 4)), "k_proj": jnp.zeros((4, 4)), "v_proj": jnp.zeros((4, 4))}
    grads = {name: jnp.eye(4)[None] for name in params}
    after = train(config, grads, params)
    assert bool(jnp.linalg.norm(after["q_proj"]) <= 2.0) is clips
    assert jnp.linalg.norm(after["v_proj"]) > 100


def test_qk_clip_per_head_is_a_switch():
    params = {"q_proj": jnp.zeros((4, 4))}
    grads = {"q_proj": jnp.eye(4)[None]}
    for per_head, norm in ((True, np.sqrt(2.0)), (False, 1.0)):
        config = optim.MuGrokConfig(muon_lr=9.0, qk_clip_threshold=1.0, qk_clip_per_head=per_head)
        tx = optim.mugrok(config, num_heads=2)
        g = jax.tree.map(lambda x: x[0], grads)
        updates: Any = tx.update(g, tx.init(params), params)[0]
        np.testing.assert_allclose(jnp.linalg.norm(updates["q_proj"]), norm, rtol=1e-5)


def test_logit_clip_follows_in_a_chain():
    config = optim.MuGrokConfig(use_qk_clip=False)
    tx = optax.chain(optim.mugrok(config), optim.qk_clip_logits(1.0, 2))
    params = {"attn": {"q_proj": jnp.eye(4), "k_proj": jnp.eye(4)}}
    zeros = jax.tree.map(jnp.zeros_like, params)
    logits = {"attn": jnp.array([0.5, 4.0])}
    updates: Any = tx.update(zeros, tx.init(params), params, max_logits=logits)[0]
    after: Any = optax.apply_updates(params, updates)
    np.testing.assert_allclose(jnp.diag(after["attn"]["k_proj"]), [1, 1, 0.5, 0.5])


def test_polished_muon_is_orthogonal():
    config = optim.MuGrokConfig(muon_lr=1.0, use_qk_clip=False, muon_ns_coeffs="polar_express")
    tx = optim.mugrok(config, tol=1e-3)
    params = {"w": jnp.zeros((8, 12))}
    g = {"w": jax.random.normal(jax.random.key(3), (8, 12))}
    updates: Any = tx.update(g, tx.init(params), params)[0]
    np.testing.assert_allclose(updates["w"] @ updates["w"].T, jnp.eye(8), atol=1.1e-3)


def test_bad_calls_get_one_clear_error():
    tx = optim.mugrok(optim.MuGrokConfig(use_qk_clip=False))
    state = tx.init(MODEL)
    with pytest.raises(ValueError, match="`params` must be given to `update`"):
        tx.update(MODEL, state)
    grads = {name: leaf for name, leaf in MODEL.items() if name != "bias"}
    with pytest.raises(ValueError, match=r"`updates`.*`params`: bias: \(6,\), got nothing"):
        tx.update(grads, state, MODEL)
    with pytest.raises(ValueError, match=r"`opt_state`.*ema/dense: \(4, 6\), got \(4, 5\)"):
        tx.update(MODEL, tx.init(MODEL | {"dense": jnp.ones((4, 5))}), MODEL)
    other = optim.mugrok(optim.MuGrokConfig(use_qk_clip=False, fallback_type="lion"))
    with pytest.raises(ValueError, match="`opt_state` must have the structure"):
        tx.update(MODEL, other.init(MODEL), MODEL)
    with pytest.raises(ValueError, match="muon_weight_decay"):
        optim.mugrok(optim.MuGrokConfig(), muon_weight_decay=-1.0)
    wrong = optim.mugrok(optim.MuGrokConfig(), num_heads=3)
    params = {"q_proj": jnp.ones((4, 4))}
    with pytest.raises(ValueError, match="4 outputs of q_proj, got 3"):
        wrong.update(params, wrong.init(params), params)


def test_a_field_broken_after_creation_is_refused():
    config = optim.MuGrokConfig.from_phase(7)
    config.grokfast_alpha = 1.0
    with pytest.raises(ValueError, match="grokfast_alpha"):
        optim.mugrok(config)
