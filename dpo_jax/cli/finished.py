"""Detect a finished training run from its files, without JAX, encoding data or restoring a checkpoint.

`finished.json` in the task's directory records the inputs of a run (settings, code and packages, data, starting model) and its
outputs (checkpoints, export, metrics, plots). If all of these are unchanged, the same command has nothing to do. If anything
differs, the training command runs as usual: it refuses, continues, or writes lost files again.

Files are compared by SHA-256, and above `HASHED_BYTES` by size and modification time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dpo_jax import loss_table
from dpo_jax.cli.config import Config
from dpo_jax.cli.config.file import list_of, types_of
from dpo_jax.models.folder import adapter_base
from dpo_jax.runtime.metrics import read_metrics
from dpo_jax.runtime.rundir import RunDir, RunLocked, packages, write_json
from dpo_jax.untrusted import Unreadable, read_object, regular

RECORD = "finished.json"
VERSION = 1
HASHED_BYTES = 256 * 2**20
MOST_FILES = 10_000
LOCK = "run.lock"
CARD = "README.md"  # of a model: `dpo-jax eval` writes it anew
NOT_COMPARED = {CARD, LOCK, RECORD}  # among the outputs: locks and the record are not results of training
ELSEWHERE = {"run.coordinator", "run.num_processes", "run.process_id"}  # which process this was


class FinishedRun:
    """The record of one task's finished run; runs whose prompts show images have none. Make it before the run reads any input,
    so that later changes are noticed.

    `sections` are the configuration sections that the task reads, or single options "section.option".
    """

    def __init__(self, task: str, config: Config, sections: Sequence[str]):
        self._task, self._config, self._sections = task, config, sections
        self._folder = Path(config.run.dir) / task
        self._inputs = _inputs(task, config, sections)
        # Several hosts would have to agree, and files in a bucket or on the Hub cannot be checked quickly.
        local = config.run.distributed == "off" and "://" not in config.checkpoints_of(task)
        self._usable = local and config.run.resume and self._inputs is not None
        try:
            self._before = _stamps(self._inputs or ())
        except OSError:  # a broken link, or too many files: training reports what is wrong, if anything
            self._usable = False

    def steps(self) -> int | None:
        """The run's number of steps, if it is finished and nothing has changed. Raises `RunLocked` while it is training."""
        if not (self._usable and (self._folder / RECORD).is_file()):
            return None
        with RunDir(self._folder) as run:
            try:
                return _steps(run) if read_object(self._folder / RECORD) == self._present(run) else None
            except (OSError, Unreadable):
                return None

    def record(self) -> None:
        """Writes the record of a run that has just ended successfully, unless a file was changed while it was running.

        A record that cannot be written is left out: the run is finished without it.
        """
        if not self._usable:
            return
        with contextlib.suppress(OSError, RunLocked, Unreadable), RunDir(self._folder) as run:
            if _stamps(self._inputs or ()) == self._before and not _shows_images(run):
                write_json(self._folder / RECORD, self._present(run))

    def _present(self, run: RunDir) -> dict[str, Any]:
        """The current state of everything recorded, as JSON values. Raises `OSError` for a missing file."""
        kept = [run.config, run.env, run.data_report, run.metrics, run.plots, run.export]
        own_tokenizer = Path(self._config.run.dir) / "tokenizer"
        outputs = [*kept, Path(self._config.checkpoints_of(self._task)), *([own_tokenizer] if own_tokenizer.exists() else [])]
        return {
            "version": VERSION,
            "settings": _settings(self._config, self._sections),
            "made_by": packages() | {"code": _code()},
            "inputs": _identities(self._inputs or ()),
            "outputs": _identities(outputs, without=NOT_COMPARED),
            "cards": [path.is_file() for path in (run.card, run.export / run.card.name)],
        }


def _shows_images(run: RunDir) -> bool:
    """Whether the prompts of a run show images: those files may be anywhere, and may change."""
    try:
        return any(report.get("images") for report in read_object(run.data_report).values())
    except (OSError, Unreadable, AttributeError):  # damaged: then nothing is known about images
        return False


