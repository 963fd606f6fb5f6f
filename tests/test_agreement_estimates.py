"""Agreement, kappa and win rates by hand, and intervals that cover."""

import math

import numpy as np
import pytest
from scipy import stats
from test_agreement import judged

from dpo_jax.evals.intervals import wilson_interval
from dpo_jax.study.agreement import (
    among_people,
    cohen_kappa,
    kappa_interval,
    raw_agreement,
    share,
    share_over_items,
    table_2,
    votes_of,
)


def test_kappa_of_the_textbook_table():
    # 20 both yes, 5 and 10 mixed, 15 both no: agreement 0.7, by chance 0.5 * 0.6 + 0.5 * 0.4 = 0.5, so kappa 0.4.
    table = np.array([[20, 5], [10, 15]])
    assert raw_agreement(table) == pytest.approx(0.7)
    assert cohen_kappa(table) == pytest.approx(0.4)


def test_kappa_at_its_landmarks():
    assert cohen_kappa(np.array([[7, 0], [0, 3]])) == 1
    assert cohen_kappa(np.array([[0, 5], [5, 0]])) == -1
    assert cohen_kappa(np.outer([3, 7], [8, 2])) == pytest.approx(0)  # independent: the agreement of chance
    assert np.isnan(cohen_kappa(np.array([[9, 0], [0, 0]])))  # both always say the same: there is no chance to beat
    assert np.isnan(cohen_kappa(np.zeros((2, 2))))


def test_kappa_knows_neither_names_nor_who_comes_first():
    tables = np.random.default_rng(0).integers(1, 50, size=(20, 2, 2))
    np.testing.assert_allclose(cohen_kappa(tables), cohen_kappa(tables.transpose(0, 2, 1)))
    np.testing.assert_allclose(cohen_kappa(tables), cohen_kappa(tables[:, ::-1, ::-1]))
    np.testing.assert_allclose(cohen_kappa(tables), [cohen_kappa(table) for table in tables])


def test_shares_of_items_have_wilsons_interval():
    counts = np.eye(2)[(np.arange(100) % 4 == 0).astype(int)]
    estimate = share_over_items(counts)
    assert estimate.value == share(counts.sum(axis=0))
    assert (estimate.low, estimate.high) == pytest.approx(wilson_interval(estimate.value * 100, 100))
    # Two statements an item that always agree are one item said twice: the interval does not narrow.
    doubled = share_over_items(2 * counts)
    assert doubled.trials == 200
    assert doubled[:3] == pytest.approx(estimate[:3])
    # An item with more statements weighs more.
    assert share_over_items(np.array([[3, 0], [0, 1]])).value == 0.75
    assert math.isnan(share_over_items(np.zeros((2, 2))).low)


def test_full_agreement_of_few_items_is_not_certainty():
    votes = votes_of(judged(*(f"{n} {rater} {'ab'[n % 2]}" for n in range(10) for rater in ("ann", "bob"))))
    table = table_2(judged(*(f"{n} {rater} {'ab'[n % 2]}" for n in range(10) for rater in ("ann", "bob"))), {}, seed=0)
    both = table["people"]["with_people"]
    assert both["agree"][:3] == pytest.approx((1, *wilson_interval(10, 10)))
    assert both["kappa"].value == 1
    assert 0 < both["kappa"].low < 0.7 < both["kappa"].high == 1
    assert raw_agreement(among_people(votes).sum(axis=0)) == 1


# The coverage of the intervals: 1,000 studies of 150 items, two people each, as the paper had them


def simulated(rng, studies, items):
    """Votes of two people and a judge, 0 for a: a shared leaning of each item, from which everybody errs on their own."""
    truth = rng.random((items, studies)) > 0.6
    people = np.stack([truth ^ (rng.random(truth.shape) < 0.2) for _ in range(2)])
    judge = truth ^ (rng.random(truth.shape) < np.where(truth, 0.3, 0.1))
    return people.astype(int), judge.astype(int)


def agreeing(tables):
    same = np.trace(tables, axis1=-2, axis2=-1)
    return np.stack([same, tables.sum(axis=(-2, -1)) - same], axis=-1)


