"""Table 2 of the paper: win rates by people and judges, and their agreement (section 6.4, appendix D.3).

As in the paper, ratings that two texts are nearly identical are set aside, and agreement is counted per rating: each rating of
a person is compared with the judge's on the same item, and with those of the other people. Shares are reported together with
Cohen's kappa (1960), (agreement - e) / (1 - e), where e is the agreement by chance: a judge and a person who both prefer one
method nine times in ten agree on 82 % of the items without looking at them.

The sampling unit is the item: two ratings of one item are not independent. Shares have the interval of the items' scores
(`score_interval`: Wilson's, if every item counts once); that of kappa resamples items (`kappa_interval`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dpo_jax.data.pairs import Cause, DataError
from dpo_jax.evals.intervals import score_interval
from dpo_jax.study.ratings import Judgment, Winner

RESAMPLES = 4000
Votes = Mapping[str, Mapping[str, Winner]]  # item -> rater -> winner
Verdicts = Mapping[str, Winner | None]  # item -> winner; None if the judge did not decide


class Estimate(NamedTuple):
    """A figure and its 95 % interval; NaN if the data do not determine it. `trials`: number of ratings, or pairs, behind it."""

    value: float
    low: float
    high: float
    trials: int


def share(counts: np.ndarray) -> np.ndarray:
    """The first of two counts `[..., 2]` as a share of their sum; NaN if both are 0."""
    counts = np.asarray(counts, np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        return counts[..., 0] / counts.sum(axis=-1)


def raw_agreement(table: np.ndarray) -> np.ndarray:
    """Share on the diagonal of `table[..., 2, 2]`: counts by the rating of one (rows) and of the other (columns)."""
    total = np.asarray(table, np.float64).sum(axis=(-2, -1))
    return share(np.stack([np.trace(table, axis1=-2, axis2=-1), total - np.trace(table, axis1=-2, axis2=-1)], axis=-1))


def chance_agreement(table: np.ndarray) -> np.ndarray:
    """Agreement by chance: of two independent raters with the marginals of `table[..., 2, 2]`."""
    table = np.asarray(table, np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        rows, columns = (table.sum(axis=axis) / table.sum(axis=(-2, -1))[..., None] for axis in (-1, -2))
    return (rows * columns).sum(axis=-1)


def cohen_kappa(table: np.ndarray) -> np.ndarray:
    """Cohen's kappa of `table[..., 2, 2]`: 1 for full agreement, 0 for chance. NaN if both always give the same rating."""
    chance = chance_agreement(table)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(chance < 1, (raw_agreement(table) - chance) / (1 - chance), math.nan)


def kappa_interval(tables: np.ndarray, *, seed: int, resamples: int = RESAMPLES) -> tuple[np.ndarray, np.ndarray]:
    """95 % interval of Cohen's kappa of `tables[I, ..., 2, 2]` summed over items: low and high, [...] each.

    Bayesian bootstrap (Rubin 1981): each resample draws new weights of the items. Half an item is added to each cell, which is
    Jeffreys' prior if every item counts once: nearly unanimous items are not certainty. A kappa below 0 is covered less often,
    down to 77 %, because the prior moves the interval towards 0. The estimate is always inside; if it is NaN, so is the
    interval.
    """
    rng, items = np.random.default_rng(seed), len(tables)
    estimate = cohen_kappa(tables.sum(axis=0))
    size = tables.sum(axis=(0, -2, -1))[..., None, None] / items
    cells = np.stack([np.broadcast_to(cell, tables.shape[1:]) * size for cell in np.eye(4).reshape(4, 2, 2)])
    weights = np.concatenate([rng.standard_exponential((resamples, items)), rng.standard_gamma(0.5, (resamples, 4))], axis=1)
    drawn = np.tensordot(weights, np.concatenate([tables, cells]), axes=1)
    low, high = np.quantile(cohen_kappa(drawn), (0.025, 0.975), axis=0)
    return np.minimum(low, estimate), np.maximum(high, estimate)


def share_over_items(counts: np.ndarray) -> Estimate:
    """`share` of `counts[I, 2]` summed over items, with its interval. Items without a count are left out."""
    counts = np.asarray(counts, np.float64)
    counts = counts[counts.any(axis=1)]
    if not len(counts):
        return Estimate(math.nan, math.nan, math.nan, 0)
    total = counts.sum(axis=0)
    return Estimate(float(share(total)), *score_interval(share(counts), counts.sum(axis=1)), int(total.sum()))


def agreement_over_items(tables: np.ndarray, *, seed: int) -> dict[str, Estimate]:
    """Raw agreement and Cohen's kappa of `tables[I, 2, 2]` summed over items. Items without a count are left out."""
    tables = np.asarray(tables, np.float64)
    tables = tables[tables.any(axis=(1, 2))]
    same, total = np.trace(tables, axis1=-2, axis2=-1), tables.sum(axis=(-2, -1))
    kappa = Estimate(math.nan, math.nan, math.nan, int(total.sum()))
    if len(tables):
        low, high = kappa_interval(tables, seed=seed)
        kappa = kappa._replace(value=float(cohen_kappa(tables.sum(axis=0))), low=float(low), high=float(high))
    return {"agree": share_over_items(np.stack([same, total - same], axis=-1)), "kappa": kappa}


