"""The artifacts for Phase 8: their form, their wholeness, and what PyTorch makes of them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from forge_jax import svf
from interop import formats, load_low_rank, load_phase6, load_phase8, write_phase8
from interop.names import flatten

DOMAINS = ("math", "code", "reasoning", "vision")
ALPHA = [1.2, 0.8, 1.5, 0.9]
METRICS = {"throughput_tps": 52.1, "latency_ms": 87.3, "accuracy": 0.87, "vram_gb": 1.8}
TOKENS = np.random.default_rng(0).integers(3, 67, (2, 11))


@pytest.fixture(params=["tied copy", "no copy", "untied"])
def checkpoint(request, tmp_path, make_llama, tokenizer):
    """A float16 Phase 6 checkpoint with tokenizer and projector."""
    model = make_llama(tie_word_embeddings=request.param != "untied").half()
    state_dict = model.state_dict()
    if request.param == "no copy":
        del state_dict["lm_head.weight"]
    config = {**json.loads(model.config.to_json_string()), "image_token_id": 3}
    (tmp_path / "in").mkdir()
    torch.save({"state_dict": state_dict, "config": config}, tmp_path / "in" / "base.pt")
    tokenizer.save(str(tmp_path / "in" / "tokenizer.json"))
    projector = {"kernel": np.ones((4, 24), np.float32), "bias": np.zeros(24, np.float32)}
    formats.write_safetensors(tmp_path / "in" / "vision.safetensors", projector)
    return load_phase6(tmp_path / "in" / "base.pt")


@pytest.fixture
def job(checkpoint):
    """Arguments of `write_phase8`: four random experts, their mixture, its low-rank twin."""
    factors, ones = svf.decompose(checkpoint.params, svf.is_attention_or_mlp)
    rng = np.random.default_rng(0)
    experts = {
        d: {p: np.float32(z + 0.2 * rng.standard_normal(z.shape)) for p, z in ones.items()}
        for d in DOMAINS
    }
    stacked = {p: jnp.stack([experts[d][p] for d in DOMAINS]) for p in ones}
    z = svf.mix(stacked, jnp.array(ALPHA))
    return {
        "checkpoint": checkpoint,
        "experts": experts,
        "alpha": ALPHA,
        "adapted_params": svf.materialize(factors, z),
        "low_rank_params": svf.truncate(factors, z, 0.25),
        "rank_fraction": 0.25,
        "measure": lambda path: METRICS,
        "succeeded": lambda metrics, path: metrics["latency_ms"] < 100,
        "extra_metadata": {"seed": 0},
    }


@pytest.fixture
def out(tmp_path, job):
    return write_phase8(tmp_path / "out.v1", **job)


def test_phase7_json_is_the_guides_to_the_letter(out):
    text = (out / "phase7.json").read_text()
    assert json.loads(text) == {
        "success": True,
        "experts": {d: f"z_vectors_{d}.pt" for d in DOMAINS},
        "best_mixture": ALPHA,
        "adapted_model": "svf_adapted_model.pt",
        "metrics": METRICS,
    }
    order = []
    json.loads(text, object_pairs_hook=lambda pairs: order.append([k for k, _ in pairs]))
    assert order == [
        list(DOMAINS),
        ["latency_ms", "accuracy", "vram_gb", "throughput_tps"],
        ["success", "experts", "best_mixture", "adapted_model", "metrics"],
    ]


def test_pickles_are_plain_and_keep_the_names_and_shapes_of_phase_6(out, checkpoint, job):
    base = torch.load(checkpoint.path, weights_only=True)["state_dict"]
    model = torch.load(out / "svf_adapted_model.pt", weights_only=True)
    adapted = model["model_state_dict"]
    assert list(adapted) == list(base)
    assert all(adapted[n].shape == base[n].shape for n in base)
    assert {t.dtype for t in adapted.values()} == {torch.float32}
    assert model["metadata"]["phase"] == 7
    assert model["metadata"]["base_sha256"] == formats.sha256_file(checkpoint.path)
    assert model["metadata"]["best_mixture"] == ALPHA
    assert model["metadata"]["seed"] == 0
    z = torch.load(out / "z_vectors_code.pt", weights_only=True)
    assert len(z) == 14
    for name, vector in z.items():
        assert (vector.dtype, vector.shape) == (torch.float32, (min(base[name].shape),))
    # torch alone rebuilds the adapted weight from the base, the z of all experts and alpha
    name = "model.layers.1.mlp.down_proj.weight"
    u, s, vh = torch.linalg.svd(base[name].float(), full_matrices=False)
    zs = [torch.load(out / f"z_vectors_{d}.pt", weights_only=True)[name] for d in DOMAINS]
    mixed = 1 + sum(a * (z - 1) for a, z in zip(ALPHA, zs, strict=True))
    assert torch.allclose(u * (s * mixed) @ vh, adapted[name], atol=1e-5)
    assert not torch.allclose(base[name].float(), adapted[name], atol=1e-2)


def test_transformers_opens_the_adapted_model(out, job, checkpoint, torch_logits, jax_logits):
    model = AutoModelForCausalLM.from_pretrained(out / "huggingface")
    want = jax_logits(checkpoint, TOKENS, params=job["adapted_params"])
    np.testing.assert_allclose(torch_logits(model, TOKENS), want, atol=1e-4, rtol=0)
    assert np.abs(jax_logits(checkpoint, TOKENS) - want).max() > 0.1
    # and so do the .pt and its safetensors twin, through Phase 6's own reader
    for name in ("svf_adapted_model.pt", "svf_adapted_model.safetensors"):
        np.testing.assert_array_equal(jax_logits(load_phase6(out / name), TOKENS), want)


def test_everything_comes_back(out, job, checkpoint):
    loaded = load_phase8(out)
    assert list(loaded.experts) == list(DOMAINS)
    for domain, z in job["experts"].items():
        assert loaded.experts[domain].keys() == z.keys()
        assert all(np.array_equal(loaded.experts[domain][p], z[p]) for p in z)
    np.testing.assert_array_equal(loaded.alpha, ALPHA)
    params = dict(flatten(job["adapted_params"]))
    assert all(np.array_equal(leaf, params[p]) for p, leaf in flatten(loaded.params))
    assert (loaded.success, loaded.metrics) == (True, METRICS)
    assert loaded.metadata["expert_order"] == list(DOMAINS)
    assert loaded.checkpoint.tokenizer is not None
    assert loaded.checkpoint.projector is not None
    assert loaded.checkpoint.tokenizer.encode("ABC").ids == checkpoint.tokenizer.encode("ABC").ids
    assert loaded.checkpoint.spec == checkpoint.spec
    np.testing.assert_array_equal(loaded.checkpoint.projector["kernel"], np.ones((4, 24)))


def test_low_rank_twin_has_its_own_file_and_entry(out, job):
    twin = load_phase8(out).low_rank
    assert twin is not None
    assert twin.rank_fraction == 0.25
    paths = {p for p, leaf in flatten(twin.checkpoint.params) if isinstance(leaf, svf.Factors)}
    assert len(paths) == 14
    want, got = jax.tree.leaves(job["low_rank_params"]), jax.tree.leaves(twin.checkpoint.params)
    assert all(np.array_equal(a, b) for a, b in zip(want, got, strict=True))
    assert "lowrank" not in (out / "phase7.json").read_text()
    report = json.loads((out / "phase7_lowrank.json").read_text())
    assert report["adapted_model"] == "svf_adapted_model_lowrank.safetensors"
    assert report["bytes"] < (out / "svf_adapted_model.safetensors").stat().st_size
    tensors = formats.read_safetensors(out / report["adapted_model"])
    name = "model.layers.0.mlp.up_proj.weight"
    shapes = [tensors[f"{name}.{part}"].shape for part in ("u", "s", "vh")]
    assert shapes == [(40, 6), (6,), (6, 24)]


def test_measure_sees_finished_files_in_the_staged_place(tmp_path, job, torch_logits, jax_logits):
    seen = []

    def measure(path):
        assert not (tmp_path / "new").exists()
        low_rank = path.suffix == ".safetensors"
        checkpoint = load_low_rank(path) if low_rank else load_phase6(path)
        assert checkpoint.tokenizer is not None
        assert checkpoint.projector is not None
        seen.append(path.name)
        return {**METRICS, "latency_ms": 150.0 if low_rank else 50.0}

    out = write_phase8(tmp_path / "new", **{**job, "measure": measure})
    assert seen == ["svf_adapted_model.pt", "svf_adapted_model_lowrank.safetensors"]
    loaded = load_phase8(out)
    assert loaded.low_rank is not None
    assert (loaded.metrics["latency_ms"], loaded.success) == (50.0, True)
    assert (loaded.low_rank.metrics["latency_ms"], loaded.low_rank.success) == (150.0, False)


def test_two_writes_give_the_same_bytes(tmp_path, out, job):
    again = write_phase8(tmp_path / "again", **job)
    manifests = [json.loads((d / "manifest.json").read_text()) for d in (out, again)]
    assert manifests[0] == manifests[1]
    assert len(manifests[0]["sha256"]) > 15


@pytest.mark.parametrize("checkpoint", ["tied copy"], indirect=True)
def test_mixture_by_weight_is_kept_under_torch_names(tmp_path, job):
    by_path = {p: [0.1 * i, 0.2, 0.3, 0.4] for i, p in enumerate(job["experts"]["math"])}
    out = write_phase8(tmp_path / "by", **job, alpha_by_path=by_path)
    metadata = torch.load(out / "svf_adapted_model.pt", weights_only=True)["metadata"]
    assert (
        metadata["alpha_by_weight"]["model.layers.0.mlp.down_proj.weight"]
        == by_path["layers_0/mlp/down_proj/kernel"]
    )
    loaded = load_phase8(out)
    assert loaded.alpha_by_path is not None
    assert loaded.alpha_by_path.keys() == by_path.keys()
    assert all(np.array_equal(loaded.alpha_by_path[p], a) for p, a in by_path.items())
    np.testing.assert_array_equal(loaded.alpha, ALPHA)


def raising(path):
    raise RuntimeError("out of memory")


def bad(**changes):
    return lambda job: {**job, **changes}


def with_z(change):
    """A job whose first expert's z went through `change`."""

    def apply(job):
        z = dict(job["experts"]["math"])
        change(z)
        return {**job, "experts": {**job["experts"], "math": z}}

    return apply


