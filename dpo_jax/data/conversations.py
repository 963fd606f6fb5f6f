"""Rows that are partly conversations, converted to lists of messages: texts become turns, ShareGPT roles become template
roles."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from dpo_jax.data.columns import Row, column, text
from dpo_jax.data.pairs import BadRow, Cause
from dpo_jax.data.roles import KNOWN, OBSERVATION, role_of, unknown_role, with_roles

IMPLICIT = ("if chosen and rejected begin with it", {"prompt": ""})


def conversation(row: Row) -> tuple[Any, Any, Any]:
    """Prompt, chosen and rejected of a row. If one is a list of messages, or the row has `system`, all become lists of
    messages.

    A text prompt beside messages is a copy of their content, as in UltraFeedback, and is left as it is, unless the messages
    begin with the assistant's answer. Raises `BadRow` for a missing side, a system text without a prompt, and a second system
    text.
    """
    prompt, *sides = (_messages(value) for value in (row.get("prompt"), column(row, "chosen"), column(row, "rejected")))
    if all(isinstance(side, str) for side in sides) and ("system" in row or isinstance(prompt, list)):
        sides = [[_turn("assistant", side)] if side.strip() else [] for side in sides]
        if not isinstance(prompt, list):
            prompt = text(row, "prompt")
    if all(isinstance(side, list) for side in sides):
        if prompt == []:
            raise BadRow(Cause.EMPTY, "no messages", field="prompt", remedy=IMPLICIT)
        if isinstance(prompt, list):
            _check_once(prompt, dict(zip(("chosen", "rejected"), sides, strict=True)))
        elif isinstance(prompt, str) and prompt.strip() and all(_first_role(side) == "assistant" for side in sides):
            prompt = [_turn("user", prompt)]
        if row.get("system") is not None and text(row, "system").strip():
            if isinstance(prompt, list):
                prompt = _after_system(row["system"], prompt)
            else:
                sides = [_after_system(row["system"], side) for side in sides]
    return prompt, sides[0], sides[1]


def is_copy(prompt: str, sides: Sequence[Any]) -> bool:
    """Whether a text prompt repeats the turns that both lists of messages begin with: a part of them, or all but answers."""
    same = itertools.takewhile(lambda turns: turns[0] == turns[1], zip(*sides, strict=False))
    shared = [turn for turn, _ in same if isinstance(turn, Mapping)]
    words = " ".join(prompt.split())
    asked = [" ".join(text_of(turn).split()) for turn in shared if turn.get("role") != "assistant"]
    return words in " ".join(" ".join(text_of(turn).split()) for turn in shared) or all(text in words for text in asked)


def text_of(message: Mapping[str, Any]) -> str:
    """The text of a message, also of its content parts."""
    content = message.get("content", message.get("value"))
    parts = content if isinstance(content, list) else [{"text": content}]
    return "\n".join(part["text"] for part in parts if isinstance(part, Mapping) and isinstance(part.get("text"), str))


def same_kind(row: Row, completions: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A row's prompt and completions by name. If one is a list of messages, or the row has `system`, all become messages.

    Otherwise they stay as they are. A blank system text counts too, so that all rows of a data set are of one kind.
    """
    named = {name: _messages(value) for name, value in {"prompt": column(row, "prompt"), **completions}.items()}
    system = text(row, "system") if row.get("system") is not None else ""
    if "system" in row or any(isinstance(value, list) for value in named.values()):
        for name, value in named.items():
            if not isinstance(value, list):
                named[name] = [_turn("user" if name == "prompt" else "assistant", text({name: value}, name))]
    if system.strip():
        named["prompt"] = _after_system(system, named["prompt"])
    return named.pop("prompt"), named


def whole_conversation(row: Row) -> Any:
    """A row's column `messages` as a list of messages, after the text of `system`, if the row has one."""
    return with_system(row, _messages(column(row, "messages")))


def with_system(row: Row, turns: Any) -> Any:
    """A list of messages after the text of a row's column `system`; unchanged if it is blank, and anything but a list as it is.

    Raises `BadRow` if they begin with another system message.
    """
    system = text(row, "system") if row.get("system") is not None else ""
    return _after_system(system, turns) if system.strip() and isinstance(turns, list) else turns


def _messages(value: Any) -> Any:
    """The value as messages `{"role", "content"}` if it is a list of these or of ShareGPT's `{"from", "value"}`."""
    if isinstance(value, Mapping) and value.keys() & {"role", "from"}:
        value = [value]
    if not isinstance(value, list):
        return value
    if all(isinstance(one, Mapping) and one.keys() >= {"from", "value"} for one in value):
        return [_turn(_role(one["from"]), one["value"]) for one in value]
    return with_roles(value)


def _role(name: Any) -> str | None:
    """The template's name of a ShareGPT role. Raises `BadRow` for an unknown one, which a template would write as it is."""
    if not isinstance(name, str):
        return None
    if (role := role_of(name)) not in (*KNOWN, OBSERVATION):
        raise unknown_role(name, field="from")
    return role


def _turn(role: Any, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def _first_role(side: list[Any]) -> Any:
    return side[0].get("role") if side and isinstance(side[0], Mapping) else None


def _check_once(prompt: list[Any], sides: Mapping[str, list[Any]]) -> None:
    for name, side in sides.items():
        if prompt and side[: len(prompt)] == prompt:
            remedy = ("read the prompt from these messages", {"prompt": ""})
            raise BadRow(Cause.DIFFERENT_PROMPTS, "it begins with the whole prompt", field=name, remedy=remedy)
        if _first_role(side) != "assistant" and any(side[:count] == prompt[-count:] for count in range(1, len(prompt))):
            detail = "it begins with the last turns of the prompt; leave them out of it, or write the whole conversation in it"
            raise BadRow(Cause.DIFFERENT_PROMPTS, detail, field=name)


def _after_system(system: str, turns: list[Any]) -> list[Any]:
    if _first_role(turns) != "system":
        return [_turn("system", system), *turns]
    if turns[0].get("content") != system:
        raise BadRow(Cause.DIFFERENT_PROMPTS, "the messages begin with another system message", field="system")
    return turns
