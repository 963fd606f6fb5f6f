"""Figure of win rates: a line for each policy over temperature, training step or N, with lengths below."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import ScaledTranslation

from dpo_jax.judge.win_rates import WinRate
from dpo_jax.plotting.drawing import figure_text, save
from dpo_jax.plotting.palette import STYLES, Style, style_of


def plot_win_rates(points: Sequence[WinRate], path: str | os.PathLike[str], *, x: str | None, baseline: str) -> Path:
    """Plots win rates with 95 % intervals above (hollow: length-controlled) and mean lengths below. `x` names the x-axis.

    Series without points are placed side by side. Extrapolated estimates at equal length are left out.
    """
    names = list(dict.fromkeys(point.series for point in points))
    # The legend has a row for each series.
    figure = Figure(figsize=(7.2, 6.0 + 0.2 * max(0, len(names) - len(STYLES))), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    single = all(point.at is None for point in points)
    for number, name in enumerate(names):
        style = style_of(number)
        mine = [point for point in points if point.series == name]
        places = np.array([float(number) if point.at is None else point.at for point in mine])
        _draw(figure, above, mine, places, name, style)
        below.plot(places, [p.policy_length for p in mine], linestyle=style.line, marker=style.marker, color=style.color)
    lengths = sorted({(float(names.index(p.series)) if p.at is None else p.at, p.baseline_length) for p in points})
    below.plot(
        [place for place, _ in lengths],
        [length for _, length in lengths],
        color="#999999",
        linestyle=(0, (6, 4)),
        marker="_",
        label="baseline (lengths)",
        zorder=0,
    )
    above.axhline(0.5, color="#999999", linewidth=0.8, linestyle=(0, (6, 4)), zorder=0)
    above.set_ylim(0, 1)
    above.set_ylabel("win rate (a flipped pair is half a win)")
    above.set_title(f"Win rate against {figure_text(baseline)}", loc="left", fontweight="bold")
    below.set_ylabel("mean length\n(characters)")
    below.set_ylim(0, 1.2 * max(max(p.policy_length, p.baseline_length) for p in points))
    below.set_xlabel(figure_text((x or "step").replace("_", " ")) if not single else "")
    if x == "best_of":  # 1, 4, 16, 64, 128
        below.set_xscale("log", base=2)
        below.minorticks_off()
    if single:
        below.set_xticks(range(len(names)), [figure_text(name) for name in names])
    elif len(lengths) <= 10:
        below.set_xticks([place for place, _ in lengths], [f"{place:g}" for place, _ in lengths])
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e4e4e4", linewidth=0.6)
        axes.set_axisbelow(True)
    named = [found for axes in (above, below) for found in zip(*axes.get_legend_handles_labels(), strict=True)]
    handles, labels = zip(*named, strict=True)
    figure.legend(handles, labels, frameon=False, loc="outside lower center", ncols=2)
    return save(figure, path, dpi=150)


def _draw(figure: Figure, axes: Axes, points: Sequence[WinRate], places: np.ndarray, name: str, style: Style) -> None:
    rates = np.array([(p.win_rate.value, p.win_rate.low, p.win_rate.high) for p in points]).T
    axes.plot(places, rates[0], linestyle=style.line, marker=style.marker, color=style.color, label=figure_text(name))
    axes.vlines(places, rates[1], rates[2], color=style.color, linewidth=1.2)
    told = [not point.extrapolated for point in points]
    if not any(told):
        return
    controlled = [point.win_rate_length_controlled for point in points if not point.extrapolated]
    beside = axes.transData + ScaledTranslation(5 / 72, 0, figure.dpi_scale_trans)
    look = {"color": style.color, "alpha": 0.6, "transform": beside}
    axes.vlines(places[told], [rate.low for rate in controlled], [rate.high for rate in controlled], linewidth=0.8, **look)
    axes.plot(
        places[told],
        [rate.value for rate in controlled],
        linestyle="none",
        marker=style.marker,
        markersize=8,
        markerfacecolor="none",
        label=figure_text(f"{name}, at equal length"),
        **look,
    )
