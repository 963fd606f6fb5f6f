"""What stands beside the columns that a format reads: columns that must be read or set aside, and others that a note names."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Collection, Mapping, Sequence
from decimal import Decimal
from typing import Any, NamedTuple

from dpo_jax.data.column_map import ColumnMap
from dpo_jax.data.columns import ColumnType, Row, number, shown_names
from dpo_jax.data.conversations import text_of
from dpo_jax.data.format_table import FORMATS
from dpo_jax.data.pairs import BadRow
from dpo_jax.data.rankings import is_object
from dpo_jax.data.unread import (
    CHOSEN,
    CONTEXT,
    OTHER_SIDES,
    PROMPT,
    REJECTED,
    is_about,
    is_filled,
    is_implicit,
    is_messages,
    is_system,
    option_of,
    prompts_and_systems,
    refusal,
    unread,
    words_of,
)

_PARTS = {*PROMPT, "functions", "prefix", "steps", "documents"}
_COPIES = {"messages", "conversation", "conversations"}  # mostly of the whole: not decoded from parquet
_SCORES = {"score", "scores", "rating", "ratings", "reward", "rewards"}
_COUNTS = {"id", "ids", "idx", "num", "count", "counts", "length", "lengths", "len", "tokens", "index", "seed", "seeds"}


class Unread(NamedTuple):
    """Columns of a row that its format does not read although they may matter, and the message that says how to read them."""

    names: list[str]
    detail: str


def unread_columns(row: Row, format: str, mapped: ColumnMap, no_orders: Collection[str] = ()) -> Unread | None:
    """Columns of a mapped row that may hold the prompt, a system text or the order of a ranking; None if there are none.

    The columns `no_orders` do not order a ranking.
    """
    if names := unread(row, format, mapped):
        return Unread(names, refusal(names, row, format, mapped))
    if format == "ranked" and (names := [name for name in _orders(row, mapped) if name not in no_orders]):
        return Unread(names, _order_refusal(names, row, mapped))
    return None


def lists_of_other_lengths(rows: Sequence[Row]) -> set[str]:
    """Columns whose lists have another length than the completions in at least half of `rows`: they do not order these."""
    alike: dict[str, list[bool]] = {}
    for row in rows:
        several = row.get("completions")
        if not isinstance(several, list):
            continue
        for name, value in row.items():
            if isinstance(value, list) and value:
                alike.setdefault(name, []).append(len(value) == len(several))
    return {name for name, found in alike.items() if 2 * sum(found) <= len(found)}


def suspects(names: Sequence[str], types: Mapping[str, ColumnType], format: str) -> list[str]:
    """The columns of a file that must be decoded to know what stands beside the columns that `format` reads."""
    orders = [name for name in names if types.get(name) == "numbers"] if format == "ranked" else []
    parts = [name for name in names if _belongs(name, format) and not _COPIES & {*words_of(name)}]
    scores = [name for pair in _scores(tuple(names), format) for name in pair]
    return list(dict.fromkeys([*prompts_and_systems(names, types, format), *orders, *parts, *scores]))


def notes_on(row: Row, format: str, mapped: ColumnMap) -> list[str]:
    """Notes on a mapped row: columns that may belong to its prompt, and scores that contradict its preference."""
    notes = [_prompt_note(name, row, mapped) for name in _parts_of_prompt(row, format)]
    for pair in _scores(tuple(row), format):
        with contextlib.suppress(BadRow):
            better, worse = (number(row, name) for name in pair)
            if better <= worse:
                told = (
                    "both completions have the same score"
                    if better == worse
                    else "the rejected completion has the higher score"
                )
                notes.append(f"{told} ({', '.join(pair)})")
    return notes


def _parts_of_prompt(row: Row, format: str) -> list[str]:
    """Columns whose names or messages suggest a part of the prompt, and that hold more than what is read."""
    named, others = _candidates(tuple(row), format)
    found = [name for name in named if is_filled(row[name])] + [name for name in others if is_messages(row[name])]
    if not found or not is_filled(row.get("prompt")):
        return []
    prompt = "\n".join(_texts(row["prompt"])).strip()
    more = {name: [text.strip() for text in _texts(row[name]) if prompt not in text] for name in found}
    if not any(more.values()):  # mostly so, and the texts below may be long
        return []
    said = "\n".join(text for name in FORMATS[format].reads if name in row for text in _texts(row[name]))
    return [name for name, texts in more.items() if not all(text in said for text in texts)]


@functools.lru_cache(maxsize=2**10)  # called for every row
def _candidates(names: tuple[str, ...], format: str) -> tuple[list[str], list[str]]:
    """The columns that are named like a part of the prompt, and others that may hold messages, among those not read."""
    reads = FORMATS[format].reads
    named = [name for name in names if _belongs(name, format)]
    others = [name for name in names if "prompt" in reads and name not in (*reads, *named) and not is_about(name)]
    return named, others


def _belongs(name: str, format: str) -> bool:
    """Whether a column that `format` does not read is named like a part of the prompt: `context`, `initial_reason_steps`."""
    reads, words = FORMATS[format].reads, words_of(name)
    if "prompt" not in reads or name in reads or is_system(name) or not _PARTS & {*words}:
        return False
    return not is_about(name) or (words[-1] in _PARTS and not OTHER_SIDES & {*words})


def _prompt_note(name: str, row: Row, mapped: ColumnMap) -> str:
    told = f"{name[:60]!r} may belong to the prompt, but is left out"
    whole = not is_implicit(row)  # then a text prompt is not used
    if whole or not isinstance(row[name], str) or not isinstance(row["prompt"], str) or set(",+") & set(name):
        return f"{told}; to read it, give messages"
    prompt = mapped.columns.get("prompt", ("prompt",))
    joined = (name, *prompt) if CONTEXT & {*words_of(name)} else (*prompt, name)
    return f"{told}; {option_of(ColumnMap({**mapped.columns, 'prompt': joined}), {})} reads it"


def _texts(value: Any) -> list[str]:
    """Every text inside a value, without the names of fields and of roles."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        if "role" in value or "from" in value:
            content = value.get("content")
            return [content if isinstance(content, str) else text_of(value)]
        value = [*value.values()]
    return [text for item in value for text in _texts(item)] if isinstance(value, list) else []


@functools.lru_cache(maxsize=2**10)  # called for every row
def _scores(names: tuple[str, ...], format: str) -> list[tuple[str, str]]:
    """The pairs of columns with a score of chosen and of rejected: `score_chosen` and `score_rejected`."""
    if not {"chosen", "rejected"} <= FORMATS[format].reads.keys():
        return []
    sides: dict[tuple[str, ...], dict[bool, str]] = {}
    for name in names:
        told = words_of(name)
        if _SCORES & {*told} and (CHOSEN & {*told} or REJECTED & {*told}):
            key = tuple(word for word in told if word not in CHOSEN | REJECTED)
            sides.setdefault(key, {})[bool(CHOSEN & {*told})] = name
    return [(found[True], found[False]) for found in sides.values() if len(found) == 2]


def _orders(row: Row, mapped: ColumnMap) -> list[str]:
    """Columns with one number or truth value for each completion, if nothing says in which order the completions are."""
    several, known = row.get("completions"), ("ranks", "scores")
    if not isinstance(several, list) or any(map(is_object, several)):  # such objects have their own rank or score
        return []
    if any(row.get(name) is not None or name in mapped.columns for name in known):
        return []
    others = (name for name in row if name not in FORMATS["ranked"].reads and not _COUNTS & {*words_of(name)})
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
