"""Loader of preferences from files in any supported public format: the single entry point to the data.

    load_preferences("hh-rlhf/", "train").report.summary()

reads every row of the split and turns each into a `Preference` or a counted, named reason why not. By default any bad row
refuses the whole set. `splits` finds the files, `files` reads them, `format_table` lists the formats, `formats` parses rows,
and `pairs` has the records and the report.
"""

from __future__ import annotations

import collections
import functools
import itertools
import shlex
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from dpo_jax.data import message_texts
from dpo_jax.data.beside import Unread, lists_of_other_lengths, notes_on, suspects, unread_columns
from dpo_jax.data.column_map import ColumnMap
from dpo_jax.data.columns import ColumnType, Row, shown_names
from dpo_jax.data.files import check_head, read_rows
from dpo_jax.data.format_table import FORMATS, FormatName, detect_format, format_of
from dpo_jax.data.image_rows import names_images, open_images
from dpo_jax.data.pairs import (
    BadRow,
    Cause,
    DataError,
    DataReport,
    OnBad,
    Preference,
    PreferenceSet,
    Triage,
    readable_name,
    refuse,
)
from dpo_jax.data.repeated_prompts import RepeatedPrompts
from dpo_jax.data.row_kinds import Wanted, check_kind, check_ranking_lengths, preferences_of, split_pairs
from dpo_jax.data.splits import find_files
from dpo_jax.data.tfds_folder import tfds_folders
from dpo_jax.data.unread import is_metadata, remedy_for_lists, suggestion

__all__ = ["PreferenceSet", "load_preferences", "peek"]

_FIRST = 100  # rows by which a format is detected
_SAMPLED = 2**24  # characters of the rows by which a format is detected
_TURNS = ("prompt", "chosen", "completion", "completions", "messages")  # columns that may hold conversations
_NOTES = 20  # most different notes on what stands beside the columns that are read
_SHAPES = 1000  # most distinct sets of columns examined for the note on unread columns


def load_preferences(
    source: str | Path,
    split: str,
    *,
    format: FormatName = "auto",
    columns: str | Mapping[str, str] | None = None,
    on_bad: OnBad = "refuse",
    tokenizer: Any = None,
    rows: Wanted = "pairs",
    ranking_length: int | None = None,
) -> PreferenceSet:
    """The preferences of `split` under `source`: a sequence of `Preference` with its `report`.

    Args:
      source: a JSON Lines (`.jsonl`, `.json`), CSV (`.csv`, `.tsv`), any of these gzipped (`.gz`), or parquet file, a folder of
        them in one of the layouts of `splits.find_files`, or a folder written by `tfds.write_tfds`.
      split: "train", "test", ...: part of the file names.
      format: one of `format_table.FORMATS`, or "tfds"; "auto" detects it from the columns of the first 100 rows and
        states it in the report.
      columns: a map from the format's column names to the file's (`column_map`), such as "prompt=question,system=" or
        `{"prompt": "instruction+input"}`.
      on_bad: "refuse" raises `DataError` listing the bad rows; "drop" drops them and counts them by cause.
      tokenizer: for its chat template; needed for conversational rows only.
      rows: the kind to read: "pairs" (also from rankings), "unpaired" (also from pairs), "rankings", "any", or "prompts".
      ranking_length: number of best completions kept of each ranking; None: all must have the same number.

    Raises `DataError` for bad rows, for a damaged, missing or mislabeled file, and if nothing is left; ValueError for an
    unknown format, or columns that no format reads.

    >>> file = Path("pairs.jsonl")
    >>> _ = file.write_text('{"prompt": "The film was", "chosen": " a delight.", "rejected": " a bore."}')
    >>> preferences = load_preferences(file, "train")
    >>> len(preferences), preferences[0].chosen, preferences.report.kept
    (1, ' a delight.', 1)
    """
    if format not in ("auto", "tfds", *FORMATS):
        raise ValueError(f"unknown format {format!r}; known: auto, tfds, {', '.join(FORMATS)}")
    mapped = ColumnMap.of(columns)
    mapped.check(format)
    if format == "tfds" or (format == "auto" and tfds_folders(Path(source))):
        if mapped.columns:
            refuse(Cause.BAD_LAYOUT, source, f"a TFDS folder has its own columns: leave out --data.columns {mapped}")
        from dpo_jax.data.tfds import read_tfds

        check_kind("pairs", rows, where=f"{source} [{split}]")
        pairs = read_tfds(source, split, on_bad=on_bad)
        return split_pairs(pairs) if rows == "unpaired" else pairs
    if mapped.columns.get("system") and getattr(tokenizer, "chat_template", None) is None:
        _refuse_system(str(source), mapped)
    reading = _Reading(DataReport(source=readable_name(source), split=split, format=format), mapped, on_bad)
    report, triage = reading.report, reading.triage
    files = find_files(source, split, report=report)
    folders = {name: path.parent for name, path in files}  # image paths are relative to these
    lines = reading.rows(files)
    stated = "pairs" if report.format == "auto" else FORMATS[report.format].rows
    if report.format != "auto":  # it is if no row can be read
        check_kind(stated, rows, where=f"{report.source} [{split}] (format {report.format})", hint=reading.hint)
    preferences: list[Preference] = []
    try:
        if report.format != "auto":
            found = FORMATS[report.format].candidates(lines, tokenizer=tokenizer)
            for uid, candidate in preferences_of(found, rows, best=ranking_length):
                report.read += 1
                try:
                    if isinstance(candidate, BadRow):
                        raise candidate
                    preferences.append(
                        open_images(candidate, folders[uid.rpartition(":")[0]]) if candidate.images else candidate
                    )
                except BadRow as problem:
                    triage.reject(uid, mapped.named(problem))
    except MemoryError:  # a small file may unpack to any size
        detail = f"out of memory on this machine after {report.rows:,} rows; use fewer rows"
        raise DataError(f"{report.source} [{split}]: {detail}", causes=[Cause.OVER_LIMIT]) from None
    triage.finish(kept=len(preferences))
    told = collections.Counter(note for preference in preferences for note in preference.notes)
    report.notes += [f"{note} ({count:,} of {len(preferences):,} pairs)" for note, count in told.items()]
    report.notes += [f"{note} ({count:,} of {report.rows:,} rows)" for note, count in reading.told.items() if count]
    report.notes += reading.repeated.notes() if reading.repeated else []
    if reading.ignored:
        report.notes.append(f"columns that are not read: {shown_names(reading.ignored)}")
    if report.format in ("rewardbench", "pku") and preferences:
        form = "the tokenizer's chat template" if preferences[0].chat else "Human: and Assistant:, as there is no chat template"
        report.notes.append(f"questions and answers are rendered with {form}")
    if not preferences:
        raise DataError(
            f"{source} [{split}]: no preference is left:\n{report.summary()}\n{report.reasons()}", causes=[Cause.NO_ROWS]
        )
    if rows == "rankings":
        check_ranking_lengths(preferences, where=f"{report.source} [{split}]")
    kept = PreferenceSet(preferences, report)
    return split_pairs(kept) if rows == "unpaired" and stated == "pairs" else kept


