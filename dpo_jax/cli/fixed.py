"""Values that a run pins in its run directory: the date of chat templates, and revisions of Hub models and data sets.

The first command that opens the run directory writes `fixed.json`, and all later ones use its values. A run that continues
tomorrow then has the prompts and models of today:

    {"date": "2026-11-27", "revisions": {"org/name": "0f1e2d3c...", "datasets/org/pairs": "4b5a6978..."}}
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from dpo_jax.cli.config import Config, ConfigError, DataConfig, MixConfig
from dpo_jax.shapes import check_shape
from dpo_jax.untrusted import Unreadable, read_object, reading
from dpo_jax.writing import write_whole

NAME = "fixed.json"
T = TypeVar("T", DataConfig, MixConfig)
MODELS = (
    *("model.path", "tokenizer.path", "dpo.policy", "dpo.reference"),
    *("eval.policy", "eval.reference", "sample.policy"),
)
"""Options that may hold a Hub id."""


def fix(config: Config) -> Config:
    """`config` with the date and the revisions pinned in its run directory; in a new one, with today's date."""
    record = _read(Path(config.run.dir) / NAME) or {"date": datetime.date.today().isoformat(), "revisions": {}}
    if config.data.date is None:
        several = config.run.distributed == "auto"
        config = _with(config, "data.date", _of_first_host(record["date"]) if several else record["date"])
    for option, path in _hub_ids(config):
        if path in record["revisions"]:
            config = _with(config, option, f"{path}@{record['revisions'][path]}")
    return _with_commits(config, record["revisions"])


def keep(config: Config) -> None:
    """Writes the pins made by `fix` to the run directory, if it has none yet."""
    if config.data.date is not None and not (Path(config.run.dir) / NAME).exists():
        _write(config, {"date": config.data.date, "revisions": {}})


def pin_revisions(config: Config) -> Config:
    """`config` with the loaded revision of every Hub model and data set, also written to the run directory."""
    from dpo_jax.cli.data_sources import read_commit
    from dpo_jax.models.hub import cached_revision

    found = {path: cached_revision(path) for _, path in _hub_ids(config)}
    found |= {_data_key(part): read_commit(part.path, part.revision) for part in config.data.parts() if _data_key(part)}
    revisions = {path: revision for path, revision in found.items() if revision is not None}
    record = _read(Path(config.run.dir) / NAME)
    if record is not None and not revisions.keys() <= record["revisions"].keys():
        _write(config, {**record, "revisions": {**revisions, **record["revisions"]}})
    return fix(config)


def date_of(config: Config) -> datetime.datetime:
    """The date that chat templates see; today's if the configuration pins none."""
    return datetime.datetime.fromisoformat(config.data.date) if config.data.date else datetime.datetime.now()


def check(config: Config) -> None:
    """Raises `ConfigError` for a damaged `fixed.json`."""
    _read(Path(config.run.dir) / NAME)


def _of_first_host(text: str) -> str:
    """The first host's text: hosts without a shared disk may have started on two sides of midnight, or of a commit."""
    from dpo_jax.runtime.hosts import run_on_first

    return run_on_first(lambda: text)


def _read(file: Path) -> dict[str, Any] | None:
    """The content of `fixed.json`; None if there is none."""
    try:
        record = check_shape(read_object(file), {"date": str, "revisions": {str: str}}, str(file))
        with reading(file):
            datetime.datetime.fromisoformat(record["date"])
        return {name: record[name] for name in ("date", "revisions")}
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Unreadable as error:
        why = str(error).removeprefix(f"{file}: ")
        raise ConfigError(
            f"{file}: damaged ({why}); it holds the date that chat templates write. Delete it, "
            "and pass the date of the run (in the config.yaml of its folders) with --data.date"
        ) from error


def _write(config: Config, record: Mapping[str, Any]) -> None:
    write_whole(Path(config.run.dir) / NAME, (json.dumps(record, indent=1) + "\n").encode())


def _hub_ids(config: Config) -> Iterator[tuple[str, str]]:
    """(option, id) of every Hub model named without a revision."""
    from dpo_jax.models.folder import is_hub_id

    for option in MODELS:
        section, field = option.split(".")
        path = getattr(getattr(config, section), field)
        if path is not None and is_hub_id(path) and "@" not in path and not Path(path).expanduser().exists():
            yield option, path


def _data_key(part: DataConfig | MixConfig) -> str | None:
    """The key in `fixed.json` of a Hub data set that is read without a fixed commit; None for any other source."""
    from dpo_jax.data.hub_files import is_dataset_id

    if not part.path or not is_dataset_id(part.path) or re.fullmatch("[0-9a-f]{40}", part.revision or ""):
        return None
    return f"datasets/{part.path}{f'@{part.revision}' if part.revision else ''}"


def _with_commits(config: Config, revisions: Mapping[str, str]) -> Config:
    """`config` with the pinned commit of each Hub data set."""

    def at_commit(part: T) -> T:
        commit = revisions.get(_data_key(part) or "")
        return part if commit is None else dataclasses.replace(part, revision=commit)

    data = config.data
    if data.mix:
        return dataclasses.replace(config, data=dataclasses.replace(data, mix=tuple(map(at_commit, data.mix))))
    return dataclasses.replace(config, data=at_commit(data)) if data.path is not None else config


def _with(config: Config, option: str, value: str) -> Config:
    name, field = option.split(".")
    return dataclasses.replace(config, **{name: dataclasses.replace(getattr(config, name), **{field: value})})
