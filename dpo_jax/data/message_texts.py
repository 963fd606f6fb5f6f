"""Messages that are stored as a text: JSON, as in CSV files and some exports, or Python's notation, which is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from dpo_jax.data.columns import CsvText, Row
from dpo_jax.data.pairs import BadRow, Cause
from dpo_jax.untrusted import TooDeep, parse_json

NOTE = "messages that are stored as JSON text are read as messages"
_TURNS = ("prompt", "chosen", "rejected", "completion", "completions", "messages")  # columns that may hold messages
_LONGEST = 32767  # characters of a cell in Excel
_ROLES = r"(?:system|user|assistant|tool|human|gpt)"
_PYTHON = re.compile(rf"\s*+(?:\[\s*+\{{\s*+'(?:role|content)'\s*+:|\[?+\s*+\{{\s*+'(?:role|from)'\s*+:\s*+'{_ROLES}')")
_SAID = re.compile(r"'(?:content|value|tool_calls)'\s*+:")
_JSON = re.compile(r'\s*+\[?+\s*+\{\s*+"')
_MESSAGES = re.compile(rf'\s*+\[\s*+\{{\s*+"(?:role|from)"\s*+:\s*+"{_ROLES}"')


def with_messages(row: Row) -> Row:
    """The row with lists of messages for the texts that are such lists in JSON; the same row if there are none.

    Cells of CSV files were converted when they were read. Raises `BadRow` as `messages_in` does.
    """
    found: dict[str, Any] = {}
    for name in _TURNS:
        value = row.get(name)
        if name == "completions" and isinstance(value, list):
            items = [_as_messages(item, f"{name}.{place}") for place, item in enumerate(value)]
            changed = any(item is not before for item, before in zip(items, value, strict=True))
            found |= {name: items} if changed else {}
        elif (messages := _as_messages(value, name)) is not value:
            found[name] = messages
    return {**row, **found} if found else row


def _as_messages(value: Any, field: str) -> Any:
    if not isinstance(value, str) or not (value[:1] == "[" or value[:1].isspace()):  # of every row: no copies of long texts
        return value
    if isinstance(value, CsvText) or value.lstrip()[:1] != "[":
        return value
    if _PYTHON.match(value) and not (_SAID.search(value) and re.search(r"\}\s*\]\s*$", value[-99:])):
        return value  # an answer that only begins like messages
    messages = messages_in(value, field)
    return value if messages is None else messages


def messages_in(text: str, field: str) -> list[Any] | None:
    """The messages that a text holds as JSON, a list or one message; None for any other text.

    Raises `BadRow` for messages in Python's notation, and for messages that are not valid JSON, such as cut ones.
    """
    if _PYTHON.match(text):
        detail = "messages in Python's notation, which cannot be read reliably; save them as lists in JSON Lines or parquet"
        raise BadRow(Cause.WRONG_TYPE, detail, field=field)
    if not _JSON.match(text):
        return None
    try:
        found = parse_json(text)
    except (ValueError, TooDeep, RecursionError) as error:
        more = isinstance(error, json.JSONDecodeError) and error.msg.startswith("Extra data")  # after a whole list
        if more or not _MESSAGES.match(text):
            return None
        cut = f"; a spreadsheet cuts cells at {_LONGEST:,} characters" if len(text) == _LONGEST else ""
        raise BadRow(Cause.INVALID_JSON, f"messages must be valid JSON: {error}{cut}", field=field) from None
    if isinstance(found, Mapping):
        return [found] if found.keys() >= {"role", "content"} else None
    return found if all(isinstance(item, Mapping) and _is_message(item) for item in found) else None


def _is_message(item: Mapping[str, Any]) -> bool:
    return ("role" in item and bool(item.keys() & {"content", "tool_calls"})) or item.keys() >= {"from", "value"}
