"""A population in one program: both forms against one materialized model after another."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from forge_jax import models, search, svf
from forge_jax.search import population

SPEC = models.DecoderSpec(
    vocab_size=23,
    hidden_size=16,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
)
K, P, N = 3, 7, 5
DECODER = models.Decoder(SPEC)
ADAPTED = svf.transform(DECODER)
COMPILED = []


class Case:
    """A model with three experts, seven mixtures, and five questions."""

    def __init__(self):
        rng = np.random.default_rng(0)
        tokens = rng.integers(0, 23, (N, 6), dtype=np.int32)
        mask = np.arange(6) >= rng.integers(0, 4, (N, 1))
        answers = rng.integers(0, 23, (N, 3), dtype=np.int32)
        answer_mask = np.arange(3) < rng.integers(1, 4, (N, 1))
        self.batch = models.Questions(tokens, mask, answers, answer_mask)
        params = DECODER.init(jax.random.key(0), tokens)["params"]
        params = jax.tree.map(lambda w: 3 * w if w.ndim == 2 else w, params)  # peaked, no ties
        self.factors, ones = svf.decompose(params, svf.is_attention_or_mlp)
        draw = functools.partial(rng.normal, scale=0.3)
        self.experts = {k: jnp.asarray(1 + draw(size=(K, *z.shape))) for k, z in ones.items()}
        self.alpha = rng.uniform(0, 2, (P, K)).astype(np.float32)

    def run(self, score, **options):
        given = (self.factors, self.experts, options.pop("alpha", self.alpha))
        return search.evaluate_population(ADAPTED, *given, score, self.batch, **options)

    def one_by_one(self, score, alphas=None):
        rows = self.alpha if alphas is None else alphas
        out = []
        for alpha in rows:
            params = svf.materialize(self.factors, svf.mix(self.experts, alpha))
            apply = functools.partial(DECODER.apply, {"params": params})
            out.append(score(apply, self.batch))
        return jax.tree.map(lambda *leaves: np.stack(leaves), *out)


@pytest.fixture(scope="module")
def case():
    return Case()


@pytest.mark.parametrize("options", [{"form": "factored", "chunk": 3}, {"form": "dense"}])
def test_both_forms_equal_the_materialized_models(case, options):
    score = models.LogLikelihood(SPEC)
    got, wanted = case.run(score, **options), case.one_by_one(score)
    assert got.shape == (P, N)
    assert np.ptp(wanted, axis=0).min() > 0.1  # the mixtures do differ
    np.testing.assert_allclose(got, wanted, atol=1e-5 * np.abs(wanted).max())


def test_both_forms_write_the_same_tokens(case):
    score = models.Respond(SPEC, max_new_tokens=4, stop_tokens=(3,))
    wanted = case.one_by_one(score)
    assert len({row.tobytes() for row in wanted.tokens.reshape(P, -1)}) > 1
    for form in ("factored", "dense"):
        got = case.run(score, form=form)
        np.testing.assert_array_equal(got.tokens, wanted.tokens)
        np.testing.assert_array_equal(got.mask, wanted.mask)


def test_exact_match_is_the_greedy_text(case):
    """Answers that a candidate does write are its matches, and nobody else's by this alone."""
    written = case.one_by_one(models.Respond(SPEC, 3))
    own = case.batch._replace(answers=written.tokens[2], answer_mask=np.ones((N, 3), bool))
    got = search.evaluate_population(
        ADAPTED, case.factors, case.experts, case.alpha, models.ExactMatch(SPEC), own
    )
    np.testing.assert_array_equal(got, (written.tokens == written.tokens[2]).all(axis=-1))
    assert got[2].all()
    assert not got.all()


def test_alpha_of_each_path(case):
    score = models.LogLikelihood(SPEC)
    first = next(iter(case.experts))
    by_path = {k: case.alpha * (k == first) for k in case.experts}
    wanted = []
    for p in range(P):
        z = svf.mix(case.experts, {k: a[p] for k, a in by_path.items()})
        params = svf.materialize(case.factors, z)
        wanted.append(score(functools.partial(DECODER.apply, {"params": params}), case.batch))
    for form in ("factored", "dense"):
        got = case.run(score, alpha=by_path, form=form)
        np.testing.assert_allclose(got, np.stack(wanted), atol=1e-4)


def test_a_rank_fraction_cuts_as_truncate_does(case):
    score = models.LogLikelihood(SPEC)
    fractions = np.array([1, 0.9, 0.7, 0.5, 0.3, 0.1, 0.01])
    got, wanted = case.run(score, rank_fraction=fractions), []
    for alpha, fraction in zip(case.alpha, fractions, strict=True):
        tree = svf.truncate(case.factors, svf.mix(case.experts, alpha), float(fraction))
        apply = functools.partial(ADAPTED.apply, {"params": tree})
        wanted.append(score(apply, case.batch))
    np.testing.assert_allclose(got, np.stack(wanted), atol=1e-4)


def counting(apply, batch):
    COMPILED.append(1)  # at tracing
    return apply(batch.tokens, batch.mask)[0].sum(axis=(1, 2))


def test_another_population_compiles_nothing(case):
    COMPILED.clear()
    first = case.run(counting, chunk=4)  # seven candidates
    assert len(COMPILED) == 1
    traces = len(COMPILED)
    second = case.run(counting, chunk=4, alpha=case.alpha[::-1].copy())
    assert len(COMPILED) == traces
    np.testing.assert_allclose(second, first[::-1], rtol=1e-4)


