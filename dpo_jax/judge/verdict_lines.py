"""Line format of a judge's log: allowed records, and a checksum that binds each line to its log and position.

    {"line": 3, "sent": "5e1f...", "tokens_in": 300, "tokens_out": 200, "check": "0123456789abcdef"}

The checksum covers the bytes before it, the number included, and the settings of the log. Each line is thus checked on its
own: a damaged line does not affect the others, and a duplicated, removed or foreign line is noticed. It is not a signature:
whoever changes a line on purpose can compute a new checksum.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dpo_jax.untrusted import Unreadable, parse_object

FAILURES = {  # why an answer is not a verdict
    "content_filter": "held back by the endpoint's filter",
    "empty": "empty",
    "format": "not in the format that was asked for",
    "length": "cut off at judge.max_tokens",
    "refusal": "refused",
}
MOST_TOKENS = 10**12  # of one request
MOST_DAMAGED = 100_000  # lines; a file with more is not a log, and listing them all would take minutes
_COUNTS = {"tokens_in": int, "tokens_out": int}
_TEXTS = {"failure": str, "text": str, "model": str}
GRAMMAR: dict[str, dict[str, type | tuple[type, ...]]] = {
    "settings": {"settings": dict},
    "sent": {"sent": str, **_COUNTS},
    "fault": {"fault": str, "cause": str, **_COUNTS},
    "answered": {"answered": str, "choice": (str, type(None)), **_TEXTS, **_COUNTS},
}
"""Kind of a record -> all its fields and their types."""
_KINDS = {frozenset(fields): kind for kind, fields in GRAMMAR.items()}
_BEGINNING = b'{"line": '  # cannot occur inside a text, whose quotes are escaped
_CHECK = b', "check": "%s"}'
_SIZE = len(_CHECK % bytes(16))


def kind_of_record(record: Mapping[str, Any]) -> str:
    """The kind of a record, a key of `GRAMMAR`. Raises `Unreadable` for a record that does not match the grammar."""
    kind = _KINDS.get(frozenset(record))
    if kind is None:
        raise Unreadable("its fields are not those of a verdict log")
    for field, types in GRAMMAR[kind].items():
        value = record[field]
        if not isinstance(value, types) or isinstance(value, bool) or (types is int and not 0 <= value < MOST_TOKENS):
            raise Unreadable(f"{field} is not valid in a verdict log")
    if kind == "answered":
        verdict = record["choice"], record["failure"]
        if verdict not in (("A", ""), ("B", ""), *((None, failure) for failure in FAILURES)):
            raise Unreadable("choice and failure do not form a verdict")
    return kind


class Seal:
    """Writes and checks lines of a log with these `settings`."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._key = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode()).digest()

    def close(self, number: int, record: Mapping[str, Any]) -> bytes:
        """The sealed line of `record` as line `number`, from 1. Raises `Unreadable` for a record that `open` would refuse."""
        kind_of_record(record)
        body = json.dumps({"line": number, **record}, ensure_ascii=False).encode()[:-1]
        return body + _CHECK % self._sum(body) + b"\n"

    def open(self, line: bytes) -> tuple[int, dict[str, Any]]:
        """Number and record of a line without its newline. Raises `Unreadable` for a line not written by `close`."""
        body, check = line[:-_SIZE], line[-_SIZE:]
        if check != _CHECK % self._sum(body):
            raise Unreadable("its checksum is not that of its content")
        try:
            record = json.loads(body + b"}")  # verified as ours: the parser for untrusted JSON takes four times as long
            number = record.pop("line", None)
        except (ValueError, RecursionError, AttributeError):
            raise Unreadable("no JSON object") from None
        if type(number) is not int or number < 1:
            raise Unreadable("it has no number")
        kind_of_record(record)
        return number, record

    def _sum(self, body: bytes) -> bytes:
        return hashlib.blake2b(body, key=self._key, digest_size=8).hexdigest().encode()


class Damaged(NamedTuple):
    """A damaged line of the file, which is not used. `place`: its line number in an editor."""

    place: int
    cause: str
    content: bytes


class Content(NamedTuple):
    """The content of a log."""

    settings: dict[str, Any]
    records: list[dict[str, Any]]  # without the settings, ordered by line number
    damaged: list[Damaged]
    lost: int  # lines that were written but are not in `records`, judged by line numbers; repeated numbers included
    following: int  # the number of the next line


def read_lines(lines: Sequence[bytes], settings: Mapping[str, Any]) -> Content:
    """Reads a log's complete lines, given without newlines. `settings` are used if the log's first line is lost.

    Lines lost at the end of the file cannot be noticed. Raises `Unreadable` if no line is sound, or only the first.
    """
    head = settings_of(lines[0])
    seal = Seal(settings if head is None else head)
    sound: dict[int, dict[str, Any]] = {}
    damaged, trailing, again = [], 0, 0
    for place, line in enumerate(lines, start=1):
        if not line:  # added by an editor: the log writes no empty lines
            continue
        if len(damaged) > MOST_DAMAGED:
            raise Unreadable(f"more than {MOST_DAMAGED:,} damaged lines")
        try:
            number, record = seal.open(line)
        except Unreadable as error:
            damaged.append(Damaged(place, str(error), line))
            trailing += max(1, line.count(_BEGINNING))  # lines whose newlines are lost are joined into one
            continue
        if number in sound:  # two logs in one file, for example, or two processes on one log: both were paid for
            damaged.append(Damaged(place, f"line number {number} a second time", line))
            again += 1
        else:
            sound[number], trailing = record, 0
    records = [record for _, record in sorted(sound.items()) if "settings" not in record]
    if damaged and not records:
        raise Unreadable(f"line {damaged[0].place}: {damaged[0].cause}, and no other line is valid")
    following = max(sound) + trailing + 1
    lost = following - 1 - len(sound) - (1 not in sound) + again
    return Content(dict(settings if head is None else head), records, damaged, lost, following)


def settings_of(line: bytes) -> dict[str, Any] | None:
    """The settings in the first line of a log; None if the line is not a first line, or damaged."""
    try:
        settings = parse_object(line, "line 1").get("settings")
        if not isinstance(settings, dict) or Seal(settings).open(line) != (1, {"settings": settings}):
            return None
        return settings
    except Unreadable:
        return None


def unchecked(lines: Sequence[bytes]) -> list[dict[str, Any]] | None:
    """The records of a log written by a version without checksums; None if the first line does not belong to such a log.

    Raises `Unreadable` for any damaged line: without checksums, one damaged line casts doubt on all others.
    """
    try:
        first = parse_object(lines[0], "line 1")
    except Unreadable:
        return None
    if list(first) != ["settings"] or not isinstance(first["settings"], dict):
        return None
    if any(b'"check": "' in line for line in lines):  # cannot occur inside a text, whose quotes are escaped
        return None
    records = []
    for place, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            records.append(parse_object(line, "content"))
            if (kind_of_record(records[-1]) == "settings") != (place == 1):
                raise Unreadable("settings that are not in the first line")
        except Unreadable as error:
            raise Unreadable(f"line {place}: {error}, but this log of an earlier version has no checksums") from None
    return records
