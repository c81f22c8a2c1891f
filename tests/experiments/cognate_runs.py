"""Phase 1 on models of a few thousand parameters, compiled once for every test of a file."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.cognate.args import Args
from experiments.cognate.training import Settings, init_state, make_tx, make_update
from experiments.cognate.validation import make_scorer
from forge_jax.models.cognate import Cognate, CognateConfig

SHAPE = CognateConfig(
    vocab_size=300,
    d_model=16,
    layers=1,
    heads=2,
    d_ff=16,
    max_positions=64,
    window=16,
    positions="learned",
    memory="ema",
    d_mem=4,
    gate_hidden=4,
    steps=1,
    micro_steps=1,
    step_weights=(0.5, 1.0),
    answer_heads=2,
    loss_rows=64,
)
SETTINGS = Settings(steps=6, batch=2, accumulate=2, average_decay=0.9, quick_compile=True)
SMALL: dict[str, Any] = {
    **{"data": "offline", "train_examples": 30, "validation_examples": 4, "length": 48},
    **{"epochs": 3, "held_batch": 4, "halting_rows": 2, "log_every": 1, "save_every": 1},
    **{"training": SETTINGS, "shape": SHAPE},
}


def make_args(out, **changes):
    return Args(**{**SMALL, "out": out, **changes})


@functools.cache
def cached_update(config, settings, seed):
    return make_update(Cognate(config), make_tx(settings, config), settings, seed)


@functools.cache
def cached_scorer(config):
    return make_scorer(Cognate(config), SETTINGS.compiler_options)


@functools.cache
def cached_init(config, settings, keys):
    made = jax.random.wrap_key_data(jnp.asarray(np.array(keys, np.uint32)))
    return init_state(Cognate(config), make_tx(settings, config), made)


def initial(model, tx, keys, settings=SETTINGS):
    """A copy: an update takes its arguments over."""
    del tx
    data = tuple(map(tuple, np.asarray(jax.random.key_data(keys)).tolist()))
    return jax.tree.map(jnp.copy, cached_init(model.config, settings, data))
