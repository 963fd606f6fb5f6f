"""Held-out preference metrics: accuracy, margin, and displacement of log-probabilities from the reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import numpy as np

from dpo_jax.data.encode import Encoded
from dpo_jax.data.loader import Batch
from dpo_jax.losses import right, right_label, whole_set_signals
from dpo_jax.runtime.progress import reported
from dpo_jax.types import Array

Interval = tuple[float, float]
PRIOR = 0.9
"""Number of wins, and of losses, added to the data for the variance of scores. Bonett and Price use 1, Agresti and Min (2005)
1/2. By exact enumeration, with 1/2 the coverage falls to 87 %, and 1 covers 98 % where 0.9 covers 96 %."""


class NonFiniteLogps(FloatingPointError):
    """The policy gives NaN or infinity for a held-out pair; an accuracy computed from this would look valid."""


def held_out_logps(
    logps: Callable[[Any], np.ndarray], batches: Iterable[tuple[np.ndarray, Batch]], *, pairs: int
) -> np.ndarray:
    """Log-probabilities float32[pairs, 2] in data order: `logps(rows) -> float32[P, 2]` over all batches of `loader.in_order`.
    For rankings [.., K].

    Raises `NonFiniteLogps`, naming the first pair with a value that is NaN or infinite.
    """
    result = np.zeros((0, 2), np.float32)
    with reported("evaluating", total=pairs, unit="pairs", brief=True) as task:
        for indices, batch in batches:
            values, place = logps(batch.rows), batch.index
            if not len(result):
                result = np.full((pairs, values.shape[1]), np.nan, np.float32)
            result[indices[place[place >= 0]]] = values[place >= 0]
            bad = place[(place >= 0) & ~np.isfinite(values).all(axis=1)]
            if len(bad):
                shown = ", ".join(f"{value:g}" for value in values[place == bad[0]][0])
                raise NonFiniteLogps(f"{batch.uids[bad[0]]}: the policy gives the log-probabilities {shown} (chosen, rejected)")
            task.advance(len(indices))
    return result


def completion_tokens(pairs: Iterable[Encoded]) -> np.ndarray:
    """Number of scored tokens of each completion: float32[P, 2], chosen first; for rankings [P, K]."""
    lengths = [pair.scored_tokens for pair in pairs]
    return np.array(lengths, np.float32).reshape(-1, len(lengths[0]) if lengths else 2)


def labels_of(examples: Sequence[Encoded]) -> np.ndarray | None:
    """Labels of single completions: float32[P], 1 for desirable ones. None for pairs and rankings."""
    if not len(examples) or examples[0].desirable is None:
        return None
    return np.array([one.desirable is True for one in examples], np.float32)


def preference_summary(
    logps: Array,
    ref_logps: Array,
    *,
    loss: Callable[..., tuple[Array, Array]],
    lengths: Array | None = None,
    desirable: Array | None = None,
    prompts: Sequence[Hashable] | None = None,
) -> dict[str, float]:
    """Loss, accuracy with its 95 % interval, margin and displacement, over `[P, 2]` log-probabilities of held-out pairs.

    `lengths` float[P, 2] are the numbers of scored tokens, for a loss that takes them. For rankings, [P, K], the best and the
    worst completion count. With the labels `desirable` float[P] it summarises single completions (`losses.unpaired_metrics`).

    `prompts[P]` identify the prompts. Pairs of one prompt may share completions and are not independent, so the interval counts
    a prompt once, with the mean of its pairs.

    A pair counts as right if the implicit reward of the chosen completion is higher, and as half right in a tie
    (`losses.right`): a policy equal to its reference has accuracy 0.5.
    """
    logps, ref_logps = np.asarray(logps), np.asarray(ref_logps)
    signals = whole_set_signals(loss, lengths, pairs=len(logps), desirable=desirable)
    losses, rewards = (np.asarray(x, np.float64) for x in loss(logps, ref_logps, **signals))
    log_ratios = np.asarray(logps, np.float64) - np.asarray(ref_logps, np.float64)
    if desirable is None:
        sides = [(rewards[:, place], log_ratios[:, place]) for place in (0, -1)]
        scores = right(rewards, logps, ref_logps)
    else:
        sides = [(rewards[which, 0], log_ratios[which, 0]) for which in (np.asarray(desirable) > 0, np.asarray(desirable) == 0)]
        scores = right_label(logps, ref_logps, np.asarray(desirable))
    scores = np.asarray(scores, np.float64)
    low, high = score_interval(*by_prompt(scores, prompts))
    # Single completions may all have the same label.
    (chosen, moved), (rejected, moved_rejected) = ([float(x.mean()) if len(x) else 0.0 for x in side] for side in sides)
    return {
        "loss": float(losses.mean()),
        "rewards/accuracies": float(scores.mean()),
        "rewards/accuracies_low": low,
        "rewards/accuracies_high": high,
        "rewards/margins": chosen - rejected,
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "displacement/chosen": moved,
        "displacement/rejected": moved_rejected,
    }


def by_prompt(scores: Array, prompts: Sequence[Hashable] | np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
    """(mean score of each prompt, its number of scores), as `score_interval` takes them; without `prompts` each score alone.

    >>> means, sizes = by_prompt([1, 0, 1], ["a", "a", "b"])
    >>> means.tolist(), sizes.tolist()
    ([0.5, 1.0], [2, 1])
    """
    scores = np.asarray(scores, np.float64)
    if prompts is None:
        return scores, None
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    places = np.array([numbers[prompt] for prompt in prompts], np.int64)
    sizes = np.bincount(places, minlength=len(numbers))
    return np.bincount(places, scores, minlength=len(numbers)) / sizes, sizes


def wilson_interval(successes: float, trials: float, *, z: float = 1.959964) -> Interval:
    """Wilson interval (1927) of a share at the confidence of `z` (95 %). Unlike the normal interval it stays within [0, 1]."""
    if trials <= 0:
        raise ValueError(f"an interval needs at least one trial, got {trials}")
    share, square = successes / trials, z * z / trials
    middle = (share + square / 2) / (1 + square)
    half = z / (1 + square) * math.sqrt(share * (1 - share) / trials + square / (4 * trials))
    # At the ends the bounds are exactly 0 and 1; rounding would miss them slightly.
    return middle - half if share > 0 else 0.0, middle + half if share < 1 else 1.0


def score_interval(scores: Array, sizes: Array | None = None) -> Interval:
    """95 % interval of the mean of `scores[n]` in [0, 1]: 1 for a win, 1/2 for a tie, 0 for a loss. Needs at least one score.

    Wilson's interval with the effective sample size (Korn and Graubard 1998): the number of wins and losses with the variance
    of these scores. Ties have less variance, so they narrow it. The variance also counts `PRIOR` wins and as many losses (as
    in Bonett and Price 2012): a few equal scores are not certainty. Without ties it is Wilson's own interval.

    Each score may be a mean of several ratings: `sizes[n]`, positive, are their numbers, which weight the mean. The scores are
    assumed independent, not the ratings.

    >>> [round(end, 3) for end in score_interval([1, 1, 0.5, 0.5, 0.5, 0])]
    [0.298, 0.822]
    """
    scores = np.asarray(scores, np.float64)
    mean = float(np.average(scores, weights=sizes)) if len(scores) else 0.0
    effective = effective_number(scores, sizes)
    return wilson_interval(mean * effective, effective)


def effective_number(scores: Array, sizes: Array | None = None) -> float:
    """The effective sample size of `score_interval`: how many independent wins and losses have the variance of these scores."""
    scores = np.asarray(scores, np.float64)
    sizes = np.ones(len(scores)) if sizes is None else np.asarray(sizes, np.float64)
    if not len(scores) or scores.min() < 0 or scores.max() > 1:
        raise ValueError(f"an interval needs scores in [0, 1], and at least one, got {scores[:5].tolist()}")
    scores, sizes = np.append(scores, [1.0, 0.0]), np.append(sizes, [sizes.mean()] * 2)
    times = np.append(np.ones(len(scores) - 2), [PRIOR, PRIOR])
    weights = sizes / (times @ sizes)
    centre = (times * weights) @ scores
    variance = times @ (weights * (scores - centre)) ** 2
    return float(centre * (1 - centre) / variance * (len(scores) - 2) / times.sum())


def mean_with_error(values: Array) -> tuple[float, float]:
    """Mean and its standard error (0 for a single value)."""
    values = np.asarray(values, np.float64)
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0
