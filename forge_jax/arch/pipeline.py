"""The stages of a document, in order: each a stack, or a latent, that reads earlier ones.

A document without a pipeline is one stack between embedding and head.
"""

from typing import Any, NamedTuple

from forge_jax.arch.mixing import Attention
from forge_jax.arch.schema import Arch, Module, Stage
from forge_jax.arch.sizes import mixers
from forge_jax.arch.structure import Cond, CondReg, CondSource, Pos

EMBEDDING = "embedding"  # the name of the first stage in canonical form
BITS = 8  # of a latent where a document does not say
# What a module leaves open comes from the architecture; the rest is each module's own.
SHARED = ("d_model", "n_layers", "mix_unit", "ffn", "norm", "pos")
OWN = ("cond", "kv_policy", "residual", "hierarchy", "depth_router", "recurrence")


class Code(NamedTuple):
    """A latent of `bits` bits per token."""

    bits: int
    dim: int  # features of a code before it is mapped to the model's width
    kappa: float  # free bits; 0 without


class Step(NamedTuple):
    """A stage between embedding and head; it reads the means of the stages named."""

    name: str
    module: str  # whose weights it has
    arch: Arch  # of its stack, or of the stack that its module would be
    code: Code | None = None  # a latent sampler's
    inputs: tuple[str, ...] = (EMBEDDING,)
    kv_from: tuple[str, ...] = ()
    mem_from: tuple[str, ...] = ()
    repeat: int = 1
    causal: bool = True

    @property
    def read(self) -> tuple[str, ...]:
        """All stages it reads."""
        return self.inputs + self.kv_from + self.mem_from


def kind_of(stage: Stage, modules: dict[str, Module]) -> str:
    """What a stage is: "transformer", "embedding", "readout", "latent_sampler" or "custom"."""
    if stage.module is not None and stage.module in modules:
        return modules[stage.module].kind
    return "transformer" if stage.kind in (None, "module") else stage.kind


def module_arch(arch: Arch, module: Module) -> Arch:
    """A module's stack as an architecture of its own."""
    own: dict[str, Any] = {name: getattr(module, name) for name in OWN}
    for name in SHARED:
        value = getattr(module, name)
        own[name] = getattr(arch, name) if value is None else value
    own["d_model"] = arch.d_model  # `graph` refuses another
    if module.pos is None and not any(isinstance(m, Attention) for m in mixers(own["mix_unit"])):
        own["pos"] = Pos(kind="rope")  # what comes from `arch` may have nothing to act on here
    return Arch(**own)


def code_of(arch: Arch, module: Module) -> Code:
    """What a latent sampler draws."""
    cond = module.cond or Cond()
    source, reg = cond.source or CondSource(kind="pool-mlp"), cond.reg or CondReg(kind="none")
    dim = (module.params or {}).get("latent_dim") or arch.d_model
    kappa = reg.kappa or 0.0 if reg.kind == "freebits" else 0.0
    return Code(source.H or BITS, int(dim), kappa)


def stages_in_full(arch: Arch) -> tuple[tuple[Stage, str, tuple[str, ...]], ...]:
    """Every stage with what it is and its inputs.

    Inputs that are left open are the nearest earlier stage that is no latent.
    """
    modules, out, before = arch.modules or {}, [], ""
    for stage in arch.pipeline or ():
        kind = kind_of(stage, modules)
        inputs = stage.inputs or ((before,) if before else ())
        out.append((stage, kind, () if kind == "embedding" else inputs))
        if kind != "latent_sampler":
            before = stage.name
    return tuple(out)


def in_use(arch: Arch) -> set[str]:
    """The stages that run in use, where a latent reads nothing."""
    full = stages_in_full(arch)
    names = {full[-1][0].name}
    for stage, kind, inputs in reversed(full):
        if stage.name in names and kind != "latent_sampler":
            names |= {*inputs, *(stage.kv_from or ()), *(stage.mem_from or ())}
    return names


def steps_of(arch: Arch) -> tuple[Step, ...]:
    """The steps of a document that the rules have passed."""
    if arch.pipeline is None:
        return (Step("stack", "stack", arch),)
    modules = arch.modules or {}
    full = stages_in_full(arch)
    first = full[0][0].name

    def named(stages: tuple[str, ...] | None) -> tuple[str, ...]:
        return tuple(EMBEDDING if name == first else name for name in stages or ())

    steps = []
    for stage, kind, inputs in full:
        if kind not in ("transformer", "latent_sampler"):
            continue
        module = modules.get(stage.module or "", Module(kind=kind))  # pyright: ignore[reportArgumentType]
        steps.append(
            Step(
                # a stage without a module has one that no document can name
                *(stage.name, stage.module or f"/{stage.name}", module_arch(arch, module)),
                code_of(arch, module) if kind == "latent_sampler" else None,
                *(named(inputs), named(stage.kv_from), named(stage.mem_from)),
                stage.repeat,
                (module.params or {}).get("causal") is not False,
            )
        )
    return tuple(steps)


def last_of(arch: Arch) -> tuple[str, ...]:
    """The stages that the head reads."""
    if arch.pipeline is None:
        return ("stack",)
    full = stages_in_full(arch)
    first = full[0][0].name
    return tuple(EMBEDDING if name == first else name for name in full[-1][2])


def active(arch: Arch, train: bool) -> tuple[Step, ...]:
    """The steps that run: in use a latent is drawn, and what only latents read is left out."""
    steps = steps_of(arch)
    if train or arch.pipeline is None:
        return steps
    used = in_use(arch)
    return tuple(step for step in steps if step.name in used)
