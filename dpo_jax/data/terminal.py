r"""Texts of others (data, policies, judges, file names) on terminals, in JSON and in spreadsheets: nothing in them is obeyed.

One rule, `HIDDEN`, says which characters are written out wherever people read (pages: `report.page`, figures:
`plotting.drawing`): those that a terminal or a browser obeys, and those that nobody sees. Files keep every text exactly.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

# Default_Ignorable_Code_Point (DerivedCoreProperties.txt of Unicode 14), which a font shows as nothing: soft hyphen, joiners,
# fillers of Hangul and Khmer, direction marks, controls of shorthand and music, tags, and what is kept for more of them. Left
# out are those that may follow a letter: joiners (200C, 200D) and variants (180B-F, FE00-F, E0100-EF).
_IGNORABLE = (
    r"\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\u3164\ufeff\uffa0\ufff0-\ufff8"
    r"\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e00ff\U000e01f0-\U000e0fff"
)
# C0, DEL, C1; line separators; annotations, what is no character; halves of a pair of UTF-16, which also stand for bytes of
# file names that are not UTF-8.
_CONTROLS = r"\x00-\x1f\x7f-\x9f\u2028\u2029\ufff9-\ufffb\ufffe\uffff\ud800-\udfff"
HIDDEN = re.compile(
    # Flags of England, Scotland and Wales, spelled in tags. Group 1: what stays.
    "(\U0001f3f4[\U000e0030-\U000e0039\U000e0061-\U000e007a]{3,6}\U000e007f)"
    rf"|[{_CONTROLS}{_IGNORABLE}]"
    # Joiners that join nothing: those of emoji and of Arabic, Persian or Indic letters stay.
    r"|(?<![\u0590-\u1cff\u2190-\u2bff\u2e80-\ud7ff\ufb1d-\ufdff\ufe0f\ufe70-\ufefc\U00010000-\U000dffff])[\u200c\u200d]"
    # Variants of what has none (StandardizedVariants.txt, emoji-variation-sequences.txt): symbols, emoji, ideographs and some
    # letters of Asia have, digits before the frame of a key, and Mongolian letters.
    r"|(?<![\xa9\xae\u1000-\u109f\u2010-\u2027\u2030-\u205e\u2070-\u2bff\u2e80-\u3130\u3190-\u9fff\ua840-\uaa7f\uf900-\ufaff"
    r"\uff01-\uff60\U00010ac0-\U00010aff\U0001f000-\U0003ffff])"
    r"(?!(?<=[#*0-9])\ufe0f\u20e3)[\ufe00-\ufe0f]"
    r"|(?<![\u1807\u180a\u1820-\u18aa])[\u180b-\u180d\u180f]"
    r"|(?<![\u2e80-\u3130\u3190-\u9fff\uf900-\ufaff\U00020000-\U0003ffff])[\U000e0100-\U000e01ef]"
)
# Most texts hold none of these, and are done with in a tenth of the time.
_SUSPECT = re.compile(rf"[{_CONTROLS}{_IGNORABLE}\u180b-\u180f\u200c\u200d\ufe00-\ufe0f\U000e0100-\U000e01ef]")


def printable(text: str, *, keep: str = "\n\t") -> str:
    r"""`text` with what is `HIDDEN` written out, such as `\x1b` or `\u202e`, but for the characters in `keep`.

    >>> print(printable("red: \x1b[31m, turned: \u202eabc"))
    red: \x1b[31m, turned: \u202eabc
    """

    def escape(found: re.Match[str]) -> str:
        stays = found[1] or found[0] in keep
        return found[0] if stays else found[0].encode("unicode_escape", "surrogatepass").decode("ascii")

    return _written_out(text, escape) if _SUSPECT.search(text) else text


def _written_out(text: str, escape: Callable[[re.Match[str]], str]) -> str:
    while (shown := HIDDEN.sub(escape, text)) != text:
        text = shown  # what followed a character that is written out now may be nothing that follows a letter
    return shown


def one_line(text: str) -> str:
    """`printable`, newlines and tabs too: a name in a message, or a cell of a table."""
    return printable(text, keep="")


def json_text(content: Any, *, indent: int | None = None) -> str:
    """JSON that gives `content` back exactly, in one line unless indented; what is `HIDDEN` is escaped (`json.dumps` leaves
    most of it as it is), so that it can be encoded as UTF-8 and shown on a terminal.
    """

    def escape(found: re.Match[str]) -> str:
        if found[1] or found[0] == "\n":  # a newline of the indentation: those of texts are escaped already
            return found[0]
        units = found[0].encode("utf-16-be", "surrogatepass").hex()
        return "".join(f"\\u{units[start : start + 4]}" for start in range(0, len(units), 4))

    text = json.dumps(content, ensure_ascii=False, indent=indent)
    return _written_out(text, escape) if _SUSPECT.search(text) else text


def csv_cell(value: Any) -> Any:
    """A cell of a CSV file: of a text what is `HIDDEN` is written out, and one that a spreadsheet would compute gets a `'`."""
    if not isinstance(value, str):
        return value
    text = one_line(value)
    return f"'{text}" if text.lstrip()[:1] in tuple("=+-@") else text


class PrintableStream:
    """A text stream that writes `printable` texts to another one, and writes out what its encoding lacks.

    What `print` shows of a text or a file name then moves no cursor and fails in no locale. `stream` is the other one.
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
    """What is printed inside, to standard output, is `printable`.

    Not so standard error, where libraries draw progress bars; `exit_codes.message` and `runtime.progress` see to themselves.
    """
    with contextlib.redirect_stdout(sys.stdout and PrintableStream(raw(sys.stdout))):  # pyright: ignore[reportArgumentType]
        yield


def raw(stream: TextIO) -> TextIO:
    """The stream to which this program, and a library that knows its terminal, may write escape sequences."""
    return stream.stream if isinstance(stream, PrintableStream) else stream
