"""Parses the command line into a checked configuration: a YAML file, or run directories, overridden by flags."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from dpo_jax import loss_table
from dpo_jax.cli import config as options
from dpo_jax.cli import words
from dpo_jax.cli.command_table import COMMANDS, NO_DEVICES, SHORT, Command
from dpo_jax.cli.config import Config, ConfigError, load_config_with_lines
from dpo_jax.cli.config.file import list_of, suggest, types_of
from dpo_jax.cli.config.report import ReportConfig
from dpo_jax.cli.config.training import ALTERNATIVES, TrainingConfig
from dpo_jax.data.terminal import raw


def parse(name: str, args: list[str]) -> Config:
    """The checked config of command `name`: the YAML file at the start of `args`, overridden by the flags after it."""
    command = COMMANDS[name]
    args = ["".join((SHORT.get(name, name), equals, value)) for name, equals, value in (arg.partition("=") for arg in args)]
    if name == "report" and args and not args[0].startswith("-") and not Path(args[0]).is_file():
        path, flags, config, lines = "RUN...", *_of_runs(args), {}
    elif args and not args[0].startswith("-"):
        path, flags = args[0], args[1:]
        config, lines = load_config_with_lines(path)
    elif {"-h", "--help"} & set(args):
        path, flags, config, lines = "CONFIG.yaml", args, Config(), {}
    else:
        if name == "report":
            raise ConfigError("report needs run directories first: dpo-jax report runs/quickstart (options: --help)")
        needs = f"{name} needs a configuration file as its first argument; `dpo-jax init my.yaml` writes one (options: --help)"
        raise ConfigError("\n".join([needs, *_foreign_words(args, _shown(command))]))
    changed = _override(name, command, config, path, flags)
    kept = {field: line for field, line in lines.items() if _get(changed, field) == _get(config, field)}
    needs = tuple(section for section in command.needs if section != "data" or not _brings_its_data(name, changed))
    changed = options.with_policy(options.at_home(changed))
    if changed.dpo.policy == "model" and {"dpo", "dpo.policy"} & set(command.reads):
        place = f"{path}:{kept['dpo.policy']}: " if "dpo.policy" in kept else ""
        raise ConfigError(f"{place}dpo.policy: model stands for the model of model.path, which is not set: set model.path")
    options.check(changed, lines=kept, path=path, needs=needs)
    if {"dpo", "dpo.loss"} & set(command.reads) and (wrong := [*loss_table.own_problems(changed.dpo.loss)]):
        raise ConfigError("\n".join(f"dpo.loss: {problem}" for problem in wrong))
    places = {field: f"{path}:{line}: " for field, line in kept.items()}
    _refuse_unread_mesh(name, changed, places=places, overruled=changed.run.devices != config.run.devices)
    return changed


def _refuse_unread_mesh(name: str, config: Config, *, places: Mapping[str, str], overruled: bool) -> None:
    """Raises `ConfigError` for sizes of a mesh that a command would not build. (`main` has more to say about mesh.context.)

    `places` has the options as the file sets them. Where a flag overruled the file's run.devices, as when the file of a pod is
    tried on one device, the file's mesh is meant for another day.
    """
    if config.run.devices == "mesh" or name in NO_DEVICES or "mesh" not in COMMANDS[name].reads:
        return
    default = dataclasses.asdict(options.MeshConfig())
    given = [field for field, size in dataclasses.asdict(config.mesh).items() if size != default[field] and field != "context"]
    given = [field for field in given if not (overruled and f"mesh.{field}" in places)]
    if given:
        field = f"mesh.{given[0]}"
        raise ConfigError(
            f"{places.get(field, '')}{field}: is read only with run.devices mesh, which is "
            f"{config.run.devices}: set --run.devices mesh, or leave it out"
        )


def _of_runs(args: list[str]) -> tuple[list[str], Config]:
    """The flags after the run directories at the start of `args`, and a config that names these directories."""
    count = next((number for number, arg in enumerate(args) if arg.startswith("-")), len(args))
    if bad := [folder for folder in args[:count] if "," in folder]:
        raise ConfigError(f"report.runs: {bad[0]}: a run directory's name must not contain a comma")
    return args[count:], Config(report=ReportConfig(runs=",".join(args[:count])))


def _brings_its_data(name: str, config: Config) -> bool:
    """Whether a command that works on the data is asked to use its own prompts or tokens instead."""
    bench = config.bench.lengths or config.bench.sampling
    own = {"sample": config.sample.prompts_file, "bench": bench, "judge": config.judge.baseline_file()}
    return own.get(name) is not None


def _get(config: Config, dotted: str) -> Any:
    value: Any = config
    for field in dotted.split("."):
        value = getattr(value, field)
    return value


def _override(name: str, command: Command, config: Config, path: str, flags: list[str]) -> Config:
    """Applies flags. tyro gets classes with only the options that the command reads, and the current values as defaults."""
    if not flags:
        return config
    try:
        import tyro
    except ModuleNotFoundError as error:
        raise ConfigError(f"{flags[0]}: flags need the package tyro: pip install tyro, or set the option in {path}") from error

    shown, known = _shown(command), options.every_option()
    for flag in (flag for flag in flags if flag.startswith("--")):
        option = flag[2:].partition("=")[0].replace("-", "_")
        section, _, field = option.partition(".")
        if option in known and _is_list(config, section, field):
            raise ConfigError(f"{flag}: a list, which cannot be given as a flag; write it in {path}")
        if option in known and field not in shown.get(section, ()):
            readers = [other for other, spec in COMMANDS.items() if {section, f"{section}.{field}"} & set(spec.reads)]
            raise ConfigError(f"{flag}: {name} does not read this option ({', '.join(readers)} would)")
    if answers := _foreign_words(flags, shown):
        raise ConfigError("\n".join(answers))
    shown = _only_named(flags, shown)
    lists = {(section, field) for section, fields in shown.items() for field in fields if _is_list(config, section, field)}
    views = []
    for section, fields in shown.items():
        current = getattr(config, section)
        cls, hints = type(current), types_of(type(current))
        view = dataclasses.make_dataclass(
            cls.__name__,
            [
                (
                    field,
                    Annotated[hint, tyro.conf.arg(help=options.help_text(cls, field))],
                    dataclasses.field(default=None if hint is _ONLY_IN_FILES else getattr(current, field)),
                )
                for field in fields
                for hint in [hints[field] if list_of(hints[field]) is None else _ONLY_IN_FILES]
            ],
            namespace={"__doc__": cls.__doc__},
            frozen=True,
        )
        views.append((section, view, dataclasses.field(default=view())))
    with contextlib.redirect_stdout(raw(sys.stdout)):  # its help has colors
        chosen = tyro.cli(
            dataclasses.make_dataclass("Options", views, frozen=True),
            prog=f"dpo-jax {name} {path}",
            description=f"{command.help[0].upper()}{command.help[1:]}. Flags override the values of {path}. With --check it "
            "only reports whether it could run, and what would run (see dpo-jax help).",
            args=flags,
        )
    changes = {
        section: {field: value for field, value in vars(getattr(chosen, section)).items() if (section, field) not in lists}
        for section in shown
    }
    return dataclasses.replace(
        config, **{section: _replaced(section, getattr(config, section), fields, flags) for section, fields in changes.items()}
    )


def _replaced(name: str, section: Any, fields: dict[str, Any], flags: list[str]) -> Any:
    """A section with the values of flags. A flag displaces its alternative in the file, such as `warmup_steps` by
    `--dpo.warmup-ratio`."""
    new = dataclasses.replace(section, **fields)
    for pair in ALTERNATIVES if isinstance(section, TrainingConfig) else ():
        given = [field for field in pair if f"{name}.{field}" in _named(flags) and fields[field] is not None]
        if len(given) != 1:
            continue
        (other,) = set(pair) - {*given}
        value, default = getattr(new, other), getattr(TrainingConfig, other)
        if value not in (default, 0):
            new = dataclasses.replace(new, **{other: default})
            print(f"note: {name}.{given[0]}, given as a flag, replaces {name}.{other} {value:g} of the file", file=sys.stderr)
    return new


def _named(flags: list[str]) -> set[str]:
    """The options that flags name, dotted."""
    return {flag[2:].partition("=")[0].replace("-", "_") for flag in flags if flag.startswith("--")}


def _only_named(flags: list[str], shown: dict[str, list[str]]) -> dict[str, list[str]]:
    """The options that flags name, if these are all known and no help is asked for; else all of `shown`.

    tyro takes a quarter of a second to build a parser of all options.
    """
    named = _named(flags)
    few = {section: [field for field in fields if f"{section}.{field}" in named] for section, fields in shown.items()}
    if "-h" in flags or not named or sum(map(len, few.values())) < len(named):
        return shown
    return {section: fields for section, fields in few.items() if fields}


_ONLY_IN_FILES = None | str  # how `--help` shows a list


def _is_list(config: Config, section: str, field: str) -> bool:
    return list_of(types_of(type(getattr(config, section))).get(field)) is not None


def _shown(command: Command) -> dict[str, list[str]]:
    """The options that a command reads, by section."""
    shown: dict[str, list[str]] = {}
    for entry in command.reads:
        section, _, field = entry.partition(".")
        shown.setdefault(section, []).extend([field] if field else types_of(types_of(Config)[section]))
    return shown


def _foreign_words(flags: list[str], shown: Mapping[str, list[str]]) -> list[str]:
    """A message for each flag or value of other trainers, with ours instead, and then one for each other unknown flag.

    Where nothing is of other trainers, unknown flags are left to tyro.
    """
    known = [f"{section}.{field}" for section, fields in shown.items() for field in fields]
    answers, unknown = [], []
    for number, arg in enumerate(flags):
        if not arg.startswith("--"):
            continue
        flag, equals, value = arg.partition("=")
        if (option := flag[2:].replace("-", "_")) not in known:
            what, answer = f"{flag}: unknown option", words.instead(flag, known)
        else:
            after = itertools.takewhile(lambda other: not other.startswith("--"), flags[number + 1 :])
            value = value if equals else " ".join(after)
            what, answer = f"{flag} {value}: unknown value", words.instead_of_value(option, value, known)
        if answer:
            answers.append(f"{what}; instead: {words.as_flags(answer, options.every_option())}")
        elif option.replace(".no_", ".") not in known and flag != "--help":
            unknown.append(words.as_flags(f"{what}{suggest(option, known)}", known))
    return [*answers, *unknown] if answers else []
