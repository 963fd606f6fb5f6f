"""Selection of the prompts that a round labels, and of the completions that become pairs. Pure functions of arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from dpo_jax.data.label import LabelCounts, label
from dpo_jax.data.loader import batch_indices

PairsHow = Literal["best_worst", "all", "bradley_terry", "soft"]
Elicitation = Literal["uniform", "disagreement", "uncertainty"]


def draw_prompts(prompts: int, count: int, *, seed: int, number: int) -> np.ndarray:
    """The prompts of round `number`: int64[count], distinct numbers below `prompts`.

    Successive rounds go through shuffled passes over all prompts. If a pass ends within a round, a prompt that would come twice
    is replaced by another. Raises ValueError if there are fewer than `count` prompts.

    >>> draw_prompts(5, 3, seed=0, number=0)
    array([2, 4, 3])
    """
    if not 0 < count <= prompts:
        raise ValueError(f"{count} distinct prompts of {prompts} cannot be drawn")
    drawn = batch_indices(prompts, batch=count, seed=seed, step=number)
    others = np.random.default_rng([seed, number]).permutation(prompts)
    return np.array(list(dict.fromkeys([*drawn.tolist(), *others.tolist()]))[:count], np.int64)


def choose_prompts(
    estimates: np.ndarray, texts: Sequence[Sequence[str]], count: int, *, how: Elicitation = "uniform"
) -> np.ndarray:
    """Numbers of the candidate prompts to label: int64[count], ascending, chosen by `estimates[C, K]` of their K completions.

    "uniform" takes the first ones, which were drawn at random. "disagreement" takes those whose estimated rewards have the
    largest standard deviation. "uncertainty" takes those whose completions the estimate cannot tell apart: the smallest mean
    distance of two completions. Completions with the same text count once, and prompts with a single text come last. Ties go to
    the earlier prompt.

    >>> estimates = np.array([[0.0, 4.0], [0.0, 0.1], [0.0, 1.0]])
    >>> texts = [[" a", " b"]] * 3
    >>> [choose_prompts(estimates, texts, 1, how=how).tolist() for how in ("uniform", "disagreement", "uncertainty")]
    [[0], [0], [1]]
    """
    estimates = np.asarray(estimates, np.float64)
    if not 0 < count <= len(estimates):
        raise ValueError(f"{count} of {len(estimates)} candidate prompts cannot be chosen")
    if how == "uniform":
        return np.arange(count)
    measure = {"disagreement": _negative_deviation, "uncertainty": _mean_distance}[how]
    values = np.array([measure(_distinct(row, its)) for row, its in zip(estimates, texts, strict=True)])
    return np.sort(np.argsort(values, kind="stable")[:count])


def _distinct(estimates: np.ndarray, texts: Sequence[str]) -> np.ndarray:
    """The estimates of distinct texts: the first of each."""
    return np.array([estimates[texts.index(text)] for text in dict.fromkeys(texts)])


def _negative_deviation(values: np.ndarray) -> float:
    return -float(values.std()) if len(values) > 1 else np.inf


def _mean_distance(values: np.ndarray) -> float:
    if len(values) < 2:
        return np.inf
    return float(np.abs(values[:, None] - values[None, :]).sum() / (len(values) * (len(values) - 1)))


def choose_pairs(
    texts: Sequence[Sequence[str]],
    rewards: np.ndarray,
    *,
    how: PairsHow,
    seed: int = 0,
    eos: str | None = None,
    keep_ties: bool = False,
) -> tuple[np.ndarray, LabelCounts]:
    """Preference pairs of the K completions of each of N prompts by `rewards[N, K]`: int64[P, 3], and counts of the rest.

    A row is (prompt, chosen, rejected). "best_worst" makes one pair per prompt: of its usable texts those with the highest and
    the lowest reward (the first and the last of equal ones). "all" makes all K (K - 1) / 2 pairs: the higher reward is chosen.
    "bradley_terry" draws the labels of all pairs, with P(first chosen) = sigmoid(r_first - r_second): `data.label.label`, which
    also says which pairs are left out (ties without `keep_ties`, equal texts, and those with a text that is blank or spells
    `eos`, which is not usable). "soft" makes the pairs of "all"; their loss takes this probability instead of a draw
    (`soft_labels`). Raises ValueError for shapes that differ and for rewards that are not finite.

    >>> texts = [[" a delight.", " a bore.", " fine."]]
    >>> choose_pairs(texts, np.array([[2.0, -1.0, 0.5]]), how="best_worst")[0]
    array([[0, 0, 1]])
    >>> choose_pairs(texts, np.array([[2.0, -1.0, 0.5]]), how="all")[0].tolist()
    [[0, 0, 1], [0, 0, 2], [0, 2, 1]]
    """
    rewards = np.asarray(rewards, np.float64)
    if not np.isfinite(rewards).all():
        raise ValueError(f"the reward is {rewards[~np.isfinite(rewards)][0]}, not a finite number")
    places = np.tile(np.arange(rewards.shape[-1]), (len(rewards), 1))
    if how == "best_worst" and rewards.shape == (len(texts), rewards.shape[-1]) and len(texts):
        usable = np.array([[bool(text.strip()) and not (eos and eos in text) for text in row] for row in texts])
        usable |= usable.sum(axis=1, keepdims=True) < 2  # then `label` says why there is no pair
        # The last of the lowest: if all rewards are equal this is a tie of two completions, not one completion twice.
        lowest = np.where(usable, rewards, np.inf)
        worst = rewards.shape[1] - 1 - lowest[:, ::-1].argmin(axis=1)
        places = np.stack([np.where(usable, rewards, -np.inf).argmax(axis=1), worst], axis=1)
        rewards = np.take_along_axis(rewards, places, axis=1)
        texts = [[row[int(best)], row[int(worst)]] for row, (best, worst) in zip(texts, places.tolist(), strict=True)]
    elif how not in ("best_worst", "all", "bradley_terry", "soft"):
        raise ValueError(f"how={how!r}: use 'best_worst', 'all', 'bradley_terry' or 'soft'")
    labels = "bradley_terry" if how == "bradley_terry" else "argmax"
    preferences, counts = label([""] * len(texts), texts, rewards, how=labels, seed=seed, eos=eos, keep_ties=keep_ties)
    found = []
    for preference in preferences:
        _, prompt, pair = preference.uid.split(":")
        number, (first, second) = int(prompt), map(int, pair.split("-"))
        if preference.chosen != texts[number][first]:  # equal texts are not a pair
            first, second = second, first
        found.append((number, places[number][first], places[number][second]))
    return np.array(found, np.int64).reshape(-1, 3), counts


def soft_labels(rewards: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Probability that a Bradley-Terry draw rejects the chosen completion of `pairs[P, 3]`, by `rewards[N, K]`: float32[P].

    As `label_smoothing` of `dpo_loss` it makes the loss the expectation over draws: the same optimum, with less variance.

    >>> soft_labels(np.array([[2.0, -1.0, 0.5]]), np.array([[0, 0, 1], [0, 2, 1]])).round(3).tolist()
    [0.04699999839067459, 0.18199999630451202]
    """
    prompts, chosen, rejected = pairs.T
    gap = np.asarray(rewards, np.float64)[prompts, chosen] - np.asarray(rewards, np.float64)[prompts, rejected]
    return ((1 - np.tanh(gap / 2)) / 2).astype(np.float32)


