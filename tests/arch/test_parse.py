"""Text in, text out; every mistake is found where it stands."""

import json

import pytest
import yaml

from forge_jax import arch
from tests.arch.documents import BASE, edited, mixer

TEXT = yaml.safe_dump(BASE, sort_keys=False)
ATTENTION = "arch.mix_unit.mixer"
CHOICES = [{"kind": "Attention", "heads": 4}, {"kind": "Retention", "heads": 2}]


def test_emitted_text_reads_back_the_same():
    spec = arch.parse(TEXT)
    assert arch.parse(arch.emit(spec)) == spec == arch.from_dict(arch.to_dict(spec))
    assert "norm_eps" not in arch.emit(spec)
    assert yaml.safe_load(arch.emit(spec)) == BASE


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("heads: 4", "hedas: 4", r"mixer\.hedas \(line 8\): is no field"),
        ("heads: 4", "heads: no", r'mixer\.heads \(line 8\): .*integer, got "no"'),
        ("heads: 4", "heads: true", r"mixer\.heads \(line 8\): .*integer, got true"),
        ("heads: 4", "heads: '4'", r'mixer\.heads \(line 8\): .*integer, got "4"'),
        ("heads: 4", "heads: 4e0", r"mixer\.heads \(line 8\): .*integer, got 4\.0"),
        ("heads: 4", "heads: 9" + "9" * 5000, r"mixer\.heads \(line 8\): .*integer"),
        ("heads: 4", "heads: 3", r"mixer\.heads \(line 8\): must divide d_model 16, got 3"),
        ("kind: Attention", "kind: Attn", r"arch\.mix_unit\.mixer \(line 6\): .*'Attn'"),
        ("mult: 2", "mult: -1", r"arch\.ffn\.mult \(line 12\): .*greater than 0, got -1"),
        ("mult: 2", "mult: .inf", r"arch\.ffn\.mult \(line 12\): .*finite"),
        ("  norm: RMSNorm\n", "", r"arch\.norm \(line 1\): is needed"),
        ("ctx_len: 32", "ctx_len: 32\n  ctx_len: 64", r"train\.ctx_len \(line \d+\): .* twice"),
        ("ctx_len: 32", "ctx_len: &a 32", "anchors are not allowed, got &a"),
        ("ctx_len: 32", "ctx_len: *a", r"aliases are not allowed, got \*a"),
        ("ctx_len: 32", "ctx_len: !!int 32", "tags are not allowed"),
        ("train:", "train: [", r"line \d+: the document is no YAML"),
        ("train:", "1: 2\ntrain:", r"a key must be text, got 1"),
        ("train:", "x: " + "[" * 99 + "]" * 99 + "\ntrain:", "nested more than 32 deep"),
        ("train:", "---\ntrain:", "wanted one document"),
        ("train:", "x: " + "a" * 1_000_000 + "\ntrain:", "at most 1000000 characters"),
    ],
)
def test_a_mistake_is_located(old, new, sentence):
    assert old in TEXT
    with pytest.raises(arch.DocumentError, match=sentence):
        arch.parse(TEXT.replace(old, new, 1))


@pytest.mark.parametrize("text", ["", "3", "- 1", "# nothing"])
def test_what_is_no_mapping_is_refused(text):
    with pytest.raises(arch.DocumentError, match=r"mapping|empty"):
        arch.parse(text)