def votes_of(judgments: Sequence[Judgment]) -> dict[str, dict[str, Winner]]:
    """Item -> rater -> winner. Raises `DataError` if a rater rates an item twice."""
    votes: dict[str, dict[str, Winner]] = {}
    for judgment in judgments:
        of_item = votes.setdefault(judgment.item, {})
        if judgment.rater in of_item:
            raise DataError(
                f"{judgment.rater} has rated item {judgment.item} in two files; keep one of them, or give two people two names",
                causes=[Cause.DUPLICATE_KEY],
            )
        of_item[judgment.rater] = judgment.winner
    return votes


def counted(votes: Votes) -> np.ndarray:
    """Number of ratings for a and for b on each item, ties set aside: float64[I, 2], in the order of `votes`."""
    said = [list(of_item.values()) for of_item in votes.values()]
    return np.array([[winners.count("a"), winners.count("b")] for winners in said], np.float64).reshape(-1, 2)


def with_judge(votes: Votes, verdicts: Verdicts) -> np.ndarray:
    """Counts by the judge's verdict (rows) and people's ratings (columns), float64[I, 2, 2]: one count per rating."""
    tables = np.zeros((len(votes), 2, 2))
    for table, item, people in zip(tables, votes, counted(votes), strict=True):
        if (winner := verdicts.get(item)) in ("a", "b"):
            table["ab".index(winner)] = people
    return tables


def among_people(votes: Votes) -> np.ndarray:
    """Counts by the ratings of two people on an item, float64[I, 2, 2]: one count per pair of ratings.

    With two people in all, the first (by name) is in the rows. With more, the order within a pair has no meaning: each pair
    counts half in either order, and the kappa is that of two people drawn at random (Scott's pi).
    """
    tables = np.zeros((len(votes), 2, 2))
    for table, of_item in zip(tables, votes.values(), strict=True):
        said = ["ab".index(of_item[rater]) for rater in sorted(of_item) if of_item[rater] != "tie"]
        for one, other in itertools.combinations(said, 2):
            table[one, other] += 1
    people = {rater for of_item in votes.values() for rater in of_item}
    return tables if len(people) <= 2 else (tables + tables.transpose(0, 2, 1)) / 2


def majority(votes: Votes) -> dict[str, Winner]:
    """Winner of each item by majority of ratings, ties set aside; "tie" if neither has a majority."""
    sides: tuple[Winner, ...] = ("b", "tie", "a")
    return {item: sides[int(np.sign(a - b)) + 1] for item, (a, b) in zip(votes, counted(votes), strict=True)}


def table_2(judgments: Sequence[Judgment], judges: Mapping[str, Verdicts], *, seed: int) -> dict[str, Any]:
    """One column of Table 2: a dictionary of plain numbers and `Estimate`s, with an account of what was counted.

    `judgments` are those of people; `judges` maps the name to show to verdicts. For people, read = kept + ties. For a judge,
    items = decided + undecided + unjudged, and the people's kept ratings = compared + not compared.
    """
    votes = votes_of(judgments)
    counts = counted(votes)
    kept, compared = int(counts.sum()), among_people(votes)
    overall = majority(votes)
    people = {
        "raters": len({judgment.rater for judgment in judgments}),
        "items": len(votes),
        "read": len(judgments),
        "ties": len(judgments) - kept,
        "kept": kept,
        "win": share_over_items(counts),
        "majority_win": share_over_items(counted({item: {"majority": winner} for item, winner in overall.items()})),
        "first": share_over_items(_positions(judgments)),
        "with_people": agreement_over_items(compared, seed=seed),
    }
    return {"people": people, "judges": {name: _judge(votes, overall, said, seed) for name, said in judges.items()}}


def _judge(votes: Votes, overall: Mapping[str, Winner], verdicts: Verdicts, seed: int) -> dict[str, Any]:
    said = {item: verdicts[item] for item in votes if item in verdicts}
    decided: dict[str, Winner] = {item: winner for item, winner in said.items() if winner in ("a", "b")}
    alone: Votes = {item: {"judge": winner} for item, winner in decided.items()}
    tables = with_judge(votes, verdicts)
    of_majority = with_judge({item: {"majority": winner} for item, winner in overall.items()}, verdicts)
    compared = int(tables.sum())
    return {
        "items": len(votes),
        "decided": len(decided),
        "undecided": len(said) - len(decided),
        "unjudged": len(votes) - len(said),
        "compared": compared,
        "not_compared": int(counted(votes).sum()) - compared,
        "win": share_over_items(counted(alone)),
        "with_people": agreement_over_items(tables, seed=seed),
        "with_majority": agreement_over_items(of_majority, seed=seed),
    }


def _positions(judgments: Sequence[Judgment]) -> np.ndarray:
    """How often the text shown first, and the one shown second, was preferred on each item, if known: float64[I, 2]."""
    items = {item: place for place, item in enumerate(dict.fromkeys(judgment.item for judgment in judgments))}
    counts = np.zeros((len(items), 2))
    for judgment in judgments:
        if judgment.leading is not None and judgment.winner != "tie":
            counts[items[judgment.item], int(judgment.leading != (judgment.winner == "a"))] += 1
    return counts
