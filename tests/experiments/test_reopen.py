"""What a run wrote is what PyTorch computes, and a model that is not is found out."""

import jax
import numpy as np
import pytest

from experiments import reopen
from forge_jax import svf
from interop import load_phase6, load_phase8, write_phase8


@pytest.fixture
def written(checkpoint, tmp_path):
    base = load_phase6(checkpoint)
    factors, ones = svf.decompose(base.params, svf.is_attention_or_mlp)
    z = {path: np.float32(1.2) * np.asarray(one) for path, one in ones.items()}
    return write_phase8(
        tmp_path / "out",
        checkpoint=base,
        experts={"math": z},
        alpha=[1.0],
        adapted_params=svf.materialize(factors, z),
        measure=lambda path: dict.fromkeys(
            ("throughput_tps", "latency_ms", "accuracy", "vram_gb"), 1.0
        ),
        succeeded=lambda metrics, path: True,
    )


def test_the_same_model_passes(written):
    assert 0 < max(reopen.differences(written)) < 1e-5
    assert "1 experts of" in reopen.check(written)


@pytest.mark.parametrize("factor", [1.01, np.nan])
def test_another_model_is_refused(written, monkeypatch, factor):
    found = load_phase8(written)
    params = jax.tree.map(lambda w: factor * w, found.checkpoint.params)
    other = found._replace(checkpoint=found.checkpoint._replace(params=params))
    monkeypatch.setattr(reopen, "load_phase8", lambda _: other)
    with pytest.raises(ValueError, match=r"other logits in PyTorch: .* is allowed"):
        reopen.check(written)


def test_where_float32_itself_is_off_more_is_allowed(written, monkeypatch):
    def off(jax, torch):
        monkeypatch.setattr(reopen, "differences", lambda _: reopen.Differences(jax, torch))
        return reopen.check(written)

    assert "within 1.8e-04" in off(1.8e-4, 8e-5)
    for refused in ((1.8e-4, 1e-6), (1.1e-3, 1e-3)):
        with pytest.raises(ValueError, match="other logits"):
            off(*refused)