class Peeked(NamedTuple):
    """Properties of the first rows of a split."""

    format: str
    files: int
    images: str | None  # "train.jsonl:3", the first of these rows with an image; None: none
    chat: DataError | None  # the error of a tokenizer without a chat template; None: these rows need none
    tools: str | None  # "train.jsonl:3", the first conversation with tools
    unusable: DataError | None  # the error of rows that make a run refuse the data, as far as these rows tell
    hint: str | None  # of rows detected as prompts alone: how they may state preferences
    doubt: str | None  # a warning: none of these rows can be used, but others may be


def peek(
    source: str | Path,
    split: str,
    *,
    format: FormatName = "auto",
    columns: str | Mapping[str, str] | None = None,
    on_bad: OnBad = "refuse",
) -> Peeked:
    """A look at `split` that reads at most the first 100 rows. Raises `DataError` as above, except for bad rows."""
    report = DataReport(source=readable_name(source), split=split, format=format)
    reading = _Reading(report, ColumnMap.of(columns), on_bad, first=_FIRST)
    files = find_files(source, split, report=reading.report)
    for name, path in files:
        check_head(name, path)
    first, images, tools = reading.rows(files), list[str](), list[str]()

    def texts() -> Iterator[tuple[str, Row]]:
        for where, row in first:
            if report.format == "trl" and names_images(row):
                images.append(where)
                continue
            if row.get("tools") not in (None, "", "null", "[]", []) and any(isinstance(row.get(name), list) for name in _TURNS):
                tools.append(where)
            yield where, row

    kept, chat = _parse(texts(), reading)
    kept += sum(1 for _ in texts()) + (chat is not None)  # the rows that cannot be parsed without a template
    unusable, doubt = _unusable(reading, kept + len(images))
    shown, told = next(iter(images), None), next(iter(tools), None)
    return Peeked(report.format, len(files), shown, chat, told, unusable, reading.hint, doubt)


