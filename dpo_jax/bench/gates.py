"""Checks that all contenders compute the same thing. Unless they agree, no ratio is reported."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dpo_jax.bench.updates import Updates
from dpo_jax.bench.work import OURS

YARDSTICKS = ("torch-live", "torch-cached", OURS)
"""Updates are compared with that of the yardstick: the first of these that takes part."""


class GateFailed(RuntimeError):
    """Contenders disagree, so their speeds may not be compared."""


class Tolerance(NamedTuple):
    logps: float  # of a completion's log-probability at step 0, relative to its size or, if larger, the mean size
    start: float  # of the loss at step 0, against ln 2
    curve: float  # of the loss at every later step
    grad_norm: float  # of every step, before clipping, relative to its size
    update: float  # L2 norm of the difference of two updates (final weights minus start), relative to that of the yardstick's


# In bfloat16 a completion's log-probability varies by some tenths of a nat with the order of summation.
#
# RMSprop divides a gradient by sqrt(v) + 1e-8. The first step is 10 * lr * sign(g) for all but the tiniest gradients, so an
# entry moves equally far whether its gradient is large or nearly cancels. A gradient below the rounding error of its own sums
# has an arbitrary sign: its entry may differ by up to 20 * lr between two libraries. Updates therefore agree far less closely
# than losses and norms, where such entries do not matter. Measured in float32: 5e-6 on small random models (4 to 20 steps);
# 1.3e-4 (PyTorch) and 1.7e-4 (ours) from float64 in the first step of SmolLM2.
TOLERANCES = {
    "float32": Tolerance(1e-5, 1e-5, 1e-4, 1e-4, 1e-3),
    "bfloat16": Tolerance(1e-2, 2e-2, 5e-2, 5e-2, 5e-1),
}


def check(results: Mapping[str, Mapping[str, Any]], *, precision: str, updates: Updates | None = None) -> dict[str, Any]:
    """The largest difference between any two contenders in each measure. Raises `GateFailed` naming both and the place.

    `results[name]` has `first_logps` [pairs, 2] (the policy before the first step), `losses` [steps] and `grad_norms` [steps].
    Curves are compared over the steps that all have taken. With `updates`, weights are compared too; all must have taken
    equally many steps. The result's `updates` is then the distance of each contender from the `yardstick`.
    """
    names = list(results)
    tolerance = TOLERANCES[precision]
    logps = [np.asarray(results[name]["first_logps"], np.float64) for name in names]
    size = np.abs(logps).max(axis=0)
    # Rounding errors grow with the number of tokens, even where the tokens are nearly certain and the sum is small.
    scale = np.maximum(1.0, np.maximum(size, size[np.isfinite(size)].mean() if np.isfinite(size).any() else 0.0))
    found: dict[str, Any] = {
        "first_logps": _largest(names, [x / scale for x in logps], tolerance.logps, "log-probabilities at step 0")
    }
    losses, norms = _curves(results, "losses"), _curves(results, "grad_norms")
    first = max(range(len(names)), key=lambda i: abs(losses[i][0] - math.log(2)))
    found["first_loss"] = abs(float(losses[first][0]) - math.log(2))
    if not found["first_loss"] <= tolerance.start:
        raise GateFailed(
            f"{names[first]}: the loss of step 0 is {losses[first][0]:.6f}, and of a policy equal to its reference ln 2 = "
            f"{math.log(2):.6f} (tolerance {tolerance.start:g}). No ratio is reported."
        )
    found["loss_curve"] = _largest(names, list(losses), tolerance.curve, "loss")
    scale = np.maximum(np.abs(norms).max(axis=0), np.finfo(np.float64).tiny)
    found["grad_norm"] = _largest(names, [x / scale for x in norms], tolerance.grad_norm, "norms of gradients (relative)")
    found["steps"] = float(losses.shape[1])
    return found if updates is None else found | _check_updates(results, updates, tolerance.update)


def _curves(results: Mapping[str, Mapping[str, Any]], key: str) -> np.ndarray:
    """float64[contenders, steps], over the steps that all have taken."""
    steps = min(len(result[key]) for result in results.values())
    return np.array([result[key][:steps] for result in results.values()], np.float64)


def _check_updates(results: Mapping[str, Mapping[str, Any]], updates: Updates, tolerance: float) -> dict[str, Any]:
    steps = {name: len(results[name]["losses"]) for name in updates.names}
    few, many = min(steps, key=lambda name: steps[name]), max(steps, key=lambda name: steps[name])
    if steps[few] != steps[many]:
        raise GateFailed(
            f"{few} took {steps[few]} steps and {many} {steps[many]}: their weights cannot be compared. No ratio is reported."
        )
    yardstick = next((name for name in YARDSTICKS if name in updates.names), updates.names[0])
    by = updates.names.index(yardstick)
    if not 0 < updates.norms[by] < math.inf:
        raise GateFailed(
            f"{yardstick}: the update of all weights in {steps[yardstick]} steps has the norm {updates.norms[by]:g}. No ratio "
            "is reported."
        )
    relative = updates.distances / updates.norms[by]
    # Compare with the yardstick first: this tells which contender is off.
    worst = max(range(len(relative)), key=lambda i: _or_infinite(relative[by, i]))
    one, other = by, worst
    if relative[one, other] <= tolerance:
        one, other = np.unravel_index(int(np.argmax(relative)), relative.shape)
    largest = float(relative[one, other])
    if not largest <= tolerance:
        raise GateFailed(
            f"{updates.names[other]} and {updates.names[one]} do not compute the same thing: their updates of the weights in "
            f"{steps[yardstick]} steps differ by {largest:.3g} in relative L2 norm, most in {updates.places[one][other]} "
            f"(tolerance {tolerance:g}). No ratio is reported."
        )
    of = {name: float(relative[by, i]) for i, name in enumerate(updates.names)}
    return {"update": largest, "yardstick": yardstick, "updates": of}


def _or_infinite(value: float) -> float:
    return float(value) if math.isfinite(value) else math.inf


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
