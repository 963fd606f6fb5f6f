"""Accuracy, calibration and length bias of implicit rewards on preference pairs.

The reward of eq. 5, r = beta log(pi / pi_ref), gives by eq. 6 the probability that people prefer the chosen completion: the
logistic function of the margin. We can therefore measure not only whether a policy ranks a pair as people did, but also
whether it is right as often as it believes. Margins are float[P], the reward of the chosen completion minus that of the
rejected one.

Intervals are 95 %. Shares have Wilson's (`score_interval`), correlations a percentile bootstrap (Efron 1979). Pairs of one
prompt may share completions and are not independent. Where `prompts[P]` identify the prompts (`preference.by_prompt`), an
interval counts a prompt once, and the bootstrap draws prompts. Without them pairs are assumed independent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dpo_jax.evals.intervals import PRIOR, Interval, by_prompt, effective_number, score_interval, wilson_interval
from dpo_jax.losses import tied
from dpo_jax.types import Array

BINS = 10
RESAMPLES = 1000
CHUNK = 2**22
"""Number of bootstrap weights in memory at a time."""


def reward_variants(logps: Array, ref_logps: Array, tokens: Array, *, beta: float) -> dict[str, np.ndarray]:
    """Four rewards of each completion, float64[P, 2] each, from log pi and log pi_ref in nats and lengths in tokens.

    "implicit" is eq. 5, "per_token" divides it by the length, "reference_free" omits the reference, and the fourth does both.
    Only the first belongs to the Bradley-Terry model that DPO fits; the others show the effect of reference and length.
    """
    logps, ref_logps, tokens = (_pairs(x, name) for x, name in ((logps, "logps"), (ref_logps, "ref_logps"), (tokens, "tokens")))
    if not len(logps) == len(ref_logps) == len(tokens):
        raise ValueError(f"{len(logps)} log-probabilities, {len(ref_logps)} of the reference and {len(tokens)} lengths")
    if (tokens < 1).any():
        raise ValueError(
            f"a completion has at least one token, but pair {int(np.argmin(tokens.min(axis=1)))} has one without tokens"
        )
    implicit, free = beta * (logps - ref_logps), beta * logps
    return {
        "implicit": implicit,
        "per_token": implicit / tokens,
        "reference_free": free,
        "reference_free_per_token": free / tokens,
    }


def margins_of(rewards: Mapping[str, np.ndarray], logps: Array, ref_logps: Array) -> dict[str, np.ndarray]:
    """Margins float64[P] of `reward_variants`, given also the log-probabilities, in the dtype in which they were computed.

    "implicit" is 0 where `losses.pair_accuracy` counts a tie, so that its accuracy equals that of training and of
    `preference_summary`.
    """
    margins = {name: values[:, 0] - values[:, 1] for name, values in rewards.items()}
    tie = tied(np.asarray(logps), np.asarray(ref_logps))
    return margins | {"implicit": np.where(tie, 0.0, margins["implicit"])}


def accuracy(margins: Array, prompts: Sequence[Hashable] | np.ndarray | None = None) -> dict[str, float]:
    """Share of pairs with a positive margin, ties counted half, with its interval: pairs, accuracy, low, high, margin.

    "independent" is the number of independent pairs with the same error, and "pairs" if no two have the same prompt.
    """
    margins = _finite(margins)
    scores = (1 + np.sign(margins)) / 2
    of_prompts = by_prompt(scores, prompts)
    low, high = score_interval(*of_prompts)
    return {
        "pairs": len(margins),
        "independent": len(margins) * effective_number(*of_prompts) / effective_number(scores),
        "accuracy": float(scores.mean()),
        "low": low,
        "high": high,
        "margin": float(margins.mean()),
    }


def accuracy_by(margins: Array, labels: Sequence[str], prompts: Sequence[Hashable] | None = None) -> list[dict[str, Any]]:
    """`accuracy` of the pairs of each label, sorted by label; the label is under "subset"."""
    margins, places = _finite(margins), np.asarray(labels)
    if len(places) != len(margins):
        raise ValueError(f"{len(margins)} margins and {len(places)} labels")
    groups = _groups(len(margins), prompts)
    return [{"subset": str(name), **accuracy(margins[of], groups[of])} for name in np.unique(places) for of in [places == name]]


def mean_share(rows: Sequence[Mapping[str, Any]], weights: Sequence[float] | None = None) -> dict[str, float]:
    """Weighted mean of independent shares, such as accuracies by subset: accuracy, low, high. Default weights are equal.

    Each row has "accuracy" and "pairs", or "independent" in place of the latter. The interval is Wilson's for the effective
    number of pairs, which gives the mean the same variance (as in surveys, Korn and Graubard 1998). For this variance half a
    right and half a wrong pair are added to each row: a small subset without errors is not certain. For a single row it is
    Wilson's own interval. A tie counts as half a right and half a wrong pair, which makes the interval too wide if there are
    many.
    """
    weights_ = np.ones(len(rows)) if weights is None else np.asarray(weights, np.float64)
    if len(weights_) != len(rows) or not len(rows) or (weights_ < 0).any() or not weights_.sum() > 0:
        raise ValueError(
            f"{len(rows)} shares need the same number of weights, none negative and not all 0, got {list(weights_)}"
        )
    weights_ = weights_ / weights_.sum()
    share = np.array([row["accuracy"] for row in rows], np.float64)
    pairs = np.array([row["independent"] if "independent" in row else row["pairs"] for row in rows], np.float64)
    likely = (share * pairs + 0.5) / (pairs + 1)
    effective = (weights_ @ likely) * (1 - weights_ @ likely) / (weights_**2 @ (likely * (1 - likely) / pairs))
    mean = float(np.clip(weights_ @ share, 0.0, 1.0))  # rounding may leave the range
    low, high = wilson_interval(mean * effective, effective)
    return {"accuracy": mean, "low": low, "high": high}


class Reliability(NamedTuple):
    """Calibration of beliefs. Belief is the logistic function of |margin|: the reward's confidence in its preferred side."""

    bins: list[dict[str, float]]  # `accuracy` with the mean belief; equally many pairs each, belief ascending
    ece: float  # mean over pairs of |share right - belief| of their bin
    ece_interval: Interval
    expected_ece: float  # mean ECE of equally many pairs with these beliefs, if every belief were correct
    expected_ece_high: float  # exceeded in that case once in 20 times
    overconfidence: float  # mean belief minus share right: needs no bins, unbiased
    overconfidence_interval: Interval


