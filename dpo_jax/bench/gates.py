"""Checks that all contenders compute the same thing, without which no ratio is reported."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np


class GateFailed(RuntimeError):
    """Contenders disagree, so their speeds may not be compared."""


class Tolerance(NamedTuple):
    logps: float  # of a completion's log-probability at step 0, relative to its size
    start: float  # of the loss at step 0, against ln 2
    curve: float  # of the loss at every later step


# In bfloat16 a completion's log-probability moves by some tenths of a nat with the order of summation.
TOLERANCES = {"float32": Tolerance(1e-4, 1e-5, 1e-3), "bfloat16": Tolerance(1e-2, 2e-2, 5e-2)}


def check(results: Mapping[str, Mapping[str, Any]], *, precision: str) -> dict[str, float]:
    """The largest difference between any two contenders in each measure. Raises `GateFailed` naming both and the place.

    `results[name]` has `first_logps` [pairs, 2], of the policy before the first step, and `losses` [steps]. Curves are compared
    over the steps that all have taken.
    """
    names = list(results)
    tolerance = TOLERANCES[precision]
    logps = [np.asarray(results[name]["first_logps"], np.float64) for name in names]
    scale = np.maximum(1.0, np.abs(logps).max(axis=0))
    found = {"first_logps": _largest(names, [x / scale for x in logps], tolerance.logps, "log-probabilities at step 0")}

    steps = min(len(results[name]["losses"]) for name in names)
    losses = [np.asarray(results[name]["losses"][:steps], np.float64) for name in names]
    first = max(range(len(names)), key=lambda i: abs(losses[i][0] - math.log(2)))
    found["first_loss"] = abs(float(losses[first][0]) - math.log(2))
    if not found["first_loss"] <= tolerance.start:
        raise GateFailed(
            f"{names[first]}: the loss of step 0 is {losses[first][0]:.6f}, and of a policy equal to its reference ln 2 = "
            f"{math.log(2):.6f} (tolerance {tolerance.start:g}). No ratio is reported."
        )
    found["loss_curve"] = _largest(names, losses, tolerance.curve, "loss")
    return found | {"steps": float(steps)}


def _largest(names: Sequence[str], values: Sequence[np.ndarray], tolerance: float, what: str) -> float:
    """The largest difference between two of `values`, arrays of one shape."""
    stacked = np.stack(values)
    spread = stacked.max(axis=0) - stacked.min(axis=0)
    worst = int(np.argmax(np.where(np.isfinite(spread), spread, np.inf)))
    largest = float(spread.ravel()[worst])
    if not largest <= tolerance:
        column = stacked.reshape(len(names), -1)[:, worst]
        low, high = names[int(np.argmin(column))], names[int(np.argmax(column))]
        where = f"pair {worst // 2}" if stacked.ndim > 2 else f"step {worst}"
        raise GateFailed(
            f"{low} and {high} do not compute the same thing: their {what} differ by {largest:.3g} at {where} "
            f"(tolerance {tolerance:g}). No ratio is reported."
        )
    return largest
