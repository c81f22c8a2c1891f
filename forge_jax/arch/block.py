"""One layer: mixers merged or routed, a feed-forward network, and the residual around both."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from forge_jax.arch import sizes
from forge_jax.arch.conditioning import modulated
from forge_jax.arch.ffn import Dense, MoE, balance_loss, init_taken, keep_largest
from forge_jax.arch.layers import linear, make_norm
from forge_jax.arch.mixers import attention, latent, linformer, longconv, performer, retention, ssm
from forge_jax.arch.mixers.frame import Frame
from forge_jax.arch.mixing import SSM, Attention, Mixer, ParUnit, Retention, RouteUnit, SingleUnit
from forge_jax.arch.schema import Arch
from forge_jax.arch.structure import DenseFFN, Residual

DEPTH = 0.01  # weight of the loss that teaches a depth router its budget


def make_mixer(mixer: Mixer, arch: Arch, dtype: jnp.dtype, gain: float, name: str) -> nn.Module:
    """The module of a mixer."""
    if isinstance(mixer, Attention):
        if sizes.features_of(mixer) is not None:
            return performer.PerformerMixer(mixer, arch, dtype, gain, name=name)
        if mixer.projection is not None:
            return linformer.LinformerMixer(mixer, arch, dtype, gain, name=name)
        if latent.latent_of(arch):
            return latent.LatentMixer(mixer, arch, dtype, gain, name=name)
        return attention.AttentionMixer(mixer, arch, dtype, gain, name=name)
    if isinstance(mixer, Retention):
        return retention.RetentionMixer(mixer, arch, dtype, gain, name=name)
    if isinstance(mixer, SSM):
        return ssm.SSMMixer(mixer, arch, dtype, gain, name=name)
    return longconv.LongConvMixer(mixer, arch, dtype, gain, name=name)


def init_mixer_state(mixer: Mixer, arch: Arch, batch: int, length: int, dtype: jnp.dtype) -> Any:
    """What a mixer keeps of the past, before any token."""
    args = (arch, batch, length, dtype)
    if isinstance(mixer, Attention):
        if sizes.features_of(mixer) is not None:
            return performer.init_state(mixer, *args)
        module = latent if latent.latent_of(arch) else attention
        return module.init_state(mixer, *args)
    if isinstance(mixer, Retention):
        return retention.init_state(mixer, *args)
    if isinstance(mixer, SSM):
        return ssm.init_state(mixer, *args)
    return longconv.init_state(mixer, *args)


def init_state(arch: Arch, batch: int, length: int, dtype: jnp.dtype) -> Any:
    """What one layer keeps of the past."""
    args = (arch, batch, length, dtype)
    states = tuple(init_mixer_state(m, *args) for m in sizes.mixers(arch.mix_unit))
    return states, init_taken(arch, batch)


def residual_gain(arch: Arch) -> float:
    """DeepNet's beta for a decoder, (8 L)^(-1/4) (Wang et al. 2022, table 2); 1 otherwise."""
    deep = arch.residual is not None and arch.residual.kind == "deepnet"
    return (8 * arch.n_layers) ** -0.25 if deep else 1.0


class MixUnit(nn.Module):
    """The mixers of a layer, merged.

    par: Add sums, WeightedAdd takes the mean by softmax of learned weights, Concat maps the
    outputs side by side. route: per token, gates are softmax(W x / temp) over the `topk` largest;
    all choices are computed.
    """

    arch: Arch
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, frame: Frame, states):
        unit, gain = self.arch.mix_unit, residual_gain(self.arch)
        outs, kept = [], []
        for i, mixer in enumerate(sizes.mixers(unit)):
            module = make_mixer(mixer, self.arch, self.dtype, gain, f"mixer_{i}")
            own = frame.knobs["mixers"][i]
            turn = None if frame.turn is None else frame.turn[i]
            state = None if states is None else states[i]
            y, state = module(x, frame._replace(knobs=own, turn=turn), state)
            outs.append(y)
            kept.append(None if states is None else state)
        kept = None if states is None else tuple(kept)
        if isinstance(unit, SingleUnit):
            return outs[0], kept
        if isinstance(unit, RouteUnit):
            outs = self.routed(unit, x, outs, frame)
        if unit.merge == "Concat":
            wide = jnp.concatenate(outs, axis=-1)
            return linear("merge", self.arch.d_model, self.dtype, gain)(wide), kept
        if isinstance(unit, ParUnit) and unit.merge == "WeightedAdd":
            weights = self.param("merge", nn.initializers.zeros, (len(outs),))
            weights = jax.nn.softmax(weights).astype(self.dtype)
            outs = [y * w for y, w in zip(outs, weights, strict=True)]
        return sum(outs), kept

    def routed(self, unit: RouteUnit, x, outs, frame: Frame):
        """The outputs times their gates; times 1 or 0 where they are just added."""
        router, n = unit.router, len(outs)
        logits = linear("router", n, jnp.dtype("float32"))(x) / frame.knobs["temp"]
        probabilities = jax.nn.softmax(logits, axis=-1)
        picked = keep_largest(probabilities, router.topk or n)
        if router.balance:
            loss = balance_loss(probabilities, picked)
            self.sow("losses", "balance", frame.live * frame.knobs["balance"] * loss)
        gates = picked
        if unit.merge != "Add":
            gates = picked * probabilities
            gates = gates / gates.sum(-1, keepdims=True)
        gates = gates.astype(self.dtype)
        return [y * gates[..., i, None] for i, y in enumerate(outs)]


