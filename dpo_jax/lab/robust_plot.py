"""Figures of the robustness experiments: gain in reward against KL, measured points and curves, in several panels."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator

from dpo_jax.plotting.drawing import bare, figure_text, save
from dpo_jax.plotting.palette import GUIDE, STYLES

KL_TICKS = (0.0, 0.1, 0.5, 1.0, 2.0, 4.0, 6.0, 10.0, 15.0, 20.0, 30.0, 50.0, 100.0, 200.0, 500.0, 1000.0)


class Curve(NamedTuple):
    """Points and a line with one name in one panel. The same name has the same style in every panel."""

    panel: str
    name: str
    points: Sequence[tuple[float, float, float, float]]  # KL in nats, gain, and the ends of its interval
    line_kl: np.ndarray  # of a theoretical or fitted curve; may be empty
    line_gain: np.ndarray
    proxy: Sequence[tuple[float, float]] = ()  # KL and gain in a learned reward, as hollow markers


def plot_curves(curves: Sequence[Curve], path: str | os.PathLike[str], *, line: str) -> Path:
    """Plots to one PNG. The KL axis is scaled by its square root, in which the optimum begins as a straight line.

    `line` describes the lines; it is empty if there are none.
    """
    panels = list(dict.fromkeys(curve.panel for curve in curves))
    styles = dict(zip(dict.fromkeys(curve.name for curve in curves), itertools.cycle(STYLES), strict=False))
    columns = min(3 if len(panels) % 3 == 0 else 2, len(panels))
    count = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns, 1.1 + 3.1 * count), layout="constrained")
    grid = figure.subplots(count, columns, squeeze=False, sharey="row")
    for axes, panel in zip(grid.ravel(), panels, strict=False):
        for curve in (curve for curve in curves if curve.panel == panel):
            style = styles[curve.name]
            if curve.points:
                kl, gain, low, high = np.array(curve.points).T
                axes.vlines(kl, low, high, color=style.color, linewidth=0.8)
                axes.plot(kl, gain, style.marker, color=style.color, markersize=4.5, label=figure_text(curve.name))
            if curve.proxy:
                axes.plot(*np.array(curve.proxy).T, style.marker, color=style.color, markersize=4.5, markerfacecolor="white")
            axes.plot(curve.line_kl, curve.line_gain, linestyle=style.line, color=style.color, linewidth=1.2)
        axes.axhline(0.0, color=GUIDE.color, linewidth=0.6)
        axes.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0.0)), np.square))
        axes.set_xlim(left=0.0)
        ticks = [kl for kl in KL_TICKS if kl <= axes.get_xlim()[1]]
        axes.xaxis.set_major_locator(FixedLocator(ticks[:: max(1, len(ticks) // 5)]))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_title(figure_text(panel), loc="left", fontsize="medium", fontweight="bold")
        bare(axes)
    for axes in grid.ravel()[len(panels) :]:
        axes.remove()
    handles = {label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside upper left",
        ncols=columns,
        frameon=False,
        title=line and f"lines: {line}",
    )
    figure.supxlabel("KL(policy || reference), nats per completion (root scale)", fontsize="medium")
    figure.supylabel("gain in reward over the reference", fontsize="medium")
    return save(figure, path, dpi=130)
