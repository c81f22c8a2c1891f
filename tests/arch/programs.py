"""Networks with random parameters, and programs of them that compile fast."""

import jax
import jax.numpy as jnp
import numpy as np

from forge_jax import arch

# Most of these tests' time is compilation; what runs is tiny.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def jitted(f, **more):
    return jax.jit(f, compiler_options=QUICK, **more)


def random_like(shapes, seed=0):
    """Normal arrays of deviation 0.4, drawn by NumPy: no initialiser has to be compiled."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(0.4 * rng.standard_normal(x.shape), x.dtype), shapes)


def random_network(document, time=12, seed=0, **options):
    """The document, its module and random parameters."""
    spec = arch.from_dict(document)
    network = arch.build(spec, **options)
    tokens = jnp.zeros((1, time), jnp.int32)
    shapes = jax.eval_shape(network.init, jax.random.key(0), tokens)
    return spec, network, {"params": random_like(shapes["params"], seed)}


def random_tokens(time, batch=2, vocabulary=11, seed=1):
    return jnp.asarray(np.random.default_rng(seed).integers(vocabulary, size=(batch, time)))
