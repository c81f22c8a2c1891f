"""Which data sets a step of phase 1 draws from, and how often: pure functions of the step."""

from collections.abc import Mapping
from typing import NamedTuple

from experiments.data.corpora import CORPORA
from forge_jax.models.cognate import SPECIALIZATIONS


class Stage(NamedTuple):
    """A part of the training."""

    number: int
    name: str
    until: float  # the share of all steps at which it ends
    datasets: tuple[str, ...]


_FOUNDATION = ("gsm8k", "svamp", "mbpp", "arc_easy", "piqa", "wikitext")
_REASONING = (*_FOUNDATION, "asdiv", "arc_challenge", "boolq", "strategyqa")
STAGES = (
    Stage(1, "foundation", 0.3, _FOUNDATION),
    Stage(2, "reasoning", 0.6, _REASONING),
    Stage(3, "advanced", 1.0, (*_REASONING, "codexglue", "hotpotqa", "drop", "hellaswag")),
)
"""the documents' epochs 1-3, 4-6 and 7-10 of ten; two further sets of text are optional"""


def stage_of(step: int, steps: int) -> Stage:
    """The stage of `step` among `steps`, counted from 0.

    Raises:
        ValueError: there is no such step.
    """
    if not 0 <= step < steps:
        raise ValueError(f"`step` must lie in [0, {steps}), got {step}.")
    return next(stage for stage in STAGES if step < stage.until * steps or stage is STAGES[-1])


def shares(
    step: int,
    steps: int,
    specialization: str,
    sizes: Mapping[str, int],
    temperature: float = 0.5,
) -> dict[str, float]:
    """The probability of each data set at `step`; they sum to 1.

    A category has the specialization's share; a tenth of everything is left to the categories that
    its mix does not name, and a category without a set in this stage gives its share to the others.
    The sets of a category share it by their size to the power `temperature`.

    Args:
        step: from 0.
        steps: of the whole training.
        specialization: a name in `SPECIALIZATIONS`.
        sizes: examples in each data set that is there.
        temperature: 1 is by size, 0 all alike.

    Raises:
        ValueError: no data set of the stage is there.
    """
    mix = dict(SPECIALIZATIONS[specialization].mix)
    names = [n for n in stage_of(step, steps).datasets if sizes.get(n, 0) > 0]
    if not names:
        raise ValueError(f"No data set of stage {stage_of(step, steps).number} has examples.")
    present = {CORPORA[n].category for n in names}
    unnamed = present - mix.keys()
    named = sum(share for category, share in mix.items() if category in present)
    scale = (0.9 if unnamed else 1.0) / named if named else 0.0
    rest = (1 - scale * named) / len(unnamed) if unnamed else 0.0
    by_category = {c: scale * mix[c] if c in mix else rest for c in present}
    weights = {n: sizes[n] ** temperature for n in names}
    totals = {c: sum(w for n, w in weights.items() if CORPORA[n].category == c) for c in present}
    return {
        n: by_category[CORPORA[n].category] * w / totals[CORPORA[n].category]
        for n, w in weights.items()
    }
