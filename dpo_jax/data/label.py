"""Preferences from samples (appendix C.1 of the paper): all pairs of a prompt's completions, labeled by a reward."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from dpo_jax.data.pairs import Preference

How = Literal["argmax", "bradley_terry"]


class LabelCounts(NamedTuple):
    """Numbers of labeled and dropped pairs. Always: `labeled + ties + identical + empty + eos == pairs`."""

    pairs: int  # all K (K - 1) / 2 of every prompt
    labeled: int
    ties: int  # equal rewards: no preference, unless the label is drawn all the same
    identical: int  # equal texts: nothing to learn
    empty: int  # a side without text, which no data set may contain
    eos: int  # a side that contains the EOS token, which no data set may contain either
    against: int  # labeled pairs whose chosen side has the lower reward


def label(
    prompts: Sequence[str],
    completions: Sequence[Sequence[str]],
    rewards: np.ndarray,
    *,
    how: How,
    seed: int,
    name: str = "samples",
    eos: str | None = None,
    finished: Sequence[Sequence[bool]] | None = None,
    keep_ties: bool = False,
) -> tuple[list[Preference], LabelCounts]:
    """All pairs of the K completions of each of P prompts, labeled by `rewards[P, K]`: 6 pairs for 4 completions.

    "argmax" chooses the higher reward. "bradley_terry" draws the label, with P(first chosen) = sigmoid(r_first - r_second) (eq.
    1); rewards are then in logits, so scale them first. Pairs are in prompt order, with uids "name:prompt:first-second". The
    same `seed` draws the same labels. Completions that contain `eos` are in no pair. A sample that is not `finished[P][K]`, cut
    off by a token limit, is marked (`Preference.unended`).

    Pairs of equal rewards are left out. With "bradley_terry", `keep_ties` draws their labels too, with probability 1/2. This is
    needed where a reward also depends on chance: leaving out ties then selects pairs by their outcome.

    Raises `ValueError` for shapes that do not agree, and for a reward that is not finite.

    >>> texts = [[" a delight.", " a bore.", " fine."]]
    >>> pairs, counts = label(["The film was"], texts, np.array([[2.0, -1.0, 2.0]]), how="argmax", seed=0)
    >>> [(pair.chosen, pair.rejected) for pair in pairs], counts.ties
    ([(' a delight.', ' a bore.'), (' fine.', ' a bore.')], 1)
    """
    if how not in ("argmax", "bradley_terry"):
        raise ValueError(f"how={how!r}: use 'argmax' or 'bradley_terry'")
    rewards = np.asarray(rewards, np.float64)
    shape = len(prompts), len(completions[0]) if len(completions) else 0
    if len(completions) != len(prompts) or {len(texts) for texts in completions} - {shape[1]} or rewards.shape != shape:
        raise ValueError(
            f"{len(prompts)} prompts, {len(completions)} lists of {sorted({len(texts) for texts in completions})} completions "
            f"and rewards of shape {rewards.shape} do not agree"
        )
    if not np.isfinite(rewards).all():
        prompt, completion = np.argwhere(~np.isfinite(rewards))[0]
        raise ValueError(f"prompt {prompt}, completion {completion}: the reward is {rewards[prompt, completion]}")
    rng = np.random.default_rng(seed)
    preferences: list[Preference] = []
    dropped = dict.fromkeys(("ties", "identical", "empty", "eos"), 0)
    against = pairs = 0
    for number, (prompt, texts) in enumerate(zip(prompts, completions, strict=True)):
        for first, second in itertools.combinations(range(len(texts)), 2):
            pairs += 1
            # Drawn for every pair: dropping a pair does not change the labels of the others.
            chance = rng.random()
            gap = rewards[number, first] - rewards[number, second]
            cause = _cause(texts[first], texts[second], gap, eos)
            if cause and not (cause == "ties" and keep_ties and how == "bradley_terry"):
                dropped[cause] += 1
                continue
            # sigmoid(gap) without overflow.
            wins = gap > 0 if how == "argmax" else chance < (1 + np.tanh(gap / 2)) / 2
            against += bool(wins) != (gap > 0) and gap != 0
            best, worst = (first, second) if wins else (second, first)
            ended = (True, True) if finished is None else (finished[number][best], finished[number][worst])
            unended = tuple(side for side, one in zip(("chosen", "rejected"), ended, strict=True) if not one)
            uid = f"{name}:{number}:{first}-{second}"
            preferences.append(Preference(prompt, texts[best], texts[worst], uid, unended=unended))
    return preferences, LabelCounts(pairs, len(preferences), **dropped, against=against)


def _cause(first: str, second: str, gap: float, eos: str | None) -> Literal["identical", "empty", "eos", "ties", ""]:
    """Why a pair states no preference; of several causes, the first in this order."""
    if first == second:
        return "identical"
    if not (first.strip() and second.strip()):
        return "empty"
    if eos and (eos in first or eos in second):
        return "eos"
    return "ties" if gap == 0 else ""
