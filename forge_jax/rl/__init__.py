"""Reinforcement learning of small parameter vectors: losses, advantages, divergences."""

from forge_jax.rl.advantage import Advantage as Advantage
from forge_jax.rl.advantage import gae as gae
from forge_jax.rl.advantage import group_advantage as group_advantage
from forge_jax.rl.advantage import whiten as whiten
from forge_jax.rl.kl import adapt_kl as adapt_kl
from forge_jax.rl.kl import kl_estimate as kl_estimate
from forge_jax.rl.kl import kl_reward as kl_reward
from forge_jax.rl.ppo import Values as Values
from forge_jax.rl.ppo import entropy as entropy
from forge_jax.rl.ppo import equal_responses as equal_responses
from forge_jax.rl.ppo import minibatches as minibatches
from forge_jax.rl.ppo import ppo_loss as ppo_loss
from forge_jax.rl.ppo import value_loss as value_loss
from forge_jax.rl.reinforce import kl_to_reference as kl_to_reference
from forge_jax.rl.reinforce import leave_one_out as leave_one_out
from forge_jax.rl.reinforce import log_probability as log_probability
from forge_jax.rl.reinforce import reinforce_loss as reinforce_loss
