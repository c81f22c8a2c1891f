"""The mutations of how layers follow each other: loops, layers passed by, coarse layers."""

import random

from forge_jax.evolve.tree import Tree, other, step_in


def recur(tree: Tree, rng: random.Random) -> bool:
    """Loop part of the stack, or stop."""
    if tree.pop("recurrence", None) is None:
        layers = tree["n_layers"]
        prelude = rng.randrange(layers)
        body = rng.randint(1, layers - prelude)
        parts = {"prelude": prelude, "body": body, "coda": layers - prelude - body}
        tree["recurrence"] = {**parts, "loops": {"train": rng.choice([2, 3])}}
    return True


def loops(tree: Tree, rng: random.Random) -> bool:
    """More or fewer loops, another adapter, more or less noise."""
    if "recurrence" not in tree:
        return False
    looped = tree["recurrence"]
    field = rng.choice(["train", "eval", "adapter", "noise_std"])
    if field == "adapter":
        adapters = ["identity", "residual", "concat_linear"]
        looped[field] = other(adapters, looped["adapter"], rng)
    elif field == "noise_std":
        looped[field] = step_in([0.0, 0.01, 0.03, 0.1], looped[field], rng)
    else:
        looped["loops"][field] = step_in([1, 2, 3, 4], looped["loops"][field], rng)
        if field == "train" and "max" in looped["loops"].get("schedule", {}):
            looped["loops"]["schedule"]["max"] = looped["loops"][field]
    return True


def schedule(tree: Tree, rng: random.Random) -> bool:
    """Draw the training loops, let them grow, or take all in every step."""
    if "recurrence" not in tree:
        return False
    looped = tree["recurrence"]["loops"]
    if looped.pop("schedule", None) is None:
        growing = {"curriculum": rng.choice(["linear", "sqrt"]), "warmup_steps": 100}
        drawn = {
            "kind": "poisson_lognormal",
            "mean": 1.5,
            "sigma": 0.5,
            "max": min(looped["train"] + 1, 4),
        }
        looped["schedule"] = rng.choice([growing, drawn, {"backprop": 1}])
    return True


def depth_router(tree: Tree, rng: random.Random) -> bool:
    """Let tokens pass layers by, more or fewer of them, or stop."""
    router = tree.get("depth_router")
    if router is None:
        tree["depth_router"] = {"kind": "token", "budget": 0.5, "min_layers": rng.randint(0, 1)}
    elif rng.random() < 0.3:
        del tree["depth_router"]
    else:
        router["budget"] = step_in([0.25, 0.5, 0.75], router["budget"], rng)
    return True


def hierarchy(tree: Tree, rng: random.Random) -> bool:
    """One coarser level more or less, or another one."""
    levels = tree.pop("hierarchy", {"levels": []})["levels"]
    new = {
        "every": rng.choice([1, 2, 3, 4]),
        "downsample": rng.choice([0.5, 0.25]),
        "up_proj": rng.random() < 0.5,
    }
    field, chance = rng.choice([*new]), rng.random()
    if not levels or chance < 0.3:
        levels.append(new)
    elif chance < 0.6:
        levels.pop(rng.randrange(len(levels)))
    else:
        rng.choice(levels)[field] = new[field]
    if levels:
        tree["hierarchy"] = {"levels": levels}
    return True
