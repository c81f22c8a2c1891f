"""The optimizer's oracles hold to 1e-6, which is a promise about fully optimised programs."""

import jax
import pytest


@pytest.fixture(autouse=True)
def fully_optimised():
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