def beta_of_round(first: float, last: float | None, *, number: int, rounds: int) -> float:
    """beta of round `number`: a geometric sequence from `first` to `last`; constant if `last` is None.

    >>> [beta_of_round(4.0, 1.0, number=number, rounds=3) for number in range(3)]
    [4.0, 2.0, 1.0]
    """
    return first if last is None or rounds == 1 else first * (last / first) ** (number / (rounds - 1))


def shares_won(outcomes: np.ndarray) -> np.ndarray:
    """Scores of completions from pairwise comparisons: `outcomes[N, K, K]` -> float64[N, K].

    `outcomes[n, i, j]` for i < j is 1 if completion i won, 0 if j did, 1/2 for a tie, NaN if undecided. The score is the share
    of decided comparisons that a completion won; NaN without any.

    >>> shares_won(np.array([[[np.nan, 1.0], [np.nan, np.nan]]]))
    array([[1., 0.]])
    """
    outcomes = np.asarray(outcomes, np.float64)
    upper = np.triu(np.ones(outcomes.shape[-2:], bool), 1)
    won = np.where(upper, outcomes, 1 - outcomes.swapaxes(-1, -2))
    decided = np.isfinite(won) & ~np.eye(won.shape[-1], dtype=bool)
    count = decided.sum(axis=-1)
    return np.where(count > 0, np.where(decided, won, 0.0).sum(axis=-1) / np.maximum(count, 1), np.nan)
