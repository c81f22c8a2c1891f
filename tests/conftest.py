"""Settings and fixtures that every test shares."""

import os
import random
from pathlib import Path

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "jax"

# Read once, when a library starts: before jax, torch and tokenizers are imported.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("MPLBACKEND", "agg")
# A test runs its programs a few times only: half the work of compiling them well.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
QUICK = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
if QUICK not in os.environ.get("XLA_FLAGS", ""):  # a worker has them from its parent
    os.environ["XLA_FLAGS"] = f"{QUICK} {os.environ.get('XLA_FLAGS', '')}".strip()

import jax  # noqa: E402
import pytest  # noqa: E402

# Most of a test's time on two cores is compilation; a second run of the suite reads it from disk.
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
# Parity tests compare with float32 references; a GPU would otherwise multiply in TF32.
jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture
def getkey(request):
    """Return a function that gives a fresh typed key at each call; a test always sees its own."""
    stream = random.Random(request.node.nodeid)
    return lambda: jax.random.key(stream.randrange(2**31))
