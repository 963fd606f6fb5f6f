"""Validated preferences as a TensorFlow Datasets data set, written and read without TensorFlow; labelled texts, read.

Always array_record: tfds also offers parquet without TensorFlow, but loses rows there without a word.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import tensorflow_datasets as tfds

from dpo_jax.data.columns import check_text
from dpo_jax.data.files import fingerprint, tfds_folders
from dpo_jax.data.pairs import BadRow, Cause, DataError, DataReport, OnBad, Preference, PreferenceSet, Triage, check_pair
from dpo_jax.data.snippets import Snippet
from dpo_jax.writing import naming

_TEXTS = ("prompt", "chosen", "rejected", "uid", "sft_target")
_FIELDS = {*_TEXTS, "chat"}
_SUBSET = "subset"  # written only where some row has one: most sets have none, and older folders lack the feature


class PreferenceBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A tfds builder over preferences in memory. `write_tfds` is the short way to use it.

    The rows keep their order, so that the training stream is the same from files and from tfds, and carry a SHA-256 per split.
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, preferences: Mapping[str, Sequence[Preference]], name: str, data_dir: str | Path) -> None:
        self.name = name  # pyright: ignore[reportAttributeAccessIssue] (tfds would take the name of the class)
        self._preferences = preferences
        self._with_subsets = any(row.subset is not None for rows in preferences.values() for row in rows)
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        fields = (*_TEXTS, _SUBSET) if self._with_subsets else _TEXTS
        texts = {field: tfds.features.Text() for field in fields}
        return self.dataset_info_from_configs(
            description="Preference pairs: a prompt, a chosen and a rejected completion, and what SFT learns for the prompt.",
            features=tfds.features.FeaturesDict({**texts, "chat": tfds.features.Scalar(np.bool_)}),
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict({split: _digest(rows) for split, rows in self._preferences.items()}),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        return {split: self._generate_examples(rows) for split, rows in self._preferences.items()}

    def _generate_examples(self, rows: Iterable[Preference]) -> Iterator[tuple[int, dict[str, Any]]]:
        # The key is the row number: equal rows are kept, and tfds can report an equal key only with TensorFlow installed.
        for index, row in enumerate(rows):
            yield index, _record(row) | ({_SUBSET: row.subset or ""} if self._with_subsets else {})


def write_tfds(
    preferences_by_split: Mapping[str, Sequence[Preference]], data_dir: str | Path, *, name: str = "preferences"
) -> Path:
    """Writes `{split: preferences}` under `data_dir/name/1.0.0` and returns that folder, after reading every record back.

    Raises `DataError` if a preference would be refused on reading, and `FileExistsError` rather than mixing in or reusing data.
    """
    for split, preferences in preferences_by_split.items():
        triage = Triage(DataReport(source=name, split=split, read=len(preferences)), on_bad="refuse")
        kept = sum(_accept(triage, row.uid, row) for row in preferences)
        triage.finish(kept)
        if not preferences:
            _refuse(Cause.NO_ROWS, split, "the split has no preferences")
    builder = PreferenceBuilder(preferences=preferences_by_split, name=name, data_dir=data_dir)
    folder = Path(builder.data_path)
    if folder.exists():
        raise FileExistsError(f"{folder} exists; tfds would silently keep what it holds")
    tfds.disable_progress_bar()
    with naming(folder):
        builder.download_and_prepare()
    for split in preferences_by_split:
        read_tfds(folder, split)
    return folder


def read_tfds(data_dir: str | Path, split: str, *, on_bad: OnBad = "refuse") -> PreferenceSet:
    """The preferences of a split that `write_tfds` wrote. `data_dir`: the folder it returned, or one above it.

    Raises `DataError` if records are missing or differ from what was written, and as `load_preferences` for bad rows.
    """
    folder = _find(Path(data_dir))
    builder = tfds.builder_from_directory(folder)
    if split not in builder.info.splits:
        _refuse(Cause.BAD_LAYOUT, folder, f"no split {split!r}; it has {', '.join(builder.info.splits)}")
    features = list(builder.info.features)  # pyright: ignore[reportArgumentType] (always a FeaturesDict)
    if missing := _FIELDS - set(features):
        _refuse(Cause.MISSING_COLUMN, folder, f"not written by `write_tfds`: no feature {', '.join(sorted(missing))}")
    report = DataReport(source=str(data_dir), split=split, format="tfds")
    preferences: list[Preference] = []
    triage = Triage(report, on_bad=on_bad)
    for where, record in _records(builder, split, folder):
        report.rows += 1
        report.read += 1
        try:
            row = _decode(record)
        except BadRow as problem:
            triage.reject(where, problem)
            continue
        if _accept(triage, where, row):
            preferences.append(row)
    triage.finish(len(preferences))
    if not report.dropped and _digest(preferences) != (builder.info.metadata or {}).get(split):
        _refuse(Cause.BAD_ARRAY_RECORD, folder, f"the records of split {split!r} are not those that were written")
    report.files = [fingerprint(Path(file).name, Path(file)) for file in builder.info.splits[split].filepaths]
    return PreferenceSet(preferences, report)


def read_texts(data_dir: str | Path, split: str) -> list[Snippet]:
    """Texts with a label, such as those of TFDS's imdb_reviews: any data set with the features "text" and "label" (0 or 1).

    `data_dir`: the folder of the data set, or one above it; it must be in array_record. Raises `DataError` as `read_tfds` does.
    """
    records = _foreign(data_dir, split, {"text", "label"})
    return [Snippet(_text(record, "text", where), int(record["label"]), where) for where, record in records]


class Article(NamedTuple):
    text: str  # without white space at its ends, as the next
    summary: str
    uid: str  # "cnn_dailymail/test:17"


def read_articles(data_dir: str | Path, split: str) -> list[Article]:
    """News articles with the summary that their editors wrote: TFDS's cnn_dailymail (features "article" and "highlights").

    `data_dir` and what is raised as in `read_texts`.
    """
    records = _foreign(data_dir, split, {"article", "highlights"})
    return [Article(_text(record, "article", where), _text(record, "highlights", where), where) for where, record in records]


def _foreign(data_dir: str | Path, split: str, features: set[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The records of a data set that others have written."""
    folder = _find(Path(data_dir))
    builder = tfds.builder_from_directory(folder)
    if split not in builder.info.splits:
        _refuse(Cause.BAD_LAYOUT, folder, f"no split {split!r}; it has {', '.join(builder.info.splits)}")
    if missing := features - set(builder.info.features):  # pyright: ignore[reportArgumentType]
        _refuse(Cause.MISSING_COLUMN, folder, f"no feature {', '.join(sorted(missing))}")
    return _records(builder, split, folder)


