"""Resuming a training command: finds the earlier run to continue, and refuses one that does not match."""

from __future__ import annotations

from pathlib import Path

from dpo_jax.cli import identity
from dpo_jax.cli.config import Config, ConfigError, DpoConfig, SftConfig
from dpo_jax.cli.preflight.packages import check_bucket
from dpo_jax.runtime.checkpoint import has_steps
from dpo_jax.training import fingerprint
from dpo_jax.training.fingerprint import SavedRun
from dpo_jax.training.run import saved_run
from dpo_jax.writing import same_place


def earlier_run(config: Config, task: str, section: SftConfig | DpoConfig) -> SavedRun | None:
    """The run to be continued; None for a new run.

    Raises `ConfigError` before any data are read: for a bucket that cannot be reached, an earlier run without run.resume, and
    one with other settings.
    """
    directory = config.checkpoints_of(task)
    check_bucket(directory)
    _refuse_own_export(config, task)
    if not config.run.resume and has_steps(directory):
        raise ConfigError(f"run.resume: is off, but {directory} holds checkpoints; turn it on, or choose another --run.dir")
    saved = saved_run(directory, place=f"{config.run.dir}/{task}")
    if saved is not None:
        with identity.refusing_mismatch():
            fingerprint.check_settings(saved.place, saved.fingerprint, identity.settings(config, section))
    return saved


def _refuse_own_export(config: Config, task: str) -> None:
    """Raises `ConfigError` if a run starts from the folder to which it will write its model."""
    named = {"model.path": config.model.path, "dpo.policy": config.dpo.policy, "dpo.reference": config.dpo.reference}
    export = Path(config.run.dir, task, "export")
    for option, path in named.items():
        if path is not None and same_place(path, export):
            raise ConfigError(f"{option}: {path} is where this run writes its own model; choose another --run.dir")
