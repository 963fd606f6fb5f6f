"""The contenders of `dpo-jax bench`, and the Python and packages they need. Needs no JAX."""

from __future__ import annotations

import dataclasses
import shutil
import sys

from dpo_jax.bench import race
from dpo_jax.bench.work import CONTENDERS, library
from dpo_jax.cli.command_table import COMMANDS
from dpo_jax.cli.config import Config, ConfigError
from dpo_jax.extras import install_command


def contenders(config: Config) -> list[str]:
    """The names in `bench.contenders`. Raises `ConfigError` for one that is unknown, lacks a package, or does not divide."""
    try:
        names = race.check_names(config.bench.contenders)
    except ValueError as error:
        raise ConfigError(f"bench.contenders: {error}") from error
    needed = {"torch" for name in names if library(name) == "torch"} | {"trl" for name in names if "trl" in name}
    if needed:
        others = ",".join(name for name in CONTENDERS if library(name) == "jax")
        need(config, sorted(needed), option="bench.contenders", otherwise=f", or only contenders that need none: {others}")
    for option, parts in (
        ("bench.groups", config.bench.groups),
        ("bench.torch_microbatches", config.bench.torch_microbatches),
    ):
        if config.dpo.batch % parts:
            raise ConfigError(f"{option}: dpo.batch, {config.dpo.batch} pairs, cannot be split into {parts} equal parts")
    return names


def not_raced(config: Config) -> list[str]:
    """Training options of sections `dpo` and `lora` that are set but ignored by all contenders: dotted options."""
    reads = COMMANDS["bench"].reads
    return [
        f"{name}.{field.name}"
        for name in ("dpo", "lora")
        for field in dataclasses.fields(getattr(config, name))
        if f"{name}.{field.name}" not in reads and getattr(getattr(config, name), field.name) != field.default
    ]


def need(config: Config, packages: list[str], *, option: str, otherwise: str = "") -> None:
    """Raises `ConfigError` naming `option`, if the PyTorch contenders' Python lacks one of `packages`."""
    python = torch_python(config)
    if not race.installed(packages, python=python):
        raise ConfigError(
            f"{option}: {python} has no {' or no '.join(packages)}: {install_command('bench')}, name another Python "
            f"(bench.torch_python){otherwise}"
        )


def torch_python(config: Config) -> str:
    """The Python interpreter of the PyTorch contenders."""
    python = config.bench.torch_python
    if python is not None and shutil.which(python) is None:
        raise ConfigError(f"bench.torch_python: {python} cannot be run as a program")
    return python or sys.executable
