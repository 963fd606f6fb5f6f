"""Figure of a race: pairs/s, peak memory and loss curves of all contenders."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dpo_jax.bench.work import library
from dpo_jax.plotting.palette import CHOSEN, REJECTED
from dpo_jax.writing import placing

COLORS = {"jax": CHOSEN.color, "torch": REJECTED.color}


def plot_race(summary: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Plots the result of `report.summarize` to a PNG file."""
    figure = Figure(figsize=(14, 4.2), layout="constrained")
    speed, memory, curves = figure.subplots(1, 3)
    contenders = summary["contenders"]
    names = list(contenders)
    rates = [contenders[name]["pairs_per_second"] for name in names]
    colors = [COLORS[library(name)] for name in names]
    medians = [rate["median"] for rate in rates]
    whiskers = [[m - r["min"] for m, r in zip(medians, rates, strict=True)], [r["max"] - r["median"] for r in rates]]
    bars = speed.barh(names, medians, xerr=whiskers, color=colors, error_kw={"linewidth": 1})
    speed.bar_label(bars, fmt="%.2f", padding=4, fontsize=8)
    _finish(speed, "Speed", "pairs/s (median, min to max)")
    sizes = [contenders[name]["peak_bytes"] / 2**30 for name in names]
    memory.bar_label(memory.barh(names, sizes, color=colors), fmt="%.2f", padding=4, fontsize=8)
    _finish(memory, "Peak memory", "GiB")
    for axes in (speed, memory):
        axes.invert_yaxis()
        axes.margins(x=0.15)
    for name in names:
        curves.plot(contenders[name]["losses"], color=COLORS[library(name)], alpha=0.5, linewidth=1.2)
    curves.axhline(math.log(2), color="#999999", linewidth=0.8, linestyle=(0, (6, 4)))
    for kind, color in COLORS.items():
        curves.plot([], [], color=color, label=kind)
    figure.legend(*curves.get_legend_handles_labels(), frameon=False, loc="outside right upper")
    _finish(curves, "Loss: all curves lie on each other", "optimizer steps taken")
    curves.set_ylabel("loss per pair (nats)")
    path = Path(path)
    with placing(path) as file:
        figure.savefig(file, dpi=120)
    return path


def _finish(axes: Axes, title: str, label: str) -> None:
    axes.set_title(title, loc="left", fontweight="bold")
    axes.set_xlabel(label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
