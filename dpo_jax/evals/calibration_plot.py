"""Reliability diagram: accuracy of the implicit reward by its confidence."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from dpo_jax.evals.calibration import Reliability
from dpo_jax.plotting.drawing import save
from dpo_jax.plotting.palette import CHOSEN
from dpo_jax.types import Array

COLOR, GUIDE = CHOSEN.color, "#777777"


def plot_reliability(found: Reliability, margins: Array, path: str | os.PathLike[str], *, title: str) -> Path:
    """Plots to one PNG the share of right pairs by belief with Wilson intervals, and below it the number of pairs."""
    figure = Figure(figsize=(6.4, 6.4), layout="constrained")
    top, below = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    belief, right, low, high = (np.array([row[name] for row in found.bins]) for name in ("belief", "accuracy", "low", "high"))
    top.plot([0.5, 1], [0.5, 1], color=GUIDE, linewidth=1.0, linestyle=(0, (6, 4)), label="perfect calibration")
    top.vlines(belief, low, high, color=COLOR, linewidth=1.4)
    top.plot(belief, right, "o", color=COLOR, markersize=6, markeredgecolor="white", label="pairs of a bin, 95 % interval")
    top.set_ylim(min(0.5, float(low.min())) - 0.03, 1.02)
    top.set_ylabel("share of pairs that it ranks right")
    top.set_title(title, loc="left", fontweight="bold")
    figure.legend(*top.get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=2)
    beliefs = 1 / (1 + np.exp(-np.abs(np.asarray(margins, np.float64))))
    below.hist(beliefs, bins=np.linspace(0.5, 1, 26).tolist(), color=COLOR)
    below.set_ylabel("pairs")
    below.set_xlabel("belief: logistic function of the size of the margin")
    for axes in (top, below):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
    return save(figure, path, dpi=150)
