"""Roles of messages: the names that chat templates read, and other names for them in data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dpo_jax.data.pairs import BadRow, Cause

KNOWN = ("system", "developer", "user", "assistant", "tool")
_ASSISTANTS = ("gpt", "chatgpt", "bard", "bing", "claude", "model", "bot", "ai")
_OTHERS = {"human": "user", "observation": "tool", **dict.fromkeys(_ASSISTANTS, "assistant")}  # of ShareGPT


def role_of(name: str) -> str:
    """The template's name of a role, in any case: `user` for `Human`. A name that is not known stays as it is."""
    role = _OTHERS.get(name.lower(), name.lower())
    return role if role in KNOWN else name


def with_roles(turns: list[Any]) -> list[Any]:
    """The turns with the template's names of their roles; anything but a message stays as it is."""
    return [
        {**turn, "role": role}
        if isinstance(turn, Mapping) and isinstance(name := turn.get("role"), str) and (role := role_of(name)) != name
        else turn
        for turn in turns
    ]


def unknown_role(name: str, *, field: str) -> BadRow:
    """The problem of a role that is not known: a template would write it as it is, or leave the message out."""
    of_tools = "; write a call as `tool_calls` of a message of the assistant" if "call" in name else ""
    return BadRow(
        Cause.WRONG_TYPE, f"unknown role {name[:60]!r}{of_tools} (known: {', '.join((*_OTHERS, *KNOWN))})", field=field
    )
