"""The race of few-shot fitness on one layer of nano: what is right is what is written."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from experiments import adapt  # noqa: E402
from experiments.bench import decoders, few_shot, race  # noqa: E402

pytestmark = pytest.mark.torch
ARGS = few_shot.Args(out=None, population=7, shots=4)  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module")
def problem(checkpoint):
    """Two domains."""
    args = adapt.Args(checkpoint=checkpoint, domains=("math", "code"), items=4, fit_items=8)
    return adapt.load(args)[0]


def drawn(problem):
    """Two experts around one, far enough apart to write other things than the base."""
    rng = np.random.default_rng(0)
    factors = few_shot.svf.named_factors(problem.weights["factors"])
    return {path: rng.uniform(0.5, 1.5, (2, len(f.s))).astype(np.float32) for path, f in factors}


@pytest.fixture
def written(problem, monkeypatch):
    """Shots whose answers are what the base writes in transformers."""
    case, shots = few_shot.case_of(problem, drawn(problem)), few_shot.shots_of(problem, 4)
    given = few_shot.in_torch(shots)
    model = decoders.torch_model(case.spec, case.params)
    more = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 3, "pad_token_id": 0}
    out = model.generate(given.tokens, attention_mask=given.mask, **more)
    answers = out[:, given.tokens.shape[1] :].numpy().astype(np.int32)
    shots = shots._replace(answers=answers, answer_mask=np.ones(answers.shape, bool))
    monkeypatch.setattr(few_shot, "shots_of", lambda *_: shots)


@pytest.fixture
def made(problem, written):
    """A race in which some answers are right."""
    return few_shot.make(problem, drawn(problem), ARGS)


def test_every_side_finds_the_same_answers_right(made):
    others = (race.PUBLIC, few_shot.JUDGED, few_shot.NO_DIAGONAL, race.TORCH)
    assert race.check(made) == dict.fromkeys(others, 0.0)
    right = made.entries[race.OURS].outcome()
    assert right.shape == (7, 4)
    assert right[0].all()  # the base
    assert right[1:].any()
    assert not right[1:].all()
    assert made.work is not None
    assert made.work.flops > 0


@pytest.mark.parametrize("side", [race.PUBLIC, few_shot.JUDGED, race.TORCH])
def test_a_side_on_other_weights_ends_the_race(made, side, monkeypatch):
    rebuild, forward = decoders.rebuild, decoders.Factored.forward
    monkeypatch.setattr(decoders, "rebuild", lambda *a, **k: -rebuild(*a, **k))
    monkeypatch.setattr(decoders.Factored, "forward", lambda *a: -forward(*a))
    one = made._replace(entries={n: made.entries[n] for n in (race.OURS, side)})
    with pytest.raises(ValueError, match=f"{side} computed something else"):
        race.check(one)


def test_what_is_generated_is_compared_up_to_the_answers_end():
    shots = few_shot.Tensors(
        *(torch.zeros(2, 1), torch.ones(2, 1)),
        answers=torch.tensor([[3, 4, 0], [3, 4, 5]]),
        answer_mask=torch.tensor([[True, True, False], [True] * 3]),
    )
    out = torch.tensor([[3, 4, 9], [3, 4, 9], [3, 1, 0], [3, 4, 5]])
    assert few_shot.are_right(out, shots, 2).tolist() == [[True, False], [False, True]]


def test_the_shots_are_trimmed_and_the_mixtures_named(problem):
    shots = few_shot.shots_of(problem, 4)
    assert shots.images is None
    assert shots.answer_mask.sum(axis=1).max() == shots.answers.shape[1]
    for count in (0, -1):
        with pytest.raises(ValueError, match="at least one shot"):
            few_shot.shots_of(problem, count)
    with pytest.raises(ValueError, match="population of 4"):
        few_shot.mixtures(3, 2)
    alpha = few_shot.mixtures(7, 2)
    np.testing.assert_allclose(alpha[:4], [[0, 0], [1, 0], [0, 1], [0.5, 0.5]])
    assert ((alpha >= 0) & (alpha <= 1)).all()
