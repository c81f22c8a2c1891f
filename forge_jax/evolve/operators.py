"""The mutations, by name. Each edits a tree (the `arch` of a canonical document) in place.

An operator may propose what the rules refuse or what means the same network: `mutate` keeps only
children that are neither. Sizes move on coarse grids, so that compiled programs are met again.
"""

import random

from forge_jax.evolve.conditions import condition
from forge_jax.evolve.layers import depth_router, hierarchy, loops, recur, schedule
from forge_jax.evolve.tree import Edit, Tree, divisors, mixers_of, other, pick, step_in

WIDTHS = [16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 640, 768, 1024]
POWERS = [2**i for i in range(1, 15)]
MULTS = [0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0]
ACTS = ["relu", "gelu", "silu", "swiglu", "geglu"]


def width(tree: Tree, rng: random.Random) -> bool:
    """One step along the widths; heads keep their size where they can.

    All stacks of a pipeline take it.
    """
    old, new = tree["d_model"], step_in(WIDTHS, tree["d_model"], rng)
    tree["d_model"] = new
    for mixer in mixers_of(tree):
        if mixer["kind"] in ("Attention", "Retention"):
            size = mixer["head_dim"] if new % mixer["head_dim"] == 0 else 16
            mixer |= {"heads": max(1, new // size), "head_dim": size}
            if mixer["kind"] == "Attention":
                mixer["kv_heads"] = mixer["heads"]
        mixer.pop("heads", None) if mixer["kind"] == "SSM" else None
    return new != old


def depth(tree: Tree, rng: random.Random) -> bool:
    """One layer more or less; of a looped stack, in the body."""
    change = rng.choice([-1, 1])
    tree["n_layers"] += change
    if "recurrence" in tree:
        tree["recurrence"]["body"] += change
    return True


def heads(tree: Tree, rng: random.Random) -> bool:
    """More or fewer heads at the same inner width."""
    mixer = pick(tree, rng, "Attention", "Retention")
    if mixer is None:
        return False
    inner = mixer["heads"] * mixer["head_dim"]
    mixer["heads"] = step_in([inner // s for s in divisors(inner, 4)][::-1], mixer["heads"], rng)
    mixer["head_dim"] = inner // mixer["heads"]
    if mixer["kind"] == "Attention" and mixer["heads"] % mixer["kv_heads"]:
        mixer["kv_heads"] = mixer["heads"]
    return True


def kv_heads(tree: Tree, rng: random.Random) -> bool:
    """More or fewer heads of keys and values."""
    mixer = pick(tree, rng, "Attention")
    if mixer is None or mixer["heads"] == 1:
        return False
    mixer["kv_heads"] = other(divisors(mixer["heads"]), mixer["kv_heads"], rng)
    return True


def stencil(tree: Tree, rng: random.Random) -> bool:
    """Another pattern, or none."""
    mixer = pick(tree, rng, "Attention")
    if mixer is None:
        return False
    size = rng.choice([4, 8, 16, 32, 64])
    new = rng.choice(
        [
            {"kind": "local", "window": size},
            {"kind": "local", "window": size, "globals": rng.choice([1, 2, 4])},
            {"kind": "sliding", "window": size, "stride": size // 2},
            {"kind": "dilated", "dilation": rng.choice([2, 3, 4])},
            {"kind": "block", "block": size},
            {"kind": "ring", "block": size},
            {"kind": "hybrid", "window": size, "dilation": size},
            None,
        ]
    )
    mixer.pop("stencil", None)
    if new:
        mixer["stencil"] = new
    return True


def window(tree: Tree, rng: random.Random) -> bool:
    """A wider or a narrower window."""
    fitting = [m for m in mixers_of(tree) if m.get("stencil", {}).get("window")]
    if not fitting:
        return False
    pattern = rng.choice(fitting)["stencil"]
    pattern["window"] = step_in(POWERS, pattern["window"], rng)
    return True


def softmax(tree: Tree, rng: random.Random) -> bool:
    """Norm of queries and keys, a cap, a scale, or random features."""
    mixer = pick(tree, rng, "Attention")
    if mixer is None:
        return False
    new = dict(mixer.get("softmax", {}))
    field = rng.choice(["qk_norm", "softcap", "qk_scale", "kernel"])
    if field == "qk_norm":
        new[field] = other(["none", "rms", "layer"], new.get(field, "none"), rng)
    elif field == "kernel":
        kernel = {"features": rng.choice([16, 32, 64])}
        new |= {"type": "kernel", "kernel": kernel}
        if "kernel" in mixer.get("softmax", {}):
            new = {k: v for k, v in new.items() if k not in ("type", "kernel")}
    elif new.pop(field, None) is None:
        new[field] = (
            rng.choice([5.0, 15.0, 30.0]) if field == "softcap" else rng.choice([0.05, 0.3])
        )
    mixer["softmax"] = new
    return True


def projection(tree: Tree, rng: random.Random) -> bool:
    """Sum up earlier blocks of attention, in longer or shorter ones, or stop.

    It takes the place of a pattern, and of a cache that does not keep every key.
    """
    mixer = pick(tree, rng, "Attention")
    if mixer is None:
        return False
    old = mixer.pop("projection", None)
    if old is None or rng.random() < 0.7:
        block = step_in(POWERS, old["block"], rng) if old else rng.choice([8, 16, 32])
        shared = rng.random() < 0.5
        mixer["projection"] = {"type": "low_rank", "block": block, "shared": shared}
        mixer.pop("stencil", None)
        tree.pop("kv_policy", None)
    return True


def value_glu(tree: Tree, rng: random.Random) -> bool:
    """Gate the output of attention, or stop."""
    mixer = pick(tree, rng, "Attention")
    if mixer is None:
        return False
    mixer["value_glu"] = not mixer.get("value_glu", False)
    return True


def positions(tree: Tree, rng: random.Random) -> bool:
    """Another kind of positions."""
    kinds = ["rope", "alibi", "relbias", "learned", "xpos"]
    tree["pos"] = {"kind": other(kinds, tree["pos"]["kind"], rng)}
    return True


def no_positions(tree: Tree, rng: random.Random) -> bool:
    """Take the positions from one attention, or give them back."""
    mixer = pick(tree, rng, "Attention")
    if mixer is None:
        return False
    if mixer.pop("pos", None) is None:
        mixer["pos"] = "none"
    return True


def rope(tree: Tree, rng: random.Random) -> bool:
    """Another theta, fewer or more turned features, or another scaling."""
    if "rope" not in tree["pos"]:
        return False
    turned = tree["pos"]["rope"]
    field = rng.choice(["theta", "dims", "scaling"])
    if field == "theta":
        turned[field] = step_in([1e2, 1e3, 1e4, 1e5, 1e6], turned[field], rng)
    elif field == "dims":
        turned[field] = step_in(POWERS, turned[field], rng)
    elif turned.pop("scaling", None) is None:
        kind = rng.choice(["ntk", "linear", "yarn"])
        turned["scaling"] = {"type": kind, "factor": rng.choice([1.5, 2.0, 4.0])}
    return True


def fresh(tree: Tree, rng: random.Random) -> Tree:
    """A new mixer of any kind."""
    kind, d = rng.choice(["Attention", "Retention", "SSM", "LongConv"]), tree["d_model"]
    if kind == "SSM":
        return {"kind": kind, "d_state": rng.choice([8, 16, 32])}
    if kind == "LongConv":
        return {"kind": kind, "kernel_len": rng.choice([4, 8, 16, 32])}
    return {"kind": kind, "heads": rng.choice([h for h in divisors(d) if d // h >= 8])}


def swap_mixer(tree: Tree, rng: random.Random) -> bool:
    """A new mixer in place of another."""
    old = rng.choice(mixers_of(tree))
    new = fresh(tree, rng)
    old.clear()
    old.update(new)
    return True


def add_mixer(tree: Tree, rng: random.Random) -> bool:
    """A new mixer beside the others, at most four."""
    mixers = mixers_of(tree)
    if len(mixers) > 3:
        return False
    mixers = [*mixers, fresh(tree, rng)]
    if tree["mix_unit"]["kind"] == "single":
        merge = rng.choice(["Add", "WeightedAdd", "Concat"])
        tree["mix_unit"] = {"kind": "par", "choices": mixers, "merge": merge}
    else:
        tree["mix_unit"]["choices"] = mixers
    return True


def drop_mixer(tree: Tree, rng: random.Random) -> bool:
    """One mixer less; of two the other stays alone."""
    mixers = mixers_of(tree)
    if len(mixers) < 2:
        return False
    mixers.pop(rng.randrange(len(mixers)))
    if len(mixers) == 1:
        tree["mix_unit"] = {"kind": "single", "mixer": mixers[0]}
    return True


def merge(tree: Tree, rng: random.Random) -> bool:
    """Another way of bringing mixers together, a router among them."""
    unit = tree["mix_unit"]
    if unit["kind"] == "single":
        return False
    if rng.random() < 0.5:
        unit["merge"] = other(["Add", "WeightedAdd", "Concat"], unit["merge"], rng)
    elif unit["kind"] == "par":
        unit |= {"kind": "route", "router": {"balance": 0.01}}
    else:
        unit["kind"] = "par"
        del unit["router"]
    return True


def router(tree: Tree, rng: random.Random) -> bool:
    """How many a router picks, how sharply, and how evenly."""
    unit = tree["mix_unit"]
    if unit["kind"] != "route":
        return False
    gate = unit["router"]
    field = rng.choice(["topk", "temp", "balance"])
    if field == "topk":
        gate[field] = rng.randint(1, len(unit["choices"]))
    elif field == "temp":
        gate[field] = step_in([0.25, 0.5, 0.7, 1.0, 1.5, 2.0], gate["temp"], rng)
    else:
        gate[field] = step_in([0.0, 0.001, 0.01, 0.1], gate["balance"], rng)
    return True


def state(tree: Tree, rng: random.Random) -> bool:
    """The size of a state space, the taps of a convolution, the chunk of a recurrence."""
    mixer = pick(tree, rng, "SSM", "LongConv", "Retention")
    if mixer is None:
        return False
    if mixer["kind"] == "LongConv":
        mixer["kernel_len"] = step_in(POWERS, mixer["kernel_len"], rng)
    elif mixer["kind"] == "Retention" or rng.random() < 0.3:
        mixer["chunk"] = other([16, 32, 64, 128], mixer.get("chunk"), rng)
    elif rng.random() < 0.5:
        mixer["d_state"] = step_in(POWERS, mixer["d_state"], rng)
    else:
        mixer["expand"] = step_in([1.0, 1.5, 2.0, 3.0], mixer["expand"], rng)
        mixer.pop("heads", None)
    return True


def ffn_width(tree: Tree, rng: random.Random) -> bool:
    """A wider or a narrower feed-forward network."""
    tree["ffn"]["mult"] = step_in(MULTS, tree["ffn"]["mult"], rng)
    return True


def ffn_act(tree: Tree, rng: random.Random) -> bool:
    """Another activation."""
    tree["ffn"]["act"] = other(ACTS, tree["ffn"]["act"], rng)
    return True


def experts(tree: Tree, rng: random.Random) -> bool:
    """Experts in place of one network, more or fewer of them, or one network again."""
    ffn = tree["ffn"]
    if ffn["kind"] == "dense":
        tree["ffn"] = {**ffn, "kind": "moe", "experts": rng.choice([2, 4])}
        return True
    field = rng.choice(["experts", "topk", "capacity", "dense"])
    if field == "dense":
        tree["ffn"] = {"kind": "dense", "mult": ffn["mult"], "act": ffn["act"]}
    elif field == "capacity" and ffn.pop("capacity", None) is None:
        ffn["capacity"] = rng.choice([1.0, 1.25, 2.0])
    elif field != "capacity":
        ffn[field] = step_in([1, 2, 4, 8], ffn[field], rng)
    return True


def norm(tree: Tree, rng: random.Random) -> bool:
    """Another norm."""
    tree["norm"] = other(["LayerNorm", "RMSNorm", "ScaleNorm"], tree["norm"], rng)
    return True


def residual(tree: Tree, rng: random.Random) -> bool:
    """Another residual."""
    tree["residual"] = rng.choice(
        [
            {"kind": "single"},
            {"kind": "single", "post_ln": True},
            {"kind": "single", "scale": rng.choice([0.5, 0.7])},
            {"kind": "dual"},
            {"kind": "deepnet"},
        ]
    )
    return True


def cache(tree: Tree, rng: random.Random) -> bool:
    """What decoding keeps, and in how many bits."""
    policy = dict(tree.get("kv_policy", {"cache": "full", "quant": "none"}))
    if rng.random() < 0.5:
        policy["quant"] = other(["none", "int8", "fp8", "nf4"], policy["quant"], rng)
    elif policy["cache"] == "latent":
        latent = dict(policy.pop("latent"))
        field = rng.choice(["dim", "freq", "full"])
        if field == "full":
            policy["cache"] = "full"
        elif field == "dim":
            policy["latent"] = latent | {"dim": step_in(POWERS, latent["dim"], rng)}
        else:
            freq = latent.get("update", {}).get("freq", 1)
            policy["latent"] = latent | {"update": {"freq": other([1, 2, 4], freq, rng)}}
    elif policy["cache"] == "full" and rng.random() < 0.3:
        policy |= {"cache": "latent", "latent": {"dim": max(8, tree["d_model"] // 4)}}
    elif policy["cache"] == "window":
        policy["window"] = step_in(POWERS, policy["window"], rng)
    else:
        policy |= {"cache": "window", "window": rng.choice([8, 16, 32, 64])}
    tree["kv_policy"] = policy
    return True


EDITS: dict[str, Edit] = {
    f.__name__: f
    for f in (
        *(width, depth, heads, kv_heads, stencil, window, softmax, projection, value_glu),
        *(positions, no_positions, rope, swap_mixer, add_mixer, drop_mixer, merge, router, state),
        *(ffn_width, ffn_act, experts, norm, residual, recur, loops, schedule, depth_router),
        *(hierarchy, condition, cache),
    )
}
