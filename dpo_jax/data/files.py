"""Readers of data files (JSON Lines, JSON arrays and CSV, also gzipped, and parquet): each row with its place, `file:line`.

A bad row is passed on as a `BadRow` and may be dropped. A bad file (truncated, not fetched, mislabeled) is always a
`DataError`, because its missing rows cannot be counted.
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import hashlib
import io
import itertools
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpo_jax.data import csv_rows
from dpo_jax.data.columns import Columns
from dpo_jax.data.pairs import BadRow, Cause, DataReport, Place, refuse
from dpo_jax.untrusted import LIMITS, BadNumber, DuplicateKey, LongLine, TooDeep, kind_of, lines_of, parse_json
from dpo_jax.writing import naming

_LINES = (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz", ".jsonlines", ".jsonlines.gz")
_JSON = (".json", ".json.gz")
SUFFIXES = (*_LINES, *_JSON, ".parquet", *csv_rows.SUFFIXES)
Row = dict[str, Any]

_LFS = b"version https://git-lfs.github.com/spec/"
_GZIP = b"\x1f\x8b"
_PARQUET = b"PAR1"
_BAD_GZIP = "the gzip stream is damaged or cut off here"
BOM = b"\xef\xbb\xbf"
_ROWS = "write one object per line (JSON Lines), or an array of objects"
_HUNTED = 2**20  # bytes; the place of a bad number is looked for in shorter lines only


def read_rows(
    name: str, path: Path, *, report: DataReport, columns: Columns | None = None
) -> Iterator[tuple[str, Row | BadRow]]:
    """The rows of one file as `(where, row)`, `where` being "name:line" counted from 1; notes and digest are added to the
    report.

    `columns`: chooses the columns of a parquet file to decode, given all names; None: all. The others are `UNREAD`. Raises
    `DataError` for a git-lfs pointer, a damaged or mislabeled file, and a file without a single row.
    """
    check_head(name, path)
    rows = 0
    if name.endswith(".parquet"):
        from dpo_jax.data.parquet import parquet_rows  # imported here: pyarrow is slow to import, and JSON Lines do not need it

        reader = parquet_rows(name, path, columns=columns)
    elif name.endswith(csv_rows.SUFFIXES):
        reader = csv_rows.csv_rows(name, _without_bom(name, _lines(name, path), report=report), report=report)
    else:
        reader = (_array_rows if is_array(name, path) else _json_rows)(name, path, report=report)
    for rows, row in enumerate(reader, 1):  # noqa: B007 (read after the loop)
        report.rows += 1
        yield row
    if rows == 0:
        refuse(Cause.NO_ROWS, name, "the file has no rows")
    report.files.append(fingerprint(name, path))


def fingerprint(name: str, path: Path) -> dict[str, Any]:
    """The entry of a file in a report: {"path", "bytes", "sha256"}."""
    with path.open("rb") as file:
        return {"path": name, "bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def check_head(name: str, path: Path) -> None:
    """Raises `DataError` if the first bytes of a file show a git-lfs pointer or contradict its name."""
    with naming(path), path.open("rb") as file:
        head = file.read(len(_LFS))
    if head.startswith(_LFS):
        refuse(Cause.GIT_LFS_POINTER, name, "a git-lfs pointer, not the data; fetch it with `git lfs pull`")
    if name.endswith(".gz") != head.startswith(_GZIP):
        refuse(Cause.BAD_GZIP, name, "named .gz, but not gzip" if name.endswith(".gz") else "gzip, but not named .gz")
    if name.endswith(".parquet") != head.startswith(_PARQUET):
        refuse(Cause.BAD_PARQUET, name, "named .parquet and is not, or the other way round")
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        refuse(Cause.INVALID_UTF8, name, "UTF-16; save it as UTF-8")
    if name.endswith(".json.gz"):
        head = _beginning(name, path, len(_LFS))
    head = head.removeprefix(BOM).lstrip()
    if name.endswith(_JSON) and re.match(rb"\{[ \t\r]*\n", head):
        refuse(Cause.BAD_LAYOUT, name, f"a JSON object over several lines; {_ROWS}")


def is_array(name: str, path: Path) -> bool:
    """Whether a file is one JSON array. In a .jsonl file it must begin with an object, as no row begins with a bracket."""
    if not name.endswith((*_LINES, *_JSON)):
        return False
    head = _beginning(name, path, 1024).removeprefix(BOM).lstrip()
    return head.startswith(b"[") and (name.endswith(_JSON) or head[1:].lstrip()[:1] == b"{")


def _beginning(name: str, path: Path, most: int) -> bytes:
    """The first bytes of a file, decompressed; at most so many."""
    with Place(name, Cause.BAD_GZIP, _BAD_GZIP).reading(), (gzip.open if name.endswith(".gz") else open)(path, "rb") as file:
        return file.read(most)


def _array_rows(name: str, path: Path, *, report: DataReport) -> Iterator[tuple[str, Row | BadRow]]:
    """The rows of a file that is one JSON array, read whole. Places count its elements from 1."""
    content = _beginning(name, path, LIMITS.file_mb * 2**20 + 1)
    LIMITS.check("file_mb", len(content), name, what="bytes, or more, in one JSON array")
    try:
        text = content.removeprefix(BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        refuse(Cause.INVALID_UTF8, name, f"byte {error.start}: {error.reason}")
    report.notes.append(f"{name}: one JSON array; places count its elements")
    number, at = 0, _after_blanks(text, text.index("[") + 1)
    while text[at : at + 1] != "]":
        number += 1
        where = f"{name}:{number}"
        try:
            _, end = json.JSONDecoder().raw_decode(text, at)  # for its end; `_parse` reads it as strictly as a line
        except (ValueError, RecursionError) as error:
            refuse(Cause.INVALID_JSON, where, f"the element that begins in line {text.count(chr(10), 0, at) + 1}: {error}")
        yield where, _parse(text[at:end].encode())
        comma = _after_blanks(text, end)
        at = _after_blanks(text, comma + 1) if text[comma : comma + 1] == "," else comma
        if (at == comma) != (text[at : at + 1] == "]"):
            refuse(Cause.INVALID_JSON, where, "after this element a comma and another one, or the end of the array, is needed")
    if text[at + 1 :].strip():
        refuse(Cause.INVALID_JSON, name, "there is more after the end of the array")


def _after_blanks(text: str, at: int) -> int:
    while text[at : at + 1] in (" ", "\t", "\r", "\n"):
        at += 1
    return at


def _json_rows(name: str, path: Path, *, report: DataReport) -> Iterator[tuple[str, Row | BadRow]]:
    blank = 0
    for number, line in enumerate(_without_bom(name, _lines(name, path), report=report), 1):
        if isinstance(line, LongLine):
            yield f"{name}:{number}", BadRow(Cause.LINE_TOO_LONG, str(line))
        elif line.strip():
            row = _parse(line)
            alone = number == 1 and name.endswith(_JSON) and isinstance(row, dict) and _is_table(row)
            if alone and not _has_more_lines(name, path):
                refuse(Cause.BAD_LAYOUT, name, f"one object holds all rows; {_ROWS} (pandas: to_json(PATH, orient='records'))")
            yield f"{name}:{number}", row
        else:
            blank += 1
    if blank:
        report.notes.append(f"{name}: {blank} blank lines skipped")


def _has_more_lines(name: str, path: Path) -> bool:
    """Whether a file has at least two lines that are not blank."""
    filled = (line for line in _lines(name, path) if isinstance(line, LongLine) or line.strip())
    return len(list(itertools.islice(filled, 2))) > 1


def _is_table(row: Row) -> bool:
    """Whether an object holds a list of rows, or a list for each column, as `to_dict("list")` of pandas gives it."""
    firsts = [value[0] if isinstance(value, list) and value else None for value in row.values()]
    messages = any(isinstance(first, dict) and {"role", "from"} & first.keys() for first in firsts)
    return bool(firsts) and None not in firsts and not messages


def _without_bom(name: str, lines: Iterator[bytes | LongLine], *, report: DataReport) -> Iterator[bytes | LongLine]:
    for number, line in enumerate(lines):
        if number == 0 and isinstance(line, bytes) and line.startswith(BOM):
            report.notes.append(f"{name}: byte order mark skipped")
            line = line[len(BOM) :]
        yield line


def _lines(name: str, path: Path) -> Iterator[bytes | LongLine]:
    place = Place(name, Cause.BAD_GZIP, _BAD_GZIP)
    with place.reading(), path.open("rb") as packed:
        # GzipFile's own readline is in Python, the buffer's is in C.
        file = io.BufferedReader(gzip.GzipFile(fileobj=packed), 2**17) if name.endswith(".gz") else packed
        for line in lines_of(file):
            place.number += 1
            yield line


def _parse(line: bytes) -> Row | BadRow:
    """The JSON object in a line, or the `BadRow` that says what is wrong with it."""
    if (nul := line.find(b"\0")) >= 0:
        return BadRow(Cause.NUL, f"NUL at byte {nul} of the line")
    try:
        row = parse_json(line, nan=True)  # refused only in a column that is read: `columns.number`, `columns.text`
    except UnicodeDecodeError as error:
        place = f"byte {line[error.start]:#04x} at byte {error.start} of the line"
        return BadRow(Cause.INVALID_UTF8, f"{place}: {error.reason}; save the file as UTF-8")
    except DuplicateKey as error:
        return BadRow(Cause.DUPLICATE_KEY, "the key occurs twice", field=error.key)
    except BadNumber as error:
        return BadRow(Cause.NAN, f"{error}", field=_place_of_bad_number(line))
    except (TooDeep, RecursionError) as error:
        return BadRow(Cause.TOO_DEEP, str(error))
    except ValueError as error:
        cut = "" if line.endswith(b"\n") else " (last line, without a newline: is the file cut off?)"
        return BadRow(Cause.INVALID_JSON, f"{error}{cut}")
    if not isinstance(row, dict):
        return BadRow(Cause.WRONG_TYPE, f"expected a JSON object, got {kind_of(row)}")
    return row


def _place_of_bad_number(line: bytes) -> str:
    """The path to the first number too large for a float, such as "answers.0.pm_score"; "" for a long or invalid line."""
    stack: list[tuple[str, Any]] = []
    if len(line) > _HUNTED:
        return ""
    with contextlib.suppress(ValueError):
        stack.append(("", json.loads(line, parse_int=float)))
    while stack:
        path, value = stack.pop()
        if isinstance(value, float) and not math.isfinite(value):
            return path
        children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        stack += [(f"{path}.{key}" if path else str(key), child) for key, child in reversed(list(children))]
    return ""
