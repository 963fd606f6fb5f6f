"""`--check` of the experiments on robustness, control, diffusion, images and multi-turn dialogue."""

from __future__ import annotations

import importlib.util

from dpo_jax.cli.config import Config, ConfigError
from dpo_jax.cli.config.lab import numbers
from dpo_jax.cli.preflight.inputs import Check
from dpo_jax.extras import install_command


def robust(check: Check) -> None:
    """Inconsistent options, and the number of runs."""
    from dpo_jax.cli.robust.runs import runs_of

    runs = runs_of(check.config)
    check.tell("runs", f"{len(runs)} of experiment {check.config.robust.experiment}")


def control(check: Check) -> None:
    """The simulator, and the number of runs."""
    if check.scope.elsewhere is None:
        check_simulator(check.config)
    section = check.config.control
    count = len(section.chosen("methods")) * len(section.chosen("preferences")) * section.seeds
    check.tell("runs", f"{count} in the world {section.world}")


def check_simulator(config: Config) -> None:
    """Raises `ConfigError` if a world needs a package that is not installed."""
    if config.control.world == "pendulum" and importlib.util.find_spec("gymnasium") is None:
        raise ConfigError(f"control.world: pendulum needs the package gymnasium: {install_command('control')}, or take lqr")


def diffusion(check: Check) -> None:
    """Whether the package with the digits is installed."""
    section = check.config.diffusion
    if section.experiment == "digits" and check.scope.elsewhere is None and importlib.util.find_spec("sklearn") is None:
        raise ConfigError(f"diffusion: the digits are those of scikit-learn: {install_command('lab')}")
    digits = section.experiment == "digits"
    several = f"{section.seeds} seeds" if digits else f"{len(numbers(section.gaussian_draws))} numbers of draws, one seed"
    check.tell("runs", f"experiment {section.experiment}, {several}")


def scenes(check: Check) -> None:
    """The number of runs on scenes."""
    section = check.config.scenes
    settings = len(section.kinds()) * sum(len(numbers(values)) for values in (section.betas, section.ft_lrs))
    check.tell("runs", f"{(settings + 1) * section.seeds}, of {section.seeds} seeds")


def dialogue(check: Check) -> None:
    """The number of runs of the question game."""
    from dpo_jax.cli.dialogue_runs import runs_of

    check.tell("runs", f"{len(runs_of(check.config))}")
