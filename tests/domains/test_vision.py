"""Patches, projector, images as text, and the answers of visual questions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from forge_jax.domains import vision


def ramp():
    return np.arange(64, dtype=np.float64).reshape(8, 8)


def test_patches_are_the_four_quarters_row_by_row():
    got = vision.patches(ramp())
    want = [ramp()[i : i + 4, j : j + 4].ravel() for i in (0, 4) for j in (0, 4)]
    np.testing.assert_array_equal(got, want)
    assert got.dtype == np.float32


@pytest.mark.parametrize("shape", [(64,), (4, 16), (8, 8, 1), (16, 16)])
def test_patches_of_another_image_are_refused(shape):
    with pytest.raises(ValueError, match=r"shape \(8, 8\), got"):
        vision.patches(np.zeros(shape))


def test_the_projector_is_affine_and_knows_the_place(getkey):
    projector = jax.jit(vision.init_projector, static_argnums=1)(getkey(), 5)
    x = np.random.default_rng(0).normal(size=(2, 4, 16)).astype(np.float32)
    projector["bias"] = projector["bias"] + np.arange(5)
    kernel, bias, place = (np.asarray(projector[k]) for k in ("kernel", "bias", "place"))
    want = np.stack([[row[i] @ kernel + bias + place[i] for i in range(4)] for row in x])
    np.testing.assert_allclose(vision.project(projector, jnp.asarray(x)), want, atol=1e-5)
    assert np.abs(place).min() > 0
    assert 0.5 < kernel.std() * 4 < 1.5


def test_an_image_as_text_shows_ten_levels():
    image = np.zeros((8, 8), np.float32)
    image[0, :4], image[7, 7] = [0.05, 0.1, 0.99, 1.0], 0.55
    lines = vision.as_text(image).split("\n")
    assert lines[0] == "01990000"
    assert lines[1:7] == ["0" * 8] * 6
    assert lines[7] == "00000005"


def test_a_digit_with_a_projector_and_without():
    image = (ramp() / 63).astype(np.float32)
    seen = vision.from_digit(image, 7, "<image>")
    assert seen.prompt == "<image><image><image><image>\nWhich digit is this?\n"
    assert (seen.answer, seen.image is image) == ("7", True)
    read = vision.from_digit(image, 7, None)
    assert read.prompt == f"{vision.as_text(image)}\nWhich digit is this?\n"
    assert read.image is None


def textvqa(*answers):
    photo = Image.fromarray(np.full((20, 30, 3), [255, 0, 0], np.uint8))
    return {"image": photo, "question": " what brand? ", "answers": list(answers)}


def test_textvqa_row():
    item = vision.from_textvqa(textvqa("Nokia", "the nokia", "samsung", "NOKIA.", ""), "<image>")
    assert item is not None
    assert item.answer == "nokia"
    assert item.prompt == "<image>" * 4 + "\nwhat brand?\n"
    assert item.image is not None
    assert (item.image.shape, item.image.dtype) == ((8, 8), np.float32)
    np.testing.assert_allclose(item.image, 76 / 255, atol=1e-6)  # ITU-R 601: 0.299 of 255
    shown = vision.from_textvqa(textvqa("a b"), None)
    assert shown is not None
    assert shown.image is None
    assert shown.prompt.startswith("22222222\n")


def test_textvqa_row_without_an_answer():
    assert vision.from_textvqa(textvqa("", "the", "?"), "<image>") is None


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Red  Car.", "red car"),
        ("a 12:30 train, an hour", "12:30 train hour"),
        ("3.5%", "3.5"),
        ("coca-cola!", "coca-cola"),
        ("don't\n", "dont"),
        ("another theory", "another theory"),
        ("The", ""),
    ],
)
def test_normalise(text, normal):
    assert vision.normalise(text) == normal


def test_reward():
    assert vision.reward("The Red car.", "red car") == 1
    assert vision.reward("red", "red car") == -1
    assert vision.reward("", "the") == -1  # two empty answers are not the same answer