class Block(nn.Module):
    """Mixers and feed-forward network, each with its residual.

    The stream is (x,), or ResiDual's two (Xie et al. 2023, eqs. 5-8): x <- LN(x + f(x)),
    d <- d + f(x), joined at the end of the stack. single: x + scale f(LN x), with a norm before f,
    after the sum, or both. deepnet: LN(scale x + f(x)) (Wang et al. 2022, eq. 1).
    """

    arch: Arch
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, stream, frame: Frame, state, always=False):
        states, taken = (None, None) if state is None else state
        before = stream
        mixed, ffn = MixUnit(self.arch, self.dtype, name="mix"), self.arch.ffn
        cond = self.arch.cond

        def mix(x):
            y: Any
            y, kept = mixed(modulated(cond, "pre_mixer", x, frame), frame, states)
            return modulated(cond, "post_mixer", y, frame), kept

        stream, states = self.around("mix", mix, stream, frame)
        gain, width = residual_gain(self.arch), self.arch.d_model
        if isinstance(ffn, DenseFFN):
            dense = Dense(ffn, width, self.dtype, gain, name="ffn")
            stream, _ = self.around("ffn", lambda x: (dense(x), None), stream, frame)
        else:
            moe = MoE(ffn, width, self.dtype, gain, name="ffn")
            stream, taken = self.around("ffn", lambda x: moe(x, frame, taken), stream, frame)
        if self.arch.depth_router is not None:
            stream = self.routed(before, stream, frame, always)
        return stream, None if state is None else (states, taken)

    def routed(self, before, after, frame: Frame, always):
        r"""Mixture-of-Depths (Raposo et al. 2024): $x + g (f(x) - x)$, $g = \sigma(r / \tau)$.

        A token takes the layer where g is at least 1/2. The `budget` is taught: a cross-entropy
        draws the largest r of a row above that line and the others below it (their section 3.5),
        so that no token's way hangs on later ones. Deviation: keys and values of the tokens that
        pass by are seen, and all tokens are computed, so no FLOPs are saved.
        """
        logits = linear("depth", 1, jnp.dtype("float32"))(before[0])[..., 0]
        logits = logits / frame.knobs["depth_tau"]
        rank = jnp.argsort(jnp.argsort(-logits, axis=-1), axis=-1)
        wanted = rank < jnp.ceil(frame.knobs["depth_budget"] * logits.shape[-1])
        loss = optax.sigmoid_binary_cross_entropy(logits, wanted).mean()
        self.sow("losses", "passing", jnp.where(always, 0.0, frame.live * DEPTH * loss))
        gate = jnp.where(logits >= 0, nn.sigmoid(logits), 0.0)
        gate = gate[..., None].astype(self.dtype)
        return jax.tree.map(lambda x, y: jnp.where(always, y, x + gate * (y - x)), before, after)

    def around(self, name: str, sublayer, stream, frame: Frame):
        """Apply a sublayer and add."""
        residual = self.arch.residual or Residual()
        scale = frame.knobs.get("residual_scale", 1.0)

        def norm(x, place):
            return make_norm(self.arch.norm, f"{name}_{place}", self.dtype)(x)

        x = stream[0]
        if residual.kind == "dual":
            y, aux = sublayer(x)
            return (norm(x + scale * y, "post"), stream[1] + scale * y), aux
        if residual.kind == "deepnet":
            y, aux = sublayer(x)
            return (norm(scale * x + y, "post"),), aux
        read = x
        if residual.pre_ln is not False:
            read = norm(x, "pre")
            read = modulated(self.arch.cond, "ln", read, frame, name=f"{name}_cond")
        y, aux = sublayer(read)
        x = x + scale * y
        return (norm(x, "post") if residual.post_ln else x,), aux