Q = "layers_0/self_attn/q_proj/kernel"
BAD = {
    "measure raises": (bad(measure=raising), RuntimeError, "out of memory"),
    "metric missing": (bad(measure=lambda p: {"accuracy": 1.0}), ValueError, "must return latency"),
    "metric nan": (
        bad(measure=lambda p: {**METRICS, "accuracy": float("nan")}),
        ValueError,
        "accuracy = nan",
    ),
    "alpha too long": (bad(alpha=[1.0] * 5), ValueError, "`alpha` must hold one number for each"),
    "alpha nan": (bad(alpha=[1.0, 1.0, 1.0, float("nan")]), ValueError, "`alpha` must be finite"),
    "metadata": (
        bad(extra_metadata={"x": object()}),
        ValueError,
        "`extra_metadata` must hold JSON",
    ),
    "z of no weight": (with_z(lambda z: z.update(x=z[Q])), ValueError, "math: x is no matrix"),
    "z of a norm": (
        with_z(lambda z: z.update({"norm/scale": np.ones(3)})),
        ValueError,
        "math: norm/scale is no matrix",
    ),
    "z shorter": (
        with_z(lambda z: z.update({Q: z[Q][:-1]})),
        ValueError,
        rf"code: {Q}: have \(\d+,\), another",
    ),
    "z of fewer": (with_z(lambda z: z.pop(Q)), ValueError, f"math: {Q}: missing, others have it"),
    "z too long": (with_z(lambda z: z.update({Q: np.ones(99)})), ValueError, r"have \(99,\)"),
    "z nan": (with_z(lambda z: z.update({Q: z[Q] * np.nan})), ValueError, "holds NaN or infinity"),
    "z empty": (with_z(lambda z: z.clear()), ValueError, "math: has no z"),
    "domain": (
        lambda job: {**job, "experts": {"../math": {}}, "alpha": [1.0]},
        ValueError,
        "cannot be part of a file name",
    ),
    "alpha by path": (bad(alpha_by_path={Q: [1.0] * 4}), ValueError, "must name the weights of"),
    "params": (bad(adapted_params={}), ValueError, "params does not fit"),
}


