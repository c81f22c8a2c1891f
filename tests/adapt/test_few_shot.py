"""The mixture found on shots: against its references, and where the answer is known."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from forge_jax import adapt, models, svf


class Plain(NamedTuple):
    """Experts whose z is the same number everywhere, so that the optimum can be computed."""

    target: jax.Array  # (n,)


def near(apply, shots):
    """A shot is right where s/s0 of the first matrix is within 0.05 of its target; no decoder."""
    s = apply.keywords["scales"]
    value = next(iter(s.values()))[0]
    error = jnp.abs(value - shots.target)
    return error < 0.05, -error


@pytest.fixture(scope="module")
def known():
    """One matrix with singular values 1, and experts z = 2 and z = 0.5."""
    import flax.linen as nn

    module = svf.transform(nn.Dense(4))
    factors, _ = svf.decompose(
        {"kernel": jnp.eye(4), "bias": jnp.zeros(4)}, lambda n, x: x.ndim == 2
    )
    return module, factors, {"kernel": jnp.array([[2.0] * 4, [0.5] * 4])}


def find(known, shots, **options):
    module, factors, experts = known
    few = adapt.FewShot(population=32, **{"generations": 12, **options})
    run = jax.jit(lambda key, shots: few(key, module, factors, experts, near, shots))
    return run(jax.random.key(0), shots)


def test_it_finds_the_mixture_that_fits(known):
    """z = 1 + a - b/2 = 1.4 needs a mixture: no expert, nor the base nor their mean, has it."""
    found = find(known, Plain(jnp.array([1.4, 1.38, 1.42])))
    z = 1 + found.alpha[0, 0] - 0.5 * found.alpha[0, 1]
    assert abs(float(z) - 1.4) < 0.03
    assert float(found.best.accuracy) == 1
    np.testing.assert_array_equal(found.single.accuracy, [0, 0])
    assert float(found.base.accuracy) == 0
    assert float(found.uniform.accuracy) == 0
    np.testing.assert_allclose(found.base.logp, -0.4, atol=1e-5)
    np.testing.assert_allclose(found.single.logp, [-0.6, -0.9], atol=1e-5)
    np.testing.assert_allclose(found.uniform.logp, -0.15, atol=1e-5)
    assert (np.diff(found.history) <= 0).all()
    assert found.alpha.shape == (1, 2)


def test_ties_are_broken_by_the_likelihood(known):
    """No mixture within the bounds is right: the nearest one is still found."""
    found = find(known, Plain(jnp.array([3.0])))
    assert float(found.best.accuracy) == 0
    np.testing.assert_allclose(found.alpha[0], [1, 0], atol=0.05)


def test_an_accurate_mixture_beats_a_likely_one(known):
    """One shot right and one far off, or both near and none right: accuracy comes first."""
    found = find(known, Plain(jnp.array([1.0, 1.9, 1.9, 1.9])))
    z = 1 + float(found.alpha[0, 0]) - 0.5 * float(found.alpha[0, 1])
    assert float(found.best.accuracy) == 0.75
    assert abs(z - 1.9) < 0.05


def test_a_mixture_that_is_no_number_is_never_found(known):
    """A score that is NaN on one side of z = 1.2: what is found lies on the other."""

    def scored(apply, shots):
        right, logp = near(apply, shots)
        value = next(iter(apply.keywords["scales"].values()))[0]
        return right, jnp.where(value > 1.2, jnp.nan, logp)

    module, factors, experts = known
    few = adapt.FewShot(population=32, generations=4)
    shots = Plain(jnp.array([1.1]))
    found = jax.jit(lambda key: few(key, module, factors, experts, scored, shots))(
        jax.random.key(0)
    )
    assert np.isfinite(found.best.logp)
    assert float(found.best.accuracy) == 1


@pytest.fixture(scope="module")
def questions(case):
    """Answers that a known mixture of the decoder writes."""
    apply = functools.partial(case.decoder.apply, {"params": case.params_of([0.8, 0.0, 0.3])})
    nothing = np.zeros((8, 1), np.int32)
    batch = models.Questions(case.tokens, case.mask, nothing, nothing > 0)
    written = models.Respond(case.spec, 3)(apply, batch)
    return models.Questions(case.tokens, case.mask, written.tokens, written.mask)


def test_on_a_decoder_it_is_never_below_its_references(case, questions):
    """Per matrix: as many alphas as matrices, and what is reported is what they score."""
    few = adapt.FewShot(groups="tensor", population=8, generations=3)
    score = models.Judge(case.spec)
    given = (case.adapted, case.factors, case.experts, score, questions)
    found = jax.jit(lambda key: few(key, *given))(jax.random.key(1))
    assert found.alpha.shape == (len(case.experts), 3)
    paths = few.by_path(found.alpha, list(case.experts))
    params = svf.materialize(case.factors, svf.mix(case.experts, paths))
    judged = score(functools.partial(case.decoder.apply, {"params": params}), questions)
    np.testing.assert_allclose(found.best.accuracy, judged.correct.mean())
    np.testing.assert_allclose(found.best.logp, judged.logp.mean(), rtol=1e-3)
    for reference in (found.base, found.uniform, found.single):
        assert (found.best.accuracy >= reference.accuracy).all()


def test_a_judge_agrees_with_decoding(case, questions):
    """Teacher forcing says right exactly where greedy decoding writes the answer."""
    for alpha in ([0.8, 0.0, 0.3], [0.0, 1.0, 0.0], [0.5, 0.0, 0.3]):
        apply = functools.partial(case.decoder.apply, {"params": case.params_of(alpha)})
        judged = models.Judge(case.spec)(apply, questions)
        np.testing.assert_array_equal(
            judged.correct, models.ExactMatch(case.spec)(apply, questions)
        )
        np.testing.assert_allclose(
            judged.logp, models.LogLikelihood(case.spec)(apply, questions), rtol=1e-5
        )


def test_layers_share_an_alpha():
    few = adapt.FewShot(groups="layer")
    paths = ["layers_0/a", "layers_0/b", "layers_1/a"]
    assert few.index(paths) == {"layers_0/a": 0, "layers_0/b": 0, "layers_1/a": 1}
    assert set(adapt.FewShot().index(paths).values()) == {0}


def test_refuses_no_shots_and_a_population_without_its_references(known):
    with pytest.raises(ValueError, match="at least one shot"):
        find(known, Plain(jnp.zeros(0)))
    few = adapt.FewShot(population=3)
    with pytest.raises(ValueError, match="population of 4"):
        few(jax.random.key(0), *known, near, Plain(jnp.zeros(1)))
    for wrong in ({"elite_ratio": 0.0}, {"std": 0.0}, {"upper": -1.0}):
        with pytest.raises(ValueError, match="`upper` and `std` above 0"):
            adapt.FewShot(**wrong).check(2)
    with pytest.raises(ValueError, match="groups"):
        adapt.FewShot(groups="row").index(["a"])  # pyright: ignore[reportArgumentType]
