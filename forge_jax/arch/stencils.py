"""Which keys a query sees, as a function of their positions."""

from typing import Any

from jaxtyping import Array, Bool, Int

from forge_jax.arch.mixing import Stencil


def visible(
    stencil: Stencil | None,
    queries: Int[Array, " time"],
    keys: Int[Array, " slots"],
    knobs: dict[str, Any],
) -> Bool[Array, "time slots"]:
    r"""Key j is visible to query i if j <= i and the canonical pattern says so.

    sliding: $j > \lfloor i/s \rfloor s - w$ for window w and stride s. Stride 1 is a local
    window; a block of b is w = 1, s = b; a ring over blocks of b (the own block and the one before)
    is w = b + 1, s = b. Ring Attention proper is exact full attention spread over devices; here the
    word names a pattern. dilated: $i - j$ a multiple of d, at most w of them. hybrid: a local
    window or a multiple of d. The first `globals` keys are visible besides.
    """
    i, j = queries[:, None], keys[None, :]
    causal = j <= i
    if stencil is None:
        return causal
    if stencil.kind == "sliding":
        stride = knobs["stride"]
        seen = j > i // stride * stride - knobs["window"]
    else:
        far = i - j
        seen = far % knobs["dilation"] == 0
        if stencil.kind == "hybrid":
            seen = seen | (far < knobs["window"])
        elif stencil.window is not None:
            seen = seen & (far < knobs["window"] * knobs["dilation"])
    if stencil.globals is not None:
        seen = seen | (j < knobs["globals"])
    return causal & seen
