"""Win rates of a policy against a baseline with intervals, and an estimate at equal length.

Functions accept any number of studies at once, along leading axes, for the simulations that test the intervals.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from dpo_jax.evals.intervals import score_interval
from dpo_jax.judge.questions import Outcome, Pair

Z = 1.959964  # of a 95 % interval
EQUAL_LENGTH = 0.1  # lengths that differ by at most this share of the longer one count as equal
EDGE = 0.05  # if the policy's text is longer, or shorter, in fewer pairs than this share, equal length is outside the data
RIDGE = 0.1  # on the standardized slope: keeps it finite where length separates wins from losses. 0.5 would flatten steep ones
OUTCOMES: tuple[Outcome, ...] = ("won", "lost", "flipped", "failed", "unanswered")


@dataclasses.dataclass(frozen=True)
class Rate:
    """A share, its 95 % interval and the number of pairs behind it. NaN if there are none."""

    value: float
    low: float
    high: float
    pairs: int


def rate(values: Sequence[float] | np.ndarray, sizes: Sequence[int] | None = None) -> Rate:
    """The mean of values in [0, 1] (1 for a pair won, 0.5 for one that flipped, 0 for one lost), with `score_interval`.

    `sizes` weight values that are themselves means of several answers.
    """
    values = np.asarray(values, np.float64)
    if not len(values):
        return Rate(math.nan, math.nan, math.nan, 0)
    weights = None if sizes is None else np.asarray(sizes)
    return Rate(float(np.average(values, weights=weights)), *score_interval(values, weights), len(values))


def length_controlled(values: np.ndarray, log_ratios: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The mean of `values[..., n]` (1 won, 0.5 flipped, 0 lost) at equal length, and its 95 % interval: three arrays [...].

    Logistic regression of the values on `log_ratios[..., n]`, the log of the policy's length over the baseline's, by Newton's
    method. The estimate is at ratio 1 (compare Dubois et al. 2024). The interval is that of the intercept, with the
    Huber-White variance, which is valid for halves too. For the variance, half a win and half a loss at equal length are added
    (as Gart 1966 does for log-odds): without them it would be near 0 if nearly all values are equal. NaN if all values, or all
    ratios, are the same, because nothing can be estimated then.
    """
    values, ratios = np.asarray(values, np.float64), np.asarray(log_ratios, np.float64)
    n, ends = values.shape[-1], [(0, 0)] * (values.ndim - 1)
    scale = np.sqrt((ratios**2).mean(axis=-1, keepdims=True))
    with np.errstate(divide="ignore", invalid="ignore"):
        x = np.stack([np.ones_like(ratios), ratios / scale], axis=-1)  # [..., n, 2]
    tellable = (np.ptp(values, axis=-1) > 0) & (np.ptp(ratios, axis=-1) > 0)
    x = np.where(tellable[..., None, None], x, 0.0)
    middle = np.where(tellable, _logistic(values, x, np.ones(n))[0], math.nan)
    values = np.concatenate([values, np.broadcast_to([1.0, 0.0], (*values.shape[:-1], 2))], axis=-1)
    x = np.pad(x, [*ends, (0, 2), (0, 0)])
    x[..., n:, 0] = 1.0
    center, error = _logistic(values, x, np.append(np.ones(n), [0.5, 0.5]))
    error = error * math.sqrt((n + 1) / max(1, n - 2)) + 0.0 * middle  # NaN where that is
    return _sigmoid(middle), _sigmoid(center - Z * error), _sigmoid(center + Z * error)


