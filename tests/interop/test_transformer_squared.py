"""The public expert files against their algebra in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from forge_jax import svf
from interop import load_transformer_squared, params_from_torch, save_transformer_squared
from interop.config import spec_from_config
from interop.transformer_squared import matrices


@pytest.fixture
def spec(config):
    return spec_from_config(config, "config")


def draw(state_dict, seed, dtype=torch.bfloat16):
    """One p for every MLP weight of a torch model, as the public code starts them, but livelier."""
    torch.manual_seed(seed)
    mlp = {n: w for n, w in state_dict.items() if "mlp" in n}
    return {n: (torch.randn(min(w.shape)) + 0.1).to(dtype) for n, w in mlp.items()}


def as_policy(p):
    """The state_dict of the policy module: a ParameterList in the order of the model."""
    return {f"learnable_params_module_list.{i}": v for i, v in enumerate(p.values())}


def oracle(weight, p, alpha=(1.0,), max_mult=1.0):
    """W' of torch's weight (out, in) in double precision; p holds one vector per expert."""
    u, s, vh = np.linalg.svd(weight.double().numpy(), full_matrices=False)
    masks = [max_mult / (1 + np.exp(-one.double().numpy())) for one in p]
    m = sum(a * mask for a, mask in zip(alpha, masks, strict=True))
    return (u * (s * m)) @ vh * s.sum() / (s * m).sum()


def is_mlp(path, leaf):
    return svf.is_mlp(path, leaf)


def errors(adapted, wanted, places):
    """The largest error of any weight, and of any matrix relative to its norm."""
    absolute, relative = [], []
    for name, (path, _) in places.items():
        leaf = adapted
        for part in path.split("/"):
            leaf = leaf[part]
        error = np.asarray(leaf).T - wanted[name]
        absolute.append(np.abs(error).max())
        relative.append(np.linalg.norm(error) / np.linalg.norm(wanted[name]))
    return max(absolute), max(relative)


def scaled(state_dict, scale):
    return {name: weight * scale for name, weight in state_dict.items()}


@pytest.mark.parametrize("form", ["names", "policy"])
@pytest.mark.parametrize("max_mult", [1.0, 2.0])
@pytest.mark.parametrize("deviation", [0.02, 0.3])
def test_expert_gives_the_weights_of_the_public_code(
    tmp_path, state_dict, spec, form, max_mult, deviation
):
    """Weights of a trained model's size are met to 1e-5, livelier ones to 1e-5 of their norm."""
    state_dict = scaled(state_dict, deviation / 0.3)
    p = draw(state_dict, 0)
    torch.save(p if form == "names" else as_policy(p), tmp_path / "expert.pt")
    z = load_transformer_squared(tmp_path / "expert.pt", spec, max_mult=max_mult)
    factors, ones = svf.decompose(params_from_torch(state_dict, spec), is_mlp)
    assert z.keys() == ones.keys()
    adapted = svf.materialize(factors, jax.tree.map(jnp.asarray, z), renormalize=True)
    wanted = {n: oracle(state_dict[n], [p[n]], max_mult=max_mult) for n in p}
    absolute, relative = errors(adapted, wanted, matrices(spec))
    moved = max(np.abs(wanted[n] - state_dict[n].numpy()).max() for n in p) / deviation
    print(
        f"expert file, {form}, weights of deviation {deviation}: {absolute:.1e} from W', "
        f"{relative:.1e} of its norm; W is {moved:.1f} deviations away"
    )
    assert relative <= 1e-5
    assert absolute <= (1e-5 if deviation == 0.02 else 2e-5)
    assert moved > 0.3


def test_experts_are_mixed_on_their_masks(tmp_path, state_dict, spec):
    """Coefficients may be anything: only their direction counts."""
    state_dict = scaled(state_dict, 0.02 / 0.3)
    experts, alpha = [draw(state_dict, seed) for seed in range(3)], (0.7, -0.2, 1.4)
    for i, p in enumerate(experts):
        torch.save(as_policy(p), tmp_path / f"{i}.pt")
    read = [load_transformer_squared(tmp_path / f"{i}.pt", spec) for i in range(3)]
    stacked = {path: jnp.stack([z[path] for z in read]) for path in read[0]}
    factors, _ = svf.decompose(params_from_torch(state_dict, spec), is_mlp)
    for scale in (1.0, 0.3):
        mixed = svf.mix(stacked, scale * jnp.asarray(alpha), mode="sum")
        adapted = svf.materialize(factors, mixed, renormalize=True)
        wanted = {n: oracle(state_dict[n], [p[n] for p in experts], alpha) for n in experts[0]}
        absolute, relative = errors(adapted, wanted, matrices(spec))
        print(f"mixture of expert files: {absolute:.1e} from W', {relative:.1e} of its norm")
        assert absolute <= 1e-5
        assert relative <= 1e-5


