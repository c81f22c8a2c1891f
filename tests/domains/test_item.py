"""The reward of the embedded domains."""

import pytest

from forge_jax.domains import DOMAINS, Item, exact, signed


@pytest.mark.parametrize("completion", ["42", " 42", "42\n", "\t42 \n"])
def test_the_bare_answer_is_rewarded(completion):
    assert exact(completion, "42") == 1.0


@pytest.mark.parametrize("completion", ["", "4", "042", "42.", "It is 42.", "42 42", "4 2", "４２"])
def test_nothing_else_is(completion):
    assert exact(completion, "42") == -1.0


def test_rewards_are_plus_and_minus_one():
    assert (signed(True), signed(False)) == (1.0, -1.0)


def test_the_domains_and_an_item_without_an_image():
    assert DOMAINS == ("math", "code", "reasoning", "vision")
    assert Item("2 + 2", "4").image is None