@pytest.mark.parametrize("checkpoint", ["no copy"], indirect=True)
@pytest.mark.parametrize("case", BAD)
def test_bad_input_leaves_nothing_behind(tmp_path, job, case):
    change, error, sentence = BAD[case]
    with pytest.raises(error, match=sentence):
        write_phase8(tmp_path / "out", **change(job))
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("checkpoint", ["no copy"], indirect=True)
def test_existing_directory_is_refused_before_any_work(tmp_path, job):
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="out already exists and is not overwritten"):
        write_phase8(tmp_path / "out", **{**job, "measure": raising})
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("checkpoint", ["no copy"], indirect=True)
def test_damage_is_noticed_and_listed(out):
    z = out / "z_vectors_math.pt"
    z.write_bytes(z.read_bytes()[:-7] + b"1234567")
    (out / "huggingface" / "model.safetensors").unlink()
    with pytest.raises(ValueError) as caught:
        load_phase8(out)
    assert "huggingface/model.safetensors is missing" in str(caught.value)
    assert "z_vectors_math.pt has changed" in str(caught.value)
    with pytest.raises(ValueError, match=r"manifest\.json does not exist"):
        load_phase8(out / "huggingface")


def change_manifest(directory, change):
    path = directory / "manifest.json"
    record = json.loads(path.read_text())
    change(record["sha256"])
    path.write_text(json.dumps(record))