def reliability(
    margins: Array, prompts: Sequence[Hashable] | None = None, *, seed: int, bins: int = BINS, resamples: int = RESAMPLES
) -> Reliability:
    """Reliability of beliefs: are pairs with a belief of 80 % right in 80 % of the cases?

    Guo et al. 2017, with bins of equal mass as in Nguyen et al. 2015.

    The chosen completion is always the first of a pair, so beliefs below one half would add nothing: the sign of the margin is
    the preferred side, its size the confidence.

    ECE is biased upward: even perfect beliefs leave a gap in a bin of few pairs. Compare it with `expected_ece`; a value that
    perfect beliefs would also give is no sign of miscalibration. A percentile interval would add the same bias again and never
    contain the 0 of perfect beliefs. Here the bootstrap estimates bias and error; the lower bound is reduced by the bias, and
    is 0 for an ECE up to `expected_ece_high`, for which pairs are drawn independently, also those of one prompt.
    """
    margins = _finite(margins)
    order = np.argsort(np.abs(margins), kind="stable")
    margins, groups = margins[order], _groups(len(margins), prompts)[order]
    belief = 1 / (1 + np.exp(-np.abs(margins)))
    right = (margins > 0) + 0.5 * (margins == 0)
    starts = _starts(len(margins), bins)
    gaps = right - belief
    ece = float(_ece(gaps[None], starts)[0])
    resampled = _bootstrap(lambda weights: _ece(weights * gaps, starts, weights.sum(axis=1)), groups, seed, resamples)
    bias, error = float(resampled.mean()) - ece, 1.959964 * float(resampled.std())
    perfect = _perfect_eces(belief, margins == 0, starts, seed=seed, resamples=resamples)
    unlikely = float(np.quantile(perfect, 0.95))
    return Reliability(
        bins=[
            {**accuracy(margins[part], groups[part]), "belief": float(belief[part].mean())}
            for part in _parts(len(margins), starts)
        ],
        ece=ece,
        ece_interval=(max(0.0, ece - bias - error) if ece > unlikely else 0.0, min(1.0, ece + error)),
        expected_ece=float(perfect.mean()),
        expected_ece_high=unlikely,
        overconfidence=-float(gaps.mean()),
        overconfidence_interval=overconfidence_interval(gaps, belief, groups),
    )


def overconfidence_interval(gaps: np.ndarray, belief: np.ndarray, groups: np.ndarray | None = None) -> Interval:
    """95 % interval of mean belief minus share right, from `gaps[P]` (right minus belief) and `belief[P]`.

    A normal interval, with `PRIOR` right and as many wrong pairs added at the mean belief, as in `score_interval`: a confident
    policy without a mistake so far may still make some. Pairs of one group, `groups[P]`, err together.
    """
    sure = float(belief.mean())
    times = np.append(np.ones(len(gaps)), [PRIOR, PRIOR])
    over = np.append(-gaps, [sure - 1, sure])
    center = float(np.average(over, weights=times))
    together = np.bincount(_groups(len(gaps), groups), over[:-2] - center)  # sums of each group
    error = 1.959964 * math.sqrt((together**2).sum() + PRIOR * ((over[-2:] - center) ** 2).sum()) / times.sum()
    return center - error, center + error


def _starts(count: int, bins: int) -> np.ndarray:
    """Start of each bin of sorted pairs; bins are as equal in size as possible."""
    bins = min(bins, count)
    return np.arange(bins) * count // bins


def _parts(count: int, starts: np.ndarray) -> list[np.ndarray]:
    return np.split(np.arange(count), starts[1:])


