"""Win rates recover what was planted, and their intervals hold it as often as they say."""

import math

import numpy as np
import pytest
from scipy import stats

from dpo_jax.evals.intervals import score_interval, wilson_interval
from dpo_jax.judge.questions import Pair
from dpo_jax.judge.win_rates import EDGE, columns, length_controlled, rate, win_rate, win_rates
from dpo_jax.judge.win_rates_plot import plot_win_rates
from dpo_jax.plotting.palette import STYLES

DRAWS = 1000
COVERAGE = (0.93, 0.97)


def coverage(truth, low, high):
    return float(np.mean((np.asarray(low) <= truth) & (truth <= np.asarray(high))))


def in_both_orders(random, chance):
    """1, 0.5 or 0: each order is won with `chance`, and orders that disagree have flipped."""
    return ((random.random(chance.shape) < chance) + 0.0 + (random.random(chance.shape) < chance)) / 2


def outcomes(pairs, chances, *, least=1e-9):
    """The ways to win, flip and lose `pairs` with `chances`, but for the least likely: scores[K, pairs], probabilities[K]."""
    counts = np.array([(won, lost) for won in range(pairs + 1) for lost in range(pairs + 1 - won)])
    counts = np.stack([counts[:, 0], pairs - counts.sum(axis=1), counts[:, 1]], axis=1)
    likely = stats.multinomial.pmf(counts, pairs, chances)
    counts, likely = counts[likely > least], likely[likely > least]
    return np.stack([np.repeat([1.0, 0.5, 0.0], row) for row in counts]), likely


def exact_coverage(pairs, chances):
    """The coverage of `rate`, and its mean width, without simulation."""
    scores, likely = outcomes(pairs, chances)
    truth, found = chances[0] + chances[1] / 2, [rate(row) for row in scores]
    held = [r.low <= truth + 1e-12 and truth - 1e-12 <= r.high for r in found]
    return likely @ held, likely @ [r.high - r.low for r in found]


# Truths as won, flipped and lost. Before, the first three were covered in 85 %, the next three in 86, 88 and 93 %.
CORNERS = [
    *[(30, (0, 0.9, 0.1)), (100, (0, 0.97, 0.03)), (300, (0, 0.99, 0.01))],
    *[(20, (0.15, 0.85, 0)), (50, (0.01, 0.92, 0.07)), (10, (0.5, 0.4, 0.1)), (10, (0, 0.7, 0.3))],
    *[(50, (0, 0.9, 0.1)), (100, (0.01, 0.9, 0.09)), (100, (0.33, 0.34, 0.33))],
]


@pytest.mark.parametrize(("pairs", "chances"), CORNERS)
def test_exact_coverage_where_nearly_all_pairs_flip_or_one_side_never_wins(pairs, chances):
    for one in (chances, chances[::-1]):
        assert COVERAGE[0] <= exact_coverage(pairs, one)[0] <= COVERAGE[1] + 0.0005  # 0.9702 at 10 pairs, 0/70/30 %


@pytest.mark.parametrize("pairs", [10, 30, 60])
def test_exact_coverage_is_never_low_where_two_or_more_pairs_are_unlike_the_rest(pairs):
    """It may be high: 0.985 where five or more such pairs are expected, 0.999 where fewer, as few outcomes are likely then."""
    shares = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9)
    truths = [(won, 1 - won - lost, lost) for won in shares for lost in shares if won + lost <= 0.95 and won <= lost]
    truths = [truth for truth in truths if pairs * (1 - max(truth)) >= 2]
    found = np.array([exact_coverage(pairs, truth) for truth in truths])
    assert COVERAGE[0] <= found[:, 0].min() <= found[:, 0].max() <= 0.999
    likely_many = found[[pairs * (1 - max(truth)) >= 5 for truth in truths], 0]
    assert likely_many.max() <= 0.985


@pytest.mark.parametrize(("pairs", "truth"), [(100, 0.5), (256, 0.61), (256, 0.85), (500, 0.36)])
def test_coverage_of_win_rates(pairs, truth):
    random = np.random.default_rng(pairs)
    chance = np.full((DRAWS, pairs), truth)
    for values, expected in ((in_both_orders(random, chance), truth), (in_both_orders(random, chance) == 1, truth**2)):
        found = [rate(draw) for draw in values]
        assert COVERAGE[0] <= coverage(expected, [r.low for r in found], [r.high for r in found]) <= COVERAGE[1]
        assert np.mean([r.value for r in found]) == pytest.approx(expected, abs=4 * 0.5 / math.sqrt(DRAWS * pairs))


