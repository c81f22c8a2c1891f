"""Random decoders for the races, with experts, and the same weights in torch.

The public way of Transformer-Squared (arXiv 2501.06252) rebuilds U diag(s z) Vt for one candidate
after another, with `rebuild` here. The published code renormalises by a scalar, left out on both
sides, adapts the MLP's matrices alone, and hands the weights to vLLM, whose place transformers'
model takes, without a reload. The same algebra in torch is the same model with `Factored` in
place of its linear layers.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from transformers.pytorch_utils import Conv1D

from experiments.bench.race import Work
from forge_jax import svf
from forge_jax.models import Decoder, DecoderSpec
from interop import params_to_torch
from interop.config import hf_config
from interop.rules import canonical_names

# on whatever device JAX would take, where torch can
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Case(NamedTuple):
    """A random decoder in float32, decomposed, with K experts."""

    spec: DecoderSpec
    decoder: Decoder
    params: Any
    factors: Any
    experts: dict[str, np.ndarray]  # path -> (K, r)


def llama_spec(hidden: int, layers: int, vocab: int = 2048) -> DecoderSpec:
    """A Llama of heads of 64 (or less), an MLP of four times the width, and a head of its own."""
    size = min(64, hidden // 2)
    heads = hidden // size
    return DecoderSpec(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=size,
        # tied random embeddings would repeat the last token for ever
        tie_word_embeddings=False,
    )


def gpt2_spec(hidden: int = 768, layers: int = 12, vocab: int = 50257) -> DecoderSpec:
    """GPT-2, at the defaults the one of 124 M parameters."""
    heads = max(hidden // 64, 2)
    return DecoderSpec(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=hidden // heads,
        max_position_embeddings=1024,
        is_gpt2=True,
        fused_qkv=True,
    )


def random_params(spec: DecoderSpec, seed: int = 0) -> Any:
    """Float32 weights of Flax's own initializers."""
    init = jax.jit(functools.partial(Decoder(spec).init))
    return init(jax.random.key(seed), jnp.zeros((1, 2), jnp.int32))["params"]


def make_case(spec: DecoderSpec, experts: int, seed: int = 0) -> Case:
    """Decompose random weights and draw z of each expert around one."""
    params = random_params(spec, seed)
    factors, ones = svf.decompose(params, svf.is_attention_or_mlp)
    rng = np.random.default_rng(seed)
    drawn = {
        path: (1 + 0.2 * rng.normal(size=(experts, *z.shape))).astype(np.float32)
        for path, z in ones.items()
    }
    return Case(spec, Decoder(spec), params, factors, drawn)


def cast(case: Case, dtype: str) -> Case:
    """The case with weights, U and Vt in `dtype`; s and z stay float32."""
    if dtype == "float32":
        return case
    params = jax.tree.map(lambda w: w.astype(dtype), case.params)
    factors, _ = svf.decompose(params, svf.is_attention_or_mlp)

    def put(leaf):
        if not isinstance(leaf, svf.Factors):
            return leaf
        return dataclasses.replace(leaf, u=leaf.u.astype(dtype), vt=leaf.vt.astype(dtype))

    factors = jax.tree.map(put, factors, is_leaf=lambda x: isinstance(x, svf.Factors))
    return case._replace(params=params, factors=factors)


def tokens_of(spec: DecoderSpec, rows: int, time: int, seed: int = 1) -> np.ndarray:
    """Random token ids, (rows, time) int32."""
    return np.random.default_rng(seed).integers(0, spec.vocab_size, (rows, time), dtype=np.int32)


def torch_model(spec: DecoderSpec, params: Any) -> Any:
    """The model of transformers with these weights."""
    config = transformers.AutoConfig.for_model(**hf_config(spec, {}))
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.load_state_dict(params_to_torch(params, spec), strict=False)
    model.tie_weights()
    return model.to(DEVICE).eval().requires_grad_(False)


class Matrix(NamedTuple):
    """Factors of one linear layer in torch: W = U diag(s) Vt, (inputs, outputs)."""

    module: str
    u: torch.Tensor  # (inputs, r)
    s: torch.Tensor  # (r,)
    vt: torch.Tensor  # (r, outputs)


def torch_matrices(case: Case) -> dict[str, Matrix]:
    """Path -> the factors, and the name of their layer in the torch model."""
    names = {entry.path: name for name, entry in canonical_names(case.spec).items()}

    def tensor(x):
        return torch.from_numpy(np.array(x, np.float32)).to(DEVICE)

    return {
        path: Matrix(names[path].removesuffix(".weight"), *map(tensor, (f.u, f.s, f.vt)))
        for path, f in svf.named_factors(case.factors)
    }


def rebuild(matrix: Matrix, z: torch.Tensor, *, diagonal: bool = True) -> torch.Tensor:
    """The weight (outputs, inputs) as the public code makes it, or without the diagonal matrix."""
    s = matrix.s * z
    if diagonal:
        return matrix.vt.T @ torch.diag_embed(s) @ matrix.u.T
    return (matrix.vt.T * s) @ matrix.u.T


def put(model: Any, matrix: Matrix, weight: torch.Tensor) -> None:
    """Write a weight (outputs, inputs) into its layer; GPT-2's layers keep the transpose."""
    layer = model.get_submodule(matrix.module)
    layer.weight.copy_(weight.T if isinstance(layer, Conv1D) else weight)


class Factored(torch.nn.Module):
    """y = ((x U) * s) Vt + bias; s is set from outside, (r,) or (rows, 1, r)."""

    def __init__(self, matrix: Matrix, bias: torch.Tensor | None):
        super().__init__()
        self.u, self.s, self.vt = matrix[1:]
        self.bias = bias

    def forward(self, x):
        y = ((x @ self.u) * self.s) @ self.vt
        return y if self.bias is None else y + self.bias


def factored_model(case: Case) -> tuple[Any, dict[str, Factored]]:
    """The model of transformers on factors, and its factored layers by path."""
    model, layers = torch_model(case.spec, case.params), {}
    for path, matrix in torch_matrices(case).items():
        parent, _, last = matrix.module.rpartition(".")
        layers[path] = Factored(matrix, model.get_submodule(matrix.module).bias)
        setattr(model.get_submodule(parent), last, layers[path])
    return model, layers


def to_torch(tree: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """The arrays of a dictionary as tensors."""
    return {k: torch.tensor(np.asarray(v), device=DEVICE) for k, v in tree.items()}


def decoder_work(
    case: Case, rows: int, time: int, *, factored: bool, passes: int = 1, logits: int | None = None
) -> Work:
    """Count the products of a forward pass over `rows` x `time` tokens, and its weights.

    2 r (m + n) flops a token and matrix where factored, else 2 m n; attention over all pairs of
    positions; `logits` of each row, or all. The weights move once for each of `passes`.
    """
    numbers = 0.0
    for _, leaf in svf.named_factors(case.factors):
        m, n, r = leaf.u.shape[0], leaf.vt.shape[1], leaf.s.shape[0]
        numbers += r * (m + n) if factored else m * n
    spec = case.spec
    head = spec.hidden_size * spec.vocab_size
    width = spec.num_attention_heads * spec.head_dim
    flops = 2 * rows * (numbers * time + head * (time if logits is None else logits))
    flops += 4 * spec.num_hidden_layers * rows * time**2 * width
    itemsize = jax.tree.leaves(case.params)[0].dtype.itemsize
    return Work(flops, itemsize * (numbers + head) * passes)
