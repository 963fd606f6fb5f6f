"""`--check` of the robustness experiments, and of diffusion."""

from __future__ import annotations

import importlib.util

from dpo_jax.cli.config import ConfigError
from dpo_jax.cli.preflight.inputs import Check
from dpo_jax.extras import install_command


def robust(check: Check) -> None:
    """Options that do not go together, and how many runs there are."""
    from dpo_jax.cli.robust.runs import runs_of

    runs = runs_of(check.config)
    check.tell("runs", f"{len(runs)} of experiment {check.config.robust.experiment}")


def diffusion(check: Check) -> None:
    """Whether the digits are here."""
    section = check.config.diffusion
    if section.experiment == "digits" and check.scope.elsewhere is None and importlib.util.find_spec("sklearn") is None:
        raise ConfigError(f"diffusion: the digits are those of scikit-learn: {install_command('lab')}")
    check.tell("runs", f"experiment {section.experiment}, {section.seeds} seeds")
