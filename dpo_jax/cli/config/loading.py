"""Reading, checking and writing a configuration, and the help texts of its options."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import math
import os
import re
import sys
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpo_jax import loss_table, optimizer_table
from dpo_jax.cli import words
from dpo_jax.cli.config import file
from dpo_jax.cli.config.file import ConfigError, types_of
from dpo_jax.cli.config.ranges import Problem
from dpo_jax.cli.config.sections import Config
from dpo_jax.data import format_table

_HOME = re.compile(r"~[\w.-]*(/|\Z)")


def load_config(path: str | Path) -> Config:
    """The config read from a YAML file. Raises `ConfigError` with file, line, field and remedy."""
    return load_config_with_lines(path)[0]


def load_config_with_lines(path: str | Path) -> tuple[Config, dict[str, int]]:
    """The config in a YAML file and the line of each dotted field that it sets. Raises `ConfigError`; ranges are checked."""
    config, lines = file.read(path, Config, instead=_instead)
    check(config, lines=lines, path=path)
    return config, lines


def _instead(key: str, value: str | None) -> str | None:
    known = every_option()
    return words.instead(key, known) if value is None else words.instead_of_value(key, value, known)


def check(
    config: Config, *, lines: Mapping[str, int] | None = None, path: str | Path = "", needs: tuple[str, ...] = ()
) -> None:
    """Raises `ConfigError` that lists every problem, and every missing value in the sections that a command `needs`.

    `lines` (from `load_config_with_lines`) and `path` let messages point into the file.
    """
    found = problems(config)
    for name in needs:
        found += [(f"{name}.{field}", message) for field, message in getattr(config, name).missing()]
    if found:
        places = {field: f"{path}:{line}: " for field, line in (lines or {}).items()}
        raise ConfigError("\n".join(f"{places.get(field, '')}{field}: {message}" for field, message in found))


_NO_TEXT = re.compile(r"[\0\ud800-\udfff]")
_BYTES = re.compile(r"[\udc80-\udcff]")  # bytes of a file name that is not UTF-8, as Python represents them (PEP 383)
_FILES = frozenset(
    (
        *("run.dir", "run.checkpoints", "data.path", "tokenizer.path", "model.path", "refs.cache", "dpo.policy"),
        *("dpo.reference", "eval.policy", "eval.reference", "eval.rewards_out", "sample.policy", "sample.prompts_file"),
        *("sample.reward_model", "sample.out", "export.checkpoint", "export.out", "prepare.out", "bench.torch_python"),
        *("plan.json", "frontier.classifier", "ppo.reward_model", "online.reward_model", "judge.a", "judge.b", "judge.out"),
        *("study.a", "study.b", "agree.key", "agree.ratings", "agree.judge", "agree.beside", "report.runs", "report.out"),
    )
)
"""Options that name files: their names are bytes, and need not be UTF-8. All other texts are characters."""

_WRITTEN = frozenset(
    (
        *("run.dir", "refs.cache", "eval.rewards_out", "sample.out", "export.out", "prepare.out", "plan.json", "judge.out"),
        "report.out",
    )
)
"""Options that name files and folders that are written. What is read must exist, and a URL does not."""


def _not_text(option: str, value: str) -> str | None:
    """What is wrong with the characters of a text; None if nothing is."""
    bad = _NO_TEXT.search(_BYTES.sub("", value) if option in _FILES else value)
    if bad is None:
        return None
    kind = "a NUL" if bad[0] == "\0" else "a byte that is not UTF-8" if _BYTES.match(bad[0]) else "half a surrogate pair"
    return f"the text holds {kind}, which no {'path' if option in _FILES else 'name'} can; write it in valid UTF-8"


def problems(config: Config) -> list[Problem]:
    """Every value that is out of range, as (dotted field, what is wrong)."""
    found = []
    for section, name in ((getattr(config, field.name), field.name) for field in dataclasses.fields(config)):
        for field, value in vars(section).items():
            if isinstance(value, str) and (message := _not_text(f"{name}.{field}", value)):
                found.append((f"{name}.{field}", message))
            if isinstance(value, str) and "://" in value and f"{name}.{field}" in _WRITTEN:
                message = "must be on a disk, which all hosts share; only run.checkpoints can be in a bucket"
                found.append((f"{name}.{field}", f"{message}, got {value}"))
            if isinstance(value, str) and _HOME.match(value) and os.path.expanduser(value) == value:
                found.append((f"{name}.{field}", f"{value}: unknown home folder; write the whole path"))
        numbers = [field for field in types_of(type(section)) if isinstance(getattr(section, field), float)]
        for number, entry in enumerate(config.data.mix if name == "data" else (), 1):
            texts = [value for value in vars(entry).values() if isinstance(value, str)]
            found += [("data.mix", f"entry {number}: {words}") for text in texts if (words := _not_text("data.path", text))]
        bad = [(field, "must be a finite number") for field in numbers if not math.isfinite(getattr(section, field))]
        found += [(f"{name}.{field}", message) for field, message in bad or section.check()]
    for name in ("sft", "dpo"):
        if config.lora.rank is not None and getattr(config, name).trainable is not None:
            found.append((f"{name}.trainable", "with lora.rank only the adapter is trained; leave one of them out"))
        if getattr(config, name).param_dtype != "float32" and (config.lora.rank or getattr(config, name).trainable):
            what = "applies only if all weights are trained: leave it out (lora.base_dtype is the type of a frozen base)"
            found.append((f"{name}.param_dtype", what))
        if getattr(config, name).keeps_best() and not config.run.eval_every_examples:
            option = "patience" if getattr(config, name).patience else "keep_best"
            found.append((f"{name}.{option}", "the only evaluation is at the end: set run.eval_every_examples"))
    positions, longest = config.model.max_positions, config.data.max_length
    if positions and longest > positions:
        found.append(("data.max_length", f"{longest} tokens do not fit model.max_positions ({positions}); lower it"))
    return found


def at_home(config: Config) -> Config:
    """`config` with each `~` or `~user` at the start of a path replaced by the home folder, as a shell does."""

    def expanded(section: Any) -> Any:
        texts = {field: value for field, value in vars(section).items() if isinstance(value, str) and _HOME.match(value)}
        lists = {field: tuple(map(expanded, value)) for field, value in vars(section).items() if isinstance(value, tuple)}
        return dataclasses.replace(section, **{field: os.path.expanduser(value) for field, value in texts.items()}, **lists)

    return dataclasses.replace(config, **{name: expanded(section) for name, section in vars(config).items()})


def with_policy(config: Config) -> Config:
    """`config` with `dpo.policy: model` replaced by `model.path`, if that is set."""
    if config.dpo.policy != "model" or config.model.path is None:
        return config
    return dataclasses.replace(config, dpo=dataclasses.replace(config.dpo, policy=config.model.path))


def dump_config(config: Config) -> str:
    """YAML text of every option; `load_config` of it gives an equal config."""
    return file.text(config)


@functools.cache
def every_option() -> tuple[str, ...]:
    """The dotted names of all options, such as "dpo.beta"."""
    return tuple(f"{section}.{field}" for section, cls in types_of(Config).items() for field in types_of(cls))


def help_text(section: type, option: str) -> str:
    """The help text of an option: the docstring below it in its section's class, or in the class the section inherits it
    from."""
    texts = _texts()
    return next(texts[cls.__name__, option] for cls in section.__mro__ if (cls.__name__, option) in texts)


@functools.cache
def _texts() -> dict[tuple[str, str], str]:
    """The help texts of all options, keyed by (name of the section's class, name of the option)."""
    texts = {}
    modules = {cls.__module__ for section in types_of(Config).values() for cls in section.__mro__ if cls is not object}
    sources = (inspect.getsource(sys.modules[module]) for module in modules)
    for node in (node for source in sources for node in ast.parse(source).body):
        body = node.body if isinstance(node, ast.ClassDef) else []
        for field, text in itertools.pairwise(body):
            match field, text:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(words))):
                    texts[typing.cast(ast.ClassDef, node).name, name] = " ".join(words.split())
    texts["DataConfig", "format"] = format_table.HELP
    texts |= {("OptimizerConfig", name): words for name, words in optimizer_table.HELP.items()}
    return texts | {("LossConfig", name): words for name, words in loss_table.HELP.items()}
