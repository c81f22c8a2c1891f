"""1,000 damaged and hostile files: each loads what it declares, or ends in one sentence.

python -m pytest tests/interop/test_mutations.py -s    # prints the counts
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from forge_jax import svf
from forge_jax.models.cognate import Cognate, CognateConfig
from interop import (
    formats,
    load_phase6,
    save_gguf,
    save_huggingface,
    save_phase4,
    save_transformer_squared,
    write_phase8,
)
from interop.cognate import save_cognate
from interop.config import hf_config
from interop.lowrank import factor_tensors
from interop.transformer_squared import matrices

ROOT = Path(__file__).parents[2]
COUNT = 1000
METRICS = {"latency_ms": 1.0, "accuracy": 0.5, "vram_gb": 0.1, "throughput_tps": 9.0}


@pytest.fixture(scope="module")
def base(tmp_path_factory, make_llama, tokenizer):
    """One sound file of every kind."""
    work = tmp_path_factory.mktemp("mutants")
    base = work / "base"
    model = make_llama()
    config = json.loads(model.config.to_json_string())
    for name in ("pair", "zip", "legacy", "gguf", "low_rank", "expert", "policy"):
        (base / name).mkdir(parents=True)
    model.save_pretrained(base / "shards", max_shard_size="5KB")
    record = {"model_state_dict": model.state_dict(), "config": config}
    torch.save(record, base / "zip" / "m.pt")
    torch.save(record, base / "legacy" / "m.pt", _use_new_zipfile_serialization=False)
    checkpoint = load_phase6(base / "zip" / "m.pt")._replace(tokenizer=tokenizer)
    params, spec = checkpoint.params, checkpoint.spec
    save_huggingface(base / "hf", params, checkpoint)
    save_gguf(base / "gguf" / "m.gguf", params, checkpoint)
    save_phase4(base / "phase4", params, checkpoint)
    tensors = {n: t.numpy() for n, t in model.state_dict().items() if n != "lm_head.weight"}
    formats.write_safetensors(base / "pair" / "m.safetensors", tensors)
    formats.write_json(base / "pair" / "m.json", {"config": config, "metadata": {"phase": 6}})

    factors, z = svf.decompose(params, svf.is_mlp)
    low_rank = factor_tensors(svf.truncate(factors, z, 0.4), checkpoint.names)
    formats.write_safetensors(base / "low_rank" / "m.safetensors", low_rank)
    formats.write_json(base / "low_rank" / "m.json", {"config": hf_config(spec, config)})
    masks = {path: np.full(n, 0.4, np.float32) for path, n in matrices(spec).values()}
    save_transformer_squared(base / "expert" / "expert.pt", masks, spec, form="names")
    save_transformer_squared(base / "policy" / "expert.pt", masks, spec, form="policy")
    small = CognateConfig(vocab_size=24, d_model=16, layers=2, heads=2, d_ff=12, d_mem=4)
    tokens = jnp.zeros((1, 1), jnp.int32)
    cognate = jax.device_get(Cognate(small).init(jax.random.key(0), tokens)["params"])
    for name in ("cognate", "cognate_pt"):
        (base / name).mkdir()
        save_cognate(base / name / "m", cognate, small)
    write_phase8(
        base / "phase8",
        checkpoint,
        {"math": jax.device_get(z), "code": jax.device_get(z)},
        [0.5, 1.0],
        adapted_params=params,
        measure=lambda path: METRICS,
        succeeded=lambda metrics, path: True,
    )
    return work


@pytest.mark.slow
def test_mutants_load_what_they_declare_or_end_in_a_sentence(base):
    command = [sys.executable, str(Path(__file__).with_name("mutants.py")), str(base), str(COUNT)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print({name: value for name, value in found.items() if name != "wrong"})
    assert found["wrong"] == []
    assert len(found["sound"]) == 13
    assert not found["ran_code"]
    assert found["mutants"] == COUNT == found["loaded"] + found["refused"]
    assert found["refused"] > COUNT / 2
    assert found["slowest_seconds"] < 10
    assert found["peak_gib"] < 2


def test_the_command_line_ends_in_one_sentence_and_exit_code_2(base, tmp_path):
    bad = tmp_path / "bad"
    shutil.copytree(base / "base" / "hf", bad)
    weights = bad / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    command = [sys.executable, "-m", "experiments.phase7", "nano", "--checkpoint", str(bad)]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "out")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "model.safetensors cannot be read as safetensors" in done.stderr
    assert not (tmp_path / "out").exists()
