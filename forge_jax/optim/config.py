"""The settings of MuonGrokfast and the presets of the phases that use it."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import optax

from forge_jax.optim.newton_schulz import JORDAN, NAMES

# What each phase sets apart from the defaults. Phases 2, 4 and 8 have no preset: 2 uses no
# gradients, and no source states one for 4 and 8.
_PRESETS: dict[int, dict[str, Any]] = {
    1: {"phase_name": "phase1_cognate"},
    3: {
        "muon_lr": 5e-4,
        "muon_ns_steps": 3,
        "grokfast_alpha": 0.95,
        "grokfast_lambda": 0.1,
        "qk_clip_threshold": 25.0,
        "fallback_lr": 1e-3,
        "kl_coefficient": 0.1,
        "phase_name": "phase3_quiet_star",
    },
    5: {
        "muon_lr": 2e-4,
        "muon_ste_mode": True,
        "grokfast_lambda": 2.0,
        "phase_name": "phase5_forge",
    },
    6: {
        "muon_lr": 1e-4,
        "muon_ns_steps": 3,
        "fallback_lr": 5e-3,
        "phase_name": "phase6_baking_stage2",
    },
    7: {
        "enable_muon": False,
        "fallback_lr": 2e-3,
        "use_qk_clip": False,
        "kl_coefficient": 0.2,
        "phase_name": "phase7_transformer2",
    },
}


@dataclasses.dataclass
class MuGrokConfig:
    """Settings of `optim.mugrok`. Mutable: an optimizer reads them once, when it is built.

    The two learning rates may be optax schedules, functions of the step.
    """

    muon_lr: optax.ScalarOrSchedule = 0.01
    muon_momentum: float = 0.95
    muon_ns_steps: int = 5
    """Newton-Schulz steps; 0 is an exact SVD"""
    muon_ns_coeffs: tuple[float, float, float] | Literal["jordan", "polar_express", "svd"] = JORDAN
    """one triple for every step, or a name that `optim.orthogonalize` knows"""
    muon_ste_mode: bool = False
    """the parameters are the latent weights of a straight-through quantizer"""
    grokfast_alpha: float = 0.98
    """decay of the gradient's moving average"""
    grokfast_lambda: float = 0.05
    """weight of the moving average"""
    use_qk_clip: bool = True
    qk_clip_threshold: float = 30.0
    """largest Frobenius norm of a query or key matrix"""
    qk_clip_per_head: bool = True
    fallback_type: Literal["adamw", "lion"] = "adamw"
    """optimizer of everything that Muon does not take"""
    fallback_lr: optax.ScalarOrSchedule = 1e-4
    fallback_betas: tuple[float, float] = (0.9, 0.999)
    fallback_weight_decay: float = 0.01
    """decoupled: multiplied by the learning rate"""
    enable_grokfast: bool = True
    enable_muon: bool = True
    enable_muon_clip: bool = True
    """QK-clip runs when this and `use_qk_clip` are both on"""
    kl_coefficient: float | None = None
    """weight of the KL term in the phase's loss; the optimizer does not read it"""
    phase_name: str = "unknown"

    def __post_init__(self):
        # JSON has no tuples.
        for name in ("muon_ns_coeffs", "fallback_betas"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, tuple(getattr(self, name)))
        self.validate()

    @classmethod
    def from_phase(cls, phase: int, **overrides: Any) -> "MuGrokConfig":
        """Return the preset of a phase, with some fields replaced.

        Raises:
            ValueError: the phase has no preset, or a field does not exist or is out of range.
        """
        if phase not in _PRESETS:
            raise ValueError(f"`phase` must be one of {sorted(_PRESETS)}, got {phase!r}.")
        return cls.from_dict({**_PRESETS[phase], **overrides})

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "MuGrokConfig":
        """Return the config with these fields; the others take their defaults.

        Raises:
            ValueError: a field does not exist or is out of range.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(fields) - set(names))
        if unknown:
            raise ValueError(f"No fields {unknown} in MuGrokConfig; there are {names}.")
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain data, fit for `json.dumps` and `from_dict`.

        Raises:
            ValueError: a learning rate is a schedule, which is a function and no data.
        """
        fields = dataclasses.asdict(self)
        schedules = [name for name, value in fields.items() if callable(value)]
        if schedules:
            raise ValueError(f"A config on disk needs numbers, but {schedules} are schedules.")
        return fields

    def validate(self) -> None:
        """Raise a ValueError that lists every field out of its range."""
        rates = {"muon_lr": self.muon_lr, "fallback_lr": self.fallback_lr}
        wrong = [
            f"`{name}` must be a schedule or at least 0, got {rate}"
            for name, rate in rates.items()
            # A traced rate, of `with_hyperparams`, has no value to check.
            if isinstance(rate, int | float) and not rate >= 0
        ]
        unit = {"muon_momentum": self.muon_momentum, "grokfast_alpha": self.grokfast_alpha}
        unit |= {f"fallback_betas[{i}]": beta for i, beta in enumerate(self.fallback_betas)}
        wrong += [f"`{k}` must lie in [0, 1), got {v}" for k, v in unit.items() if not 0 <= v < 1]
        least = {
            "muon_ns_steps": self.muon_ns_steps,
            "grokfast_lambda": self.grokfast_lambda,
            "fallback_weight_decay": self.fallback_weight_decay,
        }
        least = {k: v for k, v in least.items() if isinstance(v, int | float)}
        wrong += [f"`{k}` must be at least 0, got {v}" for k, v in least.items() if not v >= 0]
        if not self.qk_clip_threshold > 0:
            wrong.append(f"`qk_clip_threshold` must be positive, got {self.qk_clip_threshold}")
        if self.muon_ns_coeffs not in NAMES and len(self.muon_ns_coeffs) != 3:
            wrong.append(
                f"`muon_ns_coeffs` must be three numbers or one of {NAMES}, "
                f"got {self.muon_ns_coeffs}"
            )
        if len(self.fallback_betas) != 2:
            wrong.append(f"`fallback_betas` must be two numbers, got {self.fallback_betas}")
        if self.fallback_type not in ("adamw", "lion"):
            wrong.append(f"`fallback_type` must be 'adamw' or 'lion', got {self.fallback_type!r}")
        if wrong:
            raise ValueError("; ".join(wrong) + ".")
