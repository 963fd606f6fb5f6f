"""Colors, dashes and markers of all plots, chosen for color-blind readers and grayscale."""

from __future__ import annotations

from typing import NamedTuple

Dashes = str | tuple[int, tuple[float, ...]]


class Style(NamedTuple):
    """Marker, dashes and color of one series. Marker and dashes tell series apart without the color."""

    marker: str
    line: Dashes
    color: str


# Blue against orange: the pair that color-vision deficiencies keep apart. Their lightness differs by a factor of two.
CHOSEN = Style("o", "-", "#0b4f94")
REJECTED = Style("s", (0, (4, 1.5)), "#e07b00")
NEUTRAL = Style("D", (0, (1, 1)), "#5f5f5f")
GUIDE = Style("", (0, (6, 4)), "#8a8a8a")
STYLES = (
    Style("o", "-", "#1f4e9c"),
    Style("s", (0, (5, 2)), "#c8501e"),
    Style("^", (0, (1, 1)), "#2e7d4f"),
    Style("D", (0, (6, 2, 1, 2)), "#7b3294"),
    Style("v", (0, (3, 1)), "#b8860b"),
    Style("P", (0, (8, 2)), "#4d9ab5"),
    Style("X", (0, (4, 1, 1, 1, 1, 1)), "#8c2d04"),
    Style("h", (0, (2, 2)), "#5a5a5a"),
    Style("<", (0, (7, 1, 1, 1)), "#d0709a"),
    Style(">", (0, (1, 3)), "#6b8e23"),
    Style("*", (0, (9, 3, 2, 3)), "#3b3b7a"),
)


def style_of(number: int) -> Style:
    """The style of series `number`, from 0. Beyond `STYLES` their markers are combined with other lines: the first
    `len(STYLES) ** 2` differ in marker or dashes."""
    turn, marker = divmod(number, len(STYLES))
    return STYLES[(marker + turn) % len(STYLES)]._replace(marker=STYLES[marker].marker)