@pytest.mark.parametrize(("pairs", "truth", "slope"), [(100, 0.5, 1.5), (256, 0.61, 3.0), (256, 0.8, -1.0), (500, 0.4, 2.0)])
def test_length_control_recovers_what_a_judge_that_likes_length_hides(pairs, truth, slope):
    """The policy writes longer texts; the share it would win at equal length is planted, and the plain one is far off."""
    random = np.random.default_rng(pairs)
    log_ratios = random.normal(0.4, 0.4, (DRAWS, pairs))
    chance = 1 / (1 + np.exp(-(math.log(truth / (1 - truth)) + slope * log_ratios)))
    for values in (in_both_orders(random, chance), (random.random(chance.shape) < chance) + 0.0):
        middle, low, high = length_controlled(values, log_ratios)
        assert COVERAGE[0] <= coverage(truth, low, high) <= COVERAGE[1]
        assert middle.mean() == pytest.approx(truth, abs=0.01)
        assert abs(values.mean() - truth) > 0.05


@pytest.mark.parametrize(
    ("truth", "slope", "flips"), [(0.45, 0.0, 1.0), (0.9, 0.0, 0.0), (0.4, 2.0, 1.0), (0.5, 0.0, 0.9), (0.95, 0.0, 0.3)]
)
def test_exact_coverage_of_length_control_in_corners(truth, slope, flips):
    """15 pairs of either length. `flips`: as a share of those that could flip. Before, the first two had 0.92 and 0.82."""
    ratios = np.array([-0.2, 0.4])
    means = 1 / (1 + np.exp(-(math.log(truth / (1 - truth)) + slope * ratios)))
    sides = []
    for mean in means:
        flipped = flips * 2 * min(mean, 1 - mean)
        sides.append(outcomes(15, (mean - flipped / 2, flipped, 1 - mean - flipped / 2), least=1e-4))
    (one, one_likely), (other, other_likely) = sides
    values = np.concatenate([np.repeat(one, len(other), axis=0), np.tile(other, (len(one), 1))], axis=1)
    middle, low, high = length_controlled(values, np.broadcast_to(np.repeat(ratios, 15), values.shape))
    told = ~np.isnan(middle)
    likely = np.outer(one_likely, other_likely).ravel() * told
    assert ((low < middle) & (middle < high))[told].all()
    assert COVERAGE[0] <= likely @ ((low <= truth) & (truth <= high)) / likely.sum() <= 1


@pytest.mark.parametrize(
    ("pairs", "truth", "slope", "mean", "spread"),
    [(60, 0.6, 4.0, 0.8, 0.5), (400, 0.6, 4.0, 0.8, 0.5), (60, 0.9, -2.0, 0.3, 0.5), (30, 0.9, -2.0, 0.3, 0.5)],
)
def test_length_control_is_covered_where_length_decides_much_and_one_side_is_longer(pairs, truth, slope, mean, spread):
    """Of points that are not extrapolated. A ridge of 0.5 pulled the steep slope to 0, and covered 0.87 to 0.92."""
    random = np.random.default_rng(pairs)
    log_ratios = random.normal(mean, spread, (DRAWS, pairs))
    chance = 1 / (1 + np.exp(-(math.log(truth / (1 - truth)) + slope * log_ratios)))
    middle, low, high = length_controlled(in_both_orders(random, chance), log_ratios)
    told = ~np.isnan(middle) & (np.minimum((log_ratios <= 0).mean(axis=1), (log_ratios >= 0).mean(axis=1)) >= EDGE)
    assert told.mean() > 0.5
    assert COVERAGE[0] <= coverage(truth, low[told], high[told]) <= COVERAGE[1]


def test_length_control_where_length_has_no_say_and_from_the_other_side():
    random = np.random.default_rng(0)
    log_ratios, values = random.normal(0.3, 0.5, 400), (random.random(400) < 0.7) + 0.0
    # Each outcome at a ratio and at its inverse: the slope is 0, the intercept the log-odds, its error that of log-odds.
    middle, low, high = length_controlled(np.tile(values, 2), np.concatenate([log_ratios, -log_ratios]))
    mean = values.mean()
    error = 1 / math.sqrt(800 * mean * (1 - mean)) * math.sqrt(800 / 798)
    expected = [1 / (1 + math.exp(-(math.log(mean / (1 - mean)) + z * error))) for z in (0, -1.959964, 1.959964)]
    assert float(middle) == pytest.approx(mean, abs=1e-6)
    assert [float(low), float(high)] == pytest.approx(expected[1:], abs=5e-4)  # half a win and half a loss in 800
    middle, low, high = length_controlled(values, log_ratios)
    assert low < middle < high
    swapped = length_controlled(1 - values, -log_ratios)
    assert [1 - float(x) for x in swapped] == pytest.approx([float(middle), float(high), float(low)], abs=1e-9)


