"""Preferences from files, in whatever public format they are: the one entry to the data.

    load_preferences("hh-rlhf/", "train").report.summary()

reads every row of the split, turns each into a `Preference` or a counted, named reason why not, and by default refuses the
whole set if any row is bad. `files` finds and reads, `format_table` lists the formats, `formats` says what a row means,
`pairs` keeps the books.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from dpo_jax.data.columns import Row, shown_names
from dpo_jax.data.files import check_head, read_rows
from dpo_jax.data.format_table import FORMATS, FormatName, columns_of, detect_format
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
from dpo_jax.data.row_kinds import Wanted, check_kind, check_ranking_lengths, preferences_of, split_pairs
from dpo_jax.data.splits import find_files
from dpo_jax.data.tfds_folder import tfds_folders

__all__ = ["PreferenceSet", "load_preferences", "peek"]

_SAMPLED = 2**24  # characters of the rows by which a format is detected


def load_preferences(
    source: str | Path,
    split: str,
    *,
    format: FormatName = "auto",
    on_bad: OnBad = "refuse",
    tokenizer: Any = None,
    rows: Wanted = "pairs",
    ranking_length: int | None = None,
) -> PreferenceSet:
    """The preferences of `split` under `source`: a sequence of `Preference` with the `report` of how it came to be.

    Args:
      source: a JSON Lines (`.jsonl`, `.jsonl.gz`, `.json`, `.json.gz`) or parquet file, a folder of them in one of the layouts
        of `files.find_files`, or a folder written by `tfds.write_tfds`.
      split: "train", "test", ...: part of the file names.
      format: what a row means, one of `format_table.FORMATS`, or "tfds"; "auto" decides by the columns of the first 100 rows
        and says so in the report.
      on_bad: "refuse" raises `DataError` listing the bad rows; "drop" leaves them out and counts them by cause.
      tokenizer: needed for conversational rows only, for its chat template.
      rows: what is read: "pairs", also of rankings; "unpaired", single completions, also of pairs; "rankings"; or "any".
      ranking_length: how many completions of each ranking are kept, the best ones; None: all have the same number.

    Raises `DataError` for bad rows, for a file that is damaged, missing or not what its name says, and if nothing is left.

    >>> file = Path("pairs.jsonl")
    >>> _ = file.write_text('{"prompt": "The film was", "chosen": " a delight.", "rejected": " a bore."}')
    >>> preferences = load_preferences(file, "train")
    >>> len(preferences), preferences[0].chosen, preferences.report.kept
    (1, ' a delight.', 1)
    """
    if format not in ("auto", "tfds", *FORMATS):
        raise ValueError(f"unknown format {format!r}; known: auto, tfds, {', '.join(FORMATS)}")
    if format == "tfds" or (format == "auto" and tfds_folders(Path(source))):
        from dpo_jax.data.tfds import read_tfds

        check_kind("pairs", rows, where=f"{source} [{split}]")
        pairs = read_tfds(source, split, on_bad=on_bad)
        return split_pairs(pairs) if rows == "unpaired" else pairs
    report = DataReport(source=readable_name(source), split=split, format=format)
    triage = Triage(report, on_bad=on_bad)
    lines = _readable_rows(find_files(source, split, report=report), report, triage)
    if format == "auto":
        lines = _detect(lines, report)
    stated = "pairs" if report.format == "auto" else FORMATS[report.format].rows
    check_kind(stated, rows, where=f"{report.source} [{split}] (format {report.format})")
    preferences: list[Preference] = []
    try:
        if report.format != "auto":
            found = FORMATS[report.format].candidates(lines, tokenizer=tokenizer)
            for uid, candidate in preferences_of(found, rows, best=ranking_length):
                report.read += 1
                if isinstance(candidate, BadRow):
                    triage.reject(uid, candidate)
                else:
                    preferences.append(candidate)
    except MemoryError:  # a small file may unpack to anything
        detail = f"needs more memory than this machine has, after {report.rows:,} rows; take fewer"
        raise DataError(f"{report.source} [{split}]: {detail}", causes=[Cause.OVER_LIMIT]) from None
    triage.finish(kept=len(preferences))
    if report.format == "rewardbench" and preferences:
        form = "the tokenizer's chat template" if preferences[0].chat else "Human: and Assistant:, for want of a chat template"
        report.notes.append(f"questions and answers are rendered with {form}")
    if not preferences:
        raise DataError(
            f"{source} [{split}]: no preference is left:\n{report.summary()}\n{report.reasons()}", causes=[Cause.NO_ROWS]
        )
    if rows == "rankings":
        check_ranking_lengths(preferences, where=f"{report.source} [{split}]")
    kept = PreferenceSet(preferences, report)
    return split_pairs(kept) if rows == "unpaired" and stated == "pairs" else kept


def peek(source: str | Path, split: str, *, format: FormatName = "auto") -> tuple[str, int]:
    """Format and number of files of `split`, without reading more than the first 100 rows. Raises `DataError` as above."""
    report = DataReport(source=readable_name(source), split=split, format=format)
    files = find_files(source, split, report=report)
    for name, path in files:
        check_head(name, path)
    if format == "auto":
        _detect(_readable_rows(files, report, Triage(report, on_bad="drop")), report)
    return report.format, len(files)


def _readable_rows(files: list[tuple[str, Path]], report: DataReport, triage: Triage) -> Iterator[tuple[str, Row]]:
    for name, path in files:
        for where, row in read_rows(name, path, report=report, columns=lambda names, file=name: _columns(names, file, report)):
            if isinstance(row, BadRow):
                report.read += 1
                triage.reject(where, row)
            else:
                yield where, row


def _columns(names: Sequence[str], file: str, report: DataReport) -> Collection[str]:
    """The columns of a parquet file that are read."""
    columns = columns_of(report.format, names)
    if not any(column.partition(".")[0] in names for column in columns):
        _refuse_columns(file, names, report)
    return columns


def _refuse_columns(where: str, names: Iterable[str], report: DataReport) -> NoReturn:
    if report.format == "auto":
        what, needs = "no known format has", ""
    else:
        what, needs = f"format {report.format!r} reads none of", f"it needs {', '.join(FORMATS[report.format].needs)}; "
    remedy = f"{needs}if the first rows are bad, name the format with --data.format ({', '.join(FORMATS)})"
    refuse(Cause.MISSING_COLUMN, where, f"{what} the columns {shown_names(names)}; {remedy}")


def _size(row: Row, enough: int) -> int:
    """About how many characters and values a row holds. Counting ends beyond `enough`."""
    found, stack = 0, [row]
    while stack and found <= enough:
        values = stack.pop()
        found += len(values)
        if found <= enough:
            inside = values.values() if isinstance(values, Mapping) else () if isinstance(values, str) else values
            stack += [value for value in inside if isinstance(value, str | list | Mapping)]
    return found


def _detect(rows: Iterator[tuple[str, Row]], report: DataReport) -> Iterator[tuple[str, Row]]:
    """`rows`, with the format that most of the first 100 fit in the report: fewer where they are large, as all are kept."""
    size = 0
    sample: list[tuple[str, Row]] = []
    for where, row in itertools.islice(rows, 100):
        sample.append((where, row))
        if (size := size + _size(row, _SAMPLED)) > _SAMPLED:
            break
    votes = collections.Counter(name for _, row in sample if (name := detect_format(row)))
    if sample and not votes:
        where, row = sample[0]
        _refuse_columns(where, row, report)
    for name, count in votes.most_common(1):
        report.format = name
        report.notes.append(f"format {name!r}: {count} of the first {len(sample)} readable rows have its columns")
    return itertools.chain(sample, rows)
