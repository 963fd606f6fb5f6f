"""`--check` of optional packages, for commands that run on this machine."""

from __future__ import annotations

import importlib.util
import os

from dpo_jax.cli.config import Config, ConfigError
from dpo_jax.cli.preflight.inputs import Check
from dpo_jax.extras import install_command


def check_writers(config: Config) -> None:
    """Raises `ConfigError` for a metrics writer whose package is missing: now, not after the reference pass."""
    wanted = {"tensorboard": "tensorboardX" if config.run.tensorboard else ""}
    wanted |= {name: name if getattr(config.run, name) else "" for name in ("wandb", "trackio")}
    for option, package in wanted.items():
        if package and importlib.util.find_spec(package) is None:
            raise ConfigError(f"run.{option}: needs the package {package}: {install_command('writers')}, or leave it off")


def check_bucket(directory: str) -> None:
    """Raises `ConfigError` for checkpoints in a bucket that no installed package can reach."""
    if directory.startswith("gs://") and importlib.util.find_spec("gcsfs") is None:
        raise ConfigError(f"run.checkpoints: gs:// needs the package gcsfs: {install_command('gcs')}")


def writers(check: Check) -> None:
    if check.scope.elsewhere is None:
        check_writers(check.config)


def judge_packages(check: Check) -> None:
    section = check.config.judge
    if importlib.util.find_spec("httpx2") is None:
        raise ConfigError(f"judge: needs the package httpx2: {install_command('judge')}")
    if section.base_url == type(section).base_url and not os.environ.get(section.key_env, "").strip():
        raise ConfigError(f"judge.key_env: {section.base_url} needs a key, but the variable {section.key_env} is empty")


def reward_packages(check: Check) -> None:
    """Packages needed by the rewards of `label`, `ppo`, `optimum` and `frontier`."""
    needed = {
        "linear": ("sklearn", "scikit-learn", "lab"),
        "hf": ("torch", "torch", "classifier"),
        "vader": ("vaderSentiment", "vaderSentiment", "lab"),
    }
    for option in ("reward", "second_reward"):
        module, package, extra = needed.get(getattr(check.config.frontier, option), ("", "", ""))
        if module and check.scope.elsewhere is None and importlib.util.find_spec(module) is None:
            raise ConfigError(f"frontier.{option}: needs the package {package}: {install_command(extra)}")


def bench_packages(check: Check) -> None:
    """Packages needed by the contenders of `bench`."""
    from dpo_jax.cli.bench_contenders import contenders, need

    if check.config.bench.sampling is not None:
        need(check.config, ["torch"], option="bench.sampling")
    else:
        check.tell("races", ", ".join(contenders(check.config)))
