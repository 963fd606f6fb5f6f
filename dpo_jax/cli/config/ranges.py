"""Range checks that several sections share. Each yields the fields that are out of range, with the remedy."""

from __future__ import annotations

from collections.abc import Iterator

Problem = tuple[str, str]  # field, what is wrong with it and what to do


def positive(section: object, *fields: str) -> Iterator[Problem]:
    for field in fields:
        value = getattr(section, field)
        if value is not None and value <= 0:
            yield field, f"must be greater than 0, got {value}"


def not_negative(section: object, *fields: str) -> Iterator[Problem]:
    for field in fields:
        value = getattr(section, field)
        if value is not None and value < 0:
            yield field, f"must not be negative, got {value}"