def test_all_problems_come_at_once():
    text = TEXT.replace("heads: 4", "hedas: 4").replace("RMSNorm", "Norm")
    with pytest.raises(arch.DocumentError) as caught:
        arch.parse(text)
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({f"{ATTENTION}.kv_heads": 3}, r"kv_heads: must divide the 4 heads, got 3"),
        ({f"{ATTENTION}.stencil.kind": "ring"}, r"stencil\.block: is needed by a ring"),
        ({f"{ATTENTION}.stencil.kind": "local"}, r"stencil\.window: is needed by a local"),
        ({f"{ATTENTION}.softmax.type": "kernel"}, r"kernel\.features: is needed"),
        ({f"{ATTENTION}.softmax.type": "scaled"}, r"qk_scale: is needed"),
        ({f"{ATTENTION}.pos": "alibi"}, r'pos: must be "none" or the kind of arch\.pos'),
        ({"arch.mix_unit": {"kind": "single"}}, r"arch\.mix_unit\.mixer: is needed"),
        ({"arch.mix_unit": {"kind": "route", "choices": CHOICES}}, r"router: is needed"),
        ({"arch.mix_unit": {"kind": "par", "choices": CHOICES}}, r"merge: is needed"),
        ({"arch.mix_unit": {"kind": "par", "choices": [], "merge": "Add"}}, r"choices: .*at least"),
        (
            {"arch.mix_unit": {"kind": "route", "choices": CHOICES, "router": {"topk": 3}}},
            r"router\.topk: must be at most 2",
        ),
        ({"arch.ffn": {"kind": "moe", "mult": 1, "act": "relu"}}, r"ffn\.experts: is needed"),
        (
            {"arch.ffn": {"kind": "moe", "mult": 1, "act": "relu", "experts": 2, "topk": 3}},
            r"ffn\.topk: must be at most 2",
        ),
        ({"arch.kv_policy.cache": "window"}, r"kv_policy\.window: is needed"),
        ({"arch.kv_policy.cache": "latent"}, r"kv_policy\.latent: goes with"),
        ({"arch.recurrence.body": 1}, r"must be n_layers 2, got 1"),
        ({"arch.residual": {"kind": "dual", "pre_ln": False}}, r"dual has both norms"),
        ({"arch.pos.rope": {"dims": 3}}, r"dims: .*multiple of 2"),
        ({"arch.hierarchy.levels": []}, r"hierarchy\.levels: .*at least 1"),
        ({"arch.hierarchy.levels": [{"every": 2}] * 2}, r"levels\[1\]\.every: must differ"),
        (
            {"arch.hierarchy.levels": [{"every": 2, "downsample": 0.3}]},
            r"levels\[0\]\.downsample: must be 1 over a whole number of tokens, got 0\.3",
        ),
        (
            {"arch.hierarchy.levels": [{"every": 2, "downsample": 1 / 33}]},
            r"downsample: makes blocks longer than train\.ctx_len 32",
        ),
        ({"arch.hierarchy.levels": [{"every": 2, "downsample": 1e-320}]}, "longer than"),
        (
            {"arch.n_layers": 10**9, "arch.hierarchy.levels": [{"every": 2}]},
            "at most 4096 layers",
        ),
        ({"train.betas": [0.9, 1.0]}, r"train\.betas\[1\]: must lie in"),
        ({"arch.pos.rope.scaling": {"type": "longrope", "factor": 2}}, r"longrope: goes with"),
    ],
)
def test_a_rule_is_kept(changes, sentence):
    with pytest.raises(arch.DocumentError, match=sentence):
        arch.from_dict(edited(changes))


def test_alibi_needs_attention():
    with pytest.raises(arch.DocumentError, match="alibi needs an Attention"):
        arch.from_dict(edited({"arch.pos.kind": "alibi"}, mixer(kind="Retention", heads=2)))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"arch.hierarchy.levels": [{"every": 3}]}, "has no effect on 2 layers"),
        ({"arch.hierarchy.levels": [{"every": 1}, {"every": 2}]}, "levels[1]: has no effect: its"),
        ({"arch.hierarchy.levels": [{"every": 2, "downsample": 1}]}, "blocks have one token"),
        ({"arch.pos.rope.dims": 64}, "arch.pos.rope.dims: cut to the head's 4, got 64"),
        ({"arch.pos": {"kind": "alibi", "rope": {}}}, "no effect on alibi"),
        ({f"{ATTENTION}.stencil": {"kind": "full", "window": 4}}, "no effect on a full stencil"),
        ({"arch.kv_policy.window": 4}, "no effect on a full cache"),
    ],
)
def test_what_has_no_effect_is_told(changes, sentence):
    document = edited(changes)
    (note,) = arch.notes(arch.from_dict(document))
    assert sentence in note
    with pytest.raises(arch.DocumentError, match="does not fit"):
        arch.from_dict(document, strict=True)


def test_numbers_are_those_of_yaml_1_2():
    text = TEXT.replace("kind: rope", "kind: rope\n    rope: {theta: 1e4, dims: 04}")
    rope = arch.parse(text).arch.pos.rope
    assert rope is not None
    assert (rope.theta, rope.dims) == (10000.0, 4)


def test_the_schema_is_json_and_refuses_unknown_keys():
    schema = json.loads(json.dumps(arch.json_schema()))
    assert all(node.get("additionalProperties") is False for node in schema["$defs"].values())
    assert "groups" in schema["$defs"]["Attention"]["properties"]
    assert schema["$defs"]["Softmax"]["properties"]["softcap"]["description"]
