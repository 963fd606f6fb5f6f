"""Accuracy, calibration and length bias of implicit rewards on preference pairs.

The reward of eq. 5, r = beta log(pi / pi_ref), says by eq. 6 with what probability people prefer the chosen completion: the
logistic function of the margin. So a policy can be asked not only whether it ranks a pair as people did, but also whether it is
right as often as it believes. Margins are float[P], reward of the chosen completion less that of the rejected one.

Intervals are 95 %. Shares have Wilson's (`score_interval`), correlations a percentile bootstrap (Efron 1979). Pairs are taken
to be independent: several pairs of one prompt make intervals too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dpo_jax.evals.preference import PRIOR, Interval, score_interval, wilson_interval
from dpo_jax.losses import tied
from dpo_jax.types import Array

BINS = 10
RESAMPLES = 1000
CHUNK = 2**22
"""Weights of a bootstrap that are in memory at a time."""


def reward_variants(logps: Array, ref_logps: Array, tokens: Array, *, beta: float) -> dict[str, np.ndarray]:
    """Four rewards of each completion, float64[P, 2] each, from log pi and log pi_ref in nats and lengths in tokens.

    "implicit" is eq. 5. "per_token" divides it by the length, "reference_free" leaves the reference out, and the fourth does
    both. Only the first belongs to the Bradley-Terry model that DPO fits; the others show what reference and length contribute.
    """
    logps, ref_logps, tokens = (_pairs(x, name) for x, name in ((logps, "logps"), (ref_logps, "ref_logps"), (tokens, "tokens")))
    if not len(logps) == len(ref_logps) == len(tokens):
        raise ValueError(f"{len(logps)} log-probabilities, {len(ref_logps)} of the reference and {len(tokens)} lengths")
    if (tokens < 1).any():
        raise ValueError(f"a completion has at least one token, pair {int(np.argmin(tokens.min(axis=1)))} has one of none")
    implicit, free = beta * (logps - ref_logps), beta * logps
    return {
        "implicit": implicit,
        "per_token": implicit / tokens,
        "reference_free": free,
        "reference_free_per_token": free / tokens,
    }


def margins_of(rewards: Mapping[str, np.ndarray], logps: Array, ref_logps: Array) -> dict[str, np.ndarray]:
    """The margins float64[P] of `reward_variants`, whose log-probabilities are given again, in the type they were computed in.

    "implicit" is 0 where `losses.right` counts a tie, so that its accuracy is that of training and of `preference_summary`.
    """
    margins = {name: values[:, 0] - values[:, 1] for name, values in rewards.items()}
    tie = tied(np.asarray(logps), np.asarray(ref_logps))
    return margins | {"implicit": np.where(tie, 0.0, margins["implicit"])}


def accuracy(margins: Array) -> dict[str, float]:
    """Share of pairs whose margin is positive, a tie counted half, with its interval: pairs, accuracy, low, high, margin."""
    margins = _finite(margins)
    scores = (1 + np.sign(margins)) / 2
    low, high = score_interval(scores)
    return {
        "pairs": len(margins),
        "accuracy": float(scores.mean()),
        "low": low,
        "high": high,
        "margin": float(margins.mean()),
    }


def accuracy_by(margins: Array, labels: Sequence[str]) -> list[dict[str, Any]]:
    """`accuracy` of the pairs of each label, in the order of their names; the label is under "subset"."""
    margins, places = _finite(margins), np.asarray(labels)
    if len(places) != len(margins):
        raise ValueError(f"{len(margins)} margins and {len(places)} labels")
    return [{"subset": str(name), **accuracy(margins[places == name])} for name in np.unique(places)]


def mean_share(rows: Sequence[Mapping[str, Any]], weights: Sequence[float] | None = None) -> dict[str, float]:
    """Weighted mean of independent shares, such as accuracies by subset: accuracy, low, high. Without weights: all equal.

    Each row has "accuracy" and "pairs". The interval is Wilson's for as many pairs as would give the mean the same variance
    (as for surveys, Korn and Graubard 1998), with half a right and half a wrong pair added to each row for that variance: a
    small subset without an error is not certain. Of a single row it is Wilson's own. A tie is taken for half a pair that is
    right and half a pair that is wrong, which makes the interval wider than need be where there are many.
    """
    weights_ = np.ones(len(rows)) if weights is None else np.asarray(weights, np.float64)
    if len(weights_) != len(rows) or not len(rows) or (weights_ < 0).any() or not weights_.sum() > 0:
        raise ValueError(f"{len(rows)} shares need as many weights, none negative and not all 0, got {list(weights_)}")
    weights_ = weights_ / weights_.sum()
    share, pairs = (np.array([row[name] for row in rows], np.float64) for name in ("accuracy", "pairs"))
    likely = (share * pairs + 0.5) / (pairs + 1)
    effective = (weights_ @ likely) * (1 - weights_ @ likely) / (weights_**2 @ (likely * (1 - likely) / pairs))
    mean = float(np.clip(weights_ @ share, 0.0, 1.0))  # rounding may go beyond
    low, high = wilson_interval(mean * effective, effective)
    return {"accuracy": mean, "low": low, "high": high}


class Reliability(NamedTuple):
    """Belief against truth. Belief is the logistic function of |margin|: how sure the reward is of the side it takes."""

    bins: list[dict[str, float]]  # as `accuracy`, and the mean belief; as many pairs each, belief ascending
    ece: float  # mean over pairs of |share right - belief| of their bin
    ece_interval: Interval
    expected_ece: float  # mean ECE of as many pairs with these beliefs, if every belief were right
    expected_ece_high: float  # which it then exceeds once in 20 times
    overconfidence: float  # mean belief less share right: without bins, and not biased
    overconfidence_interval: Interval


def reliability(margins: Array, *, seed: int, bins: int = BINS, resamples: int = RESAMPLES) -> Reliability:
    """Are pairs with a belief of 80 % right in 80 % of the cases? (Guo et al. 2017; bins of equal mass as Nguyen et al. 2015.)

    The chosen completion is always the first of a pair, so beliefs below one half would say nothing new: the margin's sign is
    the side that the reward takes, and its size how sure it is.

    ECE is biased upward: even perfect beliefs leave a gap in a bin of few pairs. Read it beside `expected_ece`; a value within
    what perfect beliefs would give is no sign of miscalibration. A percentile interval would add the same bias once more and
    never hold the 0 of perfect beliefs: here the bootstrap gives bias and error, its lower bound is lowered by the bias, and is
    0 up to `expected_ece_high`.
    """
    margins = _finite(margins)
    order = np.argsort(np.abs(margins), kind="stable")
    margins = margins[order]
    belief = 1 / (1 + np.exp(-np.abs(margins)))
    right = (margins > 0) + 0.5 * (margins == 0)
    starts = _starts(len(margins), bins)
    gaps = right - belief
    ece = float(_ece(gaps[None], starts)[0])
    resampled = _bootstrap(lambda weights: _ece(weights * gaps, starts), len(margins), seed, resamples)
    bias, error = float(resampled.mean()) - ece, 1.959964 * float(resampled.std())
    perfect = _perfect_eces(belief, margins == 0, starts, seed=seed, resamples=resamples)
    unlikely = float(np.quantile(perfect, 0.95))
    return Reliability(
        bins=[{**accuracy(margins[part]), "belief": float(belief[part].mean())} for part in _parts(len(margins), starts)],
        ece=ece,
        ece_interval=(max(0.0, ece - bias - error) if ece > unlikely else 0.0, min(1.0, ece + error)),
        expected_ece=float(perfect.mean()),
        expected_ece_high=unlikely,
        overconfidence=-float(gaps.mean()),
        overconfidence_interval=overconfidence_interval(gaps, belief),
    )


def overconfidence_interval(gaps: np.ndarray, belief: np.ndarray) -> Interval:
    """95 % interval of mean belief less share right, from `gaps[P]` (right less belief) and `belief[P]`.

    Normal, with `PRIOR` pairs that are right and as many that are wrong added at the mean belief, as in `score_interval`:
    a policy that is sure and has made no mistake yet is not known to make none.
    """
    sure = float(belief.mean())
    times = np.append(np.ones(len(gaps)), [PRIOR, PRIOR])
    over = np.append(-gaps, [sure - 1, sure])
    centre = float(np.average(over, weights=times))
    error = 1.959964 * math.sqrt(np.average((over - centre) ** 2, weights=times) / times.sum())
    return centre - error, centre + error


def _starts(count: int, bins: int) -> np.ndarray:
    """Where each bin of sorted pairs begins; as many pairs in each as possible."""
    bins = min(bins, count)
    return np.arange(bins) * count // bins


def _parts(count: int, starts: np.ndarray) -> list[np.ndarray]:
    return np.split(np.arange(count), starts[1:])


def _ece(gaps: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """ECE of each row of `gaps` [R, P], sorted by belief."""
    return np.abs(np.add.reduceat(gaps, starts, axis=1)).sum(axis=1) / gaps.shape[1]


def _perfect_eces(belief: np.ndarray, tied: np.ndarray, starts: np.ndarray, *, seed: int, resamples: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    found = []
    for rows in _chunks(len(belief), resamples):
        right = np.where(tied, 0.5, rng.random((rows, len(belief))) < belief)
        found.append(_ece(right - belief, starts))
    return np.concatenate(found)


def correlations(margins: Array, differences: Array, *, seed: int, resamples: int = RESAMPLES) -> dict[str, float | None]:
    """Pearson's and Spearman's correlation of two values of each pair, with intervals: pearson, pearson_low, ...

    None where one of the two is the same for every pair. In a resample, ranks are taken anew.
    """
    x, y = _finite(margins), _finite(differences)
    if len(x) != len(y):
        raise ValueError(f"{len(x)} margins and {len(y)} differences")
    ranks_of = [_ranking(values) for values in (x, y)]
    measures: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "pearson": lambda weights: _pearson(weights, x, y),
        "spearman": lambda weights: _pearson(weights, *(ranks(weights) for ranks in ranks_of)),
    }
    found: dict[str, float | None] = {}
    for name, measure in measures.items():
        value = float(measure(np.ones((1, len(x))))[0])
        low, high = _interval(_bootstrap(measure, len(x), seed, resamples))
        for suffix, number in (("", value), ("_low", low), ("_high", high)):
            found[name + suffix] = number if math.isfinite(value) else None
    return found


def _pearson(weights: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Correlation under each row of `weights` [R, P]; `x` and `y` are [P] or [R, P]. NaN where one does not vary."""
    total = weights.sum(axis=1, keepdims=True)
    x, y = (values - (weights * values).sum(axis=1, keepdims=True) / total for values in (x, y))
    xx, yy, xy = ((weights * product).sum(axis=1) for product in (x * x, y * y, x * y))
    scale = np.sqrt(xx * yy)
    return np.divide(xy, scale, out=np.full(len(weights), np.nan), where=scale > 0)


