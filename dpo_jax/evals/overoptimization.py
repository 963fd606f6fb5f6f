"""Over-optimization: where the true reward of a training run peaks and falls as KL grows.

A policy that follows its implicit reward, or a learned one, moves further and further from the reference; beyond some KL the
true reward may fall (Gao et al. 2023 for reward models; Rafailov et al. 2024, arXiv 2406.02900, for DPO). This can be seen
only if the true reward is known, as in the experiments of `dpo-jax frontier`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dpo_jax.evals.intervals import Interval, student
from dpo_jax.types import Array

RunName = tuple[str, str, str]  # method, setting, seed
Measured = dict[str, float]


class Decline(NamedTuple):
    """Decline of a run from its best point to its last. Rewards in their own unit; KL(policy || reference) in nats."""

    method: str
    setting: str
    seed: str
    points: int
    best_kl: float
    best_reward: float
    last_kl: float
    last_reward: float
    fall: float  # of the reward; 0 if the last point is the best
    interval: Interval  # 95 %
    overoptimized: bool  # the last point has a larger KL, and is worse by more than the variance over prompts explains


def declines(rows: Iterable[Mapping[str, Any]]) -> list[Decline]:
    """One `Decline` for each run in a `results.csv` of `frontier` that was measured more than once.

    The rows of a run (same method, label and seed) are in the order of training, with kl, reward, reward_low and reward_high.
    The interval treats the two points as independent, though they share their prompts, so it is rather too wide. The best of
    several points is selected for its height, which makes a small fall look real: only a fall that its interval confirms
    counts.
    """
    return [_decline(key, points) for key, points in trajectories(rows).items()]


def trajectories(rows: Iterable[Mapping[str, Any]]) -> dict[RunName, list[Measured]]:
    """Points of each run that was measured more than once, in the order of training: kl, reward and its bounds."""
    runs: dict[RunName, list[Measured]] = {}
    for row in rows:
        point = {name: float(row[name]) for name in ("kl", "reward", "reward_low", "reward_high")}
        runs.setdefault((str(row["method"]), str(row["label"]), str(row["seed"])), []).append(point)
    return {key: points for key, points in runs.items() if len(points) > 1}


def _decline(key: RunName, numbers: list[Measured]) -> Decline:
    best, last = max(numbers, key=lambda point: point["reward"]), numbers[-1]
    fall = best["reward"] - last["reward"]
    below = math.hypot(best["reward"] - best["reward_low"], last["reward_high"] - last["reward"])
    above = math.hypot(best["reward_high"] - best["reward"], last["reward"] - last["reward_low"])
    return Decline(
        *key,
        points=len(numbers),
        best_kl=best["kl"],
        best_reward=best["reward"],
        last_kl=last["kl"],
        last_reward=last["reward"],
        fall=fall,
        interval=(fall - below, fall + above),
        overoptimized=last["kl"] > best["kl"] and fall > below,
    )


# Curves of Gao et al. 2022 (arXiv 2210.10760), fitted to the true reward


FORMS = {"bon": "d (a - b d)", "rl": "d (a - b log d)"}
"""R(d), the gain in true reward at d = sqrt(KL), for Best-of-N by a learned reward and for a policy trained on one."""
RESAMPLES = 1000


class GainFit(NamedTuple):
    """R(d) of a form of `FORMS`, with 95 % intervals over prompts and, with several `runs`, over runs. `falls_after` and
    `reach` are KL in nats per completion."""

    form: str
    a: float
    a_interval: Interval
    b: float
    b_interval: Interval
    falls_after: float  # KL of the curve's maximum; inf if it has none
    falls_interval: Interval
    reach: float  # the largest measured KL
    rms: float  # root mean squared residual, in units of the reward
    points: int
    runs: int  # with two points or more, on which the intervals depend

    @property
    def falls(self) -> bool:
        """Whether the true reward certainly falls within the measured range."""
        return self.falls_interval[1] <= self.reach

    @property
    def words(self) -> str:
        """Text for a table: where the true reward begins to fall."""
        if not self.falls:
            return f"not seen up to KL {self.reach:.2f}"
        return f"after KL {self.falls_after:.2f} ({self.falls_interval[0]:.2f} to {self.falls_interval[1]:.2f})"


def fit_gains(
    kl: Array, gains: Array, *, form: str, seed: int, runs: Sequence[int] | Array | None = None, resamples: int = RESAMPLES
) -> GainFit:
    """Fits R(d) through the origin, by least squares, to the mean over prompts of `gains[P, n]` at `kl[n]` nats.

    `gains` are true rewards minus the reference's on the same prompt. `runs[n]` is the run (or seed)
    of each point. A bootstrap over prompts gives their part of the intervals. Points of one run share its noise: each run with
    two points is also fitted alone, and the scatter of these fits (Student's t) is added in quadrature. KL is taken as exact.
    Points at KL 0 carry no information and are left out. Raises ValueError for another form, for shapes that do not agree, or
    for fewer than two points beyond KL 0.

    >>> d = np.sqrt(kl := np.array([1.0, 4.0, 9.0]))
    >>> found = fit_gains(kl, np.tile(d * (3 - 0.5 * d), (10, 1)), form="bon", seed=0)
    >>> round(found.a, 6), round(found.b, 6), round(found.falls_after, 6)
    (3.0, 0.5, 9.0)
    """
    kl, gains = np.asarray(kl, np.float64), np.asarray(gains, np.float64)
    if form not in FORMS:
        raise ValueError(f"form={form!r}: one of {', '.join(FORMS)} is expected")
    of = np.zeros(len(kl), np.int64) if runs is None else np.unique(np.asarray(runs), return_inverse=True)[1]
    if gains.ndim != 2 or not len(gains) or {len(kl), len(of)} != {gains.shape[1]}:
        raise ValueError(f"kl of {len(kl)} points, runs of {len(of)} and gains of shape {gains.shape} do not agree")
    gains, of, kl = gains[:, kl > 0], of[kl > 0], kl[kl > 0]
    if len(kl) < 2:
        raise ValueError(f"{len(kl)} points beyond KL 0: a curve of two constants needs two")
    d = np.sqrt(kl)
    columns = np.stack([d, -d * (d if form == "bon" else np.log(d))])
    a, b = _least_squares(columns, gains.mean(axis=0), np.ones(len(kl)))
    rng = np.random.default_rng(seed)
    shares = rng.multinomial(len(gains), np.full(len(gains), 1 / len(gains)), size=resamples) / len(gains)
    drawn = [_least_squares(columns, share @ gains, np.ones(len(kl))) for share in shares]
    alone = [number for number in range(of.max() + 1) if (of == number).sum() > 1]
    each = [_least_squares(columns, gains.mean(axis=0), of == number) for number in alone]
    intervals = [_interval((a, b)[i], [one[i] for one in drawn], [one[i] for one in each]) for i in (0, 1)]
    logs = [[_log(_maximum(one[0], one[1], form)) for one in some] for some in ([(a, b)], drawn, each)]
    falls = _interval(logs[0][0], logs[1], logs[2])
    residuals = gains.mean(axis=0) - np.array([a, b]) @ columns
    return GainFit(
        form=form,
        a=float(a),
        a_interval=intervals[0],
        b=float(b),
        b_interval=intervals[1],
        falls_after=_maximum(a, b, form),
        falls_interval=(_exp(falls[0]), _exp(falls[1])),
        reach=float(kl.max()),
        rms=float(np.sqrt(np.mean(residuals**2))),
        points=len(kl),
        runs=max(1, len(each)),  # that the intervals are over
    )


def gain_at(fit: GainFit, kl: Array) -> np.ndarray:
    """R(sqrt(kl)) of the fitted curve."""
    d = np.sqrt(np.asarray(kl, np.float64))
    return d * (fit.a - fit.b * (d if fit.form == "bon" else np.log(np.maximum(d, 1e-300))))


def _interval(value: float, drawn: Sequence[float], each: Sequence[float]) -> Interval:
    """95 % interval of a value: quantiles of `drawn` by the bootstrap over prompts, and the scatter of `each` run alone."""
    # Interpolating a quantile between a number and infinity would give infinity, so quantiles are drawn values.
    low, high = (float(end) for end in np.quantile(drawn, [0.025, 0.975], method="nearest"))
    if len(each) < 2:
        return low, high
    if not np.isfinite([value, *each]).all():  # some run never falls, or falls at once
        return min(low, *each), max(high, *each)
    scatter = student(len(each)) * float(np.std(each, ddof=1)) / math.sqrt(len(each))
    return value - math.hypot(value - low, scatter), value + math.hypot(high - value, scatter)


def _log(kl: float) -> float:
    return math.log(kl) if kl > 0 else -math.inf


def _exp(log: float) -> float:
    return math.exp(log) if log < 700 else math.inf


def _least_squares(columns: np.ndarray, values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    root = np.sqrt(weights)
    return np.linalg.lstsq((columns * root).T, values * root, rcond=None)[0]


def _maximum(a: float, b: float, form: str) -> float:
    """KL of the curve's maximum: inf if it rises for ever, 0 if it falls from the start."""
    if b <= 0:
        return math.inf
    # d = a / (2 b), or log d = a / b - 1
    d = max(a / (2 * b), 0.0) if form == "bon" else math.exp(min(a / b - 1, 300.0))
    return float(d**2)


def best_by(proxy: Array, rewards: Array, n: int) -> np.ndarray:
    """Mean true reward of Best-of-`n` by a proxy reward, from `proxy[P, M]` and `rewards[P, M]` of M samples per prompt.

    float64[P]: the mean over all subsets of n samples. Of M samples sorted by `proxy`, the i-th (from 1) is the best of
    C(i-1, n-1) of the C(M, n) subsets. Samples with equal `proxy` keep their order.

    >>> best_by(np.array([[1.0, 2.0, 3.0]]), np.array([[5.0, 0.0, 6.0]]), 2)  # the third twice, the second once
    array([4.])
    """
    proxy, rewards = np.asarray(proxy, np.float64), np.asarray(rewards, np.float64)
    if proxy.shape != rewards.shape or proxy.ndim != 2 or not 1 <= n <= proxy.shape[1]:
        raise ValueError(f"n={n}, proxy of shape {proxy.shape} and rewards of {rewards.shape} do not agree")
    samples = proxy.shape[1]
    chances = np.array([math.comb(i, n - 1) / math.comb(samples, n) for i in range(samples)])
    return np.take_along_axis(rewards, np.argsort(proxy, axis=1, kind="stable"), axis=1) @ chances
