"""The faster dense layer against Flax's own: gradients, dtypes, and what it leaves alone."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from forge_jax.models.dense import fast_dense, matmul


class Net(nn.Module):
    """Two layers, the first scanned and computed again."""

    use_bias: bool

    @nn.compact
    def __call__(self, x):
        def body(layer, x, _):
            return nn.tanh(layer(x)), None

        layers = nn.scan(
            nn.remat(body), variable_axes={"params": 0}, split_rngs={"params": True}, length=2
        )
        x, _ = layers(nn.Dense(5, use_bias=self.use_bias), x, None)
        return nn.Dense(3, use_bias=self.use_bias)(x)


def calling(net, fast):
    """The module as a function of parameters and input."""

    def call(params, x):
        if not fast:
            return net.apply({"params": params}, x)
        with nn.intercept_methods(fast_dense):
            return net.apply({"params": params}, x)

    return call


def gradient(net, fast):
    return jax.grad(lambda *args: (calling(net, fast)(*args) ** 2).sum(), (0, 1))


def is_fast(net, params, x):
    return "custom_vjp" in str(jax.make_jaxpr(calling(net, fast=True))(params, x))


@pytest.mark.parametrize("use_bias", [True, False])
def test_gradients_are_those_of_flax(use_bias):
    net = Net(use_bias)
    x = jax.random.normal(jax.random.key(0), (2, 4, 5))
    params = net.init(jax.random.key(1), x)["params"]
    wanted, got = (jax.jit(gradient(net, fast))(params, x) for fast in (False, True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, wanted)
    assert is_fast(net, params, x)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Dense(3, dtype=jnp.bfloat16),
        nn.Dense(3, precision="highest"),
        nn.Dense(3, param_dtype=jnp.bfloat16),
        nn.Dense(3, dot_general=jax.lax.dot_general),
    ],
)
def test_layers_of_their_own_kind_are_left_alone(layer):
    x = jnp.ones((2, 4))
    params = layer.init(jax.random.key(0), x)["params"]
    assert not is_fast(layer, params, x)


def test_gradients_have_the_dtypes_of_what_they_are_of():
    x, w = jnp.ones((2, 4), jnp.float32), jnp.ones((4, 3), jnp.bfloat16)
    dx, dw = jax.grad(lambda x, w: matmul(x, w).sum(), (0, 1))(x, w)
    assert (dx.dtype, dw.dtype) == (jnp.float32, jnp.bfloat16)
    np.testing.assert_array_equal(dw.astype(jnp.float32), 2)