def tables_of(one, other):
    return np.stack([[(one == i) & (other == j) for j in (0, 1)] for i in (0, 1)]).astype(float).transpose(2, 3, 0, 1)


@pytest.mark.parametrize("split", [0.0, 0.3, 0.93, 0.97])
def test_shares_of_two_statements_an_item_are_covered_also_where_nearly_all_items_are_split(split):
    """Of 60 items, `split` have a statement for either side. A bootstrap over items covers 0.92 and 0.70 in the last two."""
    truth = np.array([(1 - split) * 0.7, split, (1 - split) * 0.3])
    items = np.array([[2, 0], [1, 1], [0, 2]])
    held, mass = 0.0, 0.0
    for won in range(61):
        for lost in range(61 - won):
            times = [won, 60 - won - lost, lost]
            if (likely := stats.multinomial.pmf(times, 60, truth)) > 1e-6:
                estimate = share_over_items(np.repeat(items, times, axis=0))
                mass, held = mass + likely, held + likely * (estimate.low <= truth[0] + split / 2 <= estimate.high)
    assert 0.93 <= held / mass <= (0.97 if split < 0.9 else 0.999)


@pytest.mark.parametrize(
    ("items", "chances"),
    [
        (30, (0.485, 0.015, 0.015, 0.485)),
        (150, (0.485, 0.015, 0.015, 0.485)),
        (60, (0.01, 0.04, 0.04, 0.91)),
        (60, (0.02, 0.02, 0.02, 0.94)),
        (30, (0.4, 0.1, 0.1, 0.4)),
    ],
)
def test_kappa_is_covered_also_where_nearly_all_agree_or_say_the_same(items, chances):
    """A bootstrap of the items alone covers 0.99, 0.92, 0.47, 0.82 and 0.92 of these, and has none in a third of the fourth."""
    truth = float(cohen_kappa(np.reshape(chances, (2, 2))))
    held = []
    for counts in np.random.default_rng(0).multinomial(items, chances, size=300):
        low, high = kappa_interval(np.repeat(np.eye(4).reshape(4, 2, 2), counts, axis=0), seed=len(held), resamples=300)
        held.append(low <= truth <= high or np.isnan(low))
    assert 0.92 <= np.mean(held) <= 0.985


@pytest.mark.parametrize(("items", "chances"), [(60, (0.9, 0.05, 0.05, 0)), (30, (0.05, 0.45, 0.45, 0.05))])
def test_kappa_below_chance_is_covered_less_often(items, chances):
    """A known limit: where two never agree on the rarer side, or nearly always differ, 0.78 and 0.88, on the high side."""
    truth = float(cohen_kappa(np.reshape(chances, (2, 2))))
    assert truth < 0
    found = []
    for seed, counts in enumerate(np.random.default_rng(0).multinomial(items, chances, size=300)):
        found.append(kappa_interval(np.repeat(np.eye(4).reshape(4, 2, 2), counts, axis=0), seed=seed, resamples=300))
    low, high = np.array(found).T
    assert np.nanmean(high < truth) <= 0.025
    assert 0.7 <= np.mean(low <= truth) <= 0.93


@pytest.mark.parametrize("measure", [raw_agreement, cohen_kappa, share])
def test_intervals_cover_the_truth_95_times_in_100(measure):
    def counts_of(people, judge):
        with_the_judge = tables_of(judge, people[0]) + tables_of(judge, people[1])
        return with_the_judge.sum(axis=-2) if measure is share else with_the_judge  # share: of the people's statements

    people, judge = simulated(np.random.default_rng(1), 1, 1_000_000)
    truth = float(measure(counts_of(people, judge).sum(axis=0))[0])
    counts = counts_of(*simulated(np.random.default_rng(2), 1000, 150))
    if measure is cohen_kappa:
        low, high = kappa_interval(counts, seed=3, resamples=1000)
    else:
        of_items = np.moveaxis(counts if measure is share else agreeing(counts), 0, 1)
        low, high = np.array([share_over_items(study)[1:3] for study in of_items]).T
    assert 0.93 <= np.mean((low <= truth) & (truth <= high)) <= 0.97