def _parse(rows: Iterator[tuple[str, Row]], reading: _Reading) -> tuple[int, DataError | None]:
    """The number of usable candidates up to the first of `rows` that needs a chat template, and the error of that one."""
    kept = 0
    try:
        first = next(rows, None)  # tells the format
        if first is not None and reading.report.format in FORMATS:
            found = FORMATS[reading.report.format].candidates(itertools.chain([first], rows), tokenizer=None)
            for uid, candidate in found:
                if isinstance(candidate, BadRow):
                    reading.reject(uid, reading.mapped.named(candidate))
                else:
                    kept += 1
    except DataError as error:
        if Cause.CHAT_TEMPLATE not in error.causes:
            raise
        return kept, error
    return kept, None


def _unusable(reading: _Reading, kept: int) -> tuple[DataError | None, str | None]:
    """The error of bad rows among those that were read, of which `kept` are usable, or a warning if it is not certain."""
    report = reading.report
    report.read += kept
    try:
        reading.triage.finish(kept)
    except DataError as error:
        return DataError(f"{report.source} [{report.split}], first {report.rows:,} rows: {error}", causes=error.causes), None
    if kept or not report.dropped:
        return None, None
    told = f"{report.source} [{report.split}]: none of the first {report.rows:,} rows can be used:\n{report.reasons()}".rstrip()
    whole = report.rows < _FIRST
    return (DataError(told, causes=[Cause.NO_ROWS]), None) if whole else (None, told)


def _refuse_system(source: str, mapped: ColumnMap) -> NoReturn:
    joined = "+".join([*mapped.columns["system"], *mapped.columns.get("prompt", ("prompt",))])
    others = [f"{key}={'+'.join(names)}" for key, names in mapped.columns.items() if key not in ("prompt", "system")]
    option = f"--data.columns {shlex.quote(','.join([f'prompt={joined}', *others]))}"
    detail = (
        f"system texts need a tokenizer with a chat template (--tokenizer.path); without, {option} puts them before prompts"
    )
    refuse(Cause.CHAT_TEMPLATE, source, detail)


