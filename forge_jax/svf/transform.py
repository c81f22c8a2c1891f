"""Run an unchanged Linen module on factors: y = ((x U) * s) Vt + b in every decomposed Dense."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from forge_jax.svf import factors as _factors


@dataclasses.dataclass(frozen=True)
class Transformed:
    """A Linen module whose `apply` takes factors where the module itself takes kernels."""

    module: nn.Module

    def apply(
        self,
        variables: Mapping[str, PyTree[Any]],
        *args: Any,
        scales: Mapping[str, Float[Array, "..."]] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Apply the module with the singular values `scales`, or those in the factors.

        Args:
            variables: as for the module; `variables["params"]` may hold `Factors` for the kernels
                of `nn.Dense` layers, the rest is ordinary.
            *args: arguments of the module.
            scales: for each path the values between U and Vt: s z, from `svf.scales(factors, z)`,
                and not z itself, which has the same shape. They end in the shape of the factors'
                own s. Leading axes broadcast against the leading axes of the layers' inputs:
                [P, 1, r] gives each of P candidates (or rows) its own values for inputs
                (P, time, features). Stacked layers under `nn.scan` have [P, 1, layers, r].
            **kwargs: keyword arguments of `Module.apply` and of the module.

        Raises:
            ValueError: `scales` does not fit the factors, or a `Factors` sits in another layer than
                `nn.Dense`.
        """
        params = variables["params"]
        if scales is not None:
            params = _with_scales(params, scales)
        with nn.intercept_methods(_intercept):
            return self.module.apply({**variables, "params": params}, *args, **kwargs)


def transform(module: nn.Module) -> Transformed:
    """Return the module with an `apply` that runs on factors.

    Factors and scales are arguments of `apply` like any parameter, so it composes with `jax.jit`,
    `jax.grad`, `jax.vmap` and the module's own `nn.scan`. U and Vt are shared by all rows and
    candidates.
    """
    return Transformed(module)


def _with_scales(params: PyTree[Any], scales: Mapping[str, Array]) -> PyTree[Any]:
    """Put the scales where the factors keep s, so that `nn.scan` slices both alike."""
    found = dict(_factors.named_factors(params))
    _factors.check_paths("scales", scales, found)

    def put(name, leaf):
        s = scales[name]
        own = leaf.s.ndim
        if s.shape[-own:] != leaf.s.shape:
            raise ValueError(f"scales[{name!r}] must end in {leaf.s.shape}, got {s.shape}.")
        # The scanned axes come first in every sliced array: [P, 1, layers, r] -> [layers, P, 1, r].
        stacked = range(s.ndim - own, s.ndim - 1)
        return dataclasses.replace(
            leaf, s=jnp.moveaxis(s, tuple(stacked), tuple(range(len(stacked))))
        )

    return _factors.map_factors(put, params)


def _intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
    """Replace the call of a Dense that holds factors, and let every other method run."""
    module = context.module
    if module.scope is None:
        return call(*args, **kwargs)
    own = module.variables.get("params", {})
    held = [name for name, leaf in own.items() if _factors.is_factors(leaf)]
    if not held:
        return call(*args, **kwargs)
    if not isinstance(module, nn.Dense) or context.method_name != "__call__":
        raise ValueError(
            f"`svf.transform` runs the factors of nn.Dense only, but {type(module).__name__} holds "
            f"{'/'.join((*module.path, held[0]))}; materialize that leaf instead."
        )
    return _dense(module, *args, **kwargs)


def _dense(module: nn.Dense, inputs: Float[Array, "... m"]) -> Float[Array, "... n"]:
    """Compute what `nn.Dense` computes, in its dtype and precision, without its kernel."""
    leaf = module.get_variable("params", "kernel")
    bias = module.get_variable("params", "bias") if module.use_bias else None
    _check_dense(module, leaf, inputs)
    # The kernel that is not there takes part in the promotion with its first dtype.
    absent = jnp.zeros((), leaf.layout.dtype)
    x, _, bias = module.promote_dtype(inputs, absent, bias, dtype=module.dtype)
    assert x is not None
    u, s, vt = (part.astype(x.dtype) for part in (leaf.u, leaf.s, leaf.vt))
    y = jnp.matmul(jnp.matmul(x, u, precision=module.precision) * s, vt, precision=module.precision)
    if leaf.rest is not None:
        y = y + jnp.matmul(x, leaf.rest.astype(x.dtype), precision=module.precision)
    return y if bias is None else y + bias


def _check_dense(module: nn.Dense, leaf: _factors.Factors, inputs: Float[Array, "... m"]) -> None:
    """Refuse what would compute something else than the module does."""
    name = "/".join((*module.path, "kernel"))
    if module.dot_general is not None or module.dot_general_cls is not None:
        raise ValueError(f"{name} has its own `dot_general`, which factors cannot go through.")
    wanted = (inputs.shape[-1], module.features)
    got = (*leaf.u.shape[:-1], leaf.vt.shape[-1])
    if got != wanted or leaf.layout.inputs > leaf.layout.outputs:
        raise ValueError(f"{name} must have factors of (inputs, outputs) {wanted}, got {got}.")
