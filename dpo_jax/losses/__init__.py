"""Preference losses: functions from log-probabilities of pairs or rankings to one loss per example.

All losses take `logps` and `ref_logps`, float[P, 2]: log pi(y|x) and log pi_ref(y|x), natural logarithm, summed over the
completion's tokens, chosen first. `plackett_luce_loss` takes rankings, float[P, K], best first; `kto_loss` takes single
completions, each with a mismatched one. All return `(losses[P], rewards[P, K])`. The rewards are the implicit rewards of
Rafailov et al. 2023 (arXiv 2305.18290), eq. 5, up to the prompt's partition function, and carry no gradient. `beta`, `alpha`
and `label_smoothing` are one number, or float[P] with one for each example.

A loss that needs more names it as a keyword argument: `lengths` float[P, 2], `mean_lengths` float[P, 2] (over the whole batch),
`weight` float[P] (0 marks padding examples), `desirable` float[P] (labels from the data). `dpo_step` supplies these. A loss
with the keyword `weight` looks across the batch, and splitting that batch costs one more forward pass.
"""

from dpo_jax.losses.combine import SIGNALS as SIGNALS
from dpo_jax.losses.combine import PreferenceLoss as PreferenceLoss
from dpo_jax.losses.combine import named_loss as named_loss
from dpo_jax.losses.combine import required_inputs as required_inputs
from dpo_jax.losses.combine import sum_of_losses as sum_of_losses
from dpo_jax.losses.combine import weighted_by_policy as weighted_by_policy
from dpo_jax.losses.combine import whole_set_signals as whole_set_signals
from dpo_jax.losses.inputs import implicit_rewards as implicit_rewards
from dpo_jax.losses.inputs import label_accuracy as label_accuracy
from dpo_jax.losses.inputs import pair_accuracy as pair_accuracy
from dpo_jax.losses.inputs import tied as tied
from dpo_jax.losses.likelihood import cpo_loss as cpo_loss
from dpo_jax.losses.likelihood import orpo_loss as orpo_loss
from dpo_jax.losses.likelihood import preferred_ft_loss as preferred_ft_loss
from dpo_jax.losses.likelihood import sft_loss as sft_loss
from dpo_jax.losses.likelihood import simpo_loss as simpo_loss
from dpo_jax.losses.likelihood import unlikelihood_loss as unlikelihood_loss
from dpo_jax.losses.margin import discopop_loss as discopop_loss
from dpo_jax.losses.margin import divergence_scores as divergence_scores
from dpo_jax.losses.margin import dpo_loss as dpo_loss
from dpo_jax.losses.margin import exo_pair_loss as exo_pair_loss
from dpo_jax.losses.margin import hinge_loss as hinge_loss
from dpo_jax.losses.margin import ipo_loss as ipo_loss
from dpo_jax.losses.margin import ipo_per_token_loss as ipo_per_token_loss
from dpo_jax.losses.margin import length_normalized_loss as length_normalized_loss
from dpo_jax.losses.margin import length_regularized_loss as length_regularized_loss
from dpo_jax.losses.margin import robust_loss as robust_loss
from dpo_jax.losses.pointwise import apo_down_loss as apo_down_loss
from dpo_jax.losses.pointwise import apo_zero_loss as apo_zero_loss
from dpo_jax.losses.pointwise import bco_pair_loss as bco_pair_loss
from dpo_jax.losses.pointwise import nca_pair_loss as nca_pair_loss
from dpo_jax.losses.pointwise import sppo_hard_loss as sppo_hard_loss
from dpo_jax.losses.rankings import plackett_luce_loss as plackett_luce_loss
from dpo_jax.losses.transport import aot_loss as aot_loss
from dpo_jax.losses.transport import aot_unpaired_loss as aot_unpaired_loss
from dpo_jax.losses.unpaired import apo_zero_unpaired_loss as apo_zero_unpaired_loss
from dpo_jax.losses.unpaired import kto_loss as kto_loss
from dpo_jax.losses.unpaired import unpaired_metrics as unpaired_metrics
