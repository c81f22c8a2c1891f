"""PyTorch, safetensors, GGUF and Hugging Face files in and out; torch is imported when needed."""

from typing import TYPE_CHECKING

from interop.config import Checkpoint as Checkpoint
from interop.gguf import load_gguf as load_gguf
from interop.gguf_write import save_gguf as save_gguf
from interop.huggingface import load_huggingface as load_huggingface
from interop.huggingface import save_huggingface as save_huggingface
from interop.lowrank import load_low_rank as load_low_rank
from interop.names import params_from_torch as params_from_torch
from interop.names import params_to_torch as params_to_torch
from interop.phase4 import load_phase4 as load_phase4
from interop.phase4 import save_phase4 as save_phase4
from interop.phase6 import load_phase6 as load_phase6
from interop.phase8 import write_phase8 as write_phase8
from interop.phase8_load import Phase8 as Phase8
from interop.phase8_load import load_phase8 as load_phase8
from interop.transformer_squared import load_transformer_squared as load_transformer_squared
from interop.transformer_squared import save_transformer_squared as save_transformer_squared

if TYPE_CHECKING:
    from interop.torch_optimizer import MuonGrokfast as MuonGrokfast


def __getattr__(name: str):
    """Import the optimizer when it is asked for: its base class needs torch, the readers do not."""
    if name == "MuonGrokfast":
        from interop.torch_optimizer import MuonGrokfast

        return MuonGrokfast
    raise AttributeError(f"module 'interop' has no attribute {name!r}")
