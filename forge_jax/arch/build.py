"""From a document to a Flax Linen module of tokens to logits."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from forge_jax.arch import sizes
from forge_jax.arch.canonical import canonical
from forge_jax.arch.knobs import network_knobs
from forge_jax.arch.latents import LatentSampler
from forge_jax.arch.layers import linear
from forge_jax.arch.pipeline import EMBEDDING, Step, active, last_of
from forge_jax.arch.schema import Arch, Spec
from forge_jax.arch.stack import Stack, State, init_stack

DTYPES = {"fp32": jnp.float32, "bf16": jnp.bfloat16, "fp16": jnp.bfloat16}


class Cache(NamedTuple):
    """What decoding keeps."""

    stages: dict[str, tuple[State, ...]]  # per stage one of each repetition
    index: Int[Array, ""]  # tokens read so far


def build(spec: Spec, *, unroll: bool = False) -> "Network":
    """The module of a document; `unroll` writes every layer out, for counts and short stacks."""
    full = canonical(spec)
    return Network(
        full.arch, sizes.vocabulary_of(full), full.train.ctx_len, full.train.dtype, unroll
    )


def init_cache(spec: Spec, batch: int, length: int) -> Cache:
    """An empty cache for `length` tokens in each of `batch` rows.

    Raises:
      ValueError: the document keeps no cache, or the context is shorter than `length`.
    """
    full = canonical(spec)
    arch, context = full.arch, full.train.ctx_len
    steps = [step for step in active(arch, train=False) if step.code is None]
    if any(s.arch.kv_policy and s.arch.kv_policy.cache == "none" for s in steps):
        raise ValueError("`spec` keeps no cache (its kv_policy.cache is none): read all at once.")
    if length > context:
        raise ValueError(f"`length` must be at most train.ctx_len {context}, got {length}.")
    dtype = DTYPES[full.train.dtype]
    states = {s.name: (init_stack(s.arch, batch, length, dtype),) * s.repeat for s in steps}
    return Cache(states, jnp.int32(0))


def _mean(outs: dict[str, Any], names: tuple[str, ...]) -> Any:
    """The mean of what these stages gave; None of none."""
    return sum(outs[name] for name in names) / len(names) if names else None


class Network(nn.Module):
    """Next-token logits; take it from `build`, which brings the document to canonical form.

    Losses beside the cross entropy (balance of routers, free bits) are sown into the collection
    "losses".
    """

    arch: Arch
    vocabulary: int
    context: int
    precision: str = "fp32"
    unroll: bool = False

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "batch time"],
        cache: Cache | None = None,
        *,
        knobs: dict[str, Any] | None = None,
        train: bool = False,
        step: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "batch time vocab"], Cache | None]:
        """Logits, and the cache with these tokens in it.

        `knobs` replaces the document's scalars (`knobs(spec)` gives them); `train` takes the
        training loops, as many as their schedule draws, adds the noise of the recurrence and of a
        condition with free bits, and infers latents: for these `rngs={"noise": key}` is needed;
        `step` counts training steps. In use latents are drawn by `rngs={"latent": key}`, always the
        same ones without.

        Raises:
          ValueError: there are more tokens than the context holds.
        """
        arch, dtype, time = self.arch, DTYPES[self.precision], tokens.shape[1]
        if time > self.context:
            raise ValueError(f"Wanted at most train.ctx_len {self.context} tokens, got {time}.")
        knobs = network_knobs(arch) if knobs is None else knobs
        at = jnp.arange(time) + (0 if cache is None else cache.index)
        x = nn.Embed(self.vocabulary, arch.d_model, dtype=dtype, name="embed")(tokens)
        outs, kept, known = {EMBEDDING: x}, {}, {} if cache is None else cache.stages
        # what infers latents has parameters too, though it runs in training only
        inferring = train or self.is_initializing()
        first = {s.module: s for s in reversed(active(arch, inferring))}
        modules = {name: self.module(s) for name, s in first.items()}
        for s in active(arch, inferring):
            module, x = modules[s.module], _mean(outs, s.inputs if inferring or not s.code else ())
            if isinstance(module, LatentSampler):
                outs[s.name] = module(x, tokens.shape[0], at)
                continue
            sources = {"kv": _mean(outs, s.kv_from), "mem": _mean(outs, s.mem_from)}
            sources |= {} if s.causal else {"ahead": jnp.bool_(True)}
            states = []
            for state in known.get(s.name, (None,) * s.repeat):
                given = {"sources": sources, "train": train, "step": step}
                x, state = module(x, at, knobs[s.module], state, **given)
                states.append(state)
            outs[s.name], kept[s.name] = x, tuple(states)
        head = linear("head", self.vocabulary, dtype)
        logits = head(_mean(outs, last_of(arch))).astype(jnp.float32)
        if cache is None:
            return logits, None
        return logits, Cache({name: kept[name] for name in known}, cache.index + time)

    def module(self, step: Step) -> Stack | LatentSampler:
        """The module of a step; stages that share it share its parameters."""
        arch, dtype = step.arch, DTYPES[self.precision]
        if step.code is None:
            return Stack(arch, self.context, dtype, self.unroll, name=step.module)
        return LatentSampler(step.code, arch.d_model, arch.norm, dtype, name=step.module)
