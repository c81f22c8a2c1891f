"""What the tests of `forge_jax.parallel` run in processes of their own.

    sharded.py shapes OUT             8 forced devices: several meshes against one device
    sharded.py host OUT PORT NUMBER   one of two processes of 4 devices, joined

JAX fixes its number of devices when it starts, so it cannot be done in the process of the tests.
"""

import functools
import json
import re
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import checkpoints, experts
from experiments.data.batches import Batch
from experiments.forms import SVF
from experiments.model import Model
from forge_jax import models, parallel, search, svf

SPEC = models.DecoderSpec(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=2,
)
K, PROMPTS, SAMPLES, TIME, ANSWER, CANDIDATES = 2, 4, 2, 5, 3, 7
FACTORED = re.compile("(q|o|up|down)_proj/kernel")
SETTINGS = experts.Settings(steps=2, learning_rate=0.05)
SHAPES = {"2,2,2": (2, 2, 2), "8,1,1": (8, 1, 1), "1,8,1": (1, 8, 1), "1,1,8": (1, 1, 8)}


def read(apply, batch):
    """Teacher-forced logits; one pass, which compiles sooner than `LogLikelihood`'s two."""
    return apply(batch.tokens, batch.mask)[0]


def mesh_of(shape):
    return parallel.make_mesh(dict(zip(parallel.AXES, shape, strict=True)))


@functools.partial(jax.jit, static_argnums=0)
def decomposed(decoder):
    """Factors of a matrix by columns and one by rows in each block; the others stay kernels."""
    params = decoder.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    params = jax.tree.map(lambda w: 2 * w if w.ndim == 2 else w, params)
    return svf.decompose(params, lambda path, leaf: bool(FACTORED.search(path)))[0]


class Case:
    """A model with K experts in training, fixed rollouts and a population of mixtures; on hosts."""

    def __init__(self):
        rng = np.random.default_rng(0)
        decoder = models.Decoder(SPEC)
        nothing: Any = None
        parts: Any = {f: nothing for f in Model._fields}
        self.model = Model(**{**parts, "decoder": decoder, "adapted": svf.transform(decoder)})
        factors = decomposed(decoder)
        self.factors = jax.device_get(factors)
        rows = K * PROMPTS
        mask = np.arange(TIME) >= rng.integers(0, 4, (rows, 1))
        answer_mask = np.arange(ANSWER) < rng.integers(1, 4, (rows, 1))
        self.batch = Batch(
            tokens=rng.integers(0, 40, (rows, TIME), dtype=np.int32),
            mask=mask,
            answers=rng.integers(0, 40, (rows, ANSWER), dtype=np.int32),
            answer_mask=answer_mask,
            patches=np.zeros((rows, 0), np.float32),
        )
        sampled: Any = rng.integers(0, 40, (rows * SAMPLES, ANSWER), dtype=np.int32)
        live: Any = np.arange(ANSWER) < rng.integers(1, 4, (rows * SAMPLES, 1))
        self.responses = models.Generated(sampled, live)
        self.reward = rng.normal(size=(K, PROMPTS, SAMPLES)).astype(np.float32)
        weights = {"factors": factors, "projector": None}
        self.tx = experts.make_tx(SETTINGS)
        state = jax.jit(
            lambda w: experts.init_state(SVF, w, self.tx, K, jax.random.key(0), SETTINGS)
        )(weights)
        moved = {k: rng.normal(0, 0.3, v.shape).astype(np.float32) for k, v in state.delta.items()}
        self.state = jax.device_get(state._replace(delta=moved))
        self.experts = {k: 1 + v for k, v in moved.items()}
        self.alpha: Any = rng.uniform(0, 2, (CANDIDATES, K)).astype(np.float32)

    def placed(self, mesh):
        """Everything on the mesh; None is one device."""
        weights = {"factors": parallel.shard_params(mesh, self.factors), "projector": None}
        stacked = parallel.fitting(mesh, parallel.CANDIDATES, K)
        rows = (self.batch, self.responses)
        batch, responses = parallel.shard(mesh, rows, parallel.EXPERT_ROWS)
        return weights, parallel.shard(mesh, self.state, stacked), batch, responses

    def questions(self, mesh):
        names = ("tokens", "mask", "answers", "answer_mask")
        parts = {name: getattr(self.batch, name) for name in names}
        return parallel.shard(mesh, models.Questions(**parts), parallel.ROWS)

    def population(self, mesh, weights, score, form: Any = "factored"):
        shared = parallel.shard(mesh, self.experts, parallel.REPLICATED)
        given = (self.model.adapted, weights["factors"], shared, self.alpha, score)
        options: dict[str, Any] = {"form": form, "chunk": 2, "mesh": mesh}
        return search.evaluate_population(*given, self.questions(mesh), **options)

    def run(self, mesh):
        """One training step, teacher-forced logits, the score and text of a population."""
        weights, state, batch, responses = self.placed(mesh)
        update = experts.make_update(self.model, SVF, self.tx, SETTINGS)
        given = (batch, responses, self.reward, jax.random.key(0))
        after, metrics = update(weights, state, *given)

        @jax.jit
        def forced(weights, z, batch):
            s = svf.scales(weights["factors"], z)
            return read(svf.apply_rows(self.model.adapted, weights["factors"], s), batch)

        z = jax.tree.map(lambda d: 1 + d, after.delta)
        return {
            "delta": after.delta,
            **metrics,
            "logits": forced(weights, z, batch),
            "scores": self.population(mesh, weights, read),
        }, after

    def others(self, mesh):
        """The mixed-dense form, and text: a decoding loop that ends by itself."""
        weights, *_ = self.placed(mesh)
        dense = self.population(mesh, weights, read, "dense")
        text = models.Respond(SPEC, 3, tuple(range(8)))
        return {"dense": dense}, host(self.population(mesh, weights, text))


