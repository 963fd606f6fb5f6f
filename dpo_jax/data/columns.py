"""Typed, checked access to the columns of a row."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any, Final, Literal

from dpo_jax.data.pairs import BadRow, Cause

Row = Mapping[str, Any]
ColumnType = Literal["text", "number", "numbers", "other"]
"""The type of a parquet column, as far as it matters here. Truth values count as numbers; "numbers" are lists of them."""
Columns = Callable[[Sequence[str], Mapping[str, ColumnType]], Collection[str]]
"""(names of all columns, their types) -> names of the columns to read. "info.title" is a field inside a column."""

_LISTED = 20  # names in a message


class _Unread(enum.Enum):
    UNREAD = "unread"


UNREAD: Final = _Unread.UNREAD
"""The value of a column that was not decoded because the format does not read it."""


class CsvText(str):
    """A cell of a CSV file: a text, and also a number or a truth value where a format reads one."""

    __slots__ = ()


CsvText.__name__ = "str"  # messages name the types of values


def shown_names(names: Iterable[str]) -> str:
    """Quoted column names for a message: the first few, each shortened."""
    names = list(names)
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(repr(name[:60]) for name in names[:_LISTED]) + more or "no columns"


def column(row: Row, field: str, *, inside: str = "") -> Any:
    """The value in a column, of any type. Raises `BadRow` if there is no such column. `inside`: path to `row`, for the
    message."""
    if field not in row:
        raise BadRow(Cause.MISSING_COLUMN, f"the row has {shown_names(row)}", field=inside + field)
    if row[field] is UNREAD:
        detail = "not read, because the columns of its file fit another format: name the format with --data.format"
        raise BadRow(Cause.MISSING_COLUMN, detail, field=inside + field)
    return row[field]


def text(row: Row, field: str, *, inside: str = "") -> str:
    """The text in a column. Raises `BadRow` if it is missing, not a text, or contains what no tokenizer accepts."""
    value = column(row, field, inside=inside)
    if isinstance(value, float) and math.isnan(value):
        raise BadRow(Cause.NAN, "expected a string, got NaN", field=inside + field)
    if not isinstance(value, str):
        raise BadRow(Cause.WRONG_TYPE, f"expected a string, got {type(value).__name__}", field=inside + field)
    check_text(value, field=inside + field)
    return str(value)


def truth(row: Row, field: str) -> bool:
    """The truth value in a column: true or false, or 1 or 0. Raises `BadRow` for anything else."""
    value = column(row, field)
    if isinstance(value, CsvText):
        value = {"true": True, "false": False}.get(value.strip().lower(), value)
    elif isinstance(value, str):
        raise BadRow(Cause.WRONG_TYPE, f"expected true or false, got the text {value[:40]!r}", field=field)
    try:
        found = value if isinstance(value, bool) else number(row, field)
    except BadRow as problem:
        if not isinstance(value, CsvText) or problem.cause != Cause.WRONG_TYPE:
            raise
        raise BadRow(problem.cause, f"expected true, false, 1 or 0, got {value[:40]!r}", field=field) from None
    if found not in (0, 1):
        zero = "; write 0 for false" if found == -1 else ""
        raise BadRow(Cause.OUT_OF_RANGE, f"expected true, false, 1 or 0, got {found:g}{zero}", field=field)
    return bool(found)


def check_text(value: str, *, field: str) -> None:
    """Raises `BadRow` for a lone surrogate (JSON's `"\\ud800"`), which neither UTF-8 nor any tokenizer can encode.

    NUL is allowed: a byte-level policy can write it. Zero bytes in a text file are damage (`files`).
    """
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow(Cause.INVALID_UTF8, f"lone surrogate at character {error.start}", field=field) from None


def number(row: Row, field: str, *, inside: str = "") -> float:
    """The number in a column. Raises `BadRow` unless it is finite."""
    value = column(row, field, inside=inside)
    if isinstance(value, Decimal):  # from parquet
        value = float(value)
    if isinstance(value, CsvText):
        try:
            value = float(value)
        except ValueError:
            raise BadRow(Cause.WRONG_TYPE, f"expected a number, got {value[:40]!r}", field=inside + field) from None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRow(Cause.WRONG_TYPE, f"expected a number, got {type(value).__name__}", field=inside + field)
    if isinstance(value, int) and abs(value) >= 2**1023:
        raise BadRow(Cause.OUT_OF_RANGE, "too large a number", field=inside + field)
    if not math.isfinite(value):
        raise BadRow(Cause.NAN, f"expected a finite number, got {value}", field=inside + field)
    return value


def without_nulls(value: Any) -> Any:
    """A nested value without null keys: Arrow (parquet, `datasets`) gives every object the union of the column's keys."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value