def _text(record: Mapping[str, Any], field: str, where: str) -> str:
    try:
        text = bytes(record[field]).decode("utf-8").strip()
    except UnicodeDecodeError as error:
        _refuse(Cause.INVALID_UTF8, where, f"byte {error.start} of the {field}: {error.reason}")
    if not text:
        _refuse(Cause.EMPTY, where, f"the {field} is empty or blank")
    return text


def _find(source: Path) -> Path:
    folders = tfds_folders(source)
    if len(folders) != 1:
        found = ", ".join(map(str, folders)) or "none"
        _refuse(Cause.BAD_LAYOUT, source, f"exactly one tfds data set (dataset_info.json) is needed here, found: {found}")
    return folders[0]


def _records(builder: tfds.core.DatasetBuilder, split: str, folder: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    declared = builder.info.splits[split].num_examples
    try:
        source = builder.as_data_source(split=split)  # pyright: ignore[reportCallIssue] (its decorator hides the signature)
        if len(source) != declared:
            _refuse(Cause.BAD_ARRAY_RECORD, folder, f"split {split!r} declares {declared} records and holds {len(source)}")
        for index in range(declared):
            yield f"{folder.parent.name}/{split}:{index + 1}", source[index]
    except (OSError, RuntimeError, ValueError, IndexError) as error:
        if isinstance(error, DataError):
            raise
        _refuse(Cause.BAD_ARRAY_RECORD, folder, f"split {split!r} cannot be read: {error}")


def _record(row: Preference) -> dict[str, Any]:
    # tfds has no missing text: "nothing else than `chosen`" is written as `chosen`, and read back as None.
    record = dataclasses.asdict(row) | {"sft_target": row.chosen if row.sft_target is None else row.sft_target}
    return {field: value for field, value in record.items() if field != _SUBSET or value is not None}


def _decode(record: Mapping[str, Any]) -> Preference:
    texts: dict[str, Any] = {}
    for field in _TEXTS if _SUBSET not in record else (*_TEXTS, _SUBSET):
        try:
            texts[field] = bytes(record[field]).decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadRow(Cause.INVALID_UTF8, f"byte {error.start} of the text: {error.reason}", field=field) from None
    if texts["sft_target"] == texts["chosen"]:
        texts["sft_target"] = None
    texts[_SUBSET] = texts.get(_SUBSET) or None
    return Preference(**texts, chat=bool(record["chat"]))


def _accept(triage: Triage, where: str, row: Preference) -> bool:
    try:
        for field, value in _record(row).items():
            if field in (*_TEXTS, _SUBSET):
                check_text(value, field=field)
        check_pair(row.prompt, row.chosen, row.rejected)
    except BadRow as problem:
        triage.reject(where, problem)
        return False
    return True


def _digest(rows: Iterable[Preference]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(_record(row), sort_keys=True).encode())
    return digest.hexdigest()


def _refuse(cause: Cause, where: str | Path, detail: str) -> NoReturn:
    raise DataError(f"{where}: {cause}: {detail}", causes=[cause])
