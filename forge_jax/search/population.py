"""A population of mixtures, run on one batch in one compiled program.

No candidate's U diag(s z) Vt is ever built. Two exact forms take its place:

    factored     y = ((x U) * s(alpha)) Vt: all candidates share U and Vt, `chunk` of them are one
                 product. Cheaper for short sequences, and in decoding.
    mixed-dense  W(alpha) = W + sum_k alpha_k D_k with D_k computed once, one candidate after
                 another. Cheaper where a sequence is longer than the matrices are wide.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, PyTree

from forge_jax import parallel, svf

Form = Literal["factored", "dense"]
Score = Callable[[Callable[..., Any], Any], PyTree]
"""`score(apply, batch)`: what one candidate, as `apply(tokens, ...)`, makes of the batch"""
Experts = Mapping[str, Float[Array, "experts r"]]
Alphas = Float[Array, "candidates experts"] | Mapping[str, Float[Array, "candidates experts"]]

FLOPS_PER_BYTE = 10.0
"""that a machine computes while it moves a byte: about 10 on CPUs, 20 to 150 on a GPU"""
CHUNK = 10
"""candidates in one product unless a memory limit says otherwise"""


def evaluate_population(
    adapted: svf.Transformed,
    factors: PyTree[Any],
    experts: Experts,
    alpha: Alphas,
    score: Score,
    batch: Any,
    *,
    rank_fraction: Float[Array, " candidates"] | None = None,
    form: Literal["auto", "factored", "dense"] = "auto",
    tokens: int | None = None,
    rounds: int = 1,
    chunk: int | None = None,
    memory_limit: int | None = None,
    mesh: Mesh | None = None,
) -> PyTree:
    """Score P mixtures z = 1 + sum_k alpha_k (z_k - 1) of K experts on one batch.

    One program is compiled for each `score`, form, chunk and set of shapes, and kept; so `score`
    should be a function of a module, or a hashable object such as `models.LogLikelihood` and
    `models.ExactMatch`. Any other reward is read on the host from the tokens that
    `models.Respond` returns.

    Args:
        adapted: the model, from `svf.transform`.
        factors: its parameters, from `svf.decompose`.
        experts: for each path the z of all experts, (K, r), finite numbers
            (`adapt.check_experts`).
        alpha: one row of K coefficients per candidate, or such rows for every path.
        score: `score(apply, batch)` gives a pytree of arrays; `apply(*args, **kwargs)` is the
            module's with one candidate's parameters.
        batch: a pytree of arrays, an argument of the program.
        rank_fraction: per candidate, singular components from ceil(fraction * r) on are left out.
            Factored form only, and full decompositions only: what a randomized one leaves out
            would stay.
        form: `auto` takes what `cheaper_form` says, where it keeps the limit.
        tokens: rows that a candidate sends through its matrices in one step (rows x length when a
            text is scored, rows when it is decoded). None: the integers in `batch`.
        rounds: populations of this size in one program, as in a scan over generations: the deltas
            of the mixed-dense form are made once for all of them.
        chunk: candidates that run at once in the factored form.
        memory_limit: bytes that the deltas of the experts, and the temporaries of the candidates
            that run at once, may take. The temporaries are those that the compiler reports for the
            program on one device, which costs a compilation or more.
        mesh: from `parallel.make_mesh`: the candidates are shared out over its axis `population`.
            `factors`, `experts` and `batch` lie on it already (`parallel.shard_params`, `shard`).

    Returns:
        What `score` returns, every leaf with a leading axis of P.

    Raises:
        ValueError: `alpha`, `rank_fraction` or `experts` do not fit, a number is out of its range,
            or a candidate alone takes more than the limit.
    """
    if form not in ("auto", "factored", "dense"):
        raise ValueError(f"`form` must be auto, factored or dense, got {form!r}.")
    for name, value in {"chunk": chunk, "rounds": rounds, "tokens": tokens}.items():
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    alphas, count = _by_path(factors, experts, alpha)
    rank = _ranks(rank_fraction, count, factors)
    if rank is not None and form == "dense":
        raise ValueError("`rank_fraction` needs the factored form: a cut matrix is no mixture.")
    own = count if mesh is None else math.ceil(count / mesh.shape["population"])

    def needed(form: Form, chunk: int) -> int:
        share = jax.eval_shape(lambda x: jax.tree.map(lambda a: a[:own], x), (alphas, rank))
        abstract = _abstract((factors, experts, *share, batch))
        return _temporary_bytes(adapted, score, form, chunk, *abstract)

    if form == "auto":
        sizes = _integers(batch) if tokens is None else tokens
        cheaper = cheaper_form(factors, experts, sizes, count * rounds)
        form = "factored" if rank is not None else cheaper
        if form == "dense" and memory_limit is not None:
            deltas = delta_bytes(factors, experts)
            fits = deltas <= memory_limit and needed("dense", 1) <= memory_limit
            form = "dense" if fits else "factored"
    if memory_limit is not None:
        chunk = _allowed(needed, form, memory_limit, chunk or own)
    if mesh is not None:
        alphas, rank = parallel.shard(mesh, (alphas, rank), parallel.REPLICATED)
    arrays = (factors, experts, alphas, rank, batch)
    groups = math.ceil(own / min(chunk or CHUNK, own))
    # groups of equal size: the last one is filled up
    return _run(adapted, score, form, mesh, math.ceil(own / groups), *arrays)


def cheaper_form(
    factors: PyTree[Any],
    experts: Experts,
    tokens: int,
    candidates: int,
    *,
    flops_per_byte: float = FLOPS_PER_BYTE,
) -> Form:
    """The form whose counted cost for one of so many candidates is lower.

    For a matrix (m, n) of rank r and t tokens: factored 2 t r (m + n) flops; mixed-dense 2 t m n,
    to mix W from K deltas 2 K m n flops and (K + 2) m n numbers moved, a byte counted as
    `flops_per_byte` flops, and a candidate's share of the deltas' own 2 K m n r. What all
    candidates of a chunk read once (U, Vt) is not counted.
    """
    factored = dense = 0.0
    for name, leaf in svf.named_factors(factors):
        m, n, r = leaf.u.shape[-2], leaf.vt.shape[-1], leaf.s.shape[-1]
        k, layers = len(experts[name]), math.prod(leaf.s.shape[:-1])
        factored += layers * 2.0 * tokens * r * (m + n)
        mixing = 2.0 * k * (1 + r / candidates) + flops_per_byte * 4.0 * (k + 2)
        dense += layers * (2.0 * tokens + mixing) * m * n
    return "factored" if factored <= dense else "dense"


def delta_bytes(factors: PyTree[Any], experts: Experts) -> int:
    """What the mixed-dense form keeps: K deltas, the base and one candidate's matrices."""
    return sum(
        4 * (len(experts[name]) + 2) * math.prod(leaf.u.shape[:-1]) * leaf.vt.shape[-1]
        for name, leaf in svf.named_factors(factors)
    )