def _ranking(values: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """A function from weights [R, P] to the ranks [R, P] of `values` among themselves, each taken weight times; ties: mean."""
    _, group = np.unique(values, return_inverse=True)
    order = np.argsort(group, kind="stable")
    starts = np.flatnonzero(np.diff(group[order], prepend=-1))

    def ranks(weights: np.ndarray) -> np.ndarray:
        sizes = np.add.reduceat(weights[:, order], starts, axis=1)
        return (np.cumsum(sizes, axis=1) - (sizes - 1) / 2)[:, group]

    return ranks


def length_bias(margins: Array, tokens: Array, *, seed: int, resamples: int = RESAMPLES) -> dict[str, Any]:
    """How far the reward is a ruler: correlation of margin and length difference, and accuracy by which side is longer.

    `tokens` are lengths [P, 2], chosen first. A reward that only measures length is right exactly where the chosen is longer.
    """
    lengths = _pairs(tokens, "tokens")
    differences = lengths[:, 0] - lengths[:, 1]
    names = np.array(["rejected longer", "same length", "chosen longer"])[np.sign(differences).astype(int) + 1]
    return {
        "mean_tokens": lengths.mean(axis=0).tolist(),
        "chosen_longer": float((differences > 0).mean() + 0.5 * (differences == 0).mean()),
        **correlations(margins, differences, seed=seed, resamples=resamples),
        "accuracy": accuracy_by(margins, names.tolist()),
    }


def _bootstrap(measure: Callable[[np.ndarray], np.ndarray], count: int, seed: int, resamples: int) -> np.ndarray:
    """`measure` of weights [R, P] -> [R], over resampled pairs."""
    return np.concatenate([measure(weights) for weights in _weights(count, seed, resamples)])


def _weights(count: int, seed: int, resamples: int) -> Iterator[np.ndarray]:
    """How often each of `count` pairs is drawn in each resample: float64[R, P] in pieces that fit into memory."""
    rng = np.random.default_rng(seed)
    for rows in _chunks(count, resamples):
        drawn = rng.integers(0, count, size=(rows, count)) + count * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count).astype(np.float64)


def _chunks(count: int, resamples: int) -> Iterable[int]:
    most = max(1, CHUNK // count)
    return (min(most, resamples - done) for done in range(0, resamples, most))


def _interval(values: np.ndarray) -> Interval:
    values = values[np.isfinite(values)]
    return tuple(np.quantile(values, [0.025, 0.975]).tolist()) if len(values) else (math.nan, math.nan)


def _finite(values: Array) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"one value a pair and at least one pair are needed, got the shape {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError(f"the value of pair {int(np.argmin(np.isfinite(values)))} is not finite")
    return values


def _pairs(values: Array, name: str) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if values.ndim != 2 or values.shape[1] != 2 or not len(values):
        raise ValueError(f"{name} must be of pairs, [P, 2] with P at least 1, got the shape {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError(f"{name} of pair {int(np.argwhere(~np.isfinite(values))[0, 0])} is not finite")
    return values
