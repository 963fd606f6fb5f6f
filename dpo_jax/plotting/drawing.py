"""Drawing helpers of all plots: direct labels beside the axes, bare axes, image files."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.transforms import offset_copy

from dpo_jax.data.terminal import one_line
from dpo_jax.plotting.palette import Style
from dpo_jax.writing import placing

ImageFormat = Literal["png", "svg"]


PANEL = (4.3, 3.1)  # inches of a single panel: its text is legible at the width of a phone
LABEL_SIZE = 9.0  # points
LONGEST = 60  # characters of a label
LINE_HEIGHT = 1.35  # of a label, in units of its size
SAMPLE = (7.0, 27.0)  # where the piece of line before a label begins and ends: points from the axes


class End(NamedTuple):
    """Where a curve ends, in data coordinates, and what is written beside it."""

    x: float
    y: float
    label: str
    style: Style
    bold: bool = False


def figure_text(text: str) -> str:
    """Any text as a label that shows exactly this text, in one line: no formulas, what nobody would see, or the font lacks,
    written out, and of a long one both ends (names differ at their end as often as at their beginning).
    """
    shown = "".join(c if _has_glyph(c) else c.encode("unicode_escape").decode("ascii") for c in one_line(text))
    if len(shown) > LONGEST:
        shown = f"{shown[: LONGEST // 2]}…{shown[-LONGEST // 2 :]}"
    # A legend leaves out labels that begin with an underscore.
    return " " * shown.startswith("_") + shown.replace("$", r"\$")


@functools.cache
def _has_glyph(character: str) -> bool:
    return all(
        get_font(findfont(FontProperties(weight=weight))).get_char_index(ord(character)) for weight in ("normal", "bold")
    )


def label_ends(figure: Figure, ends: Mapping[Axes, Sequence[End]], *, size: float = LABEL_SIZE) -> None:
    """Writes each label right of its axes at the height of its curve's end, with a piece of its line; none covers another.

    Comes after everything else is drawn: it fixes the limits.
    """
    if any(ends.values()) and (layout := figure.get_layout_engine()):
        layout.execute(figure)  # for the heights that it leaves
    for axes, mine in ends.items():
        axes.set_xlim(axes.get_xlim())
        axes.set_ylim(axes.get_ylim())
        _label_axes(figure, axes, mine, size=size)


def _label_axes(figure: Figure, axes: Axes, ends: Sequence[End], *, size: float) -> None:
    to_share = axes.transAxes.inverted().transform
    places = sorted(((float(to_share(axes.transData.transform((end.x, end.y)))[1]), end) for end in ends), key=lambda at: at[0])
    gap = LINE_HEIGHT * size * figure.dpi / 72 / axes.bbox.height
    heights = spread([min(max(place, 0.0), 1.0) for place, _ in places], gap)
    for (_, end), height in zip(places, heights, strict=True):
        _label(figure, axes, end, height, size=size)


def _label(figure: Figure, axes: Axes, end: End, height: float, *, size: float) -> None:
    first, last = (offset_copy(axes.transAxes, figure, x=x, units="points") for x in SAMPLE)
    color, dashes, marker = end.style.color, end.style.line, end.style.marker
    leader = {"arrowstyle": "-", "color": color, "linewidth": 0.5, "alpha": 0.6, "shrinkA": 0, "shrinkB": 2}
    axes.annotate("", (end.x, end.y), (1, height), textcoords=first, arrowprops=leader, annotation_clip=False)
    piece = {"arrowstyle": "-", "color": color, "linewidth": 1.6, "linestyle": dashes, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", (1, height), (1, height), xycoords=last, textcoords=first, arrowprops=piece, annotation_clip=False)
    if marker:
        middle = offset_copy(axes.transAxes, figure, x=sum(SAMPLE) / 2, units="points")
        axes.plot([1], [height], marker, transform=middle, color=color, markersize=4.5, clip_on=False, gid="label")
    beside = offset_copy(axes.transAxes, figure, x=SAMPLE[1] + 4, units="points")
    weight = "bold" if end.bold else "normal"
    text = axes.text(
        1, height, figure_text(end.label), transform=beside, va="center", fontsize=size, color=color, fontweight=weight
    )
    text.set_gid("label")


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Ascending `heights`, moved as little as keeps them `gap` apart (each clump around its own mean)."""
    clumps: list[tuple[float, int]] = []  # (sum of the heights, less each one's place in the clump; members)
    for height in heights:
        total, count = height, 1
        while clumps and total / count - clumps[-1][0] / clumps[-1][1] < clumps[-1][1] * gap:
            before, members = clumps.pop()
            total, count = before + total - count * members * gap, count + members
        clumps.append((total, count))
    return [total / count + place * gap for total, count in clumps for place in range(count)]


def bare(axes: Axes) -> None:
    """Axes without a box, with faint horizontal lines behind everything."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e2e2e2", linewidth=0.6)
    axes.set_axisbelow(True)


def save(figure: Figure, path: str | os.PathLike[str], *, dpi: int = 200) -> Path:
    """Writes a PNG or SVG file, by its suffix. The same figure gives the same SVG: no date, no random ids."""
    path = Path(path)
    metadata: dict[str, Any] = {"Date": None} if path.suffix == ".svg" else {}
    with matplotlib.rc_context({"svg.hashsalt": "dpo_jax", "svg.fonttype": "path"}), placing(path) as file:
        figure.savefig(file, dpi=dpi, metadata=metadata)
    return path
