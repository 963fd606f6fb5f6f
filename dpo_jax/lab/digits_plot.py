"""Figures of the digits experiment: samples before and after training, and reward and accuracy against path KL."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from dpo_jax.lab.sweep import Result
from dpo_jax.plotting.drawing import bare, figure_text, save
from dpo_jax.plotting.palette import GUIDE, STYLES


def plot_samples(groups: Mapping[str, np.ndarray], path: str | os.PathLike[str], *, columns: int = 10) -> Path:
    """One PNG: images [n, 8, 8] in [-1, 1] of each name, in rows of `columns`, with the names above."""
    rows = [-(-len(images) // columns) for images in groups.values()]
    figure = Figure(figsize=(0.34 * columns * len(groups) + 0.3, 0.34 * max(rows) + 0.45), layout="constrained")
    axes = figure.subplots(1, len(groups), squeeze=False)[0]
    for one, (name, images) in zip(axes, groups.items(), strict=True):
        one.imshow(_tiled(images, columns), cmap="gray_r", vmin=-1, vmax=1, interpolation="nearest")
        one.set_title(figure_text(name), loc="left", fontsize="small")
        one.set_axis_off()
    return save(figure, path, dpi=130)


def _tiled(images: np.ndarray, columns: int, gap: int = 1) -> np.ndarray:
    height, width = images.shape[1] + gap, images.shape[2] + gap
    rows = -(-len(images) // columns)
    sheet = np.full((rows * height, columns * width), -1.0)
    for number, image in enumerate(images):
        top, left = number // columns * height, number % columns * width
        sheet[top : top + image.shape[0], left : left + image.shape[1]] = np.clip(image, -1, 1)
    return sheet


def plot_points(
    results: Mapping[str, Sequence[Result]], path: str | os.PathLike[str], *, reference: Mapping[str, float]
) -> Path:
    """One PNG: gain in reward, and accuracy of the classifier, against path KL (root scale), of every measured point."""
    figure = Figure(figsize=(8.6, 3.3), layout="constrained")
    left, right = figure.subplots(1, 2)
    for style, (name, runs) in zip(STYLES, results.items(), strict=False):
        points = [point for run in runs for point in run.points]
        kl = [point["kl"] for point in points]
        gains = [point["reward"] - reference["reward"] for point in points]
        left.plot(kl, gains, style.marker, color=style.color, markersize=4.5, label=figure_text(name))
        right.plot(kl, [point["accuracy"] for point in points], style.marker, color=style.color, markersize=4.5)
    left.axhline(0.0, color=GUIDE.color, linewidth=0.6)
    right.axhline(reference["accuracy"], color=GUIDE.color, linewidth=0.6)
    left.set_title("gain in reward (standard deviations of ink)", loc="left", fontsize="medium")
    right.set_title("share of samples read as their class", loc="left", fontsize="medium")
    right.set_ylim(0.0, 1.02)
    for one in (left, right):
        one.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0.0)), np.square))
        one.set_xlim(left=0.0)
        bare(one)
    figure.supxlabel("path KL(policy || reference), nats per image (root scale)", fontsize="medium")
    figure.legend(loc="outside upper left", ncols=len(results), frameon=False)
    return save(figure, path, dpi=130)
