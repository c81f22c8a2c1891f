r"""The neural long-term memory of Titans (Behrouz et al. 2025, arXiv 2501.00663), one sequence.

The memory is an MLP $\mathcal{M}$ whose weights are the state. Each token writes by one step of
gradient descent with momentum on how badly its key recalls its value:

$$ \ell_t = \|\mathcal{M}(k_t) - v_t\|^2, \quad S_t = \eta_t S_{t-1} - \theta_t \nabla\ell_t, \quad
   M_t = (1 - \alpha_t) M_{t-1} + S_t $$

(eqs. 12-14), and reads $\mathcal{M}_{t-1}(q_t)$: what was written before it, itself not included
(eq. 15 reads after the write). As in the paper's section 3.2, gradients within a chunk are taken at
the weights that the chunk starts with, so that they are independent, and the two recurrences are
linear: associative scans.

No weight of any token is built but the last one's. The gradient of a matrix at one token is an
outer product $x_s \delta_s^T$ (input times error), so

$$ W_t = a_t W_0 + b_t S_0 - \sum_{s \le t} c_{ts} \theta_s x_s \delta_s^T $$

where the scalars a, b, c follow from $\alpha$ and $\eta$ alone, and a read $W_t^T q$ is an
attention of q over the $x_s$ of its chunk.

A new document starts from the initial weights, also in the middle of a chunk: from its first token
on, every product is taken with the initial weights and nothing older is carried. Chunks count from
the row's start, so that what a document remembers depends a little on where in a row it begins, but
not on what stands before it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from forge_jax.models.cognate.recurrence import before, linear_recurrence

Weights = tuple[Float[Array, "inputs outputs"], ...]


class Titans(NamedTuple):
    """The state of one sequence's memory; float32."""

    weights: Weights
    momentum: Weights
    surprise: Float[Array, ""]  # sum over the document's tokens
    tokens: Float[Array, ""]  # of the document
    held: Float[Array, ""]  # tokens written, each faded by what was forgotten since


class Writes(NamedTuple):
    """What the tokens of a chunk bring; rates lie in [0, 1]."""

    keys: Float[Array, "time d_mem"]
    values: Float[Array, "time d_mem"]
    theta: Float[Array, " time"]  # step size
    eta: Float[Array, " time"]  # what the momentum keeps
    keep: Float[Array, " time"]  # what the weights keep, 1 - alpha
    is_first: Bool[Array, " time"]  # of its document


class Measures(NamedTuple):
    """What the memory did at each token."""

    surprise: Float[Array, " time"]  # norm of the gradient
    relative: Float[Array, " time"]  # against the document so far, in [0, 1]
    held: Float[Array, " time"]  # tokens held after the write


def init_titans(weights: Weights) -> Titans:
    """The state before any token; `weights` are the initial ones."""
    zero = jnp.float32(0)
    weights = tuple(w.astype(jnp.float32) for w in weights)
    return Titans(weights, jax.tree.map(jnp.zeros_like, weights), zero, zero, zero)


def gradients(writes: Writes, products) -> tuple[Weights, Weights]:
    """Inputs and errors of every matrix at every token: their outer products are the gradients.

    `products(layer, x)` multiplies rows of x by the matrix of `layer`.
    """
    time, width = writes.keys.shape

    def loss(probes):
        h, inputs = writes.keys, []
        for layer, probe in enumerate(probes):
            inputs.append(h)
            h = products(layer, h) + probe
            h = jax.nn.silu(h) if layer < len(probes) - 1 else h
        return jnp.sum((h - writes.values) ** 2), tuple(inputs)

    # the gradient at a zero added to a product is the error at that product, token by token
    zeros = tuple(jnp.zeros((time, width)) for _ in range(products.depth))
    errors, inputs = jax.grad(loss, has_aux=True)(zeros)
    return inputs, errors


class _Products:
    """Products with the weights at the chunk's start; with the initial ones in a new document."""

    def __init__(self, weights: Weights, initial: Weights, is_new: Bool[Array, " time"]):
        self.weights, self.initial, self.is_new = weights, initial, is_new[:, None]
        self.depth = len(weights)

    def __call__(self, layer, x):
        return jnp.where(self.is_new, x @ self.initial[layer], x @ self.weights[layer])


def relative_surprise(
    surprise: Float[Array, " time"],
    is_first: Bool[Array, " time"],
    total: Float[Array, ""],
    tokens: Float[Array, ""],
) -> tuple[Float[Array, " time"], Float[Array, ""], Float[Array, ""]]:
    r"""$r_t = g_t / (g_t + \bar g_{<t})$, and the document's sum and count after the last token.

    It is 1/2 for a token as surprising as the document's mean so far, 1 for the first. `total` and
    `tokens` are the document's sum and count before.
    """
    keep = jnp.where(is_first, 0.0, 1.0)[:, None]
    start = jnp.stack([total, tokens])
    totals = linear_recurrence(keep, jnp.stack([surprise, jnp.ones_like(surprise)], 1), start)
    past, past_count = (keep * before(totals, start)).T
    mean = past / jnp.maximum(past_count, 1.0)
    return surprise / (surprise + mean + 1e-12), totals[-1, 0], totals[-1, 1]


