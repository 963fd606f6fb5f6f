"""A typed reader of one JSON object: each field is read with the type that it must have."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

from dpo_jax.untrusted import Unreadable

LARGEST = 2**31 - 1  # sizes and token ids are int32 on every device
_SMALLEST_FLOAT, _LARGEST_FLOAT = 1.2e-38, 3.4e38  # what float32 holds at full precision
_SHOWN = 80  # characters of a wrong value


class Fields:
    """The fields of an object found in `where`; errors are `Unreadable` and name file, field and value.

    A field that the object omits takes its value from `defaults`; without a default it is required. null means "none", not the
    default, as in transformers.
    """

    def __init__(self, content: Mapping[str, Any], where: str | Path, *, defaults: Mapping[str, Any] | None = None):
        self.where = where
        self.all = {**(defaults or {}), **content}

    def has(self, key: str) -> bool:
        """Whether the field has a value other than null."""
        return self.all.get(key) is not None

    def wrong(self, key: str, right: str) -> NoReturn:
        """Raises `Unreadable`: a field's value is not `right`."""
        if key not in self.all:
            raise Unreadable(f"{self.where}: {key} is missing; it must be {right}")
        raise Unreadable(f"{self.where}: {key} = {shown(self.all[key])} is not {right}")

    def size(self, key: str, default: int | None = None, *, least: int = 1, right: str = "a positive integer") -> int:
        """An integer from `least` to the largest int32; `default` if the field is absent or null."""
        value = self.all.get(key)
        value = default if value is None else value
        if type(value) is not int or value < least:
            self.wrong(key, right)
        if value > LARGEST:
            self.wrong(key, f"{right} of at most {LARGEST:,}")
        return value

    def number(self, key: str, *, least: float = _SMALLEST_FLOAT, right: str = "a number above 0") -> float:
        """A number that float32 holds, above 0 unless stated otherwise."""
        value = self.all.get(key)
        if not _is_number(value, least=least):
            self.wrong(key, right)
        return float(value)

    def optional_number(self, key: str) -> float | None:
        """A number above 0, or None."""
        return self.number(key) if self.has(key) else None

    def flag(self, key: str) -> bool:
        """true or false; null is false."""
        value = self.all.get(key)
        if value is not None and type(value) is not bool:
            self.wrong(key, "true or false")
        return bool(value)

    def text(self, key: str, default: str | None = None) -> str:
        """A text; `default` if the field is absent or null."""
        value = self.all.get(key)
        value = default if value is None else value
        if not isinstance(value, str):
            self.wrong(key, "a string")
        return value

    def texts(self, key: str) -> list[str]:
        """An array of texts."""
        value = self.all.get(key)
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            self.wrong(key, "an array of texts")
        return value

    def numbers(self, key: str) -> list[float]:
        """An array of numbers above 0."""
        value = self.all.get(key)
        if not isinstance(value, list) or not all(_is_number(x, least=_SMALLEST_FLOAT) for x in value):
            self.wrong(key, "an array of numbers above 0")
        return [float(x) for x in value]

    def part(self, key: str) -> Fields:
        """The object in a field. Absent, null and the empty object are treated alike."""
        value = {} if self.all.get(key) is None else self.all[key]
        if not isinstance(value, Mapping):
            self.wrong(key, "an object")
        return Fields(value, f"{self.where}: {key}")

    def token_ids(self, key: str) -> list[int]:
        """One token id or an array of them, as a list; empty if the field is absent or null."""
        value = self.all.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(one) is int and 0 <= one <= LARGEST for one in ids):
            self.wrong(key, "a token id or an array of them")
        return ids


def _is_number(value: Any, *, least: float) -> TypeGuard[int | float]:
    return not isinstance(value, bool) and isinstance(value, int | float) and least <= value <= _LARGEST_FLOAT


def shown(value: Any) -> str:
    """A value as written in the file, shortened if long."""
    text = json.dumps(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
