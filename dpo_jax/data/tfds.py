"""TensorFlow Datasets without TensorFlow: writer and reader of preferences, reader of labeled texts and articles.

The file format is always array_record: tfds also offers parquet without TensorFlow, but silently loses rows there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from dpo_jax.data.columns import check_text
from dpo_jax.data.files import fingerprint
from dpo_jax.data.pairs import (
    BadRow,
    Cause,
    DataError,
    DataReport,
    OnBad,
    Place,
    Preference,
    PreferenceSet,
    Spans,
    Triage,
    check_pair,
    readable_name,
    refuse,
)
from dpo_jax.data.snippets import Snippet
from dpo_jax.data.tfds_folder import check_folder, find_tfds
from dpo_jax.untrusted import check_name, parse_json, reading
from dpo_jax.writing import naming

_TEXTS = ("prompt", "chosen", "rejected", "uid", "sft_target")
_FIELDS = {*_TEXTS, "chat"}
_SPANS = ("chosen_spans", "rejected_spans")  # as JSON text
_OPTIONAL = (
    "subset",
    "prompt_digest",
    *_SPANS,
    "unended",
)  # written if some row has one: most sets have none, older folders lack them


class _LocalInfo(tfds.core.DatasetInfo):
    """Description of a data set that is in no public bucket."""

    def initialize_from_bucket(self) -> None:
        """Does nothing. The library would query a network bucket and leave an empty temporary folder behind."""


class PreferenceBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A tfds builder of preferences in memory; see `write_tfds`.

    Rows keep their order, so that the training stream is the same from files and from tfds. Each split has a SHA-256.
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, preferences: Mapping[str, Sequence[Preference]], name: str, data_dir: str | Path) -> None:
        self.name = name  # pyright: ignore[reportAttributeAccessIssue] (tfds would use the class name)
        self._preferences = preferences
        every = [row for rows in preferences.values() for row in rows]
        self._optional = [field for field in _OPTIONAL if any(getattr(row, field) not in (None, ()) for row in every)]
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        texts = {field: tfds.features.Text() for field in (*_TEXTS, *self._optional)}
        return _LocalInfo(
            builder=self,
            description="Preference pairs: a prompt, a chosen and a rejected completion, and what SFT learns for the prompt.",
            features=tfds.features.FeaturesDict({**texts, "chat": tfds.features.Scalar(np.bool_)}),
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict({split: _digest(rows) for split, rows in self._preferences.items()}),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        return {split: self._generate_examples(rows) for split, rows in self._preferences.items()}

    def _generate_examples(self, rows: Iterable[Preference]) -> Iterator[tuple[int, dict[str, Any]]]:
        # The key is the row number: equal rows are kept, and tfds can report equal keys only if TensorFlow is installed.
        for index, row in enumerate(rows):
            yield index, dict.fromkeys(self._optional, "") | _record(row)


def write_tfds(
    preferences_by_split: Mapping[str, Sequence[Preference]], data_dir: str | Path, *, name: str = "preferences"
) -> Path:
    """Writes `{split: preferences}` under `data_dir/name/1.0.0` and returns that folder, after reading every record back.

    Raises `DataError` if a preference would be refused on reading, `FileExistsError` if the folder already has data, and
    `Unreadable` for a folder whose name is not UTF-8.
    """
    check_name(data_dir)
    for split, preferences in preferences_by_split.items():
        if other := next((row for row in preferences if row.between or row.desirable is not None), None):
            refuse(Cause.NO_PAIR, other.uid or split, "a TFDS folder holds pairs, but this is a ranking or a single completion")
        if other := next((row for row in preferences if row.images), None):
            refuse(Cause.WRONG_TYPE, other.uid or split, "a TFDS folder holds texts, but this prompt shows images")
        triage = Triage(DataReport(source=name, split=split, read=len(preferences)), on_bad="refuse")
        kept = sum(_accept(triage, row.uid, row) for row in preferences)
        triage.finish(kept)
        if not preferences:
            refuse(Cause.NO_ROWS, split, "the split has no preferences")
        if len({row.uid for row in preferences}) != len(preferences):
            refuse(Cause.DUPLICATE_KEY, split, "two preferences have the same uid")
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
    folder = find_tfds(Path(data_dir))
    written = check_folder(folder, split).get(split)
    builder = _builder(folder, _FIELDS, "not written by `write_tfds`: ")
    report = DataReport(source=readable_name(data_dir), split=split, format="tfds")
    preferences: list[Preference] = []
    triage = Triage(report, on_bad=on_bad)
    uids: set[str] = set()
    digest = hashlib.sha256()  # over all records, including dropped ones
    for where, record in _records(builder, split, folder):
        report.rows += 1
        report.read += 1
        try:
            row = _decode(record)
        except BadRow as problem:
            refuse(Cause.BAD_ARRAY_RECORD, where, f"not a record that was written: {problem}")
        digest.update(_line(row))
        if row.uid in uids:
            refuse(Cause.DUPLICATE_KEY, where, "the uid is that of an earlier record")
        uids.add(row.uid)
        if _accept(triage, where, row):
            preferences.append(row)
    if digest.hexdigest() != written:
        refuse(Cause.BAD_ARRAY_RECORD, folder, f"the records of split {split!r} are not those that were written")
    triage.finish(len(preferences))
    report.files = [fingerprint(readable_name(Path(file).name), Path(file)) for file in builder.info.splits[split].filepaths]
    return PreferenceSet(preferences, report)


def read_texts(data_dir: str | Path, split: str) -> list[Snippet]:
    """Labeled texts, such as those of TFDS's imdb_reviews: any data set with the features "text" and "label" (0 or 1).

    `data_dir`: the folder of the data set, or one above it; it must be in array_record. Raises `DataError` as `read_tfds` does.
    """
    records = _foreign(data_dir, split, {"text", "label"})
    return [Snippet(_text(record, "text", where), _label(record, where), where) for where, record in records]


class Article(NamedTuple):
    text: str  # stripped, like the next field
    summary: str
    uid: str  # "cnn_dailymail/test:17"


def read_articles(data_dir: str | Path, split: str) -> list[Article]:
    """News articles with the editors' summaries: TFDS's cnn_dailymail (features "article" and "highlights").

    `data_dir` and exceptions are as in `read_texts`.
    """
    records = _foreign(data_dir, split, {"article", "highlights"})
    return [Article(_text(record, "article", where), _text(record, "highlights", where), where) for where, record in records]


def _foreign(data_dir: str | Path, split: str, features: set[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The records of a data set written by other programs."""
    folder = find_tfds(Path(data_dir))
    check_folder(folder, split)
    return _records(_builder(folder, features), split, folder)