@functools.partial(jax.jit, static_argnames=("adapted", "score", "form", "mesh", "chunk"))
def _run(
    adapted, score: Score, form: Form, mesh, chunk: int, factors, experts, alphas, rank, batch
):
    """All candidates, `chunk` at a time in the factored form."""
    if form == "factored":

        def one(candidate, shared):
            (alpha, rank), (factors, experts, batch) = candidate, shared
            s = svf.scales(factors, svf.mix(experts, alpha))
            s = s if rank is None else svf.mask_rank(s, rank)
            return score(functools.partial(adapted.apply, {"params": factors}, scales=s), batch)

        shared = (factors, experts, batch)
        return parallel.map_candidates(one, (alphas, rank), shared, mesh=mesh, chunk=chunk)

    def mixed(alpha, shared):
        base, deltas, batch = shared
        params = svf.mix_weights(base, deltas, alpha)
        return score(functools.partial(adapted.module.apply, {"params": params}), batch)

    base = svf.materialize(factors, svf.identity(factors))
    shared = (base, svf.deltas(factors, experts), batch)
    # one after another: a product batched over candidates, each with its own W, is slower on CPUs
    return parallel.map_candidates(mixed, alphas, shared, mesh=mesh)


def _by_path(factors, experts: Experts, alpha: Alphas) -> tuple[dict[str, Array], int]:
    """(P, K) coefficients for every path, and P."""
    if not svf.named_factors(factors):
        raise ValueError("`factors` hold no decomposed matrix: give those of `svf.decompose`.")
    paths = svf.check_stacked(factors, experts)
    given = alpha if isinstance(alpha, Mapping) else dict.fromkeys(paths, alpha)
    alphas = {name: jnp.asarray(a, jnp.float32) for name, a in given.items()}
    shapes = {a.shape for a in alphas.values()}
    wanted = {len(z) for z in experts.values()}
    if len(shapes) > 1 or {shape[1:] for shape in shapes} != {(k,) for k in wanted}:
        raise ValueError(
            f"`alpha` must be (candidates, experts), the same everywhere, for {sorted(wanted)} "
            f"experts, got {sorted(shapes)}."
        )
    count = shapes.pop()[0]
    if not count:
        raise ValueError("`alpha` must have a candidate, got none.")
    return alphas, count


