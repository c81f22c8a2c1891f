"""The 37 names that a phase 1 run logs, and the dashboard that shows them."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import yaml

from experiments.data.corpora import CATEGORIES
from forge_jax.models.cognate import SPECIALIZATIONS

TRAIN = (
    *("train/step", "train/epoch", "train/loss", "train/loss_ce", "train/loss_act"),
    *("train/loss_gate", "train/perplexity", "train/learning_rate", "train/gradient_norm"),
    *("act/avg_halting_steps", "act/max_halting_steps", "act/min_halting_steps"),
    *("act/halting_variance", "act/halt_prob_mean", "act/halt_prob_std"),
    *("ltm/memory_usage", "ltm/surprise_rate"),
    *("system/gpu_memory_used_gb", "system/gpu_memory_reserved_gb", "system/tokens_per_second"),
)
"""logged while training"""
EPOCH = (
    *("val/loss", "val/perplexity", *(f"val/{c}_accuracy" for c in CATEGORIES)),
    *("curriculum/stage", "time/epoch_duration_minutes"),
)
"""logged after each epoch"""
FINAL = (
    *("final/total_params", "final/trainable_params", "final/training_time_hours"),
    *("diversity/act_threshold_std", "diversity/ltm_capacity_std"),
    "diversity/surprise_threshold_std",
)
"""logged at the end"""
NAMES = (*TRAIN, *EPOCH, *FINAL)


def exactly(names: tuple[str, ...], values: Mapping[str, Any]) -> dict[str, float]:
    """`values` as numbers under exactly these names, in their order."""
    assert set(values) == set(names), set(values) ^ set(names)
    return {name: float(values[name]) for name in names}


def training_row(
    metrics: Mapping[str, Any],
    *,
    step: int,
    epoch: int,
    rate: float,
    capacity: float,
    last_answer: int,
    tokens_per_second: float,
) -> dict[str, float]:
    """What one model's update measured; `metrics` are those of `training.make_update`."""
    acts = ("avg_halting_steps", "max_halting_steps", "min_halting_steps", "halting_variance")
    parts = ("loss_ce", "loss_act", "loss_gate")
    used, reserved = gpu_memory_gb()
    values = {
        "train/step": step,
        "train/epoch": epoch,
        "train/loss": sum(float(metrics[k]) for k in parts),
        **{f"train/{k}": metrics[k] for k in (*parts, "gradient_norm")},
        "train/perplexity": np.exp(float(metrics[f"loss_step_{last_answer}"])),
        "train/learning_rate": rate,
        **{f"act/{k}": metrics[k] for k in (*acts, "halt_prob_mean", "halt_prob_std")},
        "ltm/memory_usage": float(metrics["memory_tokens"]) / capacity,
        "ltm/surprise_rate": metrics["surprise_rate"],
        "system/gpu_memory_used_gb": used,
        "system/gpu_memory_reserved_gb": reserved,
        "system/tokens_per_second": tokens_per_second,
    }
    return exactly(TRAIN, values)


def epoch_row(validated: Mapping[str, float], stage: int, minutes: float) -> dict[str, float]:
    """What one model's validation measured; `validated` has the loss and the accuracies."""
    values = {
        "val/loss": validated["loss"],
        "val/perplexity": np.exp(validated["loss"]),
        **{f"val/{c}_accuracy": validated[c] for c in CATEGORIES if c in validated},
        "curriculum/stage": stage,
        "time/epoch_duration_minutes": minutes,
    }
    return exactly(tuple(n for n in EPOCH if n in values), values)


def final_row(total: int, trainable: int, seconds: float) -> dict[str, float]:
    """Parameters, those of them that had a gradient, and how far the documents' models differ."""
    models = SPECIALIZATIONS.values()
    values = {
        "final/total_params": total,
        "final/trainable_params": trainable,
        "final/training_time_hours": seconds / 3600,
        "diversity/act_threshold_std": np.std([m.confidence for m in models]),
        "diversity/ltm_capacity_std": np.std([m.capacity for m in models]),
        "diversity/surprise_threshold_std": np.std([m.surprise for m in models]),
    }
    return exactly(FINAL, values)


def gpu_memory_gb() -> tuple[float, float]:
    """Memory in use and held by JAX on all GPUs of this process, GB (1e9 bytes); without one 0."""
    devices = [d for d in jax.local_devices() if d.platform == "gpu"]
    stats = [device.memory_stats() or {} for device in devices]
    used = sum(s.get("bytes_in_use", 0) for s in stats)
    held = sum(s.get("pool_bytes", s.get("bytes_reserved", 0)) for s in stats)
    return used / 1e9, held / 1e9


def dashboard(prefixes: tuple[str, ...]) -> str:
    """The definition of the W&B dashboard, YAML in the form of the guide: metrics and charts.

    `prefixes` are those of the models' names, "" for one model. Curves of several models share a
    chart.
    """
    scalars = set(FINAL)
    charts = [
        {
            "title": name.replace("/", " ").replace("_", " ").title(),
            "metric": [prefix + name for prefix in prefixes],
            "type": "scalar" if name in scalars else "line",
            "section": name.partition("/")[0],
        }
        for name in NAMES
    ]
    names = [prefix + name for prefix in prefixes for name in NAMES]
    return yaml.safe_dump({"metrics": names, "charts": charts}, sort_keys=False)