def _ece(gaps: np.ndarray, starts: np.ndarray, pairs: Any = None) -> np.ndarray:
    """ECE of each row of `gaps` [R, P], sorted by belief. `pairs` [R] are their numbers, if not P."""
    return np.abs(np.add.reduceat(gaps, starts, axis=1)).sum(axis=1) / (gaps.shape[1] if pairs is None else pairs)


def _perfect_eces(belief: np.ndarray, tied: np.ndarray, starts: np.ndarray, *, seed: int, resamples: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    found = []
    for rows in _chunks(len(belief), resamples):
        right = np.where(tied, 0.5, rng.random((rows, len(belief))) < belief)
        found.append(_ece(right - belief, starts))
    return np.concatenate(found)


def correlations(
    margins: Array,
    differences: Array,
    prompts: Sequence[Hashable] | None = None,
    *,
    seed: int,
    resamples: int = RESAMPLES,
) -> dict[str, float | None]:
    """Pearson and Spearman correlation of two values per pair, with intervals: pearson, pearson_low, ...

    None if one of the two is constant. Ranks are recomputed in each resample.
    """
    x, y = _finite(margins), _finite(differences)
    if len(x) != len(y):
        raise ValueError(f"{len(x)} margins and {len(y)} differences")
    groups = _groups(len(x), prompts)
    ranks_of = [_ranking(values) for values in (x, y)]
    measures: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "pearson": lambda weights: _pearson(weights, x, y),
        "spearman": lambda weights: _pearson(weights, *(ranks(weights) for ranks in ranks_of)),
    }
    found: dict[str, float | None] = {}
    for name, measure in measures.items():
        value = float(measure(np.ones((1, len(x))))[0])
        low, high = _interval(_bootstrap(measure, groups, seed, resamples))
        for suffix, number in (("", value), ("_low", low), ("_high", high)):
            found[name + suffix] = number if math.isfinite(value) else None
    return found


def _pearson(weights: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Correlation under each row of `weights` [R, P]; `x` and `y` are [P] or [R, P]. NaN if one is constant."""
    total = weights.sum(axis=1, keepdims=True)
    x, y = (values - (weights * values).sum(axis=1, keepdims=True) / total for values in (x, y))
    xx, yy, xy = ((weights * product).sum(axis=1) for product in (x * x, y * y, x * y))
    scale = np.sqrt(xx * yy)
    return np.divide(xy, scale, out=np.full(len(weights), np.nan), where=scale > 0)


def _ranking(values: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Function from weights [R, P] to ranks [R, P] of `values`, each repeated weight times; ties get their mean rank."""
    _, group = np.unique(values, return_inverse=True)
    order = np.argsort(group, kind="stable")
    starts = np.flatnonzero(np.diff(group[order], prepend=-1))

    def ranks(weights: np.ndarray) -> np.ndarray:
        sizes = np.add.reduceat(weights[:, order], starts, axis=1)
        return (np.cumsum(sizes, axis=1) - (sizes - 1) / 2)[:, group]

    return ranks


def length_bias(
    margins: Array, tokens: Array, prompts: Sequence[Hashable] | None = None, *, seed: int, resamples: int = RESAMPLES
) -> dict[str, Any]:
    """Length bias of the reward: correlation of margin and length difference, and accuracy by the longer side.

    `tokens` are lengths [P, 2], chosen first. A reward that only measures length is right exactly if the chosen one is longer.
    """
    lengths = _pairs(tokens, "tokens")
    differences = lengths[:, 0] - lengths[:, 1]
    names = np.array(["rejected longer", "same length", "chosen longer"])[np.sign(differences).astype(int) + 1]
    return {
        "mean_tokens": lengths.mean(axis=0).tolist(),
        "chosen_longer": float((differences > 0).mean() + 0.5 * (differences == 0).mean()),
        **correlations(margins, differences, prompts, seed=seed, resamples=resamples),
        "accuracy": accuracy_by(margins, names.tolist(), prompts),
    }


def _groups(count: int, prompts: Sequence[Hashable] | np.ndarray | None) -> np.ndarray:
    """The number of each pair's prompt, int[P]; without prompts each pair has its own."""
    if prompts is None:
        return np.arange(count)
    if len(prompts) != count:
        raise ValueError(f"{count} pairs and {len(prompts)} prompts")
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    return np.array([numbers[prompt] for prompt in prompts], np.int64)


def _bootstrap(measure: Callable[[np.ndarray], np.ndarray], groups: np.ndarray, seed: int, resamples: int) -> np.ndarray:
    """Values of `measure` (weights [R, P] -> [R]) over resamples of the `groups[P]` of pairs."""
    return np.concatenate([measure(weights) for weights in _weights(groups, seed, resamples)])


def _weights(groups: np.ndarray, seed: int, resamples: int) -> Iterator[np.ndarray]:
    """Number of draws of each pair in each resample: float64[R, P], in chunks that fit in memory. Groups are drawn whole."""
    rng, count = np.random.default_rng(seed), int(groups.max()) + 1
    for rows in _chunks(len(groups), resamples):
        drawn = rng.integers(0, count, size=(rows, count)) + count * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count)[:, groups].astype(np.float64)


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
