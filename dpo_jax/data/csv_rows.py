"""Reader of CSV and TSV rows: the first record names the columns, every cell is a text.

A cell may span lines, so a quote that is never closed would swallow the rest of the file. Such a file is refused as a whole:
its rows cannot be counted.
"""

from __future__ import annotations

import csv
import itertools
import re
from collections.abc import Iterator
from typing import Any, NoReturn

from dpo_jax.data.columns import CsvText
from dpo_jax.data.message_texts import messages_in
from dpo_jax.data.pairs import BadRow, Cause, DataReport, refuse
from dpo_jax.untrusted import LIMITS, LongLine

Row = dict[str, Any]
SUFFIXES = (".csv", ".csv.gz", ".tsv", ".tsv.gz")
_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}  # spreadsheets in many countries write semicolons
_STATED = re.compile(r'"?sep=([,;\t|])"?[\r\n]*')  # a first line for Excel


def csv_rows(name: str, lines: Iterator[bytes | LongLine], *, report: DataReport) -> Iterator[tuple[str, Row | BadRow]]:
    """The rows of a CSV or TSV file as `(where, row)`, `where` being "name:line" of a row's first line, counted from 1.

    `lines` are those of the file, without a byte order mark. Cells are separated as the first line is (`_SEPARATORS`); a .tsv
    file by tabs; a line `sep=;` before the first, as Excel reads it, names another. If a space follows every separator of the
    first line, it is not part of any cell. A cell that holds messages as JSON becomes a list of messages. Blank rows are
    skipped, which a note counts. Raises `DataError` for a quote that is never closed or ends inside a cell, for two columns of
    one name and for a column without a name.
    """
    texts = _Texts(name, lines)
    before, first = _first(texts)
    separator = "\t" if name.endswith((".tsv", ".tsv.gz")) else _separator(first)
    if stated := _STATED.fullmatch(first):
        separator, before = stated[1], [*before, "\n"]
        first = next(texts, "")
    if separator != "," and name.endswith((".csv", ".csv.gz")):
        report.notes.append(f"{name}: cells are separated by {_SEPARATORS.get(separator, repr(separator))}")
    outside = _outside(first)
    if spaced := outside.count(separator) == outside.count(f"{separator} ") > 0:
        report.notes.append(f"{name}: a space follows each separator of the first line, so spaces there are not read")
    # The limit is one for the whole process. It bounds what an open quote can gather.
    csv.field_size_limit(min(LIMITS.line_mb * 2**20, 2**31 - 1))
    again = itertools.chain(before, [first], texts)
    reader = csv.reader(again, delimiter=separator, strict=True, skipinitialspace=spaced)
    header: list[str] = []
    blank = 0
    while True:
        begins = reader.line_num + 1
        texts.clear()
        try:
            cells = next(reader, None)
        except csv.Error as error:
            _refuse_quotes(name, begins, error)
        if cells is None:
            break
        if _is_blank(cells, header):
            blank += bool(header)
        elif not header:
            header = _header(name, begins, cells)
        else:
            problem = _spaced_quote(cells, header, texts.read, separator)
            yield f"{name}:{begins}", problem or _row(header, cells)
    if blank:
        report.notes.append(f"{name}: {blank} blank rows skipped")


class _Texts(Iterator[str]):
    """The lines as texts; bytes that are not UTF-8 become lone surrogates, which `_row` finds."""

    def __init__(self, name: str, lines: Iterator[bytes | LongLine]) -> None:
        self._name, self._lines, self._number = name, lines, 0
        self.read: list[str] = []  # since `clear`

    def clear(self) -> None:
        self.read.clear()

    def __next__(self) -> str:
        line = next(self._lines)
        self._number += 1
        if isinstance(line, LongLine):
            refuse(Cause.LINE_TOO_LONG, f"{self._name}:{self._number}", str(line))
        self.read.append(line.decode("utf-8", errors="surrogateescape"))
        return self.read[-1]


def _first(texts: Iterator[str]) -> tuple[list[str], str]:
    """The blank lines at the beginning, also those of separators alone, and the first other line."""
    before = []
    for line in texts:
        if line.strip().strip(",;"):
            return before, line
        before.append(line)
    return before, ""


def _outside(line: str) -> str:
    """What of a line is outside of quotes."""
    return "".join(line.split('"')[::2])


def _separator(line: str) -> str:
    """The separator that occurs most often outside of quotes; a comma if none does."""
    return max(_SEPARATORS, key=_outside(line).count)


def _is_blank(cells: list[str], header: list[str]) -> bool:
    """Whether a row is a blank line, or has several cells and all are blank, as spreadsheets write it."""
    return not cells or ((len(cells) > 1 or not header) and not any(cell.strip() for cell in cells))


def _spaced_quote(cells: list[str], header: list[str], lines: list[str], separator: str) -> BadRow | None:
    """The problem of a cell written as `, "text"`: after a space a quote is part of the text. In a cell whose text has such
    quotes they would be doubled."""
    for place, cell in enumerate(cells):
        if cell.startswith(" ") and len(cell.strip()) > 2 and cell.strip()[0] == cell.strip()[-1] == '"':
            line = "".join(lines)
            if line.startswith(cell) or f"{separator}{cell}" in line:
                detail = "a space before the opening quote makes the quotes part of the text; remove these spaces from the file"
                return BadRow(Cause.BAD_CSV, detail, field=header[place] if place < len(header) else "")
    return None


def _header(name: str, line: int, cells: list[str]) -> list[str]:
    header = [cell.strip() for cell in cells]
    if "" in header and header.index("") == 0 and len(header) > 1:
        # `pandas.DataFrame.to_csv` writes row numbers without a name.
        header[0] = "index" if "index" not in header else "row number"
    for number, cell in enumerate(header, 1):
        if (damage := _damage(cell, f"name of column {number}")) is not None:
            refuse(damage.cause, f"{name}:{line}", f"{damage.field}: {damage.detail}")
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
        if (damage := _damage(cell, column)) is not None:
            return damage
        try:
            row[column] = CsvText(cell) if (messages := messages_in(cell, column)) is None else messages
        except BadRow as problem:
            return problem
    return row


def _damage(cell: str, field: str) -> BadRow | None:
    if (nul := cell.find("\0")) >= 0:
        return BadRow(Cause.NUL, f"NUL at character {nul} of the cell", field=field)
    foreign = next((character for character in cell if "\udc80" <= character <= "\udcff"), None)
    if foreign is None:
        return None
    detail = f"byte {ord(foreign) - 0xDC00:#04x} is not UTF-8; save the file as UTF-8 (in Excel: 'CSV UTF-8')"
    return BadRow(Cause.INVALID_UTF8, detail, field=field)


def _refuse_quotes(name: str, line: int, error: csv.Error) -> NoReturn:
    if "field larger" in str(error) or "unexpected end of data" in str(error):
        what = 'a quote (") opens in this row and is never closed'
    elif "new-line character" in str(error):
        detail = "a carriage return (CR) without LF is not read as a line end; save the file with line ends LF or CR LF"
        refuse(Cause.BAD_CSV, f"{name}:{line}", f"{detail}, and cells with line breaks in quotes")
    else:
        what = f"quotes are wrong in this row ({error})"
    remedy = 'a cell with a quote, a separator or a line break stands in quotes, and a quote inside is doubled ("")'
    refuse(Cause.BAD_CSV, f"{name}:{line}", f"{what}; {remedy}")
