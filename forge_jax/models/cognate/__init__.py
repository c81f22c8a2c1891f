"""Cognate: TRM recursion over a Titans-MAG backbone."""

from forge_jax.models.cognate.config import SPECIALIZATIONS as SPECIALIZATIONS
from forge_jax.models.cognate.config import CognateConfig as CognateConfig
from forge_jax.models.cognate.config import Controls as Controls
from forge_jax.models.cognate.config import Specialization as Specialization
from forge_jax.models.cognate.config import halt_threshold as halt_threshold
from forge_jax.models.cognate.config import stack_controls as stack_controls
from forge_jax.models.cognate.decode import Inference as Inference
from forge_jax.models.cognate.decode import continue_tokens as continue_tokens
from forge_jax.models.cognate.decode import infer as infer
from forge_jax.models.cognate.loss import IGNORED as IGNORED
from forge_jax.models.cognate.loss import Thought as Thought
from forge_jax.models.cognate.loss import loss as loss
from forge_jax.models.cognate.loss import next_token_labels as next_token_labels
from forge_jax.models.cognate.loss import step_loss as step_loss
from forge_jax.models.cognate.model import Carry as Carry
from forge_jax.models.cognate.model import Cognate as Cognate
from forge_jax.models.cognate.model import Outputs as Outputs
from forge_jax.models.cognate.model import count_parameters as count_parameters
from forge_jax.models.cognate.model import init_carry as init_carry