def damping(
    keys: Float[Array, "time d_mem"], rate: Float[Array, " time"], document: Array
) -> Float[Array, " time"]:
    r"""What the tokens s < t of the chunk leave to learn: $\prod_s 1 - 2\theta_s |k_s^T k_t|$.

    Our addition. Gradients taken at the chunk's start know nothing of each other, so that a key
    that comes C times would be corrected C times over, and diverge. With this factor C equal keys
    move a linear memory as far as C steps one after the other; orthogonal keys, and chunks of one
    token, are as in the paper.
    """
    earlier = jnp.tril(document[:, None] == document, -1)
    left = 1 - jnp.minimum(2 * rate, 1) * jnp.minimum(jnp.abs(keys @ keys.T), 1)
    return jnp.prod(jnp.where(earlier, left, 1), axis=1)


def curvature(
    squares: Float[Array, " time"], errors: Float[Array, "time d_mem"]
) -> Float[Array, " time"]:
    r"""How far a step of 1/2 moves the recall, in units of its error; at least 1.

    $\|\nabla\ell\|^2 / 4\ell$, which is 1 for a linear memory and a key of unit length. Our
    addition: a deep memory steps by $\theta$ over this, and so does not overshoot where its inner
    features or its later matrices are large. `errors` are $2 (\mathcal{M}(k) - v)$.
    """
    return jnp.maximum(squares / ((errors**2).sum(-1) + 1e-12), 1.0)


def recall_chunk(
    state: Titans,
    initial: Weights,
    writes: Writes,
    queries: Float[Array, "time d_mem"],
    surprise_threshold: Float[Array, ""] | float,
    temperature: float = 0.05,
) -> tuple[Float[Array, "time d_mem"], Titans, Measures]:
    """Read and write one chunk of one sequence.

    A token is written at its rate times sigmoid((relative surprise - threshold) / temperature);
    with a threshold of -inf at its full rate. The gate takes no gradient.

    Returns:
        What each query read, the state after the chunk, and measures.
    """
    time = queries.shape[0]
    document = jnp.cumsum(writes.is_first)
    products = _Products(state.weights, initial, document > 0)
    inputs, errors = gradients(writes, products)

    norms = [(e**2).sum(-1) * (x**2).sum(-1) for e, x in zip(errors, inputs, strict=True)]
    squares = jnp.stack(norms).sum(axis=0)
    surprise = jax.lax.stop_gradient(jnp.sqrt(squares))
    relative, total, tokens = relative_surprise(
        surprise, writes.is_first, state.surprise, state.tokens
    )
    gate = jax.nn.sigmoid((relative - surprise_threshold) / temperature)
    rate = writes.theta * gate
    # scales the step and is no thing to learn from
    slow = jax.lax.stop_gradient(curvature(squares, errors[-1]))
    step = rate * damping(writes.keys, rate, document) / slow

    # column s < time: what is left of token s's step; column `time`: of the momentum at the start
    goes_on = jnp.where(writes.is_first, 0.0, 1.0)[:, None]
    carried = jnp.eye(time + 1)[time]
    in_momentum = linear_recurrence(goes_on * writes.eta[:, None], jnp.eye(time, time + 1), carried)
    # two columns more: what is left of the start's weights, the chunk's or the document's, and the
    # tokens held
    begun = jnp.where(writes.is_first, writes.keep, 0.0)
    added = jnp.concatenate([in_momentum, begun[:, None], gate[:, None]], axis=1)
    start = jnp.concatenate([jnp.zeros(time + 1), jnp.ones(1), state.held[None]])
    in_weights = linear_recurrence(goes_on * writes.keep[:, None], added, start)
    held = jax.lax.stop_gradient(in_weights[:, time + 2])

    past = goes_on * before(in_weights, start)
    past_start = past[:, time + 1 : time + 2] + 1 - goes_on
    h = queries
    for layer, (x, error) in enumerate(zip(inputs, errors, strict=True)):
        written = (past[:, :time] * (h @ x.T)) @ (step[:, None] * error)
        momentum = past[:, time : time + 1] * (h @ state.momentum[layer])
        h = past_start * products(layer, h) + momentum - written
        h = jax.nn.silu(h) if layer < products.depth - 1 else h

    def after(coefficients, start):
        """Sum of outer products and of what was carried, at the chunk's end."""
        scale = (coefficients[:time] * step)[:, None]
        return tuple(
            w + coefficients[time] * s - x.T @ (scale * e)
            for w, s, x, e in zip(start, state.momentum, inputs, errors, strict=True)
        )

    last = jax.tree.map(
        lambda w, w0: in_weights[-1, time + 1] * jnp.where(document[-1] > 0, w0, w),
        state.weights,
        initial,
    )
    weights = after(in_weights[-1], last)
    momentum = after(in_momentum[-1], (jnp.float32(0),) * products.depth)
    new = Titans(weights, momentum, total, tokens, held[-1])
    return h, new, Measures(surprise, relative, held)