def _logistic(values: np.ndarray, x: np.ndarray, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Intercept and its standard error, [...] each, of `values[..., n]` regressed on `x[..., n, 2]` with weights `times[n]`."""
    penalty = np.diag([0.0, RIDGE])

    def inverse(chance: np.ndarray) -> np.ndarray:
        hessian = np.einsum("...ni,...nj,...n->...ij", x, x, times * chance * (1 - chance)) + penalty
        return np.linalg.inv(hessian + 1e-9 * np.eye(2))

    theta = np.zeros((*values.shape[:-1], 2))
    for _ in range(50):
        chance = _sigmoid(np.einsum("...ni,...i->...n", x, theta))
        gradient = np.einsum("...ni,...n->...i", x, times * (values - chance)) - theta @ penalty
        step = np.einsum("...ij,...j->...i", inverse(chance), gradient)
        theta = theta + np.clip(step, -2.0, 2.0)
        if not len(step) or np.abs(step).max() < 1e-10:
            break
    chance = _sigmoid(np.einsum("...ni,...i->...n", x, theta))
    bread = inverse(chance)
    meat = np.einsum("...ni,...nj,...n->...ij", x, x, times * (values - chance) ** 2)
    return theta[..., 0], np.sqrt((bread @ meat @ bread)[..., 0, 0])


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * x))


@dataclasses.dataclass(frozen=True)
class WinRate:
    """One point of a figure. Lengths are in characters. Failed pairs enter only `lowest` and `highest`."""

    series: str
    at: float | None
    counts: dict[Outcome, int]  # they add up to the pairs
    won: Rate  # in both orders
    lost: Rate
    flipped: Rate
    win_rate: Rate  # a flipped pair is half a win, the average of one question in random order, as in the paper
    lowest: float  # win_rate if every pair without a verdict had been lost
    highest: float  # win_rate if every pair without a verdict had been won
    policy_length: float
    baseline_length: float
    win_rate_at_equal_length: Rate  # over the pairs whose lengths differ by at most EQUAL_LENGTH
    win_rate_length_controlled: Rate
    extrapolated: bool  # nearly all texts of one side are longer, so the estimate at equal length depends on the assumed curve


def win_rate(pairs: Sequence[Pair], outcomes: Sequence[Outcome]) -> WinRate:
    """The win rate of the pairs of one point; needs at least one pair."""
    counts: dict[Outcome, int] = {name: sum(outcome == name for outcome in outcomes) for name in OUTCOMES}
    decided = [(p, o) for p, o in zip(pairs, outcomes, strict=True) if o in ("won", "lost", "flipped")]
    values = np.array([{"won": 1.0, "flipped": 0.5}.get(outcome, 0.0) for _, outcome in decided])
    lengths = np.array([(max(1, len(p.policy.strip())), max(1, len(p.baseline.strip()))) for p, _ in decided], np.float64)
    lengths = lengths.reshape(-1, 2)
    equal = lengths.min(axis=1) >= (1 - EQUAL_LENGTH) * lengths.max(axis=1) if len(decided) else np.zeros(0, bool)
    controlled = Rate(math.nan, math.nan, math.nan, 0)
    if len(decided):
        middle, low, high = length_controlled(values, np.log(lengths[:, 0] / lengths[:, 1]))
        controlled = Rate(float(middle), float(low), float(high), len(decided))
    undecided = len(pairs) - len(decided)
    sides = [np.mean(lengths[:, 0] <= lengths[:, 1]), np.mean(lengths[:, 0] >= lengths[:, 1])] if len(decided) else [1.0]
    return WinRate(
        series=pairs[0].series,
        at=pairs[0].at,
        counts=counts,
        won=rate([float(outcome == "won") for _, outcome in decided]),
        lost=rate([float(outcome == "lost") for _, outcome in decided]),
        flipped=rate([float(outcome == "flipped") for _, outcome in decided]),
        win_rate=rate(values),
        lowest=float(values.sum()) / len(pairs),
        highest=(float(values.sum()) + undecided) / len(pairs),
        policy_length=float(np.mean([len(p.policy.strip()) for p in pairs])),
        baseline_length=float(np.mean([len(p.baseline.strip()) for p in pairs])),
        win_rate_at_equal_length=rate(values[equal]),
        win_rate_length_controlled=controlled,
        extrapolated=bool(min(sides) < EDGE),
    )


def win_rates(pairs: Sequence[Pair], outcomes: Sequence[Outcome]) -> list[WinRate]:
    """One `WinRate` for each series and point: series in the order of their first pair, points in ascending order."""
    groups: dict[tuple[str, float | None], list[int]] = {}
    for number, pair in enumerate(pairs):
        groups.setdefault((pair.series, pair.at), []).append(number)
    names = list(dict.fromkeys(pair.series for pair in pairs))
    ordered = sorted(groups, key=lambda group: (names.index(group[0]), group[1] or 0.0))
    return [win_rate([pairs[i] for i in groups[g]], [outcomes[i] for i in groups[g]]) for g in ordered]


def columns(point: WinRate) -> dict[str, object]:
    """A row of `win_rates.csv`: numbers by name, with an empty cell for unknown values."""
    row: dict[str, object] = {"series": point.series, "at": point.at, "pairs": sum(point.counts.values()), **point.counts}
    for field in dataclasses.fields(point):
        value = getattr(point, field.name)
        if isinstance(value, Rate):
            name = field.name if field.name.startswith("win_rate") else f"{field.name}_rate"
            row |= {name: value.value, f"{name}_low": value.low, f"{name}_high": value.high}
            row |= {"pairs_at_equal_length": value.pairs} if field.name == "win_rate_at_equal_length" else {}
        elif isinstance(value, float | bool) and field.name != "at":
            row[field.name] = value
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in row.items()}
