"""Sizes that a document leaves open, in one place for checks, canonical form, build and cost."""

from forge_jax.arch.mixing import SSM, Attention, Mixer, MixUnit, Retention, SingleUnit
from forge_jax.arch.schema import Arch, Spec
from forge_jax.arch.structure import FFN

HEAD_DIM = 64  # heads are cut at this size where a document does not say
VOCABULARY = 256  # bytes


def mixers(unit: MixUnit) -> tuple[Mixer, ...]:
    """The mixers of a unit, in the document's order."""
    return (unit.mixer,) if isinstance(unit, SingleUnit) else unit.choices


def attentions(arch: Arch) -> tuple[Attention, ...]:
    """The attention mixers of an architecture."""
    return tuple(m for m in mixers(arch.mix_unit) if isinstance(m, Attention))


def even_split(width: int, size: int = HEAD_DIM) -> int:
    """The most equal parts of `width` that are not smaller than `size`; at least one."""
    return max(n for n in range(1, max(1, width // size) + 1) if width % n == 0)


def heads_of(mixer: Attention | Retention | SSM, width: int) -> tuple[int, int]:
    """Heads and features per head of a mixer of `width` inner features.

    Where both are given the inner width is their product (attention and retention).
    """
    if isinstance(mixer, SSM):
        inner = inner_of(mixer, width)
        heads = mixer.heads or even_split(inner)
        return heads, inner // heads
    if mixer.heads and mixer.head_dim:
        return mixer.heads, mixer.head_dim
    if mixer.head_dim:
        return max(1, width // mixer.head_dim), mixer.head_dim
    heads = mixer.heads or even_split(width)
    return heads, width // heads


def inner_of(mixer: SSM, width: int) -> int:
    """Inner features of a state space mixer."""
    return max(1, round((mixer.expand or 2.0) * width))


def hidden_of(ffn: FFN, width: int) -> int:
    """Hidden features of a feed-forward network."""
    return max(1, round(ffn.mult * width))


def vocabulary_of(spec: Spec) -> int:
    """Rows of the embedding."""
    return spec.train.vocab_size or VOCABULARY


def features_of(mixer: Attention) -> int | None:
    """Random features that stand in for the softmax; None where it is a softmax."""
    softmax = mixer.softmax
    if softmax is None or softmax.type != "kernel" or softmax.kernel is None:
        return None
    return softmax.kernel.features


def block_of(mixer: Attention, context: int) -> int | None:
    """Tokens that a low-rank projection sums up; None where nothing is: plain attention."""
    projection = mixer.projection
    if projection is None or projection.type == "none":
        return None
    block = projection.block or -(-context // (projection.rank or context))
    return block if 1 < block < context else None


def turned(mixer: Attention, arch: Arch) -> int:
    """Features of each head that rotary positions turn, even and at most head_dim."""
    size = heads_of(mixer, arch.d_model)[1] // 2 * 2
    return min(arch.pos.rope.dims or size, size) if arch.pos.rope else size


def positioned(mixer: Mixer, arch: Arch) -> bool:
    """Tell whether the positions of `arch.pos` act inside this mixer."""
    return isinstance(mixer, Attention) and mixer.pos != "none" and arch.pos.kind != "learned"
