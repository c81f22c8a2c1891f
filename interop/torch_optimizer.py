"""MuonGrokfast for PyTorch: the chain of `forge_jax.optim` behind `torch.optim.Optimizer`.

Parameters and gradients enter through dlpack, without a copy where torch's buffer is aligned as
XLA needs it, and the stepped parameters return by one `copy_`. All groups run in one compiled
program, and `step` returns when it has finished.
"""

import dataclasses
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from optax.contrib import MuonDimensionNumbers

from forge_jax import optim

Route = Literal["muon", "fallback"]


class MuonGrokfast(torch.optim.Optimizer):
    """Grokfast, then Muon or the fallback parameter by parameter, then QK-clip.

    Each group that is given becomes two in `param_groups`, one for each route, so that
    `group["lr"]` is `muon_lr` in one and `fallback_lr` in the other and a scheduler of torch
    drives both in proportion. `group["weight_decay"]` is decoupled; Muon's is 0 unless given.

    A step whose gradients are not all finite changes nothing and is counted in
    `state["skipped"]`; the others are counted in `state["step"]`. A parameter without gradient is
    left alone, its momentum too, but shares the step count of its group. Parameters of less than
    32 bits have float32 state and a float32 copy; float64 ones are stepped as float32 and hold
    rounded values after. With `muon_ste_mode`, a parameter that has `weight_full_precision` gives
    its gradient to that tensor, which is stepped in its place.

    The chain runs on the host's processor. Parameters on an accelerator are copied there and back
    at every step: correct, but slow.

    Args:
        params: tensors, groups, or pairs of name and tensor as `named_parameters` yields them.
            QK-clip and `fallback` go by name: without names, clipping that is on warns.
        config: settings; rates must be numbers.
        qk_select: see `optim.mugrok`; the path is the parameter's name.
        num_heads: see `optim.mugrok`.
        fallback: see `optim.mugrok`.
        update_scale: see `optim.mugrok`.
        nesterov: see `optim.mugrok`.
        tol: see `optim.mugrok`.
        **overrides: fields of `config` to replace.

    Raises:
        ValueError: a field is unknown or out of range, a rate is a schedule, or two parameters of
            a group have one name; in `step`, a group's `lr` or `weight_decay` is below 0 or NaN.
        TypeError: parameters are a tensor or a set, as torch has it.
    """

    state: Any  # torch's, by parameter; and the two counters by name

    def __init__(
        self,
        params: Iterable[Any],
        config: optim.MuGrokConfig | None = None,
        *,
        qk_select: Callable[[str, Any], Any] = optim.is_qk,
        num_heads: Any = None,
        fallback: Callable[[str, Any], bool] | None = None,
        update_scale: Literal["none", "width", "rms"] = "none",
        nesterov: bool = False,
        tol: float | None = None,
        **overrides: Any,
    ):
        self.config = _numbers_only(config or optim.MuGrokConfig(), overrides)
        self._fallback = fallback
        self._select, self._heads = qk_select, num_heads
        self._knobs = {"update_scale": update_scale, "nesterov": nesterov, "tol": tol}
        self._opt_states: list[Any] = []  # one per group; None before its first step
        self._compiled = jax.jit(self._update, static_argnums=0, donate_argnums=1)
        given = _ordered(params)
        self._built = False  # torch adds the groups one by one
        # torch refuses an empty list but takes a group without parameters.
        super().__init__(given or [{"params": []}], {"lr": None, "weight_decay": None})
        self.state["step"], self.state["skipped"] = 0, 0
        self._built = True
        if given:
            self._warn_if_nothing_clips()
        else:  # that group has no names, and torch would allow none in any later one
            self.param_groups.clear()
            self._opt_states.clear()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, split by route; `lr` and `weight_decay`, if given, hold for both.

        Raises:
            ValueError: a rate is below 0 or NaN, or two parameters have one name.
        """
        tensors = param_group["params"]
        tensors = [tensors] if isinstance(tensors, torch.Tensor) else _ordered(tensors)
        _check_rates(param_group)
        first = self._built and not self.param_groups
        config, start = self.config, sum(len(g["params"]) for g in self.param_groups)
        named = [p if isinstance(p, tuple) else (str(start + i), p) for i, p in enumerate(tensors)]
        _check_names([name for name, _ in named])
        rates = {"muon": config.muon_lr, "fallback": config.fallback_lr}
        decays = {"muon": 0.0, "fallback": config.fallback_weight_decay}
        routes = [self._route(name, tensor) for name, tensor in named]
        for route in dict.fromkeys(routes) or ["fallback"]:
            chosen = [t for t, r in zip(tensors, routes, strict=True) if r == route]
            defaults = {"lr": rates[route], "weight_decay": decays[route]}
            super().add_param_group(defaults | param_group | {"params": chosen, "route": route})
            self._opt_states.append(None)
        if first:
            self._warn_if_nothing_clips()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore
        """Take one step, after `closure` if one is given, and return what it returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            _check_rates(group)
        groups = [_Group(g["route"], _short(g["params"])) for g in self.param_groups]
        names = self._names()
        params = [self._arrays(g, n) for g, n in zip(self.param_groups, names, strict=True)]
        with_gradient = [
            {n: p for n, p in zip(ns, g["params"], strict=True) if p.grad is not None}
            for g, ns in zip(self.param_groups, names, strict=True)
        ]
        if not any(with_gradient):
            return loss
        self._start(groups, params)
        grads = [
            {n: _to_jax(has[n].grad) if n in has else jnp.zeros_like(x) for n, x in ps.items()}
            for has, ps in zip(with_gradient, params, strict=True)
        ]
        present = [{n: n in has for n in ps} for has, ps in zip(with_gradient, params, strict=True)]
        scalars = [(float(g["lr"]), float(g["weight_decay"])) for g in self.param_groups]
        finite, self._opt_states, stepped = jax.block_until_ready(
            self._compiled(tuple(groups), self._opt_states, params, grads, present, scalars)
        )
        if not finite:
            self.state["skipped"] += 1
            return loss
        self.state["step"] += 1
        for group, ns, new in zip(self.param_groups, names, stepped, strict=True):
            for name, param in zip(ns, group["params"], strict=True):
                if param.grad is not None:
                    self._latent(param).copy_(torch.from_dlpack(new[name]))
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return groups, counters and the chain's state as tensors and plain data."""
        packed = super().state_dict()
        packed["state"]["chain"] = [
            None if s is None else [torch.from_numpy(np.array(x)) for x in jax.tree.leaves(s)]
            for s in self._opt_states
        ]
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the state of an optimizer that was built for the same parameters.

        Raises:
            ValueError: groups or state are of other parameters or of another config.
        """
        chain = state_dict["state"].get("chain", [])
        if len(chain) != len(self.param_groups):
            raise ValueError(
                f"`state_dict` must have {len(self.param_groups)} groups, got {len(chain)}."
            )
        groups = [_Group(g["route"], _short(g["params"])) for g in self.param_groups]
        arrays = [self._arrays(g, n) for g, n in zip(self.param_groups, self._names(), strict=True)]
        states = [
            None if leaves is None else _unflatten(self._build(group, 0.0, 0.0), params, leaves)
            for group, params, leaves in zip(groups, arrays, chain, strict=True)
        ]
        rest = {key: value for key, value in state_dict["state"].items() if key != "chain"}
        super().load_state_dict({**state_dict, "state": rest})
        self._opt_states = states

    def _build(self, group: "_Group", lr: Any, weight_decay: Any):
        """Build the chain of one group; the rates may be traced."""
        config = dataclasses.replace(
            self.config,
            enable_muon=group.route == "muon",
            muon_lr=lr,
            fallback_lr=lr,
            fallback_weight_decay=weight_decay,
        )
        tx = optim.mugrok(
            config,
            self._select,
            self._heads,
            layout=_layout,
            muon_weight_decay=weight_decay,
            **self._knobs,
        )
        return optim.master_copy(tx) if group.short else tx

    def _update(self, groups, states, params, grads, present, scalars):
        """Step every group, or none where a gradient is not finite."""
        finite = jnp.all(jnp.array([jnp.all(jnp.isfinite(g)) for g in jax.tree.leaves(grads)]))

        def stepped():
            new_states, new_params = [], []
            everything = zip(groups, states, params, grads, present, scalars, strict=True)
            for group, state, p, g, has, (lr, decay) in everything:
                tx = self._build(group, lr, decay)
                updates, new = tx.update(g, state, p) if p else ({}, state)
                new_states.append(_keep(has, new, state))
                new_params.append(optax.apply_updates(p, updates))
            return new_states, new_params

        new_states, new_params = jax.lax.cond(finite, stepped, lambda: (states, params))
        return finite, new_states, new_params

    def _start(self, groups: list["_Group"], params: list[dict[str, jax.Array]]) -> None:
        """Make the state of each group that has none."""
        with warnings.catch_warnings():
            # Of a clip that matches nothing the constructor has warned, once for all groups.
            warnings.simplefilter("ignore", UserWarning)
            for i, state in enumerate(self._opt_states):
                if state is None:
                    init = self._build(groups[i], 0.0, 0.0).init
                    self._opt_states[i] = jax.jit(init)(params[i])

    def _arrays(self, group: dict[str, Any], names: list[str]) -> dict[str, jax.Array]:
        latents = map(self._latent, group["params"])
        return {n: _to_jax(p) for n, p in zip(names, latents, strict=True)}

    def _names(self) -> list[list[str]]:
        """Return the name of every parameter by group, numbers where there are none."""
        names, count = [], 0
        for group in self.param_groups:
            numbers = [str(count + i) for i in range(len(group["params"]))]
            names.append(list(group.get("param_names", numbers)))
            count += len(numbers)
        return names

    def _latent(self, param: torch.Tensor) -> torch.Tensor:
        """Return the tensor that is stepped for a parameter."""
        if self.config.muon_ste_mode:
            return getattr(param, "weight_full_precision", param).detach()
        return param.detach()

    def _route(self, name: str, param: torch.Tensor) -> Route:
        named_out = self._fallback is not None and self._fallback(name, param)
        return (
            "muon" if param.ndim >= 2 and self.config.enable_muon and not named_out else "fallback"
        )

    def _route_parameter(self, param: torch.Tensor) -> Route:
        """Return the route of a parameter that has no name."""
        return self._route("", param)

    def _newton_schulz_ortho(
        self, matrix: torch.Tensor, steps: int | None = None, tol: float | None = None
    ) -> torch.Tensor:
        """Return `optim.orthogonalize` of a matrix."""
        steps = self.config.muon_ns_steps if steps is None else steps
        x = optim.orthogonalize(_to_jax(matrix), steps, self.config.muon_ns_coeffs, tol)
        return torch.from_numpy(np.array(x))

    def _apply_qk_clip(self, weight: torch.Tensor, update: torch.Tensor, name: str) -> torch.Tensor:
        """Return the update that `optim.qk_clip` makes of one for this weight."""
        heads = self._heads if self.config.qk_clip_per_head else None
        clip = optim.qk_clip(self.config.qk_clip_threshold, heads, self._select, layout=_layout)
        params, updates = {name: _to_jax(weight)}, {name: _to_jax(update)}
        clipped: Any = clip.update(updates, clip.init(params), params)[0]
        return torch.from_numpy(np.array(clipped[name]))

    def _warn_if_nothing_clips(self) -> None:
        if not (self.config.use_qk_clip and self.config.enable_muon_clip):
            return
        if any("param_names" not in group for group in self.param_groups):
            warnings.warn(
                "QK-clip is on, but the parameters have no names to find queries and keys by: "
                "give `model.named_parameters()`.",
                stacklevel=3,
            )
        elif not any(
            self._select(name, param)
            for group, names in zip(self.param_groups, self._names(), strict=True)
            for name, param in zip(names, group["params"], strict=True)
        ):
            warnings.warn("QK-clip is on, but `qk_select` matches no parameter.", stacklevel=3)


class _Group(NamedTuple):
    """What of a group decides its chain."""

    route: Route
    short: bool  # parameters of less than 32 bits


def _numbers_only(config: optim.MuGrokConfig, overrides: dict[str, Any]) -> optim.MuGrokConfig:
    """Return a copy with some fields replaced."""
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)} | overrides
    schedules = [name for name in ("muon_lr", "fallback_lr") if callable(fields[name])]
    if schedules:
        raise ValueError(
            f"{schedules} must be numbers, got schedules: a scheduler of torch sets `group['lr']`."
        )
    return optim.MuGrokConfig.from_dict(fields)


def _ordered(params: Iterable[Any]) -> list[Any]:
    """Return the parameters as a list; like torch, refuse what has no order or is one tensor."""
    if isinstance(params, set | frozenset | torch.Tensor):
        kind = type(params).__name__
        raise TypeError(f"`params` must be an ordered collection of tensors, got a {kind}.")
    return list(params)


def _check_names(names: list[str]) -> None:
    """Raise a ValueError that lists repeated names: a group is a dictionary by name."""
    repeated = sorted(name for name, count in Counter(names).items() if count > 1)
    if repeated:
        raise ValueError(
            f"The names of a group must be unique, got {repeated} more than once: give "
            "`named_parameters(prefix=...)`, or a group to each model."
        )


def _check_rates(group: dict[str, Any]) -> None:
    """Raise a ValueError where a rate of a group is below 0 or NaN."""
    for key in ("lr", "weight_decay"):
        if key in group and not group[key] >= 0:
            raise ValueError(f"`group['{key}']` must be at least 0, got {group[key]}.")


def _layout(path: str, leaf: Any) -> MuonDimensionNumbers:
    """Read axis 0 as the outputs and all others as inputs, as torch's Linear and Conv do."""
    del path
    return MuonDimensionNumbers(tuple(range(1, leaf.ndim)), 0)


