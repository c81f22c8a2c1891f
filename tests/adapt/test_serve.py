"""A batch of different questions in two passes: the rows' tokens are those of one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from forge_jax import adapt, models, svf

NEW = 4


class Fixed:
    """A dispatcher that sends row i where it is told."""

    def __init__(self, experts):
        self.experts = jnp.asarray(experts)

    def __call__(self, apply, batch):
        del apply, batch
        return adapt.Choice(self.experts, jax.nn.one_hot(self.experts, 3))


@pytest.fixture(scope="module")
def batch(case):
    nothing = np.zeros((8, 1), np.int32)
    return models.Questions(case.tokens, case.mask, nothing, nothing > 0)


@pytest.fixture(scope="module")
def answer(case):
    return models.Respond(case.spec, NEW, (3,))


@pytest.fixture(scope="module")
def served(case, batch, answer):
    """`serve(experts, choices)`, one compiled program, and the list of its traces."""
    traces = []

    @jax.jit
    def run(experts, choices):
        traces.append(None)
        given = (case.adapted, case.factors, experts, Fixed(choices), answer, batch)
        return adapt.two_pass(*given)

    return run, traces


def one_by_one(case, batch, answer, choices):
    """Every row alone, on the ordinary weights of its expert."""
    alphas = np.concatenate([np.eye(3), np.zeros((1, 3))])  # the last, -1, is the base

    @jax.jit
    def run(params, row):
        def apply(*args, **kwargs):
            return case.decoder.apply({"params": params}, *args, **kwargs)

        return answer(apply, row)

    out = []
    for i, expert in enumerate(choices):
        row = jax.tree.map(lambda x, i=i: x[i : i + 1], batch)
        out.append(run(case.params_of(alphas[expert]), row))
    return jax.tree.map(lambda *x: np.concatenate(x), *out)


def test_a_mixed_batch_equals_its_rows_one_by_one(case, batch, answer, served):
    """Three experts and the base in one step; and they do write different things."""
    choices = np.array([0, 1, 2, -1, 2, 1, 0, -1])
    run, traces = served
    got = run(svf.pad_experts(case.experts, 5), choices)
    want = one_by_one(case, batch, answer, choices)
    np.testing.assert_array_equal(got.answer.tokens, want.tokens)
    np.testing.assert_array_equal(got.answer.mask, want.mask)
    other = run(svf.pad_experts(case.experts, 5), np.roll(choices, 1))
    assert (np.asarray(other.answer.tokens) != want.tokens).any()
    np.testing.assert_array_equal(got.choice.expert, choices)
    assert len(traces) == 1


def test_an_expert_that_comes_later_compiles_nothing(case, served):
    run, traces = served
    two = {k: z[:2] for k, z in case.experts.items()}
    choices = np.array([0, 1, 2, -1, 2, 1, 0, -1])
    before = run(svf.pad_experts(two, 5), choices)
    after = run(svf.pad_experts(case.experts, 5), choices)
    assert len(traces) == 1
    changed = (np.asarray(before.answer.tokens) != np.asarray(after.answer.tokens)).any(axis=1)
    assert changed.any()
    assert not changed[choices != 2].any()


def test_mixtures_may_differ_row_by_row(case):
    """Fractions too, against the materialised weights of each."""
    alpha = np.random.default_rng(1).uniform(0, 1, (8, 3)).astype(np.float32)
    rows = svf.row_scales(case.factors, case.experts, jnp.asarray(alpha))
    got, _ = svf.apply_rows(case.adapted, case.factors, rows)(case.tokens, case.mask)
    for i in (0, 5):
        row = (case.tokens[i : i + 1], case.mask[i : i + 1])
        want, _ = case.decoder.apply({"params": case.params_of(alpha[i])}, *row)
        live = case.mask[i]
        np.testing.assert_allclose(got[i][live], want[0][live], atol=1e-3)


def test_experts_of_another_model_are_refused(case):
    """Every difference at once, each with its path."""
    name, other, third = list(case.experts)[:3]
    bad = dict(case.experts)
    bad[name] = bad[name].at[1, 0].set(jnp.nan)
    bad[other] = bad[other][:, :-1]
    bad["layers_9/mlp/up_proj/kernel"] = bad.pop(third)
    with pytest.raises(ValueError) as error:
        adapt.check_experts(case.factors, bad)
    said = str(error.value)
    for words in (f"{name} holds NaN", f"{other} has", f"{third} is missing", "layers_9/mlp"):
        assert words in said
    adapt.check_experts(case.factors, case.experts)
