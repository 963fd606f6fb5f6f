"""Roles of messages: the names that chat templates read, and other names for them in data."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from dpo_jax.data.pairs import BadRow, Cause

KNOWN = ("system", "developer", "user", "assistant", "tool")
OBSERVATION = "observation"  # of a tool; some templates, such as GLM-4's, have this name
_ASSISTANTS = ("gpt", "chatgpt", "bard", "bing", "claude", "model", "bot", "ai")
_OTHERS = {"human": "user", OBSERVATION: "tool", **dict.fromkeys(_ASSISTANTS, "assistant")}  # of ShareGPT


def role_of(name: str, template: str | None = None) -> str:
    """The template's name of a role, in any case: `user` for `Human`. A name that is not known stays as it is.

    `observation` becomes `tool` only if `template`, the source of the chat template, is given and does not name it.
    """
    if name.lower() == OBSERVATION and (template is None or names_role(template, OBSERVATION)):
        return OBSERVATION
    role = _OTHERS.get(name.lower(), name.lower())
    return role if role in KNOWN else name


def names_role(template: str, name: str) -> bool:
    """Whether the source of a chat template has the name of a role in quotes."""
    return re.search(rf"(['\"]){re.escape(name)}\1", template) is not None


def with_roles(turns: list[Any], template: str | None = None) -> list[Any]:
    """The turns with the names that `role_of` gives their roles; anything but a message stays as it is."""
    return [
        {**turn, "role": role}
        if isinstance(turn, Mapping) and isinstance(name := turn.get("role"), str) and (role := role_of(name, template)) != name
        else turn
        for turn in turns
    ]


def unknown_role(name: str, *, field: str) -> BadRow:
    """The problem of a role that is not known: a template would write it as it is, or leave the message out."""
    of_tools = "; write a call as `tool_calls` of a message of the assistant" if "call" in name else ""
    return BadRow(
        Cause.WRONG_TYPE, f"unknown role {name[:60]!r}{of_tools} (known: {', '.join((*_OTHERS, *KNOWN))})", field=field
    )
