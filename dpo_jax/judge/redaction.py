"""Redaction of a secret (an API key) from texts that are shown or written.

A server may repeat the key it was sent, whole, shortened ("sk-ab...yz") or encoded; these forms are removed. No filter can
stop an endpoint that deliberately leaks the key in a spelling of its own.
"""

from __future__ import annotations

import base64
import re
import string
from collections.abc import Iterator
from urllib.parse import quote

REDACTED = "[key]"
PIECE = 8  # consecutive characters of the secret that count as a trace of it
LEAST = 4  # a shorter word is not treated as a secret: removing it would garble texts
_LOWER = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)  # keeps the length, as str.lower() does not
_DOTS = "[.*\u2022\u00b7\u2026#x]"  # characters that replace the middle of a shortened key


class Redactor:
    """`redactor(text)` is `text` with "[key]" in place of every trace of `secret`.

    With `secret` None or of 3 characters or fewer the text is unchanged.

    A trace is `PIECE` consecutive characters (all of a shorter secret), in upper or lower case, plain or in base64, hex or
    percent-encoding; or a shortened form: at least 3 characters of its beginning before dots, asterisks or x, or at least 4 of
    its end after them. Takes time linear in the text.
    """

    def __init__(self, secret: str | None) -> None:
        self._pieces: dict[int, set[str]] = {}
        self._shortened = None
        if secret is None or len(secret) < LEAST:
            return
        for form in map(_lower, _forms(secret)):
            if len(form) < len(secret):  # for a short secret, base64 has only a letter or two that do not depend on neighbors
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
    """The secret plain and encoded. In base64, its letters depend on its offset within a group of three bytes."""
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
    """Pattern of shortened forms: beginning, dots, end; or dots and end."""

    def any_of(parts: list[str]) -> str:
        return "|".join(re.escape(part) for part in sorted(parts, key=len, reverse=True))

    sizes = range(1, min(len(secret), 13))
    beginning = any_of([secret[:size] for size in sizes if size >= 3])
    end, long_end = (any_of([secret[-size:] for size in sizes if size >= least]) for least in (2, 4))
    dots = rf"(?:{_DOTS}{{2,}}+|\u2026)"
    return re.compile(rf"(?:{beginning}){dots}(?:{end})?" + (rf"|(?<!{_DOTS}){dots}(?:{long_end})" if long_end else ""))
