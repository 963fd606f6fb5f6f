"""Noise schedules (cosine and linear), ELBO weights, and variances of the reverse process."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np

Weighting = Literal["constant", "elbo"]


class Schedule(NamedTuple):
    """T steps of a variance-preserving diffusion: `x_t = signal[t] * x_0 + noise[t] * e`, t = 0 (almost clean) to T - 1.

        signal    float64[T]  sqrt of the product of (1 - beta), Ho et al. 2020 (arXiv 2006.11239)
        noise     float64[T]  sqrt(1 - signal^2)
        beta      float64[T]  variance that step t adds
        variance  float64[T]  of the reverse step: that of q(x_{t-1} | x_t, x_0); for the last step (t = 0), beta[0]
        elbo      float64[T]  weight of the squared noise error in the ELBO, see `weights`

    >>> schedule = cosine_schedule(50)
    >>> schedule.steps, [round(float(value), 3) for value in schedule.signal[[0, 25, 49]]]
    (50, [0.999, 0.68, 0.001])
    """

    signal: np.ndarray
    noise: np.ndarray
    beta: np.ndarray
    variance: np.ndarray
    elbo: np.ndarray

    @property
    def steps(self) -> int:
        return len(self.beta)

    def weights(self, weighting: Weighting) -> np.ndarray:
        """Weights w(t) of the squared noise errors: float64[T].

        `elbo`: `beta^2 / (2 variance (1 - beta) noise^2)`, so that the sum over t is the ELBO in nats (Ho et al., eq. 12).
        `constant`: 1, as in Wallace et al.
        """
        if weighting not in ("constant", "elbo"):
            raise ValueError(f"weighting={weighting}: constant or elbo is expected")
        return self.elbo if weighting == "elbo" else np.ones(self.steps)


def cosine_schedule(steps: int) -> Schedule:
    """The cosine schedule of Nichol and Dhariwal 2021 (arXiv 2102.09672, eq. 17), with their offset of 0.008.

    >>> cosine_schedule(2).beta.round(3).tolist()
    [0.506, 0.999]
    """
    times = np.arange(_positive(steps) + 1) / steps
    left = np.cos((times + 0.008) / 1.008 * math.pi / 2) ** 2
    return schedule_of(np.minimum(1 - left[1:] / left[:-1], 0.999))


def linear_schedule(steps: int) -> Schedule:
    """The linear schedule of Ho et al. 2020: beta from 1e-4 to 0.02 for 1000 steps; the same total noise for other numbers.

    >>> linear_schedule(1000).beta[[0, -1]].tolist()
    [0.0001, 0.02]
    """
    scale = 1000 / _positive(steps)
    return schedule_of(np.minimum(np.linspace(1e-4 * scale, 0.02 * scale, steps), 0.999))


SCHEDULES = {"cosine": cosine_schedule, "linear": linear_schedule}


def schedule_of(beta: np.ndarray) -> Schedule:
    """The schedule of any variances beta[T] in (0, 1)."""
    beta = np.asarray(beta, np.float64)
    if not ((beta > 0) & (beta < 1)).all():
        raise ValueError("every beta must be between 0 and 1")
    kept = np.cumprod(1 - beta)  # alpha bar
    before = np.concatenate([[1.0], kept[:-1]])
    variance = beta * (1 - before) / (1 - kept)
    variance[0] = beta[0]  # a last step without noise would have no density
    elbo = beta**2 / (2 * variance * (1 - beta) * (1 - kept))
    return Schedule(np.sqrt(kept), np.sqrt(1 - kept), beta, variance, elbo)


def _positive(steps: int) -> int:
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    return steps
