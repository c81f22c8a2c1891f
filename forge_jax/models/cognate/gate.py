"""Memory as a gate (MAG): what of each feature comes from the stack, and what from memory."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from forge_jax.models.cognate.config import CognateConfig


def binary_entropy(logits: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Entropy of a coin whose log odds are `logits`, nats; finite and smooth for any logit."""
    p = jax.nn.sigmoid(logits)
    return -(p * jax.nn.log_sigmoid(logits) + (1 - p) * jax.nn.log_sigmoid(-logits))


class MagGate(nn.Module):
    """$g y + (1 - g) m$ with $g = \\sigma(W_2 \\mathrm{relu}(W_1 [y; m] + b_1) + b_2)$ per channel.

    Deviation from Titans (eqs. 26-28), which multiplies the two branches after normalising each:
    this is the form of the seed, and the two weights of a channel always sum to one.
    """

    config: CognateConfig

    @nn.compact
    def __call__(self, y: Float[Array, "batch time d"], m: Float[Array, "batch time d"]):
        """The mixture, and the gate's entropy per token, nats, averaged over channels."""
        init = nn.initializers.normal(0.02)
        hidden = nn.Dense(self.config.gate_hidden, kernel_init=init, name="w_concat")(
            jnp.concatenate([y, m], axis=-1)
        )
        logits = nn.Dense(self.config.d_model, kernel_init=init, name="w_gate")(nn.relu(hidden))
        g = nn.sigmoid(logits)
        entropy = binary_entropy(logits.astype(jnp.float32)).mean(axis=-1)
        return g * y + (1 - g) * m, entropy
