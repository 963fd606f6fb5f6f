"""Direct Preference Optimization (Rafailov et al. 2023) in JAX and Flax. The names below are the functional API.

Names are imported lazily (PEP 562): `import dpo_jax` is instant, and does not load JAX.

Each name has an example in its docstring. In these, `tokenizer`, `encoded`, `init`, `forward`, `unembed`, `model`, `variables`,
`rows` and `tx` come from the README's example ("Use the functions"), and `state` is the one before its loop. `folder` holds a
small Hugging Face model, for example a model of `make_model` written by `save_hf`. `collected` and `rollout` come from
`collect` and `advantages`.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpo_jax.checks.model import check_model as check_model
    from dpo_jax.cpl import SegmentPairs as SegmentPairs
    from dpo_jax.cpl import Transitions as Transitions
    from dpo_jax.cpl import bc_step as bc_step
    from dpo_jax.cpl import cpl_loss as cpl_loss
    from dpo_jax.cpl import cpl_step as cpl_step
    from dpo_jax.data.encode import Encoded as Encoded
    from dpo_jax.data.encode import encode as encode
    from dpo_jax.data.label import label as label
    from dpo_jax.data.layout import Layout as Layout
    from dpo_jax.data.layout import causal_rows as causal_rows
    from dpo_jax.data.layout import completion_rows as completion_rows
    from dpo_jax.data.layout import examples_to_rows as examples_to_rows
    from dpo_jax.data.layout import packed_rows as packed_rows
    from dpo_jax.data.layout import plain_rows as plain_rows
    from dpo_jax.data.layout import ranking_rows as ranking_rows
    from dpo_jax.data.layout import shared_rows as shared_rows
    from dpo_jax.data.loader import eval_batches as eval_batches
    from dpo_jax.data.loader import plan_layout as plan_layout
    from dpo_jax.data.loader import total_steps as total_steps
    from dpo_jax.data.loader import train_batches as train_batches
    from dpo_jax.data.prepare import data_digest as data_digest
    from dpo_jax.data.sources import load_preferences as load_preferences
    from dpo_jax.data.tokenizer import train_tokenizer as train_tokenizer
    from dpo_jax.data.unpaired import mismatched as mismatched
    from dpo_jax.dataset_logps import reference_logps_of as reference_logps_of
    from dpo_jax.dpo import dpo_objective as dpo_objective
    from dpo_jax.dpo import dpo_step as dpo_step
    from dpo_jax.dpo import preference_metrics as preference_metrics
    from dpo_jax.evals.frontier import best_of_n as best_of_n
    from dpo_jax.evals.frontier import optimum as optimum
    from dpo_jax.evals.frontier import regret as regret
    from dpo_jax.evals.frontier import sequence_kl as sequence_kl
    from dpo_jax.evals.preference import held_out_logps as held_out_logps
    from dpo_jax.evals.preference import preference_summary as preference_summary
    from dpo_jax.logps import completion_lengths as completion_lengths
    from dpo_jax.logps import completion_logps as completion_logps
    from dpo_jax.logps import sequence_logps as sequence_logps
    from dpo_jax.logps import slots_to_pairs as slots_to_pairs
    from dpo_jax.losses import dpo_loss as dpo_loss
    from dpo_jax.losses import implicit_rewards as implicit_rewards
    from dpo_jax.losses import ipo_loss as ipo_loss
    from dpo_jax.losses import kto_loss as kto_loss
    from dpo_jax.losses import named_loss as named_loss
    from dpo_jax.losses import plackett_luce_loss as plackett_luce_loss
    from dpo_jax.losses import unlikelihood_loss as unlikelihood_loss
    from dpo_jax.models.decoder import make_model as make_model
    from dpo_jax.models.families import decoder_config as decoder_config
    from dpo_jax.models.families import hf_config as hf_config
    from dpo_jax.models.hf import load_hf as load_hf
    from dpo_jax.models.hf import save_hf as save_hf
    from dpo_jax.models.lora import Lora as Lora
    from dpo_jax.models.lora import lora_model as lora_model
    from dpo_jax.models.lora import merge_adapter as merge_adapter
    from dpo_jax.models.targets import lora_targets as lora_targets
    from dpo_jax.ppo import advantages as advantages
    from dpo_jax.ppo import collect as collect
    from dpo_jax.ppo import minibatches as minibatches
    from dpo_jax.ppo import next_kl_coef as next_kl_coef
    from dpo_jax.ppo import ppo_step as ppo_step
    from dpo_jax.ppo import prompt_batch as prompt_batch
    from dpo_jax.reference import reference_logps as reference_logps
    from dpo_jax.reward_model import completion_rewards as completion_rewards
    from dpo_jax.reward_model import reward_step as reward_step
    from dpo_jax.reward_model import with_scalar_head as with_scalar_head
    from dpo_jax.rounding import stochastic_rounding as stochastic_rounding
    from dpo_jax.runtime.checkpoint import Checkpoints as Checkpoints
    from dpo_jax.runtime.fit import Evaluation as Evaluation
    from dpo_jax.runtime.mesh import make_mesh as make_mesh
    from dpo_jax.runtime.optim import linear_warmup as linear_warmup
    from dpo_jax.runtime.optim import make_optimizer as make_optimizer
    from dpo_jax.runtime.parallel import mesh_partitioner as mesh_partitioner
    from dpo_jax.runtime.parallel import pmap_partitioner as pmap_partitioner
    from dpo_jax.runtime.parallel import single_device as single_device
    from dpo_jax.sampling import generate as generate
    from dpo_jax.sampling import left_pad as left_pad
    from dpo_jax.sft import sft_step as sft_step
    from dpo_jax.step import apply_gradients as apply_gradients
    from dpo_jax.step import init_state as init_state
    from dpo_jax.step import mean_grads as mean_grads
    from dpo_jax.step import train_step as train_step
    from dpo_jax.training.references import cached_reference_logps as cached_reference_logps
    from dpo_jax.training.run import Saving as Saving
    from dpo_jax.training.run import train as train
    from dpo_jax.training.start_check import starts_at_reference as starts_at_reference
    from dpo_jax.training.stopping import EarlyStopping as EarlyStopping
    from dpo_jax.types import Model as Model
    from dpo_jax.types import Rows as Rows
    from dpo_jax.types import TrainState as TrainState

_HOMES = {
    "checks.model": ("check_model",),
    "cpl": ("SegmentPairs", "Transitions", "bc_step", "cpl_loss", "cpl_step"),
    "data.encode": ("Encoded", "encode"),
    "data.label": ("label",),
    "data.layout": (
        "Layout",
        "causal_rows",
        "completion_rows",
        "examples_to_rows",
        "packed_rows",
        "plain_rows",
        "ranking_rows",
        "shared_rows",
    ),
    "data.loader": ("eval_batches", "plan_layout", "total_steps", "train_batches"),
    "data.prepare": ("data_digest",),
    "data.sources": ("load_preferences",),
    "data.tokenizer": ("train_tokenizer",),
    "data.unpaired": ("mismatched",),
    "dataset_logps": ("reference_logps_of",),
    "dpo": ("dpo_objective", "dpo_step", "preference_metrics"),
    "evals.frontier": ("best_of_n", "optimum", "regret", "sequence_kl"),
    "evals.preference": ("held_out_logps", "preference_summary"),
    "logps": ("completion_lengths", "completion_logps", "sequence_logps", "slots_to_pairs"),
    "losses": ("dpo_loss", "implicit_rewards", "ipo_loss", "kto_loss", "named_loss", "plackett_luce_loss", "unlikelihood_loss"),
    "models.decoder": ("make_model",),
    "models.families": ("decoder_config", "hf_config"),
    "models.hf": ("load_hf", "save_hf"),
    "models.lora": ("Lora", "lora_model", "merge_adapter"),
    "models.targets": ("lora_targets",),
    "ppo": ("advantages", "collect", "minibatches", "next_kl_coef", "ppo_step", "prompt_batch"),
    "reference": ("reference_logps",),
    "reward_model": ("completion_rewards", "reward_step", "with_scalar_head"),
    "rounding": ("stochastic_rounding",),
    "runtime.checkpoint": ("Checkpoints",),
    "runtime.fit": ("Evaluation",),
    "runtime.mesh": ("make_mesh",),
    "runtime.optim": ("linear_warmup", "make_optimizer"),
    "runtime.parallel": ("mesh_partitioner", "pmap_partitioner", "single_device"),
    "sampling": ("generate", "left_pad"),
    "sft": ("sft_step",),
    "step": ("apply_gradients", "init_state", "mean_grads", "train_step"),
    "training.references": ("cached_reference_logps",),
    "training.run": ("Saving", "train"),
    "training.start_check": ("starts_at_reference",),
    "training.stopping": ("EarlyStopping",),
    "types": ("Model", "Rows", "TrainState"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("dpo_jax")
    if name not in _HOME and importlib.util.find_spec(f"dpo_jax.{name}") is not None:
        return importlib.import_module(f"dpo_jax.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'dpo_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(f"dpo_jax.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
