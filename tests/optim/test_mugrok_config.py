"""The presets field by field, and the config as data."""

import dataclasses
import json

import optax
import pytest

from forge_jax import optim

DEFAULTS = {
    "muon_lr": 0.01,
    "muon_momentum": 0.95,
    "muon_ns_steps": 5,
    "muon_ns_coeffs": (3.4445, -4.7750, 2.0315),
    "muon_ste_mode": False,
    "grokfast_alpha": 0.98,
    "grokfast_lambda": 0.05,
    "use_qk_clip": True,
    "qk_clip_threshold": 30.0,
    "qk_clip_per_head": True,
    "fallback_type": "adamw",
    "fallback_lr": 1e-4,
    "fallback_betas": (0.9, 0.999),
    "fallback_weight_decay": 0.01,
    "enable_grokfast": True,
    "enable_muon": True,
    "enable_muon_clip": True,
    "kl_coefficient": None,
    "phase_name": "unknown",
}

# Columns: phases 1, 3, 5, 6, 7. A row that is not here is the default in every phase.
TABLE = {
    "muon_lr": (0.01, 5e-4, 2e-4, 1e-4, 0.01),
    "muon_ns_steps": (5, 3, 5, 3, 5),
    "muon_ste_mode": (False, False, True, False, False),
    "grokfast_alpha": (0.98, 0.95, 0.98, 0.98, 0.98),
    "grokfast_lambda": (0.05, 0.1, 2.0, 0.05, 0.05),
    "use_qk_clip": (True, True, True, True, False),
    "qk_clip_threshold": (30.0, 25.0, 30.0, 30.0, 30.0),
    "fallback_lr": (1e-4, 1e-3, 1e-4, 5e-3, 2e-3),
    "enable_muon": (True, True, True, True, False),
    "kl_coefficient": (None, 0.1, None, None, 0.2),
    "phase_name": (
        "phase1_cognate",
        "phase3_quiet_star",
        "phase5_forge",
        "phase6_baking_stage2",
        "phase7_transformer2",
    ),
}


def test_defaults():
    assert optim.MuGrokConfig().to_dict() == DEFAULTS


@pytest.mark.parametrize("field", DEFAULTS)
@pytest.mark.parametrize(("column", "phase"), list(enumerate((1, 3, 5, 6, 7))))
def test_presets(column, phase, field):
    want = TABLE.get(field, (DEFAULTS[field],) * 5)[column]
    assert getattr(optim.MuGrokConfig.from_phase(phase), field) == want


def test_the_table_has_every_field():
    assert list(DEFAULTS) == [field.name for field in dataclasses.fields(optim.MuGrokConfig)]


def test_phase_7_is_the_guides_manual_config():
    manual = optim.MuGrokConfig(
        enable_muon=False,
        fallback_type="adamw",
        fallback_lr=2e-3,
        fallback_betas=(0.9, 0.999),
        fallback_weight_decay=0.01,
        enable_grokfast=True,
        grokfast_alpha=0.98,
        grokfast_lambda=0.05,
        use_qk_clip=False,
        kl_coefficient=0.2,
        phase_name="phase7_transformer2",
    )
    assert optim.MuGrokConfig.from_phase(7) == manual


def test_overrides_do_not_stick_to_the_preset():
    changed = optim.MuGrokConfig.from_phase(7, grokfast_lambda=0.1, fallback_type="lion")
    assert (changed.grokfast_lambda, changed.fallback_type) == (0.1, "lion")
    changed.fallback_lr = 1.0
    assert optim.MuGrokConfig.from_phase(7).fallback_lr == 2e-3


@pytest.mark.parametrize("phase", [1, 3, 5, 6, 7])
def test_survives_json(phase):
    config = optim.MuGrokConfig.from_phase(phase)
    text = json.dumps(config.to_dict())
    assert optim.MuGrokConfig.from_dict(json.loads(text)) == config
    assert optim.MuGrokConfig(**config.to_dict()) == config


@pytest.mark.parametrize("phase", [0, 2, 4, 8, "7"])
def test_a_phase_without_preset_lists_those_that_exist(phase):
    with pytest.raises(ValueError, match=r"\[1, 3, 5, 6, 7\]"):
        optim.MuGrokConfig.from_phase(phase)


def test_an_unknown_field_lists_those_that_exist():
    with pytest.raises(ValueError, match=r"\['lr'\].*fallback_lr"):
        optim.MuGrokConfig.from_phase(7, lr=1e-3)
    with pytest.raises(ValueError, match=r"\['lr'\].*fallback_lr"):
        optim.MuGrokConfig.from_dict({"lr": 1e-3})


@pytest.mark.parametrize("coeffs", ["jordan", "polar_express", "svd"])
def test_coefficients_may_be_named(coeffs):
    config = optim.MuGrokConfig(muon_ns_coeffs=coeffs)
    assert optim.MuGrokConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match=r"muon_ns_coeffs.*polar_express"):
        optim.MuGrokConfig.from_dict({"muon_ns_coeffs": "newton"})


def test_a_schedule_is_no_data():
    config = optim.MuGrokConfig.from_phase(7, fallback_lr=optax.constant_schedule(1e-3))
    with pytest.raises(ValueError, match="fallback_lr"):
        config.to_dict()


def test_every_field_out_of_range_is_named():
    wrong = {
        "muon_lr": -1.0,
        "muon_momentum": 1.0,
        "muon_ns_steps": -1,
        "muon_ns_coeffs": (1.0, 2.0),
        "grokfast_alpha": 1.0,
        "grokfast_lambda": -0.1,
        "qk_clip_threshold": 0.0,
        "fallback_type": "sgd",
        "fallback_lr": -1e-4,
        "fallback_betas": (0.9, 1.0),
        "fallback_weight_decay": -0.1,
    }
    with pytest.raises(ValueError) as error:
        optim.MuGrokConfig(**wrong)
    assert all(name in str(error.value) for name in wrong)
    fields = [field.name for field in dataclasses.fields(optim.MuGrokConfig)]
    assert set(wrong) < set(fields)
