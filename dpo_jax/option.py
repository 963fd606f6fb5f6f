"""An option of the tables of losses, optimizers and schedules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Option(NamedTuple):
    """An option: its type and default (None: that of what it belongs to), which values it takes, and the text of `--help`."""

    type: Any
    default: Any
    inside: Callable[[Any], bool]
    expected: str
    help: str