def _short(params: list[torch.Tensor]) -> bool:
    return any(p.element_size() < 4 for p in params)


def _to_jax(tensor: torch.Tensor) -> jax.Array:
    """Share a tensor's memory with JAX, or copy what JAX cannot take as it is."""
    tensor = tensor.detach()
    if tensor.dtype == torch.float64:  # off in JAX unless it is asked for
        tensor = tensor.float()
    return jnp.from_dlpack(tensor.to("cpu").contiguous())


def _keep(present: dict[str, Any], new: Any, old: Any) -> Any:
    """Take the new state only of the parameters that have a gradient."""

    def choose(path, n, o):
        key = getattr(path[-1], "key", None) if path else None
        return jnp.where(present[key], n, o) if key in present else n

    return jax.tree_util.tree_map_with_path(choose, new, old)


def _unflatten(tx: optax.GradientTransformation, params: Any, leaves: list[torch.Tensor]) -> Any:
    """Return the state of `tx` that has these leaves.

    Raises:
        ValueError: their number, shapes or dtypes are not those of a state for `params`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        wanted = jax.eval_shape(tx.init, params)
    # A copy: `step` gives the memory of the state away, and these tensors are the caller's.
    arrays = [jnp.array(leaf.numpy(), copy=True) for leaf in leaves]
    want = [(x.shape, x.dtype) for x in jax.tree.leaves(wanted)]
    got = [(x.shape, x.dtype) for x in arrays]
    if want != got:
        wrong = next((f"{w}, got {g}" for w, g in zip(want, got, strict=False) if w != g), "")
        raise ValueError(
            "`state_dict` must be of the same parameters and config: "
            f"want {len(want)} arrays, got {len(got)}{'; first difference: ' * bool(wrong)}{wrong}."
        )
    return jax.tree.unflatten(jax.tree.structure(wanted), arrays)
