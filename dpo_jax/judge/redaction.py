"""Redaction of a secret (an API key) from texts that are shown or written.

A server may repeat the key it was sent, whole, shortened ("sk-ab...yz") or encoded. An endpoint that wants to give the key away
can spell it as it likes, and no filter would know; what servers do by themselves is removed.
"""

from __future__ import annotations

import base64
import re
import string
from collections.abc import Iterator
from urllib.parse import quote

REDACTED = "[key]"
PIECE = 8  # characters of the secret in a row that are a trace of it
LEAST = 4  # a shorter word is no secret: to remove it would garble texts
_LOWER = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)  # keeps the length, as str.lower() does not
_DOTS = "[.*\u2022\u00b7\u2026#x]"  # what stands for the middle of a shortened key


class Redactor:
    """`redactor(text)` is `text` with "[key]" for every trace of `secret`; None, or one of 3 characters or less: all of `text`.

    A trace is `PIECE` characters in a row (all of a shorter secret), in upper or lower case, as they are or in base64, hex or
    percent-encoding; or what is left of a shortened one: 3 characters or more of its beginning before dots, asterisks or x,
    or 4 or more of its end after them. Takes time linear in the text.
    """

    def __init__(self, secret: str | None) -> None:
        self._pieces: dict[int, set[str]] = {}
        self._shortened = None
        if secret is None or len(secret) < LEAST:
            return
        for form in map(_lower, _forms(secret)):
            if len(form) < len(secret):  # of a short secret base64 leaves a letter or two that no neighbour decides
                continue
            size = min(PIECE, len(form))
            self._pieces.setdefault(size, set()).update(form[i : i + size] for i in range(len(form) - size + 1))
        self._shortened = _shortened(_lower(secret))

    def __call__(self, text: str) -> str:
        if self._shortened is None:
            return text
        lower, traces = _lower(text), bytearray(len(text))
        for size, pieces in self._pieces.items():
            for start in range(len(lower) - size + 1):
                if lower[start : start + size] in pieces:
                    traces[start : start + size] = b"\1" * size
        for found in self._shortened.finditer(lower):
            traces[found.start() : found.end()] = b"\1" * len(found[0])
        kept, end = [], 0
        for trace in re.finditer(b"\x01+", traces):
            kept += [text[end : trace.start()], REDACTED]
            end = trace.end()
        return "".join(kept) + text[end:]


def _lower(text: str) -> str:
    return text.translate(_LOWER)


def _forms(secret: str) -> Iterator[str]:
    """The secret as it is and encoded. In base64, its letters depend on where it begins within a group of three bytes."""
    content = secret.encode("utf-8", "replace")
    yield secret
    yield quote(secret, safe="")
    yield content.hex()
    yield f"%{content.hex('%')}"
    for before in range(3):
        whole = (before + len(content)) // 3 * 4  # the last letters depend on what follows
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            yield encode(bytes(before) + content).decode()[(0, 2, 3)[before] : whole]


def _shortened(secret: str) -> re.Pattern[str]:
    """Beginning, dots, end; or dots and end."""

    def any_of(parts: list[str]) -> str:
        return "|".join(re.escape(part) for part in sorted(parts, key=len, reverse=True))

    sizes = range(1, min(len(secret), 13))
    beginning = any_of([secret[:size] for size in sizes if size >= 3])
    end, long_end = (any_of([secret[-size:] for size in sizes if size >= least]) for least in (2, 4))
    dots = rf"(?:{_DOTS}{{2,}}+|\u2026)"
    return re.compile(rf"(?:{beginning}){dots}(?:{end})?" + (rf"|(?<!{_DOTS}){dots}(?:{long_end})" if long_end else ""))
