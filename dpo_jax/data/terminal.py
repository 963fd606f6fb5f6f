r"""Escaping of untrusted texts (data, policies, judges, file names) for terminals, JSON and spreadsheets.

One pattern, `HIDDEN`, defines the characters that are escaped wherever people read (pages: `report.page`, figures:
`plotting.drawing`): control characters of terminals and browsers, and invisible ones. Files keep every text exactly.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

# Default_Ignorable_Code_Point (DerivedCoreProperties.txt of Unicode 14), invisible in fonts: soft hyphen, joiners, fillers of
# Hangul and Khmer, direction marks, controls of shorthand and music, tags, and reserved code points. Left out are those that
# may follow a letter: joiners (200C, 200D) and variation selectors (180B-F, FE00-F, E0100-EF).
_IGNORABLE = (
    r"\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\u3164\ufeff\uffa0\ufff0-\ufff8"
    r"\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e00ff\U000e01f0-\U000e0fff"
)
# C0, DEL, C1; line separators; annotations, noncharacters; UTF-16 surrogates, which also represent non-UTF-8 bytes of file
# names.
_CONTROLS = r"\x00-\x1f\x7f-\x9f\u2028\u2029\ufff9-\ufffb\ufffe\uffff\ud800-\udfff"
HIDDEN = re.compile(
    # Flags of England, Scotland and Wales, written with tags. Group 1 is kept.
    "(\U0001f3f4[\U000e0030-\U000e0039\U000e0061-\U000e007a]{3,6}\U000e007f)"
    rf"|[{_CONTROLS}{_IGNORABLE}]"
    # Joiners that join nothing; those of emoji and of Arabic, Persian or Indic letters are kept.
    r"|(?<![\u0590-\u1cff\u2190-\u2bff\u2e80-\ud7ff\ufb1d-\ufdff\ufe0f\ufe70-\ufefc\U00010000-\U000dffff])[\u200c\u200d]"
    # Variation selectors after characters without variants (StandardizedVariants.txt, emoji-variation-sequences.txt). Symbols,
    # emoji, ideographs, some Asian and Mongolian letters have variants, and digits before the keycap.
    r"|(?<![\xa9\xae\u1000-\u109f\u2010-\u2027\u2030-\u205e\u2070-\u2bff\u2e80-\u3130\u3190-\u9fff\ua840-\uaa7f\uf900-\ufaff"
    r"\uff01-\uff60\U00010ac0-\U00010aff\U0001f000-\U0003ffff])"
    r"(?!(?<=[#*0-9])\ufe0f\u20e3)[\ufe00-\ufe0f]"
    r"|(?<![\u1807\u180a\u1820-\u18aa])[\u180b-\u180d\u180f]"
    r"|(?<![\u2e80-\u3130\u3190-\u9fff\uf900-\ufaff\U00020000-\U0003ffff])[\U000e0100-\U000e01ef]"
)
# Most texts contain none of these, so this check makes them ten times as fast.
_SUSPECT = re.compile(rf"[{_CONTROLS}{_IGNORABLE}\u180b-\u180f\u200c\u200d\ufe00-\ufe0f\U000e0100-\U000e01ef]")


def printable(text: str, *, keep: str = "\n\t") -> str:
    r"""`text` with `HIDDEN` characters escaped, such as `\x1b` or `\u202e`, except those in `keep`.

    >>> print(printable("red: \x1b[31m, turned: \u202eabc"))
    red: \x1b[31m, turned: \u202eabc
    """

    def escape(found: re.Match[str]) -> str:
        stays = found[1] or found[0] in keep
        return found[0] if stays else found[0].encode("unicode_escape", "surrogatepass").decode("ascii")

    return _written_out(text, escape) if _SUSPECT.search(text) else text


def _written_out(text: str, escape: Callable[[re.Match[str]], str]) -> str:
    while (shown := HIDDEN.sub(escape, text)) != text:
        text = shown  # after an escaped character, the next one may have become hidden
    return shown


def one_line(text: str) -> str:
    """`printable` with newlines and tabs escaped too: for a name in a message or a table cell."""
    return printable(text, keep="")


def json_text(content: Any, *, indent: int | None = None) -> str:
    """JSON that round-trips `content` exactly, on one line unless indented. `HIDDEN` characters are escaped (`json.dumps` keeps
    most of them), so that the text can be encoded as UTF-8 and shown on a terminal.
    """

    def escape(found: re.Match[str]) -> str:
        if found[1] or found[0] == "\n":  # a newline of the indentation; those in texts are already escaped
            return found[0]
        units = found[0].encode("utf-16-be", "surrogatepass").hex()
        return "".join(f"\\u{units[start : start + 4]}" for start in range(0, len(units), 4))

    text = json.dumps(content, ensure_ascii=False, indent=indent)
    return _written_out(text, escape) if _SUSPECT.search(text) else text


def csv_cell(value: Any) -> Any:
    """A CSV cell: `HIDDEN` characters of a text are escaped, and a text that a spreadsheet would evaluate is prefixed with
    `'`."""
    if not isinstance(value, str):
        return value
    text = one_line(value)
    return f"'{text}" if text.lstrip()[:1] in tuple("=+-@") else text


class PrintableStream:
    """A text stream that writes `printable` texts to `stream`, and escapes what its encoding lacks.

    Printing a text or file name then moves no cursor and fails in no locale.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        shown, encoding = printable(text), getattr(self.stream, "encoding", None) or "utf-8"
        self.stream.write(shown.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextlib.contextmanager
def printable_output() -> Iterator[None]:
    """Context manager that makes standard output `printable`.

    Standard error is unchanged, because libraries draw progress bars there; `exit_codes.message` and `runtime.progress` escape
    their own texts.
    """
    with contextlib.redirect_stdout(sys.stdout and PrintableStream(raw(sys.stdout))):  # pyright: ignore[reportArgumentType]
        yield


def raw(stream: TextIO) -> TextIO:
    """The underlying stream, to which this program and terminal-aware libraries may write escape sequences."""
    return stream.stream if isinstance(stream, PrintableStream) else stream
