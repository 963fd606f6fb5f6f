"""One-line film reviews with a sentiment label: the two files of rt-polarity (Pang and Lee 2005), one snippet per line.

    rt-polarity.pos    emerges as something rare , an issue movie that's so honest and keenly observed ...
    rt-polarity.neg    simplistic , silly and tedious .

The text alone assigns a snippet to one of three parts, so no text is in two of them. A policy and its reference train on
"policy", the reward classifier on "reward", and both are evaluated on "test".
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dpo_jax.data.files import BOM
from dpo_jax.data.pairs import Cause, DataError
from dpo_jax.untrusted import LongLine, lines_of

Part = Literal["policy", "reward", "test"]
FILES = {"rt-polarity.pos": 1, "rt-polarity.neg": 0}
TENTHS: tuple[tuple[Part, int], ...] = (("policy", 5), ("reward", 4), ("test", 1))
PREFIX_TOKENS = (2, 8)  # the paper's (section 6.1), both included


class Snippet(NamedTuple):
    text: str  # stripped
    label: int  # 1 positive, 0 negative
    uid: str  # "rt-polarity.pos:17": file and line


def load_snippets(folder: str | Path) -> list[Snippet]:
    """The snippets of both files in `folder`, UTF-8, in the order of the files.

    Raises `DataError`, naming file and line, for a file that is missing, empty or not UTF-8, and for a blank line.
    """
    snippets = []
    for name, label in FILES.items():
        path, before = Path(folder) / name, len(snippets)
        if path.exists() and not path.is_file():
            raise DataError(f"{path}: is not a file", causes=[Cause.BAD_LAYOUT])
        try:
            with path.open("rb") as lines:
                for number, line in enumerate(lines_of(lines), start=1):
                    if number == 1 and isinstance(line, bytes):
                        line = line.removeprefix(BOM)
                    snippets.append(Snippet(_text(line, f"{path}:{number}"), label, f"{name}:{number}"))
        except OSError as error:
            detail = f"{path}: cannot be read ({error.strerror}): the folder must hold {' and '.join(FILES)}"
            raise DataError(detail, causes=[Cause.BAD_LAYOUT]) from error
        if len(snippets) == before:
            raise DataError(f"{path}: is empty: it must hold one snippet a line", causes=[Cause.NO_ROWS])
    return snippets


def _text(line: bytes | LongLine, where: str) -> str:
    if isinstance(line, LongLine):
        raise DataError(f"{where}: {line}", causes=[Cause.LINE_TOO_LONG])
    try:
        text = line.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        detail = f"{where}: not UTF-8 at byte {error.start} of the line: convert the file (the original is in Latin-1)"
        raise DataError(detail, causes=[Cause.INVALID_UTF8]) from error
    if not text:
        raise DataError(f"{where}: a blank line: remove it", causes=[Cause.EMPTY])
    if "\0" in text:
        raise DataError(f"{where}: holds a NUL character: the file is damaged", causes=[Cause.NUL])
    return text


def part_of(text: str) -> Part:
    """The part of a text. It depends only on the text, not on other texts or a seed."""
    tenth = _number("part", text) % 10
    for part, tenths in TENTHS:
        if tenth < tenths:
            return part
        tenth -= tenths
    raise AssertionError("the parts do not add up to ten tenths")


def snippets_of(snippets: Sequence[Snippet], part: Part) -> list[Snippet]:
    """The snippets of `part`, in order: about 50 % for "policy", 40 % for "reward", 10 % for "test"."""
    if part not in dict(TENTHS):
        raise ValueError(f"the snippets have the parts {', '.join(dict(TENTHS))}, not {part!r}")
    return [snippet for snippet in snippets if part_of(snippet.text) == part]


def prefixes(snippets: Sequence[Snippet], tokenizer: Any, n: int, seed: int) -> list[str]:
    """`n` beginnings of snippets, 2 to 8 tokens long: distinct prompts for continuations.

    First one of each snippet, then a second one of each with another length, and so on. Choice and lengths depend only on
    `seed` and the texts: the first prompts do not depend on `n`. A beginning is never the whole snippet, and is left out if its
    text does not tokenize to the tokens it was cut from. Raises `ValueError` if there are fewer than `n`.
    """
    order = sorted(snippets, key=lambda snippet: (_number(f"order {seed}", snippet.text), snippet.uid))
    encoded = [list(tokenizer(snippet.text, add_special_tokens=False)["input_ids"]) for snippet in order]
    shortest, longest = PREFIX_TOKENS
    lengths = longest - shortest + 1
    found: dict[str, None] = {}
    for turn, (snippet, ids) in itertools.product(range(lengths), zip(order, encoded, strict=True)):
        if len(found) == n:
            break
        length = shortest + (_number(f"length {seed}", snippet.text) + turn) % lengths
        text = tokenizer.decode(ids[:length])
        if length < len(ids) and tokenizer(text, add_special_tokens=False)["input_ids"] == ids[:length]:
            found[text] = None
    if len(found) < n:
        raise ValueError(f"{len(snippets)} snippets have {len(found)} distinct beginnings, and {n} are asked for")
    return list(found)


def _number(what: str, text: str) -> int:
    """A stable pseudo-random number: Python's generators do not guarantee stability for everything they draw."""
    return int.from_bytes(hashlib.blake2b(f"{what}\0{text}".encode(), digest_size=8).digest(), "big")
