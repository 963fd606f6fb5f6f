"""Plots of reward against KL: every method with the optimal frontier, and each run over training."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text
from matplotlib.transforms import Bbox

from dpo_jax.evals.frontier import Optimum, Point
from dpo_jax.evals.overoptimization import Measured, RunName
from dpo_jax.plotting.drawing import End, figure_text, label_ends, save
from dpo_jax.plotting.palette import STYLES, Style, style_of

OPTIMUM = Style("", "-", "#000000")
KL_TICKS = (0.0, 0.1, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 10.0, 12.0, 15.0, 20.0, 30.0, 50.0, 100.0, 200.0, 500.0, 1000.0)
SIDES = ((4, -9, "left"), (4, 4, "left"), (-4, 4, "right"), (-4, -9, "right"))  # sides of a marker for its label, in points


def plot_frontier(
    points: Sequence[Point],
    optimum: Optimum,
    path: str | os.PathLike[str],
    *,
    max_kl: float | None = None,
    reward: str = "true reward",
    curve: str = "optimum (eq. 4)",
) -> Path:
    """Plots the points of all methods and the curve of pi* to a PNG file.

    Several points of one method, setting and seed are one run over time, drawn small and faint. The last point of a setting
    (with several seeds, their mean) is drawn in full. A line joins the last points of a method's settings, ordered by KL.
    Points beyond `max_kl` nats (default: no limit) are placed at the edge and labeled with their KL. The KL axis is scaled by
    its square root, which makes the optimum a straight line near the reference. `reward` and `curve` name the rewards and the
    curve of `optimum`.
    """
    max_kl = max_kl or 1.04 * max([float(optimum.kl[-1]), *(p.kl for p in points), *(p.kl_bound or 0.0 for p in points)])
    figure = Figure(figsize=(10.5, 6.4), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0.0)), np.square))
    axes.set_xlim(0.0, max_kl)
    axes.set_xticks([kl for kl in KL_TICKS if kl <= max_kl])
    axes.xaxis.set_major_formatter("{x:g}")
    methods = list(dict.fromkeys(point.method for point in points))
    ends = [End(*_draw_optimum(axes, optimum, max_kl), curve, OPTIMUM, bold=True)]
    notes = len(axes.texts)
    for method, style in zip(methods, map(style_of, itertools.count()), strict=False):
        ends.append(End(*_draw_method(axes, [p for p in points if p.method == method], style, max_kl), method, style))
    axes.set_xlabel("KL(policy || reference), nats per completion (root scale)")
    axes.set_ylabel(f"mean {reward}")
    axes.set_title(f"{reward[0].upper()}{reward[1:]} against KL", loc="left", fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e4e4e4", linewidth=0.6)
    axes.set_axisbelow(True)
    settings = axes.texts[notes:]
    label_ends(figure, {axes: ends})
    figure.draw_without_rendering()
    _set_apart(axes, settings)
    return save(figure, path, dpi=150)


def plot_trajectories(runs: Mapping[RunName, Sequence[Measured]], path: str | os.PathLike[str]) -> Path:
    """Plots to one PNG true reward against KL over the training of each run, with a panel for each method.

    A run starts at its thin end, with its best point marked (filled) and its last (hollow): reward that falls to the right is
    over-optimization. KL axes are scaled by the square root, as in `plot_frontier`.
    """
    methods = list(dict.fromkeys(method for method, _, _ in runs))
    columns = min(3, len(methods))
    count = -(-len(methods) // columns)
    figure = Figure(figsize=(4.4 * columns, 0.5 + 3.0 * count), layout="constrained")
    places, labels = figure.subplots(count, columns, squeeze=False).ravel(), {}
    for axes, method in zip(places, methods, strict=False):
        mine = [(setting, seed, points) for (name, setting, seed), points in runs.items() if name == method]
        several = len({seed for _, seed, _ in mine}) > 1
        ends = []
        for (setting, seed, points), style in zip(mine, itertools.cycle(STYLES)):
            kl, reward = ([point[name] for point in points] for name in ("kl", "reward"))
            best = int(np.argmax(reward))
            label = " ".join(filter(None, (setting, f"seed {seed}" if several else "")))
            axes.plot(kl, reward, linestyle=style.line, color=style.color, linewidth=1.3)
            ends.append(End(kl[-1], reward[-1], label, style))
            axes.plot(kl[-1], reward[-1], style.marker, color=style.color, markersize=6, markerfacecolor="white")
            axes.plot(kl[best], reward[best], style.marker, color=style.color, markersize=6)
        axes.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0.0)), np.square))
        axes.set_xlim(left=0.0)
        most = axes.get_xlim()[1]
        ticks = [kl for kl in KL_TICKS if kl <= most]
        axes.set_xticks(ticks[:: max(1, len(ticks) // 5)])
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_title(figure_text(method), loc="left", fontweight="bold")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e4e4e4", linewidth=0.6)
        labels[axes] = ends
    for axes in places[len(methods) :]:
        axes.remove()
    label_ends(figure, labels, size=7.5)
    figure.supxlabel("KL(policy || reference), nats per completion (root scale)", fontsize="medium")
    figure.supylabel("mean true reward", fontsize="medium")
    return save(figure, path, dpi=120)


def _draw_optimum(axes: Axes, optimum: Optimum, max_kl: float) -> tuple[float, float]:
    """Draws the curve from the reference on, dashed gray where it rests on too few samples. Returns the place of its label."""
    kl, reward, trusted = optimum.kl, optimum.reward, optimum.trusted
    low, high = optimum.band
    if kl[0] > 0:
        kl, reward, trusted = np.append(0.0, kl), np.append(optimum.reference, reward), np.append(True, trusted)
        low, high = np.append(optimum.reference, low), np.append(optimum.reference, high)
    last = np.flatnonzero(trusted)[-1] if trusted.any() else 0
    axes.fill_between(kl[: last + 1], low[: last + 1], high[: last + 1], color="#bbbbbb", alpha=0.55, linewidth=0, zorder=1)
    axes.fill_between(kl[last:], low[last:], high[last:], color="#dddddd", alpha=0.5, linewidth=0, zorder=1)
    axes.plot(kl[: last + 1], reward[: last + 1], color="black", linewidth=2.2, zorder=2)
    if last + 1 < len(kl):
        axes.plot(kl[last:], reward[last:], color="#8a8a8a", linewidth=1.6, linestyle=(0, (4, 3)), zorder=2)
        if kl[last] < max_kl:
            text = "too few effective samples from here"
            at = (kl[last], reward[last])
            axes.annotate(text, at, (-4, 10), textcoords="offset points", ha="right", fontsize=7.5, color="#666666")
    inside = np.flatnonzero(kl <= max_kl)[-1]
    return float(kl[inside]), float(reward[inside])


def _draw_method(axes: Axes, points: Sequence[Point], style: Style, max_kl: float) -> tuple[float, float]:
    """Draws all runs of one method. Returns the place of its label: its last point, ordered by KL."""
    finals = []
    for setting in dict.fromkeys(point.setting for point in points):
        run = [point for point in points if point.setting == setting]
        finals.append(run[-1])
        for seed in dict.fromkeys(point.seed for point in run):
            one = [point for point in run if point.seed == seed]
            if len(one) > 1 or seed:
                over_time = [min(point.kl, max_kl) for point in one], [point.reward for point in one]
                axes.plot(*over_time, style.marker, color=style.color, markersize=3, alpha=0.35, markeredgewidth=0, zorder=3)
                axes.plot(*over_time, color=style.color, linewidth=0.5, alpha=0.3, zorder=3)
    finals.sort(key=lambda point: point.kl)
    x, y = [min(point.kl, max_kl) for point in finals], [point.reward for point in finals]
    axes.plot(
        x,
        y,
        linestyle=style.line,
        marker=style.marker,
        color=style.color,
        markersize=6.5,
        markeredgecolor="white",
        markeredgewidth=0.7,
        linewidth=1.4,
        zorder=5,
        clip_on=False,
    )
    for point in finals:
        _draw_details(axes, point, style, max_kl)
    return x[-1], y[-1]


def _draw_details(axes: Axes, point: Point, style: Style, max_kl: float) -> None:
    """Draws intervals as thin bars, the setting beside the marker, and for best-of-N the bound to the right of the estimate."""
    x = min(point.kl, max_kl)
    if point.reward_interval:
        axes.vlines(x, *point.reward_interval, color=style.color, linewidth=0.9, zorder=4)
    if point.kl_interval:
        left, right = (min(side, max_kl) for side in point.kl_interval)
        axes.hlines(point.reward, left, right, color=style.color, linewidth=0.9, zorder=4)
    if point.kl_bound is not None:
        bound = min(point.kl_bound, max_kl)
        axes.hlines(point.reward, x, bound, color=style.color, linewidth=0.9, linestyle=(0, (1, 1.5)), zorder=4)
        axes.plot([bound], [point.reward], "|", color=style.color, markersize=8, zorder=4)
    beyond = f" (KL {point.kl:.0f} \N{RIGHTWARDS ARROW})" if point.kl > max_kl else ""
    if point.setting or beyond:
        axes.annotate(
            figure_text((point.setting + beyond).strip()),
            (x, point.reward),
            xytext=(-5 if beyond else 4, -9),
            textcoords="offset points",
            ha="right" if beyond else "left",
            fontsize=6.5,
            color=style.color,
        )


def _set_apart(axes: Axes, labels: Sequence[Text]) -> None:
    """Moves labels to a free side of their markers. A label without one is removed: the table of results has its value."""
    half = 3.5 * axes.figure.dpi / 72  # half of a marker, in pixels
    notes = [label for label in labels if isinstance(label, Annotation)]
    markers = [axes.transData.transform(note.xy) for note in notes]
    taken = [Bbox([marker - half, marker + half]) for marker in markers]
    for note in notes:
        for x, y, side in SIDES:
            if side == "left" and note.xy[0] >= axes.get_xlim()[1]:  # the names are there
                continue
            note.set(horizontalalignment=side)
            note.xyann = x, y
            box = note.get_window_extent()
            if not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
        else:
            note.remove()