@pytest.mark.parametrize("checkpoint", ["no copy"], indirect=True)
def test_artifacts_that_the_manifest_does_not_list_are_refused(out):
    twin = sorted(p.name for p in out.iterdir() if "lowrank" in p.name)
    assert len(twin) == 3
    change_manifest(out, lambda digests: [digests.pop(name) for name in twin])
    with pytest.raises(ValueError) as caught:
        load_phase8(out)
    assert all(f"{name} is not in the manifest" in str(caught.value) for name in twin)
    for name in twin:
        (out / name).unlink()
    assert load_phase8(out).low_rank is None
    (out / "huggingface" / "adapter_config.json").write_text("{}")  # transformers would read it
    with pytest.raises(
        ValueError, match=r"huggingface/adapter_config\.json is not in the manifest"
    ):
        load_phase8(out)


@pytest.mark.parametrize("checkpoint", ["no copy"], indirect=True)
def test_a_manifest_of_the_report_alone_is_refused(out):
    change_manifest(out, lambda d: [d.pop(name) for name in list(d) if name != "phase7.json"])
    with pytest.raises(ValueError, match=r"svf_adapted_model\.pt is not in the manifest"):
        load_phase8(out)


@pytest.mark.parametrize("checkpoint", ["no copy"], indirect=True)
def test_the_other_files_of_a_run_may_lie_beside_the_artifacts(out):
    """Phase 7 moves the best seed's artifacts to the top of its run."""
    for name in ("config.json", "metrics.jsonl", "report.html", "z_heatmap.npz", "phase7.log"):
        (out / name).write_text("{}")
    for name in ("seed1", "checkpoints"):
        (out / name).mkdir()
        (out / name / "svf_adapted_model.pt").write_text("another")
    assert load_phase8(out).success


@pytest.mark.parametrize("checkpoint", ["no copy"], indirect=True)
def test_reports_of_another_kind_are_refused(out):
    """Whole numbers are numbers; integers beyond a float and files of others are not taken."""
    sound = json.loads((out / "phase7.json").read_text())

    def put(**changes):
        (out / "phase7.json").write_text(json.dumps({**sound, **changes}))
        digest = formats.sha256_file(out / "phase7.json")
        change_manifest(out, lambda digests: digests.update({"phase7.json": digest}))

    put(best_mixture=[1, 0, 2, 1])
    assert load_phase8(out).alpha.dtype == np.float64
    put(best_mixture=[10**400, 0, 0, 0], metrics={**METRICS, "vram_gb": 10**400})
    with pytest.raises(
        ValueError, match=r"best_mixture: want a number(?s:.)*metrics: want latency"
    ):
        load_phase8(out)
    (out / "config.pt").write_text("no artifact")
    put(adapted_model="config.pt", experts={**sound["experts"], "math": "config.pt"})
    with pytest.raises(ValueError, match=r"adapted_model: want the name(?s:.)*experts: want the"):
        load_phase8(out)


@pytest.mark.parametrize("checkpoint", ["no copy"], indirect=True)
def test_pickle_that_contradicts_its_twin_is_noticed(out):
    """Someone edits one file and the manifest, but not the other."""
    z = torch.load(out / "z_vectors_math.pt", weights_only=True)
    torch.save({n: t + 1 for n, t in z.items()}, out / "z_vectors_math.pt")
    digest = formats.sha256_file(out / "z_vectors_math.pt")
    change_manifest(out, lambda digests: digests.update({"z_vectors_math.pt": digest}))
    with pytest.raises(ValueError, match=r"z_vectors_math\.pt differs from z_vectors_math\.safet"):
        load_phase8(out)
