"""The starting policy of an experiment: trained by SFT if it does not exist."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from dpo_jax.cli.commands import sft as sft_command
from dpo_jax.cli.config import Config, ConfigError, LoraConfig


def make_reference(config: Config) -> None:
    """The starting policy from SFT, unless it exists. It is trained whole; methods may train adapters beside it."""
    if config.dpo.policy is None and not Path(config.dpo_policy()).is_dir():
        sft_command.run(dataclasses.replace(config, lora=LoraConfig()))


def refuse_bfloat16(config: Config, command: str) -> None:
    """Raises `ConfigError` for trained parameters in bfloat16."""
    if config.dpo.param_dtype != "float32":
        raise ConfigError(f"dpo.param_dtype: {command} keeps parameters in float32; leave it out")