def _ranks(rank_fraction, count: int, factors) -> Array | None:
    """The rank fractions as an array, or None."""
    if rank_fraction is None:
        return None
    rank = np.asarray(rank_fraction, np.float32)
    if rank.shape != (count,) or not ((rank > 0) & (rank <= 1)).all():
        raise ValueError(
            f"`rank_fraction` must be {count} numbers in (0, 1], one per candidate, got {rank}."
        )
    parts = [name for name, leaf in svf.named_factors(factors) if leaf.rest is not None]
    if parts and (rank < 1).any():
        raise ValueError(
            f"`rank_fraction` below 1 needs full decompositions, {parts[0]} has a randomized one."
        )
    return jnp.asarray(rank)


def _integers(batch: Any) -> int:
    """The number of token ids in the batch."""
    leaves = [x for x in jax.tree.leaves(batch) if jnp.issubdtype(jnp.result_type(x), jnp.integer)]
    return sum(np.size(x) for x in leaves)


def _allowed(needed: Callable[[Form, int], int], form: Form, memory_limit: int, most: int) -> int:
    """How many candidates at once keep the limit, at most so many; `needed(form, chunk)` bytes."""
    chunk = 1 if form == "dense" else most  # candidates of the dense form run one by one
    while (took := needed(form, chunk)) > memory_limit:
        if chunk == 1:
            raise ValueError(
                f"One candidate takes {took:,} bytes of temporary memory in the {form} form, "
                f"`memory_limit` allows {memory_limit:,}."
            )
        chunk = max(1, min(chunk - 1, chunk * memory_limit // took))
    return chunk


def _abstract(arrays) -> tuple[tuple[jax.ShapeDtypeStruct, ...], Any]:
    """Shapes and dtypes, which can be a key."""
    leaves, treedef = jax.tree.flatten(arrays)
    return tuple(jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x)) for x in leaves), treedef


@functools.lru_cache(maxsize=64)
def _temporary_bytes(adapted, score: Score, form: Form, chunk: int, leaves, treedef) -> int:
    """Temporaries of the program, as the compiler counts them."""
    compiled = _run.lower(
        adapted, score, form, None, chunk, *jax.tree.unflatten(treedef, leaves)
    ).compile()
    memory: Any = compiled.memory_analysis()
    return int(memory.temp_size_in_bytes)
