"""Reader of CSV and TSV rows: the first record names the columns, every cell is a text.

A cell may span lines, so a quote that is never closed would swallow the rest of the file. Such a file is refused as a whole:
its rows cannot be counted.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from dpo_jax.data.columns import CsvText
from dpo_jax.data.pairs import BadRow, Cause, DataReport, refuse
from dpo_jax.untrusted import LIMITS, LongLine, TooDeep, parse_json

Row = dict[str, Any]
SUFFIXES = (".csv", ".csv.gz", ".tsv", ".tsv.gz")
_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}  # spreadsheets in many countries write semicolons


def csv_rows(name: str, lines: Iterator[bytes | LongLine], *, report: DataReport) -> Iterator[tuple[str, Row | BadRow]]:
    """The rows of a CSV or TSV file as `(where, row)`, `where` being "name:line" of a row's first line, counted from 1.

    `lines` are those of the file, without a byte order mark. Cells are separated as the first line is (`_SEPARATORS`); a .tsv
    file by tabs. A cell that holds messages as JSON becomes a list of messages. Blank lines are skipped. Raises `DataError`
    for a quote that is never closed or ends inside a cell, for two columns of one name and for a column without a name.
    """
    texts = _Texts(name, lines)
    first = next(texts, "")
    separator = "\t" if name.endswith((".tsv", ".tsv.gz")) else _separator(first)
    if separator != "," and name.endswith((".csv", ".csv.gz")):
        report.notes.append(f"{name}: cells are separated by {_SEPARATORS[separator]}")
    # The limit is one for the whole process. It bounds what an open quote can gather.
    csv.field_size_limit(min(LIMITS.line_mb * 2**20, 2**31 - 1))
    reader = csv.reader(_again(first, texts), delimiter=separator, strict=True)
    header: list[str] = []
    while True:
        begins = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            _refuse_quotes(name, begins, error)
        if cells is None:
            return
        if not cells:  # a blank line
            continue
        if not header:
            header = _header(name, begins, cells)
        else:
            yield f"{name}:{begins}", _row(header, cells)


class _Texts(Iterator[str]):
    """The lines as texts; bytes that are not UTF-8 become lone surrogates, which `_row` finds."""

    def __init__(self, name: str, lines: Iterator[bytes | LongLine]) -> None:
        self._name, self._lines, self._number = name, lines, 0

    def __next__(self) -> str:
        line = next(self._lines)
        self._number += 1
        if isinstance(line, LongLine):
            refuse(Cause.LINE_TOO_LONG, f"{self._name}:{self._number}", str(line))
        return line.decode("utf-8", errors="surrogateescape")


def _again(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _separator(line: str) -> str:
    """The separator that occurs most often outside of quotes; a comma if none does."""
    outside = "".join(line.split('"')[::2])
    return max(_SEPARATORS, key=outside.count)


def _header(name: str, line: int, cells: list[str]) -> list[str]:
    header = [cell.strip() for cell in cells]
    if "" in header and header.index("") == 0 and len(header) > 1:
        header[0] = "index"  # `pandas.DataFrame.to_csv` writes row numbers without a name
    for number, cell in enumerate(header, 1):
        if not cell:
            refuse(Cause.MISSING_COLUMN, f"{name}:{line}", f"column {number} has no name; the first line must name all columns")
        if header.count(cell) > 1:
            refuse(Cause.DUPLICATE_KEY, f"{name}:{line}", f"two columns are named {cell!r}")
    return header


def _row(header: list[str], cells: list[str]) -> Row | BadRow:
    if len(cells) != len(header):
        detail = f"{len(cells)} cells, but the first line names {len(header)} columns; is a cell with a separator unquoted?"
        return BadRow(Cause.WRONG_TYPE, detail)
    row = {}
    for column, cell in zip(header, cells, strict=True):
        if (nul := cell.find("\0")) >= 0:
            return BadRow(Cause.NUL, f"NUL at character {nul} of the cell", field=column)
        foreign = next((character for character in cell if "\udc80" <= character <= "\udcff"), None)
        if foreign is not None:
            detail = f"byte {ord(foreign) - 0xDC00:#04x} is not UTF-8; save the file as UTF-8 (in Excel: 'CSV UTF-8')"
            return BadRow(Cause.INVALID_UTF8, detail, field=column)
        value = _value(cell, column)
        if isinstance(value, BadRow):
            return value
        row[column] = value
    return row


def _value(cell: str, column: str) -> Any:
    """A cell as text; as a list where it holds messages in JSON; a `BadRow` where it holds messages in Python's notation."""
    begin = cell[:100].replace(" ", "")
    if not begin.startswith(('[{"', "[{'")):
        return CsvText(cell)
    if begin.startswith(("[{'role'", "[{'content'")):
        detail = "messages in Python's notation, which cannot be read reliably; save the data as JSON Lines (.jsonl) or parquet"
        return BadRow(Cause.WRONG_TYPE, detail, field=column)
    try:
        found = parse_json(cell.encode())
    except (ValueError, TooDeep, RecursionError):
        return CsvText(cell)
    messages = isinstance(found, list) and all(isinstance(item, Mapping) and "role" in item for item in found)
    return found if messages else CsvText(cell)


def _refuse_quotes(name: str, line: int, error: csv.Error) -> NoReturn:
    if "field larger" in str(error) or "unexpected end of data" in str(error):
        what = 'a quote (") opens in this row and is never closed'
    else:
        what = f"quotes are wrong in this row ({error})"
    remedy = 'a cell with a quote, a separator or a line break stands in quotes, and a quote inside is doubled ("")'
    refuse(Cause.BAD_CSV, f"{name}:{line}", f"{what}; {remedy}")