def recorded(task: str, config: Config, sections: Sequence[str]) -> bool:
    """Whether the run directory holds the record of a finished run with these settings. No other file is read."""
    try:
        record = read_object(Path(config.run.dir) / task / RECORD)
    except (OSError, Unreadable):
        return False
    return record.get("version") == VERSION and record.get("settings") == _settings(config, sections)


def _settings(config: Config, sections: Sequence[str]) -> dict[str, Any]:
    options = {f"{section}.{name}": value for section, name, value in _options(config, sections)}
    return json.loads(json.dumps({option: value for option, value in options.items() if option not in ELSEWHERE}))


def _options(config: Config, sections: Sequence[str]) -> Iterator[tuple[str, str, Any]]:
    """(section, option, value) of all options of `sections`, which are section names or single options "section.option"."""
    for section, _, single in (name.partition(".") for name in sections if name != "limits"):  # which do not affect any result
        values = dataclasses.asdict(getattr(config, section))
        yield from ((section, name, value) for name, value in values.items() if single in ("", name))


def _inputs(task: str, config: Config, sections: Sequence[str]) -> list[Path] | None:
    """The files and folders that the settings name. None if one of them is not local: it may be on the Hub."""
    named = [config.dpo_policy()] if task == "dpo" else []
    for section, name, value in _options(config, sections):
        if section in ("run", "refs"):  # where results go
            continue
        if (section, name) == ("dpo", "loss"):
            named += map(str, loss_table.own_files(value))
            continue
        kind = types_of(type(getattr(config, section)))[name]
        if list_of(kind) is not None:
            named += [entry["path"] for entry in value]
        if value is not None and kind in (str, str | None) and ("/" in value or Path(value).expanduser().exists()):
            named.append(value)
    with contextlib.suppress(Unreadable):
        named += [base for value in [*named] if (base := adapter_base(Path(value).expanduser())) is not None]
    paths = [Path(value).expanduser() for value in dict.fromkeys(named)]
    return paths if all(path.exists() for path in paths) else None


def _steps(run: RunDir) -> int | None:
    rows = read_metrics(run.metrics)
    return rows[-1]["step"] if rows else None


def _files(paths: Iterable[Path]) -> Iterator[Path]:
    """The files and, of folders, all files within but locks and cards of models, also those of linked folders."""
    for path in paths:
        yield from [path] if not path.is_dir() else _within(path, seen={os.path.realpath(path)})


def _within(folder: Path, *, seen: set[str]) -> Iterator[Path]:
    is_model = any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))
    left_out = {LOCK, CARD} if is_model else {LOCK}
    for entry in sorted(folder.iterdir()):
        if entry.name in left_out:
            continue
        if not entry.is_dir():
            yield entry
        elif (real := os.path.realpath(entry)) not in seen:  # a link may lead back
            seen.add(real)
            yield from _within(entry, seen=seen)


def _stamps(paths: Iterable[Path]) -> dict[str, tuple[int, int]]:
    stats = {str(file): file.stat() for file in itertools.islice(_files(paths), MOST_FILES + 1)}
    if len(stats) > MOST_FILES:
        raise OSError(f"more than {MOST_FILES} files")
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}


def _identities(paths: Iterable[Path], *, without: Collection[str] = ()) -> dict[str, str]:
    files = [file for file in _files(paths) if file.name not in without]
    with ThreadPoolExecutor(8) as pool:  # hashlib releases the interpreter lock
        return dict(zip(map(str, files), pool.map(_identity, files), strict=True))


def _identity(file: Path) -> str:
    stat = regular(file).stat()
    if stat.st_size > HASHED_BYTES:
        return f"{stat.st_size} bytes of {stat.st_mtime_ns}"
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _code() -> str:
    """SHA-256 of this package's modules: another version may read the same data differently."""
    root = Path(__file__).parent.parent
    lines: Mapping[str, str] = {str(file.relative_to(root)): _identity(file) for file in sorted(root.rglob("*.py"))}
    return hashlib.sha256(json.dumps(lines, sort_keys=True).encode()).hexdigest()
