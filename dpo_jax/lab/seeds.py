"""Means over several seeds of one setting, with intervals over prompts and seeds together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from dpo_jax.evals.intervals import student
from dpo_jax.lab.sweep import Result


def over_seeds(points: Sequence[Mapping[str, float]], name: str) -> dict[str, float]:
    """`{"": mean, "_low": low, "_high": high}` of the value `name` of `points`, one per seed, each with `_low` and `_high`.

    With one seed it is the seed's own interval, over prompts. With several, the interval over prompts (the mean of theirs,
    because all seeds share the prompts) and the one over seeds (Student's t) add in quadrature. For two seeds that differ by d
    this is at least 6.4 d to each side.

    >>> over_seeds([{"x": 1.0, "x_low": 0.7, "x_high": 1.3}, {"x": 1.0, "x_low": 0.5, "x_high": 1.5}], "x")
    {'': 1.0, '_low': 0.6, '_high': 1.4}
    """
    values = np.array([[point[f"{name}{end}"] for end in ("", "_low", "_high")] for point in points], np.float64)
    mean, low, high = values.mean(axis=0)
    if len(points) == 1:
        return {"": float(mean), "_low": float(low), "_high": float(high)}
    scatter = student(len(points)) * values[:, 0].std(ddof=1) / math.sqrt(len(points))
    below, above = math.hypot(mean - low, scatter), math.hypot(high - mean, scatter)
    return {"": float(mean), "_low": float(mean - below), "_high": float(mean + above)}


def last_points(results: Sequence[Result]) -> dict[tuple[str, str], dict[int, dict[str, float]]]:
    """Last points of the runs of each setting: {(method, label): {seed: last point}}."""
    found: dict[tuple[str, str], dict[int, dict[str, float]]] = {}
    for result in results:
        found.setdefault((result.run.method, result.run.label), {})[result.run.seed] = result.points[-1]
    return found
