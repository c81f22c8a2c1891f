"""What a condition may not be, and what of it has no effect."""

import pytest

from forge_jax import arch
from tests.arch.documents import edited

POOL = {"kind": "pool-mlp", "H": 5}
SEGMENT = {"kind": "segment", "H": 5, "segment": 3}
FILM = {"where": "pre_mixer", "op": "film"}
STATE_SPACE = {"arch.mix_unit": {"kind": "single", "mixer": {"kind": "SSM"}}}


def cond(*ops, **more):
    return {"arch.cond": {"source": POOL, "ops": list(ops), **more}}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"arch.cond": {"source": POOL}}, r"arch\.cond\.ops: is needed"),
        ({"arch.cond": {}}, r"arch\.cond\.source: is needed"),
        ({"arch.cond": {"ops": [FILM]}}, r"arch\.cond\.source: is needed"),
        (cond(FILM, source={"kind": "segment"}), r"source\.segment: is needed by a segment"),
        (cond(FILM, reg={"kind": "freebits"}), r"reg\.kappa: is needed by freebits"),
        (cond({**FILM, "op": "lora", "r": 2}), r"ops\[0\]\.where: must be proj_q or proj_v"),
        (cond({"where": "q", "op": "lora"}), r"ops\[0\]\.r: is needed by lora"),
        (cond({**FILM, "share": "per_head"}), r"ops\[0\]\.share: per_head goes with"),
        (
            {**cond({"where": "v", "op": "add"}), **STATE_SPACE},
            r"v needs an Attention or Retention",
        ),
        ({**cond({"where": "ln", "op": "add"}), "arch.residual.kind": "dual"}, r"ln needs"),
        ({**cond({"where": "ln", "op": "add"}), "arch.residual.pre_ln": False}, r"ln needs"),
    ],
)
def test_a_rule_is_kept(changes, sentence):
    with pytest.raises(arch.DocumentError, match=sentence):
        arch.from_dict(edited(changes))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (cond(FILM, source={**POOL, "segment": 3}), "no effect on a pool-mlp source"),
        (cond(FILM, source={**SEGMENT, "segment": 32}), "no segment ends within"),
        (cond(FILM, reg={"kind": "none", "kappa": 1}), "no effect while its kind is none"),
        (cond({**FILM, "r": 3}), "no effect on film"),
        (cond({"where": "q", "op": "lora", "r": 3, "share": "global"}), "no effect on lora"),
    ],
)
def test_what_has_no_effect_is_told(changes, sentence):
    (note,) = arch.notes(arch.from_dict(edited(changes)))
    assert sentence in note