def test_where_length_explains_all_or_nothing_varies():
    ratios = np.linspace(-1, 1, 40)
    assert all(np.isfinite(x) for x in length_controlled((ratios > 0) + 0.0, ratios))
    for values, log_ratios in ((np.ones(40), ratios), ((ratios > 0) + 0.0, np.zeros(40)), (np.ones(1), np.ones(1))):
        assert np.isnan(length_controlled(values, log_ratios)).all()


def test_rate_of_zeros_and_ones_is_wilsons_and_halves_narrow_it():
    for values in ([1, 1, 0, 1], [1, 1], [0] * 40 + [1]):
        found = rate(values)
        assert (found.value, found.pairs) == (np.mean(values), len(values))
        assert (found.low, found.high) == pytest.approx(wilson_interval(sum(values), len(values)), abs=1e-12)
    assert (rate([1, 1]).high, rate([0]).low) == (1, 0)
    assert score_interval([1, 0.5, 0, 0.5])[0] == pytest.approx(1 - score_interval([0, 0.5, 1, 0.5])[1])
    halves, whole = rate([0.5] * 50 + [1.0] * 25 + [0.0] * 25), rate([1.0] * 50 + [0.0] * 50)
    assert halves.value == whole.value == 0.5
    assert halves.high - halves.low == pytest.approx((whole.high - whole.low) / math.sqrt(2), rel=0.02)
    assert math.isnan(rate([]).low)


def pair(number, policy, baseline, series="dpo", at=None):
    return Pair(f"{series}:{at}:{number}", series, at, f"p{number}", policy, baseline)


def test_what_a_point_tells():
    texts = [("x" * 10, "y" * 10), ("x" * 20, "y" * 10), ("x" * 21, "y" * 20), ("", "y"), ("x" * 9, "y" * 100), (" x ", "y")]
    point = win_rate(
        [pair(i, *both) for i, both in enumerate(texts)], ["won", "won", "lost", "flipped", "failed", "unanswered"]
    )
    assert point.counts == {"won": 2, "lost": 1, "flipped": 1, "failed": 1, "unanswered": 1}
    assert (point.won.value, point.lost.value, point.flipped.value, point.win_rate.value) == (0.5, 0.25, 0.25, 0.625)
    assert point.win_rate.pairs == 4
    assert (point.lowest, point.highest) == (2.5 / 6, 4.5 / 6)
    assert point.win_rate_at_equal_length == rate([1.0, 0.0, 0.5])  # an empty text counts as one character
    assert (point.policy_length, point.baseline_length) == (61 / 6, 142 / 6)
    assert not point.extrapolated  # of the four that count one is longer, two as long
    longer = [pair(i, "x" * (15 if i else 9), "y" * 10) for i in range(40)]
    assert [win_rate(longer[:n], ["won"] * n).extrapolated for n in (20, 40)] == [
        False,
        True,
    ]  # 1 of 20 and of 40 is not longer
    row = columns(point)
    assert (row["pairs"], row["won"], row["won_rate"], row["win_rate"], row["pairs_at_equal_length"]) == (6, 2, 0.5, 0.625, 3)
    assert columns(win_rate([pair(0, "a", "b")], ["failed"]))["win_rate"] is None


def test_points_in_order_and_drawn(tmp_path):
    pairs = [pair(i, "a b", "c", series, at) for series in ("sft", "dpo") for at in (1.0, 0.25) for i in range(3)]
    points = win_rates(pairs, ["won", "lost", "flipped"] * 4)
    assert [(p.series, p.at) for p in points] == [("sft", 0.25), ("sft", 1.0), ("dpo", 0.25), ("dpo", 1.0)]
    images = []
    for number, shown in enumerate((points, points[:2], win_rates([p._replace(at=None) for p in pairs], ["won"] * 12))):
        path = plot_win_rates(shown, tmp_path / f"{number}.png", x="temperature", baseline="chosen")
        images.append(path.read_bytes())
    assert len(set(images)) == 3
    for count in (len(STYLES) + 1, 40):
        many = win_rates([pair(0, "a", "b", str(i)) for i in range(count)], ["won"] * count)
        assert plot_win_rates(many, tmp_path / f"{count}.png", x=None, baseline="b").stat().st_size > 0


def test_both_orders_of_a_pair_are_one_sample():
    """A judge that always says A in one order and B in the other has no bias, and its interval is narrow."""
    means, sizes = [0.5] * 40, [2] * 40
    found = rate(means, sizes)
    assert found.value == 0.5
    assert found.high - found.low < 0.1 < rate([1.0, 0.0] * 40).high - rate([1.0, 0.0] * 40).low
    # Where every pair flips, two letters a pair tell no more than one.
    flips = [1.0] * 29 + [0.0] * 21
    assert rate(flips, [2] * 50) == rate(flips)
    assert rate([1.0, 0.0], [3, 1]).value == 0.75
