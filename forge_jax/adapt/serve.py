"""Two passes over a batch of different questions: classify, mix, answer, each row its own z."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float, PyTree

from forge_jax import svf
from forge_jax.adapt.dispatch import Choice

Experts = Mapping[str, Float[Array, "experts r"]]


class Answered(NamedTuple):
    """What the two passes gave."""

    choice: Choice
    answer: Any  # what `answer` returned


def check_experts(factors: PyTree[Any], experts: Experts) -> None:
    """Refuse experts of another model, and z that are no numbers.

    Raises:
        ValueError: listing every path that is missing, too many, of another shape or not finite.
    """
    wanted = {name: leaf.s.shape for name, leaf in svf.named_factors(factors)}
    problems = [f"{name} is missing" for name in wanted if name not in experts]
    for name, z in experts.items():
        if name not in wanted:
            problems.append(f"{name} is none of the model's matrices")
        elif z.shape[1:] != wanted[name]:
            problems.append(f"{name} has {z.shape[1:]} singular values, the model {wanted[name]}")
        elif not np.isfinite(np.asarray(z)).all():
            problems.append(f"{name} holds NaN or infinity")
    if problems:
        raise ValueError(f"The experts do not fit the model: {'; '.join(problems)}.")


def two_pass(
    adapted: svf.Transformed,
    factors: PyTree[Any],
    experts: Experts,
    classify: Callable[[Callable[..., Any], Any], Choice],
    answer: Callable[[Callable[..., Any], Any], Any],
    batch: Any,
) -> Answered:
    """Classify every question with the base, then answer all of them in one step.

    The second pass runs each row with the z of its own expert; all rows share U and Vt in one
    product. Nothing is grouped or reloaded, and switching experts costs a gather. A new expert in
    padded experts and labels (`svf.pad_experts`, `make_labels`) compiles nothing again.

    Args:
        adapted: the model, from `svf.transform`.
        factors: its parameters.
        experts: for each path the z of all experts, (K, r).
        classify: `classify(apply, batch)`, a dispatcher with the batch's fields; `apply` is the
            base's and takes `scales=` for a classification expert.
        answer: `answer(apply, batch)` with the rows' own `apply`, such as `models.Respond`. One
            answer a question: the rows must stay those of the batch.
        batch: a pytree of arrays.
    """
    apply = functools.partial(adapted.apply, {"params": factors})
    choice = classify(apply, batch)
    rows = svf.apply_rows(adapted, factors, svf.row_scales(factors, experts, choice.expert))
    return Answered(choice, answer(rows, batch))
