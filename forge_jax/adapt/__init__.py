"""Adaptation at inference: which expert, or which mixture, answers a question."""

from forge_jax.adapt.dispatch import BASE as BASE
from forge_jax.adapt.dispatch import Choice as Choice
from forge_jax.adapt.dispatch import ClassifierDispatch as ClassifierDispatch
from forge_jax.adapt.dispatch import Labels as Labels
from forge_jax.adapt.dispatch import PromptDispatch as PromptDispatch
from forge_jax.adapt.dispatch import boxed as boxed
from forge_jax.adapt.dispatch import classification_loss as classification_loss
from forge_jax.adapt.dispatch import fit_classifier as fit_classifier
from forge_jax.adapt.dispatch import from_text as from_text
from forge_jax.adapt.dispatch import make_labels as make_labels
from forge_jax.adapt.dispatch import pool as pool
from forge_jax.adapt.few_shot import FewShot as FewShot
from forge_jax.adapt.few_shot import Found as Found
from forge_jax.adapt.few_shot import OnShots as OnShots
from forge_jax.adapt.few_shot import references as references
from forge_jax.adapt.serve import Answered as Answered
from forge_jax.adapt.serve import check_experts as check_experts
from forge_jax.adapt.serve import two_pass as two_pass
