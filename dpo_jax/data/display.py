"""Prompts shown to people: rendered conversations split into turns."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dpo_jax.data.rendering import render
from dpo_jax.data.special_tokens import special_tokens
from dpo_jax.data.terminal import printable
from dpo_jax.untrusted import Unreadable

Turn = dict[str, str]
# Placeholder words that no template changes: not trimmed, not escaped, not split into thought and answer.
_SYSTEM, _FIRST, _ANSWER, _SECOND = (f"XQ{name}QX" for name in ("SYSTEM", "FIRST", "ANSWER", "SECOND"))


def as_text(turns: Sequence[Mapping[str, str]]) -> str:
    """A conversation as readable text, one turn per line: `user: ...`."""
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)


def shown_prompt(sample: Mapping[str, Any]) -> str:
    """The prompt of a sample as readable text: its `turns` if it has them, else its text. Control characters are escaped."""
    return printable(as_text(sample["turns"]) if sample.get("turns") else str(sample.get("prompt", "")))


def chat_turns(prompt: str, tokenizer: Any) -> list[Turn] | None:
    """The turns of a prompt rendered by the tokenizer's chat template; None if it was not, or not from such turns alone.

    The template's own text between turns is found by rendering placeholder words. A prompt truncated at its start begins with
    "...". A system text that the template adds may appear among the turns.
    """
    marks = _marks(tokenizer, str(tokenizer.chat_template)) if getattr(tokenizer, "chat_template", None) else None
    if marks is None or not prompt.endswith(marks.to_answer):
        return None
    rest, role, turns = prompt.removesuffix(marks.to_answer), "user", []
    while (at := rest.rfind(mark := marks.before[role])) >= 0:
        turns.append({"role": role, "content": rest[at + len(mark) :]})
        rest, role = rest[:at], "assistant" if role == "user" else "user"
    turns = [*_first_turns(rest, role, marks), *reversed(turns)]
    special = special_tokens(tokenizer)
    return None if any(token in turn["content"] for turn in turns for token in special) else turns


class _Marks(NamedTuple):
    """The text that a template writes around the contents of turns."""

    head: str  # before a first user turn
    before: dict[str, str]  # role -> text between a turn of the other role and one of this role
    to_answer: str  # after the last user turn
    system_head: str | None  # before a system turn; None: no system role
    after_system: str  # between a system turn and the first user turn


@functools.lru_cache(maxsize=8)
def _marks(tokenizer: Any, template: str) -> _Marks | None:
    user, answer, again = (
        {"role": role, "content": content} for role, content in (("user", _FIRST), ("assistant", _ANSWER), ("user", _SECOND))
    )
    try:
        head, to_answer = _render([user], tokenizer).split(_FIRST)
        first, between = _render([user, answer, again], tokenizer).split(_FIRST)
        to_assistant, between = between.split(_ANSWER)
        to_user, last = between.split(_SECOND)
    except Unreadable:
        raise
    except ValueError:  # the template refuses, or repeats a turn: no such marks
        return None
    if (first, last) != (head, to_answer) or not (to_answer and to_assistant and to_user):
        return None
    system_head, after_system = None, ""
    try:
        system_head, rest = _render([{"role": "system", "content": _SYSTEM}, user], tokenizer).split(_SYSTEM)
        after_system = rest.split(_FIRST)[0]
    except Unreadable:
        raise
    except ValueError:  # no system role
        system_head = None
    return _Marks(head, {"user": to_user, "assistant": to_assistant}, to_answer, system_head, after_system)


def _render(messages: list[Turn], tokenizer: Any) -> str:
    return render(tokenizer, messages, generate=True)


def _first_turns(text: str, role: str, marks: _Marks) -> list[Turn]:
    """The turns before the first separator: a turn of `role`, or the system's, after the template's head."""
    if role == "user" and text.startswith(marks.head):
        return [{"role": "user", "content": text.removeprefix(marks.head)}]
    if marks.system_head is not None and text.startswith(marks.system_head):
        content, found, user = text.removeprefix(marks.system_head), "", ""
        if role == "user":  # a template may separate system and user by words of its own
            content, found, user = content.partition(marks.after_system)
        turns = [{"role": "system", "content": content}, {"role": "user", "content": user}]
        return [turn for turn, there in zip(turns, (content.strip(), found), strict=True) if there]
    mark = marks.head if role == "user" else marks.before[role]
    cut = next((size for size in range(len(mark), 0, -1) if text.startswith(mark[-size:])), 0)
    return [{"role": role, "content": f"...{text[cut:]}"}] if text[cut:] else []