@pytest.mark.parametrize("form", ["names", "policy"])
def test_there_and_back_is_bit_exact(tmp_path, state_dict, spec, form):
    p = {n: v.clamp(-4, 4) for n, v in draw(state_dict, 5).items()}
    torch.save(p, tmp_path / "in.pt")
    z = load_transformer_squared(tmp_path / "in.pt", spec, max_mult=2.0)
    save_transformer_squared(tmp_path / "out.pt", z, spec, max_mult=2.0, form=form)
    back = torch.load(tmp_path / "out.pt", weights_only=True)
    want = p if form == "names" else as_policy(p)
    assert list(back) == list(want)
    assert all(torch.equal(back[n], want[n]) and back[n].dtype == want[n].dtype for n in want)


def test_float32_keeps_any_mask(tmp_path, state_dict, spec):
    rng = np.random.default_rng(0)
    z = {
        path: rng.uniform(0.01, 0.99, size).astype(np.float32)
        for path, size in matrices(spec).values()
    }
    save_transformer_squared(tmp_path / "z.pt", z, spec, dtype="float32")
    back = load_transformer_squared(tmp_path / "z.pt", spec)
    assert max(np.abs(back[n] - z[n]).max() for n in z) < 1e-6


@pytest.mark.parametrize("most", [1.0, 2.5, 3.0])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_written_is_read_to_the_ends_of_its_range(tmp_path, state_dict, spec, dtype, most):
    """z of p = -16 and 16, rounded to float32, come back; so do a file's own."""
    p = {n: torch.linspace(-16, 16, len(v)) for n, v in draw(state_dict, 0).items()}
    torch.save(p, tmp_path / "in.pt")
    z = load_transformer_squared(tmp_path / "in.pt", spec, max_mult=most)
    save_transformer_squared(tmp_path / "out.pt", z, spec, dtype=dtype, max_mult=most)
    back = load_transformer_squared(tmp_path / "out.pt", spec, max_mult=most)
    apart = max(np.abs(back[n] - z[n]).max() for n in z) / most
    assert apart < (1e-6 if dtype == "float32" else 1e-2)


def test_all_problems_of_an_expert_are_listed(tmp_path, state_dict, spec):
    p = draw(state_dict, 0)
    names = list(p)
    p[names[0]] = torch.ones(3)
    p[names[1]] = torch.ones(24, dtype=torch.int32)
    p[names[2]] = torch.full((24,), torch.nan)
    p[names[3]] = torch.full((24,), 40.0)
    del p[names[4]]
    p["learnable_params_module_list.5"] = torch.zeros(24)
    p["learnable_params_module_list.99"] = torch.zeros(24)
    torch.save(p, tmp_path / "bad.pt")
    with pytest.raises(ValueError) as caught:
        load_transformer_squared(tmp_path / "bad.pt", spec)
    lines = [line.strip() for line in str(caught.value).splitlines()[1:]]
    assert lines == sorted(
        [
            f"{names[0]}: have (3,), want (24,)",
            f"{names[1]}: have torch.int32, want a float vector",
            f"{names[2]}: holds NaN or infinity",
            f"{names[3]}: lies outside [-16, 16]",
            f"{names[4]}: missing",
            "learnable_params_module_list.5: the vector of this matrix is there twice",
            "learnable_params_module_list.99: no matrix of this model's MLPs",
        ]
    )


def test_masks_that_no_sigmoid_gives_are_refused(tmp_path, spec):
    z = {path: np.ones(size, np.float32) for path, size in matrices(spec).values()}
    with pytest.raises(ValueError, match=r"lies outside \[1\.125351621e-07, 0\.9999998875\]"):
        save_transformer_squared(tmp_path / "z.pt", z, spec)
    assert list(tmp_path.iterdir()) == []
    save_transformer_squared(tmp_path / "z.pt", z, spec, max_mult=2.0)
    leaf = next(iter(z))
    for value in (-0.1, 0.0, 2e-8, 2 - 1.2e-7, np.nan):
        z[leaf] = np.full(z[leaf].shape, value)
        with pytest.raises(ValueError, match=f"{leaf}: lies outside .*, where .p. <= 16"):
            save_transformer_squared(tmp_path / "z.pt", z, spec, max_mult=2.0, dtype="float32")
    with pytest.raises(ValueError, match="`max_mult` must be positive"):
        load_transformer_squared(tmp_path / "z.pt", spec, max_mult=0)
