"""Texts of data and models on a terminal: control characters are written out and not obeyed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # C0 without newline and tab, DEL, C1


def printable(text: str) -> str:
    """`text` with control characters written out, such as `\\x1b`: a terminal obeys none of them. Newline and tab stay."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def json_line(content: Mapping[str, Any]) -> str:
    """One line of JSON in which every control character is escaped (`json.dumps` leaves DEL and C1 as they are)."""
    return _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(content, ensure_ascii=False))
