"""Additional frontier plots: lengths of the policies' samples, and learned against true reward."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dpo_jax.evals.intervals import Interval
from dpo_jax.plotting.drawing import End, label_ends, save
from dpo_jax.plotting.palette import style_of


class Spot(NamedTuple):
    """A policy in a panel."""

    x: float
    y: float
    interval: Interval  # of y


def plot_lengths(
    by_kl: Mapping[str, Sequence[Spot]],
    by_beta: Mapping[str, Sequence[Spot]],
    path: str | os.PathLike[str],
    *,
    reference: float,
) -> Path:
    """Plots to one PNG mean tokens of samples against KL (sqrt scale) and beta (log scale), with a line for each method.

    `reference` is the mean of the reference's samples, drawn as a dashed line. Panels without spots are left out.
    """
    panels = [(by_kl, "KL(policy || reference), nats per completion (root scale)"), (by_beta, "beta (log scale)")]
    panels = [(spots, name) for spots, name in panels if spots]
    figure = Figure(figsize=(5.4 * len(panels), 4.2), layout="constrained")
    labels = {}
    for axes, (spots, name) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        axes.axhline(reference, color="#8a8a8a", linewidth=1.0, linestyle=(0, (4, 3)))
        labels[axes] = _draw(axes, spots, by_kl)
        if spots is by_beta:
            axes.set_xscale("log")
        else:
            axes.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0.0)), np.square))
            axes.set_xlim(left=0.0)
        axes.set_xlabel(name)
        _plain(axes)
    label_ends(figure, labels, size=7.5)
    figure.supylabel("mean tokens of samples (dashed: of the reference)", fontsize="medium")
    return save(figure, path, dpi=120)


def plot_learned(spots: Mapping[str, Sequence[Spot]], path: str | os.PathLike[str]) -> Path:
    """Plots to one PNG the gain in true reward (y) against the gain in a learned reward (x), both over the reference.

    On the dashed diagonal the learned reward is right; below it the learned reward is too optimiztic.
    """
    figure = Figure(figsize=(6.0, 4.6), layout="constrained")
    axes = figure.add_subplot()
    ends = _draw(axes, spots, spots)
    low, high = (f(spot.x for of in spots.values() for spot in of) for f in (min, max))
    axes.plot([low, high], [low, high], color="#8a8a8a", linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)
    axes.set_xlabel("gain in the learned reward")
    axes.set_ylabel("gain in the true reward")
    _plain(axes)
    label_ends(figure, {axes: ends}, size=7.5)
    return save(figure, path, dpi=120)


def _draw(axes: Axes, spots: Mapping[str, Sequence[Spot]], names: Mapping[str, object]) -> list[End]:
    """Draws a line for each method, ordered by x, with bars for the intervals. Styles are assigned by position in `names`."""
    ends = []
    for method, of in spots.items():
        style = style_of(list(names).index(method))
        ordered = sorted(of)
        x, y = [spot.x for spot in ordered], [spot.y for spot in ordered]
        axes.plot(x, y, linestyle=style.line, marker=style.marker, color=style.color, markersize=5, linewidth=1.2, zorder=3)
        axes.vlines(x, *zip(*(spot.interval for spot in ordered), strict=True), color=style.color, linewidth=0.9, zorder=2)
        ends.append(End(x[-1], y[-1], method, style))
    return ends


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e4e4e4", linewidth=0.6)
    axes.set_axisbelow(True)
