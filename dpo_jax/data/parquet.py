"""Reader of parquet rows. Only the requested columns are decoded; the others may contain values that Python cannot
represent."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from dpo_jax.data.columns import UNREAD, Columns, ColumnType, shown_names, without_nulls
from dpo_jax.data.pairs import BadRow, Cause, Place, refuse
from dpo_jax.untrusted import LIMITS, cause_of

_BATCH = 1024  # rows,
_MEMORY = 2**28  # and most bytes that they may unpack to
_FEW = 16  # rows per batch if a row group unpacks to more
_PLAIN = 2**20  # usual limit of a dictionary in bytes: writers abandon a larger one
Row = dict[str, Any]


def parquet_rows(name: str, path: Path, *, columns: Columns | None = None) -> Iterator[tuple[str, Row | BadRow]]:
    """The rows of a parquet file as `(where, row)`, `where` being "name:row" counted from 1.

    `columns` chooses from all column names; "info.title" is a field inside a column. Other columns are `UNREAD`. A cell that
    cannot be decoded makes its row a `BadRow` naming the column. Raises `DataError` for a damaged file.
    """
    number = 0
    for batch, unread in _batches(name, path, columns):
        large = batch.nbytes > LIMITS.line_mb * 2**20  # otherwise no row can be
        rows = None if large else _rows(batch, unread)
        for index in range(batch.num_rows):
            number += 1
            size = sum(_size(values, index) for values in batch.columns) if large else 0
            yield f"{name}:{number}", rows[index] if rows else _too_long(size) or _row(batch, index, unread)


def _size(values: Any, index: int) -> int:
    """Unpacked bytes of one value."""
    if hasattr(values, "dictionary"):
        place = values.indices[index].as_py()
        return 0 if place is None else _size(values.dictionary, place)
    return values.slice(index, 1).nbytes


def _too_long(size: int) -> BadRow | None:
    """The `BadRow` for a row of `size` bytes, if above the limit of a text line: a small file may unpack to any size."""
    if size <= LIMITS.line_mb * 2**20:
        return None
    return BadRow(Cause.LINE_TOO_LONG, f"a row of {size:,} bytes; {LIMITS.remedy('line_mb')}")


def declared_rows(path: Path) -> int:
    """The row count that a parquet file declares. Raises `DataError` for a damaged file."""
    with Place(str(path), Cause.BAD_PARQUET, "the file is damaged or cut off").reading():
        return pq.read_metadata(path).num_rows


def _batches(name: str, path: Path, columns: Columns | None) -> Iterator[tuple[Any, Row]]:
    """The batches of the file, each with a row in which every column is `UNREAD`."""
    place = Place(name, Cause.BAD_PARQUET, "the file is damaged or cut off")
    with place.reading():
        file = _File(path, page_checksum_verification=True)
        names, types = file.columns_and_types()
        leaves = [leaf for _, leaf in _leaves(file.metadata.schema)]
    with file:
        chosen = leaves if columns is None else _chosen(columns(names, types), names, leaves)
        if not chosen:
            refuse(Cause.MISSING_COLUMN, name, f"it has no column that is read, only {shown_names(names)}")
        with place.reading():
            rows = _rows_at_a_time(file, name, path, chosen)
            for batch in file.iter_batches(batch_size=rows, columns=chosen):
                read = batch.schema.names
                if twice := [column for column in read if read.count(column) > 1]:
                    refuse(Cause.DUPLICATE_KEY, name, f"two columns are named {twice[0]!r}")
                yield batch, dict.fromkeys(names, UNREAD)
                place.number += batch.num_rows
        if place.number != file.metadata.num_rows:
            refuse(Cause.BAD_PARQUET, name, f"the file declares {file.metadata.num_rows} rows but holds {place.number}")


def _rows_at_a_time(file: pq.ParquetFile, name: str, path: Path, chosen: Collection[str]) -> int:
    """Number of rows whose unpacked size fits in memory. Equal values are stored once in a file, but separately in memory.

    Raises `DataError` if a single row may unpack to more than the limit of a line.
    """
    rows, wanted = _BATCH, [index for index, leaf in _leaves(file.metadata.schema) if leaf in chosen]
    with path.open("rb") as raw:
        for group in map(file.metadata.row_group, range(file.metadata.num_row_groups)):
            for chunk in map(group.column, wanted):
                largest = _dictionary_bytes(raw, chunk)
                # Every row has at least one value, so this bounds the values of one row.
                row = largest * (chunk.num_values - group.num_rows + 1)
                if chunk.num_values > group.num_rows and largest > _FEW * _PLAIN and (long := _too_long(row)):
                    refuse(Cause.LINE_TOO_LONG, name, long.detail)
                rows = min(rows, _MEMORY // max(1, largest, chunk.total_uncompressed_size // max(1, chunk.num_values)))
                if chunk.total_uncompressed_size > _MEMORY:
                    rows = min(rows, _FEW)
    return max(1, rows)


def _dictionary_bytes(raw: IO[bytes], chunk: Any) -> int:
    """Bytes of a column's dictionary, an upper bound for the values in it; 0 without one.

    Its page begins with the type and the unpacked size, as `PageHeader` of parquet.thrift in Thrift's compact protocol.
    """
    if not chunk.has_dictionary_page or not chunk.dictionary_page_offset:
        return 0
    raw.seek(chunk.dictionary_page_offset)
    head = raw.read(16)
    if head[:3] != b"\x15\x04\x15":  # field 1, an i32: 2, a dictionary; field 2, an i32
        return chunk.total_uncompressed_size
    size = shift = 0
    for byte in head[3:]:
        size |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            break
    return size >> 1  # zigzag


class _File(pq.ParquetFile):
    """A parquet file whose column names may not be UTF-8. Such columns are ignored."""

    def _build_nested_paths(self) -> dict[str, list[int]]:
        # pyarrow raises for an undecodable name, whichever columns are requested.
        paths = collections.defaultdict(list)
        for index, leaf in _leaves(self.reader.metadata.schema):
            paths[leaf].append(index)
        return paths

    def columns_and_types(self) -> tuple[list[str], dict[str, ColumnType]]:
        """The names of all columns, and the type of each."""
        names, types, schema = [], {}, self.schema_arrow  # which pyarrow rebuilds on each access
        for index in range(len(schema)):
            with contextlib.suppress(UnicodeDecodeError):
                field = schema.field(index)
                names.append(field.name)
                types[field.name] = _type(field.type)
        return names, types


def _type(kind: Any) -> ColumnType:
    if pa.types.is_dictionary(kind):
        return _type(kind.value_type)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return "text"
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind) or pa.types.is_boolean(kind):
        return "number"
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if lists and _type(kind.value_type) == "number":
        return "numbers"
    return "other"


def _leaves(schema: pq.ParquetSchema) -> Iterator[tuple[int, str]]:
    """Number and path, such as "answers.list.element.text", of every leaf column with a UTF-8 name."""
    for index in range(len(schema)):
        with contextlib.suppress(UnicodeDecodeError):
            yield index, schema.column(index).path


def _chosen(wanted: Collection[str], names: Collection[str], leaves: Collection[str]) -> list[str]:
    """The leaves that belong to the wanted columns and fields, such as "prompt" and "answers.text"."""
    found: dict[str, None] = {}
    for want in wanted:
        column, _, field = (want, "", "") if want in names else want.partition(".")
        others = [other for other in names if other.startswith(f"{column}.")]  # a name may hold a dot
        of_column = [
            leaf for leaf in leaves if f"{leaf}.".startswith(f"{column}.") and not any(leaf.startswith(o) for o in others)
        ]
        inside = [leaf for leaf in of_column if field in leaf.split(".")[1:]]
        found |= dict.fromkeys(inside or of_column)  # field missing: the column has another type, as its rows will say
    return list(found)


def _rows(batch: Any, unread: Row) -> list[Row] | None:
    """All rows of a batch, in half the time of `_row`; None if a cell cannot be decoded or may unpack to much more."""
    if any(getattr(values, "dictionary", values).nbytes > _PLAIN for values in batch.columns if hasattr(values, "dictionary")):
        return None
    columns = []
    for values in batch.columns:
        try:
            cells = values.to_pylist()
        except Exception:  # `_row` finds the cell
            return None
        nested = any(isinstance(cell, list | dict) for cell in cells)
        columns.append([without_nulls(cell) if isinstance(cell, list | dict) else cell for cell in cells] if nested else cells)
    names = batch.schema.names
    return [{**unread, **dict(zip(names, row, strict=True))} for row in zip(*columns, strict=True)]


def _row(batch: Any, index: int, unread: Row) -> Row | BadRow:
    row = dict(unread)
    for column, values in zip(batch.schema.names, batch.columns, strict=True):
        try:
            value = values[index].as_py()
        except UnicodeDecodeError as error:
            return BadRow(Cause.INVALID_UTF8, f"byte {error.start} of the text: {error.reason}", field=column)
        except Exception as error:  # pyarrow may raise anything for values that Python cannot represent
            return BadRow(Cause.WRONG_TYPE, f"{values.type} cannot be read: {cause_of(error)}", field=column)
        row[column] = without_nulls(value) if isinstance(value, list | dict) else value
    return row