class _Reading:
    """The rows of a split with the column names of its format. Detection sets the format in the report."""

    def __init__(self, report: DataReport, mapped: ColumnMap, on_bad: OnBad, *, first: int | None = None) -> None:
        self.report, self.mapped = report, mapped
        self.first = first  # most rows to read; None: all
        self.triage = Triage(report, on_bad=on_bad)
        self.ignored: dict[str, None] = {}  # columns not read by the format
        self.told: collections.Counter[str] = collections.Counter()  # notes on rows
        self.hint: str | None = None  # how rows that were detected as prompts alone may state preferences
        self.repeated: RepeatedPrompts | None = None  # None: no format is known
        self._seen: set[tuple[str, ...]] = set()
        self._no_orders: set[str] = set()  # columns of lists that do not order a ranking

    def rows(self, files: list[tuple[str, Path]]) -> Iterator[tuple[str, Row]]:
        """The rows of all files, after the format is detected from the first 100 (fewer if they are large, as they are kept in
        memory).

        Raises `DataError` if they fit no format, or if most have a column that should have been read.
        """
        rows, sample, size = self._readable(files), list[tuple[str, Row]](), 0
        for where, row in itertools.islice(rows, _FIRST):
            sample.append((where, row))
            if (size := size + _size(row, _SAMPLED)) > _SAMPLED:
                break
        if self.report.format == "auto":
            self._detect(sample)
            self.hint = self._hint(sample[0][1]) if self.report.format == "prompts" else None
        if self.report.format != "auto":
            self._no_orders = lists_of_other_lengths([row for _, row in sample])
            found = [(where, unread) for where, row in sample if (unread := self._unread(row))]
            if 2 * len(found) > len(sample):
                where, unread = max(found, key=lambda one: len(one[1].names))  # the system text may be blank in some
                refuse(Cause.UNREAD_COLUMN, where, unread.detail)
            self.repeated = RepeatedPrompts(self.report.format, [row for _, row in sample])
        return self._checked(itertools.chain(sample, rows))

    def _detect(self, sample: list[tuple[str, Row]]) -> None:
        votes = collections.Counter(
            name for _, row in sample if (name := detect_format(row)) and not self._mapped_pairs(name, row)
        )
        if sample and not votes:
            where, row = sample[0]
            self._refuse_columns(where, row)
        for name, count in votes.most_common(1):
            self.report.format = name
            self.report.notes.append(f"format {name!r}: {count} of the first {len(sample)} readable rows have its columns")

    def _hint(self, row: Row) -> str | None:
        if remedy := remedy_for_lists(row, self.mapped):
            return remedy
        others = [name for name in row if name not in FORMATS["prompts"].reads and not is_metadata(name)]
        told = f"if other columns hold the completions ({shown_names(others)}), write chosen and rejected from them"
        return told if others else None

    def _readable(self, files: list[tuple[str, Path]]) -> Iterator[tuple[str, Row]]:
        for name, path in files:
            for where, row in read_rows(name, path, report=self.report, columns=functools.partial(self._columns, name)):
                try:
                    if isinstance(row, BadRow):
                        raise row
                    row = self.mapped.row(row)
                    read = message_texts.with_messages(row)
                    self.told[message_texts.NOTE] += read is not row
                    yield where, read
                except BadRow as problem:
                    self.reject(where, problem)
                if self.first is not None and self.report.rows >= self.first:
                    return

    def _columns(self, file: str, names: Sequence[str], types: Mapping[str, ColumnType]) -> Collection[str]:
        """The columns of a parquet file to read."""
        called = self.mapped.names(file, names)
        format = format_of(self.report.format, called)
        wanted = [*FORMATS[format].reads] if format else []
        if self.report.format == "auto" and format and self._mapped_pairs(format, row := {name: "a text" for name in called}):
            self._refuse_columns(file, row)
        if not any(column.partition(".")[0] in called for column in wanted):
            self._refuse_columns(file, {name: "a text" for name in called})
        return self.mapped.sources_of([*wanted, *(suspects(called, types, format) if format else ())])

    def _mapped_pairs(self, format: str, row: Row) -> bool:
        """Whether a row that fits a format of texts or prompts holds preferences under other names, which must not be lost."""
        return FORMATS[format].rows in ("demonstrations", "prompts") and suggestion(row, self.mapped) is not None

    def _checked(self, rows: Iterable[tuple[str, Row]]) -> Iterator[tuple[str, Row]]:
        """The rows except those with a column that should have been read."""
        reads = {name.partition(".")[0] for name in FORMATS[self.report.format].reads} if self.report.format in FORMATS else {}
        for where, row in rows:
            if (names := tuple(row)) not in self._seen and len(self._seen) < _SHAPES:
                self._seen.add(names)
                self.ignored |= dict.fromkeys(name for name in names if name not in reads)
            if unread := self._unread(row):
                self.reject(where, BadRow(Cause.UNREAD_COLUMN, unread.detail))
                continue
            self.told.update(
                note for note in notes_on(row, self.report.format, self.mapped) if note in self.told or len(self.told) < _NOTES
            )
            if "system" in row and "system" not in self.mapped.columns:  # blank, or a copy of text in the messages
                row = {name: value for name, value in row.items() if name != "system"}
            try:
                yield where, self.repeated.row(row) if self.repeated else row
            except BadRow as problem:
                self.reject(where, problem)

    def _unread(self, row: Row) -> Unread | None:
        return unread_columns(row, self.report.format, self.mapped, self._no_orders)

    def reject(self, where: str, problem: BadRow) -> None:
        """Counts a row, or a candidate of it, as read and unusable."""
        self.report.read += 1
        self.triage.reject(where, problem)

    def _refuse_columns(self, where: str, row: Row) -> NoReturn:
        format = self.report.format
        if format == "auto":
            what, needs = "no known format has", ""
        else:
            what, needs = f"format {format!r} reads none of", f"it needs {', '.join(FORMATS[format].needs)}; "
        option = suggestion(row, self.mapped) if format in ("auto", "trl") else None
        if option is None and isinstance(row.get("conversations"), list) and format in ("auto", "sft_messages"):
            option = "--data.columns messages=conversations"
        needs += f"read them with {option}; " if option else ""
        if option is None and format in ("auto", "ranked") and (remedy := remedy_for_lists(row, self.mapped)):
            needs += f"{remedy}; "
        remedy = f"{needs}if the first rows are bad, name the format with --data.format ({', '.join(FORMATS)})"
        remedy += "" if option else "; if they have other names, map them: --data.columns prompt=NAME,chosen=NAME,rejected=NAME"
        remedy += "" if option else "; for sft prompt=NAME,completion=NAME or text=NAME"
        refuse(Cause.MISSING_COLUMN, where, f"{what} the columns {shown_names(row)}; {remedy}")


def _size(row: Row, enough: int) -> int:
    """Approximate number of characters and values in a row. Counting stops above `enough`."""
    found, stack = 0, [row]
    while stack and found <= enough:
        values = stack.pop()
        found += len(values)
        if found <= enough:
            inside = values.values() if isinstance(values, Mapping) else () if isinstance(values, str) else values
            stack += [value for value in inside if isinstance(value, str | list | Mapping)]
    return found
