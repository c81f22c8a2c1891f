"""Mutations of the pipeline: stages apart, what they read, how often they run, latents.

Like those of `operators` they may propose what the rules refuse.
"""

import random

from forge_jax.evolve.tree import Edit, Tree, step_in

READS = ("kv_from", "mem_from", "inputs")


def stacks_of(tree: Tree) -> list[Tree]:
    """The stages between embedding and readout that are no latents."""
    latents = {n for n, m in tree.get("modules", {}).items() if m.get("kind") == "latent_sampler"}
    stages = tree.get("pipeline", [])[1:-1]
    return [stage for stage in stages if stage["module"] not in latents]


def earlier(tree: Tree, stage: Tree) -> list[str]:
    """Names of the stages before a stage."""
    names = [other["name"] for other in tree["pipeline"]]
    return names[: names.index(stage["name"])]


def split(tree: Tree, rng: random.Random) -> bool:
    """Cut a stack in two stages, the second with keys and values of the embedding or the first."""
    if "pipeline" in tree or tree["n_layers"] < 2 or "recurrence" in tree:
        return False
    lower = rng.randrange(1, tree["n_layers"])
    stack = {name: value for name, value in tree.items()}
    upper = {"name": "upper", "module": "upper", "inputs": ["lower"]}
    upper[rng.choice(READS[:2])] = [rng.choice(["embedding", "lower"])]
    modules = {
        "lower": {**stack, "n_layers": lower},
        "upper": {**stack, "n_layers": tree["n_layers"] - lower},
    }
    for name in set(tree) - {"d_model", "n_layers", "mix_unit", "ffn", "norm", "pos"}:
        del tree[name]  # a module leaves nothing open
    tree["modules"] = modules
    tree["pipeline"] = [
        {"name": "embedding", "kind": "embedding"},
        {"name": "lower", "module": "lower"},
        upper,
        {"name": "readout", "kind": "readout"},
    ]
    return True


def rewire(tree: Tree, rng: random.Random) -> bool:
    """Let a stage read another earlier stage as well, or one less."""
    stages = stacks_of(tree)
    if not stages:
        return False
    stage, field = rng.choice(stages), rng.choice(READS)
    name, read = rng.choice(earlier(tree, stage)), list(stage.get(field, []))
    stage[field] = [n for n in read if n != name] if name in read else [*read, name]
    if not stage[field]:
        del stage[field]
    return True


def repeat(tree: Tree, rng: random.Random) -> bool:
    """Run a stage more or less often."""
    stages = stacks_of(tree)
    if not stages:
        return False
    stage = rng.choice(stages)
    stage["repeat"] = step_in([1, 2, 3], stage.get("repeat", 1), rng)
    return True


def share(tree: Tree, rng: random.Random) -> bool:
    """Give a stage the weights of another."""
    stages = stacks_of(tree)
    if len(stages) < 2:
        return False
    one, two = rng.sample(stages, 2)
    one["module"] = two["module"]
    prune(tree)
    return True


def prune(tree: Tree) -> None:
    """Take away the stages that none reads, and the modules of no stage."""
    stages, unread = tree["pipeline"], True
    while unread:
        read = {name for stage in stages for field in READS for name in stage.get(field, [])}
        unread = [stage for stage in stages[1:-1] if stage["name"] not in read]
        stages = [stage for stage in stages if stage not in unread]
    used = {stage.get("module") for stage in stages}
    tree["pipeline"] = stages
    tree["modules"] = {name: m for name, m in tree["modules"].items() if name in used}


def latent(tree: Tree, rng: random.Random) -> bool:
    """Infer a latent from an earlier stage and hand it to a stack, or take it away."""
    stages = stacks_of(tree)
    if not stages:
        return False
    names = {n for n, m in tree["modules"].items() if m.get("kind") == "latent_sampler"}
    if names:
        gone = {s["name"] for s in tree["pipeline"] if s.get("module") in names}
        for stage in tree["pipeline"]:
            for field in READS:
                if left := [n for n in stage.pop(field, []) if n not in gone]:
                    stage[field] = left
        prune(tree)
        return True
    reader = rng.choice(stages)
    source = rng.choice(earlier(tree, reader))
    cond = {"source": {"kind": "pool-mlp", "H": rng.choice([4, 8])}}
    cond["reg"] = {"kind": "freebits", "kappa": rng.choice([0.25, 0.5, 1.0])}
    tree["modules"]["latent"] = {"kind": "latent_sampler", "cond": cond}
    at = tree["pipeline"].index(reader)
    tree["pipeline"].insert(at, {"name": "latent", "module": "latent", "inputs": [source]})
    reader["mem_from"] = [*reader.get("mem_from", []), "latent"]
    return True


REWIRINGS: dict[str, Edit] = {f.__name__: f for f in (split, rewire, repeat, share, latent)}
