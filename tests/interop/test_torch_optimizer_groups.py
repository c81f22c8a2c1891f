"""Groups, names, rates and memory of MuonGrokfast on torch parameters."""

import copy
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.optim import lr_scheduler  # noqa: E402

from interop import MuonGrokfast  # noqa: E402

pytestmark = pytest.mark.torch


def linear(seed=0):
    torch.manual_seed(seed)
    return nn.Linear(4, 3, bias=False)


def named(module):
    return list(module.named_parameters())


def test_repeated_names_are_refused():
    a, b = linear(0), linear(1)
    with pytest.raises(ValueError, match=r"unique, got \['weight'\] more than once"):
        MuonGrokfast([*named(a), *named(b)], use_qk_clip=False)
    groups = [{"params": named(a)}, {"params": named(b)}]
    starts = [m.weight.detach().clone() for m in (a, b)]
    optimizer = MuonGrokfast(groups, use_qk_clip=False, enable_muon=False)
    a.weight.grad, b.weight.grad = torch.ones(3, 4), -torch.ones(3, 4)
    optimizer.step()
    assert torch.all(a.weight < starts[0])
    assert torch.all(b.weight > starts[1])
    prefixed = [*a.named_parameters(prefix="a"), *b.named_parameters(prefix="b")]
    assert len(MuonGrokfast(prefixed, use_qk_clip=False).param_groups) == 1


def test_an_empty_optimizer_takes_named_groups_later():
    optimizer = MuonGrokfast([])
    assert optimizer.step() is None
    with pytest.warns(UserWarning, match="matches no parameter") as caught:
        optimizer.add_param_group({"params": named(linear())})
    assert len(caught) == 1
    assert [g["param_names"] for g in optimizer.param_groups] == [["weight"]]
    with pytest.raises(ValueError, match="with/without names"):
        optimizer.add_param_group({"params": [linear(1).weight]})


@pytest.mark.parametrize(
    ("key", "value"), [("lr", -1.0), ("lr", float("nan")), ("weight_decay", -0.1)]
)
def test_rates_out_of_range_are_refused_where_they_are_set(key, value):
    p = linear().weight
    with pytest.raises(ValueError, match=rf"group\['{key}'\].*at least 0, got {value}"):
        MuonGrokfast([{"params": [p], key: value}], use_qk_clip=False)
    optimizer = MuonGrokfast([p], use_qk_clip=False)
    optimizer.param_groups[0][key] = value
    p.grad = torch.ones(3, 4)
    with pytest.raises(ValueError, match=rf"group\['{key}'\].*at least 0, got {value}"):
        optimizer.step()


def test_collections_without_order_are_refused():
    p: Any = linear().weight
    for wrong, kind in (({p}, "set"), ([{"params": {p}}], "set"), (p, "Parameter")):
        with pytest.raises(TypeError, match=f"ordered collection.*got a {kind}"):
            MuonGrokfast(wrong, use_qk_clip=False)


def test_wrong_head_counts_are_refused():
    model = nn.ModuleDict({"q_proj": linear()})
    optimizer = MuonGrokfast(model.named_parameters(), num_heads=2)
    before = model["q_proj"].weight.detach().clone()
    model["q_proj"].weight.grad = torch.ones(3, 4)
    with pytest.raises(ValueError, match=r"3 outputs of q_proj.weight, got 2"):
        optimizer.step()
    assert torch.equal(model["q_proj"].weight.detach(), before)


def aligned(tensor):
    """Return a copy that starts at a multiple of 64 bytes, which JAX would take as it is."""
    raw = torch.zeros(tensor.nbytes + 64, dtype=torch.uint8)
    start = -raw.data_ptr() % 64
    place = raw[start : start + tensor.nbytes].view(tensor.dtype).reshape(tensor.shape)
    return place.copy_(tensor)


def test_loaded_state_stays_the_callers():
    """`step` gives its state to XLA, which may write over it, and the caller may write as well."""
    model = linear()
    optimizer = MuonGrokfast(model.parameters(), use_qk_clip=False, enable_muon=False)
    model.weight.grad = torch.ones(3, 4)
    optimizer.step()
    saved = optimizer.state_dict()
    saved["state"]["chain"] = [[aligned(x) for x in xs] for xs in saved["state"]["chain"]]
    kept = copy.deepcopy(saved["state"]["chain"])
    for _ in range(2):
        optimizer.load_state_dict(saved)
        optimizer.step()
        for want, got in zip(kept[0], saved["state"]["chain"][0], strict=True):
            assert torch.equal(want, got)
    optimizer.load_state_dict(saved)
    for x in saved["state"]["chain"][0]:
        x.zero_()
    taken = optimizer.state_dict()["state"]["chain"][0]
    assert all(torch.equal(want, got) for want, got in zip(kept[0], taken, strict=True))


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: lr_scheduler.StepLR(o, step_size=2, gamma=0.5),
        lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=0),
        lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=6, cycle_momentum=False),
    ],
    ids=["step", "plateau", "one_cycle"],
)
def test_schedulers_set_the_size_of_the_step(schedule):
    """Equal gradients give Muon equal directions, so that the step is as long as the rate."""
    model = linear()
    optimizer = MuonGrokfast(model.parameters(), use_qk_clip=False, muon_lr=0.1)
    scheduler = schedule(optimizer)
    rates, sizes = [], []
    for _ in range(4):
        before = model.weight.detach().clone()
        torch.manual_seed(1)
        model.weight.grad = torch.randn(3, 4)
        optimizer.step()
        rates.append(optimizer.param_groups[0]["lr"])
        sizes.append((model.weight.detach() - before).norm().item())
        plateau = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
        scheduler.step(*([1.0] if plateau else []))
    assert len(set(rates)) > 1
    np.testing.assert_allclose(np.array(sizes) / sizes[0], np.array(rates) / rates[0], rtol=1e-3)
