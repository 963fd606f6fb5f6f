"""Runs of one setting with several seeds: their mean, with an interval over prompts and seeds together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from dpo_jax.lab.sweep import Result

STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""The 97.5 % quantile of Student's t for a mean of so many values; of more, that of a normal distribution is taken."""


def over_seeds(points: Sequence[Mapping[str, float]], name: str) -> dict[str, float]:
    """`{"": mean, "_low": low, "_high": high}` of the value `name` of `points`, one a seed; each has `_low` and `_high`, too.

    Of one seed, its own interval, over prompts. Of several, the intervals over prompts (their mean, as all seeds share the
    prompts) and over seeds (Student's t) add up in squares. Two seeds that differ by d have one of at least 6.4 d to each side.

    >>> over_seeds([{"x": 1.0, "x_low": 0.7, "x_high": 1.3}, {"x": 1.0, "x_low": 0.5, "x_high": 1.5}], "x")
    {'': 1.0, '_low': 0.6, '_high': 1.4}
    """
    values = np.array([[point[f"{name}{end}"] for end in ("", "_low", "_high")] for point in points], np.float64)
    mean, low, high = values.mean(axis=0)
    if len(points) == 1:
        return {"": float(mean), "_low": float(low), "_high": float(high)}
    scatter = STUDENT.get(len(points), 1.96) * values[:, 0].std(ddof=1) / math.sqrt(len(points))
    below, above = math.hypot(mean - low, scatter), math.hypot(high - mean, scatter)
    return {"": float(mean), "_low": float(mean - below), "_high": float(mean + above)}


def last_points(results: Sequence[Result]) -> dict[tuple[str, str], dict[int, dict[str, float]]]:
    """Where the runs of each setting ended: {(method, label): {seed: its last point}}."""
    found: dict[tuple[str, str], dict[int, dict[str, float]]] = {}
    for result in results:
        found.setdefault((result.run.method, result.run.label), {})[result.run.seed] = result.points[-1]
    return found
