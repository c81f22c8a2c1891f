"""The mutation of what conditions the layers."""

import random

from forge_jax.evolve.tree import Tree, mixers_of, other, step_in

SIZES = [4, 8, 16, 32]
AROUND = ["film", "add", "scale"]


def condition(tree: Tree, rng: random.Random) -> bool:
    """Condition the layers, change the source, an op or the free bits, or stop."""
    cond = tree.get("cond")
    if cond is None:
        tree["cond"] = {"source": fresh_source(rng), "ops": [fresh_op(tree, rng)]}
        return True
    field, ops = rng.choice(["source", "H", "reg", "add", "change", "drop"]), cond["ops"]
    if field == "source":
        cond["source"] = fresh_source(rng) | {"H": cond["source"]["H"]}
    elif field == "H":
        cond["source"]["H"] = step_in(SIZES, cond["source"]["H"], rng)
    elif field == "reg" and cond.pop("reg", None) is None:
        cond["reg"] = {"kind": "freebits", "kappa": rng.choice([0.5, 1.0, 2.0])}
    elif field == "add" and len(ops) < 4:
        ops.append(fresh_op(tree, rng))
    elif field == "change":
        change(tree, rng.choice(ops), rng)
    elif field == "drop":
        ops.pop(rng.randrange(len(ops)))
        if not ops:
            del tree["cond"]
    return True


def fresh_source(rng: random.Random) -> Tree:
    """All of the past, or the last segment of it."""
    if rng.random() < 0.5:
        return {"kind": "pool-mlp"}
    return {"kind": "segment", "segment": rng.choice([4, 8, 16, 32])}


def fresh_op(tree: Tree, rng: random.Random) -> Tree:
    """Any op, where the mixers have what it acts on."""
    projected = any(m["kind"] in ("Attention", "Retention") for m in mixers_of(tree))
    if not projected or rng.random() < 0.5:
        places = ["token", "pre_mixer", "post_mixer", "ln"]
        return {"where": rng.choice(places), "op": rng.choice(AROUND)}
    where = rng.choice(["proj_q", "proj_v"])
    if rng.random() < 0.5:
        return {"where": where, "op": "lora", "r": rng.choice([2, 4, 8])}
    share = rng.choice(["per_channel", "per_head"])
    return {"where": where, "op": rng.choice(AROUND), "share": share}


def change(tree: Tree, op: Tree, rng: random.Random) -> None:
    """Another op in its place, or the same with other numbers."""
    if rng.random() < 0.3:
        new = fresh_op(tree, rng)
        op.clear()
        op.update(new)
    elif op["op"] == "lora":
        op["r"] = step_in([1, 2, 4, 8, 16], op["r"], rng)
    elif rng.random() < 0.5:
        op["op"] = other(AROUND, op["op"], rng)
    else:
        op["share"] = other(["global", "per_channel", "per_head"], op["share"], rng)