def _builder(folder: Path, needed: set[str], hint: str = "") -> tfds.core.DatasetBuilder:
    """The library's reader of a data set, checked for the needed features."""
    with _reading(folder):
        builder = tfds.builder_from_directory(folder)
        features = set(builder.info.features)  # pyright: ignore[reportArgumentType] (a FeaturesDict, or else unusable)
    if missing := needed - features:
        refuse(Cause.MISSING_COLUMN, folder, f"{hint}no feature {', '.join(sorted(missing))}")
    return builder


def _text(record: Mapping[str, Any], field: str, where: str) -> str:
    try:
        text = _decoded(record, field).strip()
    except BadRow as problem:
        raise DataError(f"{where}: {problem}", causes=[problem.cause]) from problem
    if not text:
        refuse(Cause.EMPTY, where, f"the {field} is empty or blank")
    return text


def _label(record: Mapping[str, Any], where: str) -> int:
    if not isinstance(record["label"], int | np.integer):
        refuse(Cause.WRONG_TYPE, where, "the label is not a number")
    return int(record["label"])


def _records(builder: tfds.core.DatasetBuilder, split: str, folder: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with _reading(folder):
        declared = builder.info.splits[split].num_examples
        for file in map(Path, builder.info.splits[split].filepaths):
            if not file.is_file():  # the library would block on a pipe
                refuse(Cause.BAD_ARRAY_RECORD, file, "no such file")
        source = builder.as_data_source(split=split)  # pyright: ignore[reportCallIssue] (its decorator hides the signature)
        held = len(source)
    if held != declared:
        refuse(Cause.BAD_ARRAY_RECORD, folder, f"split {split!r} declares {declared} records but holds {held}")
    place = Place(f"{readable_name(folder.parent.name)}/{split}", Cause.BAD_ARRAY_RECORD, "the record cannot be read")
    with place.reading():
        for index in range(declared):
            record = source[index]
            place.number += 1
            yield f"{place.name}:{place.number}", record


def _reading(folder: Path) -> contextlib.AbstractContextManager[None]:
    where = f"{folder}: {Cause.BAD_ARRAY_RECORD}: cannot be read"
    return reading(where, error=lambda words: DataError(words, causes=[Cause.BAD_ARRAY_RECORD]))


def _record(row: Preference) -> dict[str, Any]:
    # tfds has no missing texts: a missing `sft_target` is written as `chosen` and read back as None.
    record = dataclasses.asdict(row) | {"sft_target": row.chosen if row.sft_target is None else row.sft_target}
    record |= {field: json.dumps(record[field]) for field in _SPANS if record[field] is not None}
    record["unended"] = " ".join(row.unended) or None
    kept = {*_FIELDS, *(field for field in _OPTIONAL if record[field] is not None)}  # pairs have no `between` or `desirable`
    return {field: value for field, value in record.items() if field in kept}


def _decode(record: Mapping[str, Any]) -> Preference:
    texts: dict[str, Any] = {field: _decoded(record, field) for field in (*_TEXTS, *_OPTIONAL) if field in record}
    if texts["sft_target"] == texts["chosen"]:
        texts["sft_target"] = None
    for field in _OPTIONAL:
        texts[field] = texts.get(field) or None
    for field in _SPANS:
        texts[field] = None if texts[field] is None else _spans(texts[field], field)
    texts["unended"] = tuple((texts["unended"] or "").split())
    if not {*texts["unended"]} <= {"chosen", "rejected"}:
        raise BadRow(Cause.WRONG_TYPE, "the sides chosen and rejected are expected", field="unended")
    if not isinstance(record["chat"], bool | np.bool_):
        raise BadRow(Cause.WRONG_TYPE, "true or false is needed", field="chat")
    return Preference(**texts, chat=bool(record["chat"]))


def _spans(text: str, field: str) -> Spans:
    try:
        return tuple((int(begin), int(end)) for begin, end in parse_json(text))
    except (ValueError, TypeError) as error:
        raise BadRow(Cause.WRONG_TYPE, f"not spans of characters: {error}", field=field) from error


def _decoded(record: Mapping[str, Any], field: str) -> str:
    value = record[field]
    if not isinstance(value, bytes):
        raise BadRow(Cause.WRONG_TYPE, f"expected a string, got {type(value).__name__}", field=field)
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRow(Cause.INVALID_UTF8, f"byte {error.start} of the text: {error.reason}", field=field) from None


def _accept(triage: Triage, where: str, row: Preference) -> bool:
    try:
        for field, value in _record(row).items():
            if field in (*_TEXTS, *_OPTIONAL):
                check_text(value, field=field)
        check_pair(row.prompt, row.chosen, row.rejected)
    except BadRow as problem:
        triage.reject(where, problem)
        return False
    return True


def _digest(rows: Iterable[Preference]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(_line(row))
    return digest.hexdigest()


def _line(row: Preference) -> bytes:
    return json.dumps(_record(row), sort_keys=True).encode()
