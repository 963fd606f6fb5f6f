"""Discovery of TFDS data set folders, and checks of their JSON files before tensorflow_datasets reads them.

The library imports any module that `features.json` names, and retries for seconds on a file that is not UTF-8.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpo_jax.data.pairs import Cause, DataError, refuse
from dpo_jax.untrusted import Unreadable, check_name, read_object, reading

_INFO, _FEATURES, _METADATA = "dataset_info.json", "features.json", "metadata.json"
_CLASSES = "tensorflow_datasets.core.features."


def tfds_folders(source: Path) -> list[Path]:
    """The tfds data sets at or up to two levels below `source`: folders with a `dataset_info.json` and a `features.json`."""
    found = (path.parent for pattern in ("", "*/", "*/*/") for path in source.glob(pattern + _INFO))
    return sorted(folder for folder in found if (folder / _FEATURES).is_file())


def find_tfds(source: Path) -> Path:
    """The one tfds data set at or below `source`. Raises `DataError` if there is none or several; `Unreadable` for a name that
    is not UTF-8."""
    check_name(source)
    folders = tfds_folders(source)
    if len(folders) != 1:
        found = ", ".join(map(str, folders[:12])) or "none"
        files = f"{_INFO} and {_FEATURES}"
        refuse(Cause.BAD_LAYOUT, source, f"exactly one tfds data set ({files}) is needed here, found: {found}")
    return folders[0]


def split_rows(folder: Path) -> dict[str, int]:
    """How many rows each split of a data set declares. Raises `DataError` for a damaged `dataset_info.json`."""
    file = folder / _INFO
    info = _object(file)
    rows: dict[str, int] = {}
    with reading(file, error=_damaged):
        for entry in info.get("splits", ()):
            lengths = [int(length) for length in entry.get("shardLengths", ())]
            if not isinstance(entry["name"], str) or any(not 0 <= length < 2**63 for length in lengths):
                raise ValueError(f"the split {str(entry['name'])[:60]!r} has no valid name or shardLengths")
            rows[entry["name"]] = sum(lengths)
    return rows


def check_folder(folder: Path, split: str) -> dict[str, Any]:
    """Checks the JSON files of a data set and returns its metadata, {} if it has none.

    Raises `DataError` for a damaged file, a missing split, and features that need other code.
    """
    rows = split_rows(folder)
    if split not in rows:
        there = ", ".join(rows) or "none"
        refuse(Cause.BAD_LAYOUT, folder, f"no split {split!r}; it has {there}")
    if not rows[split]:
        refuse(Cause.NO_ROWS, folder, f"the split {split!r} has no rows")
    for name in _classes(_object(folder / _FEATURES)):
        if not str(name).startswith(_CLASSES):
            refuse(Cause.BAD_LAYOUT, folder / _FEATURES, f"{str(name)[:100]!r} is not a feature of TFDS itself, and is not run")
    return _object(folder / _METADATA) if (folder / _METADATA).exists() else {}


def _classes(node: Any) -> Iterator[Any]:
    """The names of all feature classes, also in older forms of the file."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key in ("pythonClassName", "python_class_name") or (key == "type" and isinstance(value, str)):
                yield value
            yield from _classes(value)
    elif isinstance(node, list):
        for item in node:
            yield from _classes(item)


def _object(file: Path) -> dict[str, Any]:
    try:
        return read_object(file)
    except Unreadable as error:
        raise _damaged(str(error)) from error


def _damaged(words: str) -> DataError:
    return DataError(f"{words}; the file is damaged: write the data set again", causes=[Cause.BAD_LAYOUT])
