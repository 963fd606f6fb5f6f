"""Tokens as strings that are safe to print: no escape sequence in a text reaches the terminal."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np

from dpo_jax.data.encode import token_ids
from dpo_jax.data.terminal import one_line

SEPARATOR = "·"
RUNS = 7  # most runs shown, of scored and other tokens alternating
_OTHER_SPACE = re.compile(rf"[^\S ]|{SEPARATOR}")  # characters that look like a space but are other tokens, and our separator


def token_strings(ids: Sequence[int] | np.ndarray, tokenizer: Any) -> list[str]:
    """Each token as its printable part of the text, including its space.

    A token that is only part of a character is shown as in the tokenizer's file.
    """
    anchor = token_ids("a", tokenizer).tolist()  # after another token, a token keeps its leading space
    before = tokenizer.decode(anchor, clean_up_tokenization_spaces=False)
    strings = []
    for token in map(int, ids):
        text = tokenizer.decode([*anchor, token], clean_up_tokenization_spaces=False)
        part = text.removeprefix(before) if text.startswith(before) else ""
        if not part or "\N{REPLACEMENT CHARACTER}" in part:
            part = str(tokenizer.convert_ids_to_tokens(token))
        strings.append(_OTHER_SPACE.sub(_escaped, one_line(part)))
    return strings


def _escaped(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode("ascii")


def shortened(strings: Sequence[str], most: int) -> list[str]:
    """`strings`; if they exceed `most` characters, those at both ends with the number of omitted ones between."""
    if sum(map(len, strings)) + len(strings) <= most:
        return list(strings)
    front, back = _leading(strings, most // 2), _leading(strings[::-1], most // 2)
    left_out = len(strings) - len(front) - len(back)
    return [*front, f"... {left_out:,} more ...", *back[::-1]]


def _leading(strings: Sequence[str], most: int) -> list[str]:
    taken, size = [], 0
    for string in strings:
        size += len(string) + 1
        if size > most:
            break
        taken.append(string)
    return taken


def marked(tokens: Sequence[str], scored: bool | Sequence[bool], most: int | None = None) -> list[str]:
    """The tokens, with each scored run in brackets. `most` shortens each run, and then only the first runs are shown."""
    flags = [scored] * len(tokens) if isinstance(scored, bool) else scored
    runs = [(flag, [token for token, _ in run]) for flag, run in groupby(zip(tokens, flags, strict=True), key=itemgetter(1))]
    shown: list[str] = []
    shown_runs = runs if most is None else runs[:RUNS]
    for flag, run in shown_runs:
        strings = run if most is None else shortened(run, most if len(runs) <= 3 else most // 2)
        if flag:
            strings = ["[" + strings[0], *strings[1:]]
            strings[-1] += "]"
        shown += strings
    left_out = sum(len(run) for _, run in runs[len(shown_runs) :])
    return [*shown, *([f"... {left_out:,} more ..."] if left_out else [])]


def rows_of(strings: Sequence[str], width: int) -> list[str]:
    """`strings` joined by `SEPARATOR`, in lines of at most `width` characters; only a longer string is broken."""
    lines = [""]
    for number, string in enumerate(strings):
        part = string + SEPARATOR * (number < len(strings) - 1)
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("")
        lines[-1] += part
        while len(lines[-1]) > width:
            lines[-1:] = [lines[-1][:width], lines[-1][width:]]
    return lines
