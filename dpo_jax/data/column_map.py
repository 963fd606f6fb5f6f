"""Column maps (`data.columns`): from the column names that a format reads to those of a file.

    prompt=instruction+input,system=

The prompt is the text in `instruction` and, on the next line, the text in `input`; `system=` deliberately reads no column.
"""

from __future__ import annotations

import dataclasses
import difflib
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from dpo_jax.data.columns import Row, check_text, shown_names
from dpo_jax.data.format_table import FORMATS
from dpo_jax.data.pairs import BadRow, Cause, refuse

HOW = "write it as prompt=question,chosen=answer_a; texts are joined by prompt=instruction+input, and prompt= reads none"


@dataclasses.dataclass(frozen=True)
class ColumnMap:
    """`columns["prompt"]`: the columns of the file that are read as `prompt`, joined by newlines; an empty tuple means none."""

    columns: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, value: str | Mapping[str, str] | None) -> ColumnMap:
        """From a text as above, or a mapping such as `{"prompt": "instruction+input"}`. Raises `ValueError` with the remedy."""
        pairs = [tuple(part.partition("=")[::2]) for part in value.split(",")] if isinstance(value, str) else value or {}
        if isinstance(value, str) and (bad := next((part for part in value.split(",") if "=" not in part), None)) is not None:
            raise ValueError(f"{bad.strip()!r} has no =; {HOW}")
        columns: dict[str, tuple[str, ...]] = {}
        for key, names in pairs.items() if isinstance(pairs, Mapping) else pairs:
            if key.strip() in columns:
                raise ValueError(f"{key.strip()} is mapped twice; keep one of them")
            parts = [name.strip() for name in (names or "").split("+")]
            if parts != [""] and "" in parts:
                raise ValueError(f"{names!r} has a + without a name next to it; {HOW}")
            columns[key.strip()] = tuple(name for name in parts if name)
        return cls(columns)

    def __str__(self) -> str:
        return ",".join(f"{key}={'+'.join(names)}" for key, names in self.columns.items())

    def check(self, format: str) -> None:
        """Raises `ValueError` for a name that `format` (auto: any format) does not read. Every format takes `system=`."""
        formats = [FORMATS[format]] if format in FORMATS else list(FORMATS.values())
        known = list(dict.fromkeys(name.partition(".")[0] for one in formats for name in one.reads))
        for key, names in self.columns.items():
            if key not in known and (names or key != "system"):
                whose = f"format {format} reads ({', '.join(known)})" if format in FORMATS else "any format reads"
                close = difflib.get_close_matches(key, known, n=1)
                raise ValueError(f"{key!r} is not a column that {whose}; " + (f"did you mean {close[0]!r}?" if close else HOW))

    @property
    def _sources(self) -> set[str]:
        return {name for names in self.columns.values() for name in names}

    def names(self, where: str, names: Sequence[str]) -> list[str]:
        """The column names of a file after mapping. Raises `DataError` if a mapped column is missing."""
        for key, sources in self.columns.items():
            for source in sources:
                if source not in names and source.partition(".")[0] not in names:
                    detail = f"no column {source!r}, which --data.columns reads as {key}: the file has {shown_names(names)}"
                    refuse(Cause.MISSING_COLUMN, where, detail)
        kept = [name for name in names if name not in self._sources and name not in self.columns]
        return [*(key for key, sources in self.columns.items() if sources), *kept]

    def sources_of(self, wanted: Iterable[str]) -> list[str]:
        """The columns of the file that are read for the columns `wanted` of a format, such as "prompt" and "info.title"."""
        found: dict[str, None] = {}
        for name in wanted:
            found |= dict.fromkeys(self.columns.get(name.partition(".")[0], (name,)))
        return list(found)

    def row(self, row: Row) -> Row:
        """The row with the format's column names; other columns stay. Raises `BadRow` if a mapped column is missing."""
        if not self.columns:
            return row
        sources = self._sources
        kept = {name: value for name, value in row.items() if name not in sources and name not in self.columns}
        return kept | {key: _joined(row, names, key) for key, names in self.columns.items() if names}

    def named(self, problem: BadRow) -> BadRow:
        """The problem of a mapped row, naming the column as the file does, with its remedy as an option."""
        head = problem.field.partition(".")[0]
        names = self.columns.get(head, (head,))
        remedy = self._remedy(*problem.remedy) if problem.remedy else ""
        if names in ((), (head,)) and not remedy:
            return problem
        source = "" if names in ((), (head,)) else f" (read from {shown_names(names)})"
        return BadRow(problem.cause, f"{problem.detail}{source}{remedy}", field=problem.field)

    def _remedy(self, what: str, more: Mapping[str, str]) -> str:
        """A remedy with the option that keeps what is mapped; "" if no option names the columns."""
        columns = dict(self.columns)
        for key, name in more.items():
            source, inside = self.columns.get(key, (key,)), name.removeprefix(key)  # ".0" of chosen=good
            if name and (len(source) != 1 or set(",+") & set(source[0])):
                return ""
            columns[key] = (f"{source[0]}{inside}",) if name else ()
        return f"; {what}: --data.columns {shlex.quote(str(ColumnMap(columns)))}"


def _joined(row: Row, names: Collection[str], key: str) -> Any:
    values = {name: _value(row, name, key) for name in names}
    if len(values) == 1:
        [value] = values.values()
        return value
    for name, value in values.items():
        if value is not None and not isinstance(value, str):
            raise BadRow(Cause.WRONG_TYPE, f"expected a string to join, got {type(value).__name__}", field=name)
        check_text(value or "", field=name)
    return "\n".join(value for value in values.values() if value and value.strip())


def _value(row: Row, name: str, key: str) -> Any:
    """The value under a name of a row; "info.title" and "output.0" are inside a column. Raises `BadRow` if there is none."""
    value, rest = row, name
    while rest:
        head, dot, more = rest.partition(".")
        if isinstance(value, Mapping) and rest in value:  # a name may contain a dot
            return value[rest]
        if isinstance(value, Mapping) and dot and head in value:
            value, rest = value[head], more
        elif isinstance(value, list) and head.isascii() and head.isdecimal() and len(head) < 6 and int(head) < len(value):
            value, rest = value[int(head)], more
        else:
            has = shown_names(value) if isinstance(value, Mapping) else f"a {type(value).__name__}"
            raise BadRow(Cause.MISSING_COLUMN, f"--data.columns reads it as {key}, but here is {has}", field=name)
    return value
