"""From a document to a Flax Linen module of tokens to logits."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from forge_jax.arch import sizes
from forge_jax.arch.canonical import canonical
from forge_jax.arch.knobs import arch_knobs
from forge_jax.arch.layers import linear
from forge_jax.arch.schema import Arch, Spec
from forge_jax.arch.stack import Stack, State, init_stack

DTYPES = {"fp32": jnp.float32, "bf16": jnp.bfloat16, "fp16": jnp.bfloat16}


class Cache(NamedTuple):
    """What decoding keeps."""

    stack: State
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
    if arch.kv_policy and arch.kv_policy.cache == "none":
        raise ValueError("`spec` keeps no cache (arch.kv_policy.cache is none): read all at once.")
    if length > context:
        raise ValueError(f"`length` must be at most train.ctx_len {context}, got {length}.")
    return Cache(init_stack(arch, batch, length, DTYPES[full.train.dtype]), jnp.int32(0))


class Network(nn.Module):
    """Next-token logits; take it from `build`, which brings the document to canonical form.

    Losses beside the cross entropy (balance of routers) are sown into the collection "losses".
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
        training loops, as many as their schedule draws, and adds the recurrence's noise: for both
        `rngs={"noise": key}` is needed; `step` counts training steps.

        Raises:
          ValueError: there are more tokens than the context holds.
        """
        arch, dtype, time = self.arch, DTYPES[self.precision], tokens.shape[1]
        if time > self.context:
            raise ValueError(f"Wanted at most train.ctx_len {self.context} tokens, got {time}.")
        knobs = arch_knobs(arch) if knobs is None else knobs
        at = jnp.arange(time) + (0 if cache is None else cache.index)
        x = nn.Embed(self.vocabulary, arch.d_model, dtype=dtype, name="embed")(tokens)
        stack = Stack(arch, self.context, dtype, self.unroll, name="stack")
        state = None if cache is None else cache.stack
        x, state = stack(x, at, knobs, state, train=train, step=step)
        logits = linear("head", self.vocabulary, dtype)(x).astype(jnp.float32)
        if cache is None or state is None:
            return logits, None
        return logits, Cache(state, cache.index + time)
