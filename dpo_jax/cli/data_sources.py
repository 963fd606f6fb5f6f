"""Loads the preferences that section `data` names: local files, Hub data sets, weighted mixtures, hash splits."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from dpo_jax.cli.config import Config, ConfigError, MixConfig
from dpo_jax.data.hash_split import take_side
from dpo_jax.data.hub_files import HubData, HubError, is_dataset_id, open_dataset
from dpo_jax.data.mixture import mix, source_names
from dpo_jax.data.pairs import DataError, PreferenceSet
from dpo_jax.data.row_kinds import Wanted, check_ranking_lengths, split_pairs
from dpo_jax.data.sources import load_preferences
from dpo_jax.data.splits import has_split
from dpo_jax.data.tfds_folder import find_tfds, split_rows, tfds_folders
from dpo_jax.runtime.progress import reported

Side = Literal["train", "test"]
_COMMITS: dict[tuple[str, str | None], str] = {}  # (Hub id, revision) -> the commit that this process has read


def read_commit(path: str, revision: str | None) -> str | None:
    """The commit at which this process has read a Hub data set; None for any other source."""
    return _COMMITS.get((path, revision))


def load_files(config: Config, side: Side, tokenizer: Any = None, *, rows: Wanted = "pairs") -> PreferenceSet:
    """The preferences of one side, from all sources, read as `rows`.

    Raises `DataError` for bad data, including a source whose rows are not of the kind `rows`; `ConfigError` for missing data.
    """
    data = config.data
    options = {"on_bad": data.on_bad, "tokenizer": tokenizer, "rows": rows, "ranking_length": data.ranking_length}
    if data.source == "tfds":
        assert data.path is not None  # checked with the configuration
        split = data.train_split if side == "train" else data.test_split
        with reported(f"reading the {split} split"):
            return load_preferences(data.path, split, format="tfds", **options)
    cut = sources_to_cut(config)
    names = names_of(config)
    sets = {}
    for part, name in zip(data.parts(), names, strict=True):
        try:
            sets[name] = _load(config, part, side, cut=name in cut, **options)
        except DataError as error:
            if not data.mix:
                raise
            raise DataError(f"data.mix, {part.path}: {error}", causes=error.causes) from error
    if not data.mix:
        return sets[names[0]]
    labeled = {name for name, loaded in sets.items() if any(one.desirable is not None for one in loaded)}
    if labeled and rows != "prompts":  # with "any" the others may be pairs, which can also be read as single completions
        sets = {name: loaded if name in labeled else split_pairs(loaded) for name, loaded in sets.items()}
    if rows == "rankings":
        check_ranking_lengths(itertools.chain(*sets.values()), where="data.mix")
    return mix(sets, {name: part.weight if side == "train" else 1.0 for name, part in zip(names, data.parts(), strict=True)})


def check_hub_splits(config: Config) -> None:
    """Raises `ConfigError` if a Hub data set lacks the train or the held-out split. Downloads nothing."""
    if config.data.source != "files":
        return
    cut = sources_to_cut(config)
    for part, name in zip(config.data.parts(), names_of(config), strict=True):
        if not is_dataset_id(part.path):
            continue
        found = _opened(config, part)
        for split in (part.train_split,) if name in cut else (part.train_split, part.test_split):
            assert split is not None  # `DataConfig.parts` fills it in
            with _naming_option(config):
                found.check_split(split)


def names_of(config: Config) -> list[str]:
    """The name of each source, the prefix of its uids in a mixture."""
    parts = config.data.parts()
    return source_names(f"{part.path.rstrip('/')}/{part.config}" if part.config else part.path.rstrip("/") for part in parts)


def sources_to_cut(config: Config) -> set[str]:
    """Names of the sources without a held-out split, from whose train split `data.test_share` takes held-out pairs.

    A single file has none, whatever its name says. Raises `ConfigError` if all sources have one.
    """
    data = config.data
    if data.test_share is None:
        return set()
    named = zip(names_of(config), data.parts(), strict=True)
    cut = {name for name, part in named if _one_file_for_both(part) or not _has_split(config, part, part.test_split)}
    if not cut:
        raise ConfigError(
            f"data.test_share: {data.name()} has a split {data.test_split!r}, so nothing is held out of the train "
            "split; leave it out, or name a split that does not exist yet, such as --data.test-split held_out"
        )
    return cut


def check_held_out(config: Config, part: MixConfig) -> None:
    """Raises `ConfigError` for a source that is not cut and would train and test on the same rows, those of a single file."""
    if _one_file_for_both(part):
        raise ConfigError(
            f"{_option(config)}: {part.path} is one file, and its name says {part.test_split!r}, so training and held-out "
            "pairs would be the same; hold out a part of it with --data.test-share 0.05, or give a folder with a file per split"
        )


def _one_file_for_both(part: MixConfig) -> bool:
    path = Path(part.path)
    return path.is_file() and all(split is not None and has_split(path, split) for split in (part.train_split, part.test_split))


def folder_of(part: MixConfig) -> Path:
    """The local file or folder of a source. Raises `ConfigError` naming the option."""
    path = Path(part.path)
    if part.revision is not None and path.exists():
        raise ConfigError(
            f"data.revision: {path} is on this machine, but only data sets of the Hub have revisions; leave it out"
        )
    if part.config is None or not path.exists():
        return path
    folder = next((path / below for below in (part.config, f"data/{part.config}") if (path / below).is_dir()), None)
    if folder is None:
        raise ConfigError(f"data.config: {path} has no folder {part.config}; leave it out to read the whole of {path}")
    return folder


def _load(config: Config, part: MixConfig, side: Side, *, cut: bool, **options: Any) -> PreferenceSet:
    data = config.data
    split = part.train_split if side == "train" or cut else part.test_split
    assert part.format is not None  # `DataConfig.parts` fills in what a source omits
    assert split is not None
    if side == "train" and not cut:
        check_held_out(config, part)
    folder, commit, note = folder_of(part), None, None
    if is_dataset_id(part.path):
        folder, commit, note = _fetch(config, part, split)
    with reported(f"reading the {split} split" + (f" of {part.path}" if data.mix else "")):
        loaded = load_preferences(folder, split, format=part.format, columns=part.columns, **options)
    if commit is not None:
        loaded.report.source = f"{part.path}{f'/{part.config}' if part.config else ''}@{commit}"
    loaded.report.notes += [note] if note else []
    wanted = data.train_split if side == "train" else data.test_split
    if not cut:
        loaded.report.split = wanted  # in a mixture, each source may name its splits differently
        return loaded
    assert data.test_share is not None
    return take_side(loaded, side, share=data.test_share, split=wanted)


def _has_split(config: Config, part: MixConfig, split: str | None) -> bool:
    assert split is not None  # `DataConfig.parts` fills it in
    if is_dataset_id(part.path):
        return _opened(config, part).has_split(split)
    folder = folder_of(part)
    if part.format == "tfds" or (part.format == "auto" and tfds_folders(folder)):
        return split in split_rows(find_tfds(folder))
    return has_split(folder, split)


def _fetch(config: Config, part: MixConfig, split: str) -> tuple[Path, str, str | None]:
    """(folder, commit, note) of a Hub data set, once the files of `split` are in the cache."""
    found = _opened(config, part)
    with _naming_option(config):
        size = found.bytes_of(split)
        with reported(f"downloading {part.path}", total=round(size / 1e6), unit="MB") as task:
            arrived = [0]

            def progress(count: int) -> None:
                before, arrived[0] = arrived[0], arrived[0] + count
                if megabytes := arrived[0] // 1_000_000 - before // 1_000_000:
                    task.advance(megabytes)

            folder, commit = found.fetch(split, progress=progress)
    _COMMITS[part.path, part.revision] = commit
    return folder, commit, found.note


def _opened(config: Config, part: MixConfig) -> HubData:
    """The content of a Hub data set; both splits and all hosts see the same commit."""
    with _naming_option(config), reported(f"asking the Hub for {part.path}"):
        found = _listing(part.path, part.revision, part.config)
        if config.run.distributed == "off":
            return found
        from dpo_jax.runtime.hosts import run_on_first  # JAX, which --check does without

        commit = run_on_first(lambda: found.revision)
        return found if commit == found.revision else _listing(part.path, commit, part.config)


@contextlib.contextmanager
def _naming_option(config: Config) -> Iterator[None]:
    """A context that turns a `HubError` into a `ConfigError` naming the option."""
    try:
        yield
    except HubError as error:
        raise ConfigError(f"{_option(config)}: {error}") from error


_listing = functools.cache(lambda path, revision, config: open_dataset(path, revision=revision, config=config))


def _option(config: Config) -> str:
    return "data.mix" if config.data.mix else "data.path"