def test_a_memory_limit_makes_the_chunks(case, monkeypatch):
    score, run, ran = models.LogLikelihood(SPEC), population._run, []

    def spy(*args):
        memory: Any = run.lower(*args).compile().memory_analysis()
        ran.append(memory.temp_size_in_bytes)
        chunks.append(args[4])
        return run(*args)

    spy.lower = run.lower
    monkeypatch.setattr(population, "_run", spy)
    chunks: list[int] = []
    wanted = case.run(score, chunk=P)
    for share in (1, 2, 4):
        limit = ran[0] // share
        got = case.run(score, memory_limit=limit, form="factored")
        np.testing.assert_allclose(got, wanted, atol=1e-5)
        assert ran[-1] <= limit
    assert chunks[:2] == [P, P]
    assert P > chunks[2] > chunks[3] >= 1
    with pytest.raises(ValueError, match=r"One candidate takes [\d,]+ bytes"):
        case.run(score, memory_limit=1000)


def test_auto_takes_the_form_that_keeps_the_limit(case, monkeypatch):
    """The mixed-dense form is measured once, not for every chunk."""
    score, run, forms, compiled = models.LogLikelihood(SPEC), population._run, [], []

    def spy(*args):
        forms.append(args[2])
        return run(*args)

    def lower(*args):
        compiled.append(args[2])
        return run.lower(*args)

    spy.lower = lower
    monkeypatch.setattr(population, "_run", spy)
    monkeypatch.setattr(population, "cheaper_form", lambda *args: "dense")
    population._temporary_bytes.cache_clear()
    limit = population.delta_bytes(case.factors, case.experts)
    got = [case.run(score, memory_limit=m) for m in (None, 2**30, limit)]
    assert forms == ["dense", "dense", "factored"]
    assert compiled.count("dense") == 1
    np.testing.assert_allclose(got[2], got[0], atol=1e-4)


def test_a_rank_fraction_needs_full_decompositions(case):
    whole = svf.materialize(case.factors, svf.identity(case.factors))
    parts, ones = svf.decompose(whole, svf.is_attention_or_mlp, max_full=6, key=jax.random.key(0))
    experts = {name: jnp.stack([z] * K) for name, z in ones.items()}
    given = (ADAPTED, parts, experts, case.alpha, models.LogLikelihood(SPEC), case.batch)
    search.evaluate_population(*given, rank_fraction=np.ones(P))
    with pytest.raises(ValueError, match="needs full decompositions, layers_0/mlp/down_proj"):
        search.evaluate_population(*given, rank_fraction=np.full(P, 0.5))


def test_the_form_follows_the_counted_cost(case):
    """By hand for one square matrix of width n = 8, each of P candidates in units of n n:
    factored 4 t, dense 2 t + 2 K + 40 (K + 2) + 2 K n / P."""
    factors, ones = svf.decompose({"w": jnp.eye(8)}, lambda path, leaf: True)
    experts = {"w": jnp.stack([ones["w"]] * K)}
    for candidates in (1, 8):
        crossing = K + 20 * (K + 2) + K * 8 // candidates
        assert search.cheaper_form(factors, experts, crossing, candidates) == "factored"
        assert search.cheaper_form(factors, experts, crossing + 1, candidates) == "dense"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"alpha": np.ones((P, K + 1))}, rf"for [{K}] experts, got [({P}, {K + 1})]"),
        ({"alpha": np.ones(K)}, "must be (candidates, experts)"),
        ({"rank_fraction": np.ones(2)}, f"must be {P} numbers in (0, 1]"),
        ({"rank_fraction": np.zeros(P)}, "in (0, 1]"),
        ({"rank_fraction": np.ones(P), "form": "dense"}, "needs the factored form"),
        ({"form": "sparse"}, "got 'sparse'"),
        ({"chunk": 0}, "`chunk` must be at least 1"),
        ({"rounds": 0}, "`rounds` must be at least 1"),
        ({"tokens": -4}, "`tokens` must be at least 1"),
        ({"alpha": np.ones((0, K))}, "must have a candidate"),
    ],
)
def test_what_does_not_fit_is_refused(case, options, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        case.run(models.LogLikelihood(SPEC), **options)


def test_experts_that_do_not_fit_are_refused(case):
    path = "layers_1/mlp/up_proj/kernel"
    wrong = {
        f"missing={[path]}": {k: z for k, z in case.experts.items() if k != path},
        "must be (experts, *(16,)), got (16,)": case.experts | {path: jnp.ones(16)},
        "got (0, 16)": case.experts | {path: jnp.ones((0, 16))},
    }
    for said, experts in wrong.items():
        given = (ADAPTED, case.factors, experts, case.alpha, models.LogLikelihood(SPEC), case.batch)
        for form in ("auto", "factored", "dense"):
            with pytest.raises(ValueError, match=re.escape(said)):
                search.evaluate_population(*given, form=form)
    params = svf.materialize(case.factors, svf.identity(case.factors))
    with pytest.raises(ValueError, match="hold no decomposed matrix"):
        search.evaluate_population(ADAPTED, params, *given[2:])


def test_padding_may_stand_on_either_side(case):
    """Tokenizers pad behind a prompt unless told otherwise."""
    batch, score = case.batch, models.Judge(SPEC)
    prompts = models.pad_right(batch.tokens, batch.mask)
    turned = models.Questions(*prompts, *models.pad_left(batch.answers, batch.answer_mask))
    assert (turned.mask != batch.mask).any()
    assert (turned.answer_mask != batch.answer_mask).any()
    given = (ADAPTED, case.factors, case.experts, case.alpha, score)
    wanted = search.evaluate_population(*given, batch)
    got = search.evaluate_population(*given, turned)
    np.testing.assert_allclose(got.logp, wanted.logp, atol=1e-4)
    np.testing.assert_array_equal(got.correct, wanted.correct)
