"""Reinforcement learning of small parameter vectors: losses, baselines, divergences."""

from forge_jax.rl.reinforce import kl_to_reference as kl_to_reference
from forge_jax.rl.reinforce import leave_one_out as leave_one_out
from forge_jax.rl.reinforce import log_probability as log_probability
from forge_jax.rl.reinforce import reinforce_loss as reinforce_loss
