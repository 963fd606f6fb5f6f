"""Figure of `dpo-jax control`: return over training, with a panel for each kind of preferences."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from dpo_jax.lab.sweep import Result
from dpo_jax.plotting.drawing import bare, save
from dpo_jax.plotting.palette import GUIDE, STYLES


def plot_returns(
    results: Sequence[Result], path: str | os.PathLike[str], *, optimal: float, lowest: float | None = None
) -> Path:
    """One PNG: the mean over seeds, with the range from the lowest to the highest seed. `lowest` limits the axis."""
    kinds = list(dict.fromkeys(result.run.settings["preferences"] for result in results))
    styles = dict(zip(dict.fromkeys(result.run.method for result in results), STYLES, strict=False))
    figure = Figure(figsize=(4.6 * len(kinds), 3.6), layout="constrained")
    for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False, sharey=True)[0], kinds, strict=True):
        for method, style in styles.items():
            runs = [r.points for r in results if (r.run.method, r.run.settings["preferences"]) == (method, kind)]
            if not runs:
                continue
            steps = [point["step"] for point in runs[0]]
            values = np.array([[point["return"] for point in points] for points in runs])
            axes.fill_between(steps, values.min(axis=0), values.max(axis=0), color=style.color, alpha=0.15, linewidth=0)
            axes.plot(steps, values.mean(axis=0), marker=style.marker, linestyle=style.line, color=style.color, label=method)
        axes.axhline(optimal, color=GUIDE.color, linestyle=GUIDE.line, linewidth=1.0, label="optimum or expert")
        axes.set_title(f"preferences by {kind}", loc="left", fontsize="medium", fontweight="bold")
        if lowest is not None:
            axes.set_ylim(bottom=lowest)
        bare(axes)
    handles = {label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside upper left", ncols=5, frameon=False)
    figure.supxlabel("optimizer steps", fontsize="medium")
    figure.supylabel("return", fontsize="medium")
    return save(figure, path, dpi=130)
