"""Language models as Flax Linen modules, and generation from them."""

from forge_jax.models.attention import Cache as Cache
from forge_jax.models.attention import init_cache as init_cache
from forge_jax.models.attention import repeat_cache as repeat_cache
from forge_jax.models.decoder import Decoder as Decoder
from forge_jax.models.generate import Generated as Generated
from forge_jax.models.generate import generate as generate
from forge_jax.models.generate import pad_left as pad_left
from forge_jax.models.generate import pad_right as pad_right
from forge_jax.models.generate import response_logits as response_logits
from forge_jax.models.generate import with_hidden as with_hidden
from forge_jax.models.score import ExactMatch as ExactMatch
from forge_jax.models.score import Judge as Judge
from forge_jax.models.score import Judged as Judged
from forge_jax.models.score import LogLikelihood as LogLikelihood
from forge_jax.models.score import Questions as Questions
from forge_jax.models.score import Respond as Respond
from forge_jax.models.score import is_right as is_right
from forge_jax.models.spec import DecoderSpec as DecoderSpec
from forge_jax.models.spec import RopeScaling as RopeScaling
