"""What stands beside the columns that a format reads: columns that must be read or set aside before a row can be used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any, NamedTuple

from dpo_jax.data.column_map import ColumnMap
from dpo_jax.data.columns import ColumnType, Row, shown_names
from dpo_jax.data.format_table import FORMATS
from dpo_jax.data.unread import option_of, prompts_and_systems, refusal, unread, words_of


class Unread(NamedTuple):
    """Columns of a row that its format does not read although they may matter, and the message that says how to read them."""

    names: list[str]
    detail: str


def unread_columns(row: Row, format: str, mapped: ColumnMap) -> Unread | None:
    """Columns of a mapped row that may hold the prompt, a system text or the order of a ranking; None if there are none."""
    if names := unread(row, format, mapped):
        return Unread(names, refusal(names, row, format, mapped))
    if format == "ranked" and (names := _orders(row, mapped)):
        return Unread(names, _order_refusal(names, row, mapped))
    return None


def suspects(names: Sequence[str], types: Mapping[str, ColumnType], format: str) -> list[str]:
    """The columns of a file that must be decoded to know what stands beside the columns that `format` reads."""
    orders = [name for name in names if types.get(name) == "numbers"] if format == "ranked" else []
    return list(dict.fromkeys([*prompts_and_systems(names, types, format), *orders]))


def _orders(row: Row, mapped: ColumnMap) -> list[str]:
    """Columns with one number or truth value for each completion, if nothing says in which order the completions are."""
    several, known = row.get("completions"), ("ranks", "scores")
    if not isinstance(several, list) or any(row.get(name) is not None or name in mapped.columns for name in known):
        return []
    others = (name for name in row if name not in FORMATS["ranked"].reads)
    return [name for name in others if _is_one_each(row[name], len(several))]


def _is_one_each(value: Any, count: int) -> bool:
    return isinstance(value, list) and len(value) == count > 0 and all(isinstance(one, int | float | Decimal) for one in value)


def _order_refusal(names: Sequence[str], row: Row, mapped: ColumnMap) -> str:
    by_order = f"{option_of(mapped, {'scores': ''})} takes the completions as they stand, best first"
    if all(isinstance(one, bool) for name in names for one in row[name]):
        steps = "true or false for each completion, as for the steps of TRL's stepwise supervision, which are no ranking"
        return f"{shown_names(names)}: {steps}; {by_order}"
    key = "ranks" if {"rank", "ranks", "ranking", "order"} & {*words_of(names[0])} else "scores"
    option = "rename the column to read it" if set(",+") & set(names[0]) else f"{option_of(mapped, {key: names[0]})} reads it"
    means = "1 is the best" if key == "ranks" else "more is better"
    return f"not read, and may rank the completions: {shown_names(names)}; {option} ({means}), {by_order}"
