"""The coefficient of the load-balancing loss of a mixture of experts, as a training section asks for it."""

from __future__ import annotations

from dpo_jax.cli.config import Config, ConfigError, TrainingConfig
from dpo_jax.models.families import router_coefficient
from dpo_jax.types import Model


def router_aux_loss(config: Config, section: TrainingConfig, model: Model) -> float:
    """What `section` asks for, or else what the config.json of `model` does. Raises `ConfigError` without experts."""
    asked = section.router_aux_loss
    if asked and model.route is None:
        name = "sft" if section is config.sft else "dpo"
        raise ConfigError(f"{name}.router_aux_loss: a {model.config.family} has no experts to balance; leave it out")
    return router_coefficient(model.config) if asked is None else asked
