"""The flags of `--check`: what it may assume."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from dpo_jax.cli.command_table import COMMANDS
from dpo_jax.cli.config.file import ConfigError, is_count, suggest

OPTIONS = """\
  --check                   check data, models, devices and the run directory, report what would run, and exit
  --check-after=CMD,CMD     the same, assuming that these commands will have run in the same run directory
  --check-devices=N         the same, for N devices: whether batch and mesh divide evenly among them
  --check-elsewhere=FOLDER  the same, for hosts that mount FOLDER: paths inside it are not checked here"""


class Scope(NamedTuple):
    """Assumptions of a check."""

    after: tuple[str, ...] = ()  # commands that will have run before in the same run directory
    devices: int | None = None  # over all hosts; None: unknown
    elsewhere: str | None = None  # a folder on other machines

    def hides(self, path: str) -> bool:
        """Whether a path is in a place that cannot be seen from here."""
        return self.elsewhere is not None and Path(path).is_relative_to(self.elsewhere)


def scope_of(args: list[str]) -> tuple[list[str], Scope | None]:
    """The arguments without those in `OPTIONS`, and the scope that these give; None if there are none."""
    rest = [arg for arg in args if arg != "--check" and not arg.startswith("--check-")]
    found: dict[str, Any] = {}
    for arg in (arg for arg in args if arg.startswith("--check-")):
        name, equals, value = arg.removeprefix("--check-").partition("=")
        if name not in Scope._fields or not value:
            raise ConfigError(f"{arg}: unknown flag; the flags of --check are:\n{OPTIONS}")
        if name == "devices" and not is_count(value):
            raise ConfigError(f"{arg}: must be a number of devices")
        for command in value.split(",") if name == "after" else ():
            if command not in COMMANDS:
                raise ConfigError(f"{arg}: {command}: unknown command{suggest(command, list(COMMANDS))}")
        found[name] = {"after": lambda v: tuple(v.split(",")), "devices": int, "elsewhere": str}[name](value)
    return rest, Scope(**found) if len(rest) < len(args) else None
