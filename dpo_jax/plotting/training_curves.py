"""Plot training curves from `metrics.jsonl`, of one run or of several."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dpo_jax.plotting.curves import COMPARED, EVAL, PANELS, ROWS, Line, Panel, guide_of, running_mean, series, window_of
from dpo_jax.plotting.drawing import LABEL_SIZE, PANEL, End, ImageFormat, bare, figure_text, label_ends, save
from dpo_jax.plotting.palette import GUIDE, STYLES

MARKS = 60  # characters of a line below a panel
NAME = 22  # characters of a run's name beside its curve


def plot_training(
    rows: Iterable[Mapping[str, Any]], directory: str | os.PathLike[str], *, format: ImageFormat = "png"
) -> list[Path]:
    """Draw the rows of a `metrics.jsonl` (from `runtime.metrics.read_metrics`); returns the images in reading order.

    Training rows have bare names, evaluation rows names that begin with `eval/`; values are numbers, or None where they were
    not finite. A panel without any of its metrics is left out: SFT and DPO runs get the images that mean something for them.
    """
    rows = list(rows)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    drawn = [(panel, draw_panel(panel, rows)) for panel in PANELS]
    return [save(figure, directory / f"{panel.file}.{format}") for panel, figure in drawn if figure is not None]


def draw_panel(panel: Panel, rows: ROWS) -> Figure | None:
    """One panel of a run; None if the rows have none of its metrics."""
    if not any(_has(line, rows) for line in panel.lines):
        return None
    figure = Figure(figsize=PANEL, layout="constrained")
    axes = figure.add_subplot()
    ends = [end for line in panel.lines if (end := _draw(axes, line, rows)) is not None]
    if guide := guide_of(panel, rows):
        axes.axhline(guide[0], color=GUIDE.color, linewidth=0.8, linestyle=GUIDE.line, zorder=0)
        ends.append(End(axes.get_xlim()[1], guide[0], guide[1], GUIDE))
    _finish(axes, panel.title, panel.unit, _marks(panel.lines, rows))
    if not any(line.smooth for line in panel.lines):
        axes.yaxis.set_major_formatter("{x:g}")  # of any size, from 5e-07 to 3
    # A single curve is named by the title, and a name would say the same again.
    label_ends(figure, {axes: ends} if len(ends) > 1 else {})
    return figure


def _has(line: Line, rows: ROWS) -> bool:
    return any((line.batches and line.metric in row) or EVAL + line.metric in row for row in rows)


def _draw(axes: Axes, line: Line, rows: ROWS) -> End | None:
    """A metric over training (batches faint, their running mean strong) and on held-out data (points, with their interval).

    Returns where it ends, or None if the rows do not have it.
    """
    if not _has(line, rows):
        return None
    steps, values = series(rows if line.batches else [], line.metric)
    color, last = line.style.color, None
    if len(steps):
        window = window_of(len(steps)) if line.smooth else 1
        if window > 1:
            axes.plot(steps, values, color=color, alpha=0.35, linewidth=0.7, gid="raw", rasterized=len(steps) > 4000)
            values = running_mean(values, window)
        axes.plot(steps, values, linestyle=line.style.line, color=color, linewidth=1.8, gid=line.metric)
        last = _last(steps, values)
    eval_steps, eval_values = series(rows, EVAL + line.metric)
    if len(eval_steps):
        look = {"color": color, "markersize": 5, "markeredgecolor": "white", "markeredgewidth": 0.7}
        axes.plot(eval_steps, eval_values, line.style.marker, **look, gid=EVAL + line.metric, zorder=4)
        low, high = (series(rows, f"{EVAL}{line.metric}_{side}")[1] for side in ("low", "high"))
        if len(low) == len(high) == len(eval_steps):
            axes.vlines(eval_steps, low, high, color=color, linewidth=1.2)
        last = last or _last(eval_steps, eval_values)
    return End(*(last or (0.0, 0.0)), line.label, line.style)


def _last(steps: np.ndarray, values: np.ndarray) -> tuple[float, float] | None:
    """The last finite point of a curve."""
    good = np.flatnonzero(np.isfinite(values))
    return (float(steps[good[-1]]), float(values[good[-1]])) if len(good) else None


def _marks(lines: Sequence[Line], rows: ROWS) -> str:
    """What thin and thick lines and points are, in words, for below the x-axis."""
    counts = [len(series(rows, line.metric)[0]) for line in lines if line.smooth and line.batches]
    window = max(map(window_of, counts), default=1)
    words = [f"thin: each step, thick: mean of {window} steps"] if window > 1 else []
    evaluated = {name for row in rows for name in row if name.startswith(EVAL)}
    metrics = {EVAL + line.metric for line in lines} & evaluated
    if metrics:
        interval = ", 95 % interval" if any(f"{metric}_low" in evaluated for metric in metrics) else ""
        words.append(f"points: held out{interval}")
    return ("; " if len("; ".join(words)) < MARKS else ";\n").join(words)


def _finish(axes: Axes, title: str, unit: str, marks: str = "") -> None:
    """Title and unit above the axes, where they have its whole width; what the marks mean below."""
    axes.set_title(title, loc="left", fontweight="bold", fontsize=11, pad=19)
    axes.annotate(unit, (0, 1), (0, 6), "axes fraction", "offset points", fontsize=8.5, color="#555555")
    axes.set_xlabel("optimizer steps taken", fontsize=8.5, color="#333333")
    if marks and axes.figure is not None:
        axes.figure.supxlabel(marks, x=0.01, ha="left", fontsize=8, color="#555555")
    axes.tick_params(labelsize=8.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    bare(axes)


def plot_displacement(runs: Mapping[str, Iterable[Mapping[str, Any]]], path: str | os.PathLike[str]) -> Path:
    """How far chosen and rejected completions moved from the reference, a small panel for each run with such rows: one image.

    `runs` are rows of `metrics.jsonl` by the name to show. Each panel has its own axes: some methods move far more.
    Raises `ValueError` if no run has displacements (methods without pairs have none).
    """
    panel = next(panel for panel in PANELS if panel.file == "displacement")
    shown = {name: list(rows) for name, rows in runs.items()}
    shown = {
        name: rows for name, rows in shown.items() if any(len(series(rows, p + panel.lines[0].metric)[0]) for p in ("", EVAL))
    }
    if not shown:
        raise ValueError(f"none of the {len(runs)} runs has {panel.lines[0].metric}: only training on pairs records it")
    columns = min(4, len(shown))
    count = -(-len(shown) // columns)
    figure = Figure(figsize=(3.6 * columns, 0.4 + 2.4 * count), layout="constrained")
    places, labels = figure.subplots(count, columns, squeeze=False).ravel(), {}
    for axes, (name, rows) in zip(places, shown.items(), strict=False):
        ends = [end for line in panel.lines if (end := _draw(axes, line, rows)) is not None]
        axes.axhline(0.0, color=GUIDE.color, linewidth=0.8, linestyle=GUIDE.line, zorder=0)
        axes.set_title(figure_text(name), loc="left", fontweight="bold", fontsize=10)
        axes.tick_params(labelsize=8)
        bare(axes)
        labels[axes] = ends
    for axes in places[len(shown) :]:
        axes.remove()
    label_ends(figure, labels, size=8)
    figure.suptitle(panel.unit, x=0.01, ha="left", fontsize="medium")
    figure.supxlabel("optimizer steps taken", fontsize="medium")
    return save(figure, path, dpi=120)


def plot_runs(
    runs: Mapping[str, Iterable[Mapping[str, Any]]], directory: str | os.PathLike[str], *, format: ImageFormat = "png"
) -> list[Path]:
    """Several runs in the same axes, an image for each metric of `COMPARED` that at least one of them has.

    `runs` are rows of `metrics.jsonl` by the name to show. What is measured every step is a running mean over faint raw values.
    """
    shown = {name: list(rows) for name, rows in runs.items()}
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for metric, title, unit in COMPARED:
        if not any(metric in row for rows in shown.values() for row in rows):
            continue
        figure = Figure(figsize=PANEL, layout="constrained")
        axes = figure.add_subplot()
        held_out = metric.startswith(EVAL)
        ends, windows = [], set()
        for number, (name, rows) in enumerate(shown.items()):
            steps, values = series(rows, metric)
            style = STYLES[number % len(STYLES)]
            window = 1 if held_out else window_of(len(steps))
            windows.add(window)
            if window > 1:
                axes.plot(steps, values, color=style.color, alpha=0.25, linewidth=0.5, gid="raw", rasterized=len(steps) > 4000)
            values = running_mean(values, window)
            look: dict[str, Any] = {"linestyle": style.line, "color": style.color, "linewidth": 1.6}
            axes.plot(steps, values, **look, marker=style.marker if held_out else "", markersize=4.5)
            if last := _last(steps, values):
                ends.append(End(*last, _shortened(name), style))
        marks = f"thin: each step, thick: mean of {max(windows)} steps" if max(windows) > 1 else ""
        _finish(axes, title, unit, marks)
        label_ends(figure, {axes: ends}, size=LABEL_SIZE if len(ends) < 8 else 7)
        written.append(save(figure, directory / f"{metric.replace('/', '-')}.{format}"))
    return written


def _shortened(name: str) -> str:
    """Long names differ at their end as often as at their beginning, so the middle goes."""
    return name if len(name) <= NAME else f"{name[: NAME // 2 - 1]}…{name[-NAME // 2 :]}"
