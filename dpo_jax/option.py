"""One option in the tables of losses, optimizers and schedules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Option(NamedTuple):
    """An option: type, default (None: that of the loss or optimizer), a test of its values with its message, and help text."""

    type: Any
    default: Any
    inside: Callable[[Any], bool]
    expected: str
    help: str