def host(tree):
    return jax.tree.map(np.asarray, tree)


def difference(got, wanted):
    """The largest error of each quantity as a fraction of its largest value."""
    got, wanted = host(got), host(wanted)

    def one(got, wanted):
        leaves = zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True)
        # not Python's max, which loses a NaN that is not the first
        return float(np.max([np.abs(g - w).max() / np.abs(w).max() for g, w in leaves]))

    return {name: one(got[name], wanted[name]) for name in wanted}


def held(tree):
    """Which fraction of its leaves' bytes one device holds."""
    leaves = jax.tree.leaves(tree)
    own = sum(x.addressable_shards[0].data.nbytes for x in leaves)
    return own / sum(x.nbytes for x in leaves)


def facts(case, mesh, wanted):
    """How a mesh compares with one device, and what its devices hold."""
    got, after = case.run(mesh)
    weights, state, batch, _ = case.placed(mesh)
    layer = weights["factors"]["layers_0"]
    kernels = [x for x in jax.tree.leaves((layer["self_attn"], layer["mlp"])) if x.ndim > 1]
    return {
        "difference": difference(got, wanted),
        "devices": [len(x.sharding.device_set) for x in jax.tree.leaves(got)],
        "held": {
            "kernels": held(kernels),
            "rows": held(batch.tokens),
            "delta": held(state.delta),
            "embedding": held(weights["factors"]["embed_tokens"]["embedding"]),
        },
    }, after


def restored(folder, tree, case, mesh):
    """Save `tree` from the mesh that it lies on, restore it on another; the bits and the shards."""
    checkpoints.save(folder, 1, tree, {})
    weights, state, *_ = case.placed(mesh)
    template = (weights["factors"], state)
    found = checkpoints.restore_latest(folder, template)
    assert found is not None
    back = jax.tree.leaves(found[1])
    same = [np.array_equal(a, b) for a, b in zip(back, jax.tree.leaves(tree), strict=True)]
    where = [a.sharding == b.sharding for a, b in zip(back, jax.tree.leaves(template), strict=True)]
    return {"bits": same, "shardings": where, "held": held(back)}


def shapes(out):
    """Several meshes of eight devices against one device."""
    case = Case()
    wanted, _ = case.run(None)
    arrays: Any = {k: np.asarray(wanted[k]) for k in ("logits", "scores", "loss")}
    np.savez(out / "one.npz", **arrays)
    found: dict[str, Any] = {"zero": difference({"z": case.state.delta}, {"z": wanted["delta"]})}
    for name, shape in SHAPES.items():
        mesh = mesh_of(shape)
        found[name], after = facts(case, mesh, wanted)
        if name == "2,2,2":
            tree = (case.placed(mesh)[0]["factors"], after)
            other = restored(out / "checkpoint", tree, case, mesh_of((1, 4, 2)))
            found["restored"] = other
            (dense, text), (_, alone) = case.others(mesh), case.others(None)
            found["dense"] = difference(dense, {"dense": wanted["scores"]})
            found["text"] = jax.tree.map(np.array_equal, text, alone)
            found["stops"] = text.mask.sum(axis=-1).tolist()
    found["example"] = example()
    found["work"] = [work(None), work(mesh_of((1, 1, 8)))]
    (out / "shapes.json").write_text(json.dumps(found))


def example():
    """Run the documentation's example; what its result and its factors are."""
    text = (Path(__file__).resolve().parents[2] / "docs" / "devices.md").read_text()
    names: dict[str, Any] = {}
    exec(text.split("```python")[1].split("```")[0], names)
    scores = names["scores"]
    return [list(scores.shape), len(scores.sharding.device_set), held(names["factors"])]


def work(mesh):
    """Floating-point operations of one device in a step over two candidates of each group."""

    @jax.jit
    def run(x, w):
        return parallel.map_candidates(lambda c, w: c @ w @ w, x, w, mesh=mesh, chunk=2)

    x, w = jnp.ones((30, 4, 64)), jnp.ones((64, 64))
    counted: Any = run.lower(x, w).compile().cost_analysis()
    return counted["flops"], float(run(x, w).sum())


def joined(out, port, number):
    """The same on a mesh over two processes, against what `shapes` found on one device."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", 2, number)
    mesh = mesh_of((2, 2, 2))
    got, _ = Case().run(mesh)
    whole = parallel.shard(mesh, got, parallel.REPLICATED)
    wanted = dict(np.load(out / "one.npz"))
    found = {
        "devices": [jax.local_device_count(), jax.device_count()],
        "addressable": [x.is_fully_addressable for x in jax.tree.leaves(got["logits"])],
        "difference": difference({k: whole[k] for k in wanted}, wanted),
    }
    (out / f"host{number}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    mode, folder, *rest = sys.argv[1:]
    if mode == "shapes":
        shapes(Path(folder))
    else:
        joined(Path(folder), *map(int, rest))
