"""The figures of the result table: intervals that cover, ties that count half, and a reference that is its own equal."""

import functools
import math

import numpy as np
import pytest
from test_step import random_pairs

from dpo_jax.data.encode import Encoded
from dpo_jax.data.loader import eval_batches, plan_layout
from dpo_jax.evals.intervals import mean_with_error, score_interval, wilson_interval
from dpo_jax.evals.preference import NonFiniteLogps, held_out_logps, preference_summary, summary_by_source
from dpo_jax.losses import dpo_loss, ipo_loss

DPO = functools.partial(dpo_loss, beta=0.1)
RNG = np.random.default_rng(0)
REF = RNG.normal(-30, 5, size=(400, 2)).astype(np.float32)


# The first four: Newcombe 1998 (Statistics in Medicine 17), table I, method 3. The last two: the formula, done by hand.
@pytest.mark.parametrize(
    ("successes", "trials", "expected"),
    [
        (81, 263, (0.2553, 0.3662)),
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0.0000, 0.1611)),
        (1, 29, (0.0061, 0.1718)),
        (50, 100, (0.4038, 0.5962)),
        (500, 500, (0.9924, 1.0000)),
    ],
)
def test_wilson_interval_of_published_cases(successes, trials, expected):
    assert wilson_interval(successes, trials) == pytest.approx(expected, abs=5e-5)


def test_wilson_interval_is_symmetric_and_narrows():
    low, high = wilson_interval(30, 100)
    assert wilson_interval(70, 100) == pytest.approx((1 - high, 1 - low))
    widths = [np.diff(wilson_interval(0.9 * n, n))[0] for n in (10, 100, 1000)]
    assert widths[0] > 2 * widths[1] > 4 * widths[2]
    for successes in (0, 0.5, 9.5, 10):
        low, high = wilson_interval(successes, 10)
        assert 0 <= low <= successes / 10 <= high <= 1
    with pytest.raises(ValueError, match="at least one trial"):
        wilson_interval(0, 0)


def test_scores_narrow_the_interval_where_they_tie_and_weigh_by_their_sizes():
    ends = score_interval([1, 0, 0.5, 0.5]), score_interval([1, 0, 1, 0])
    assert ends[1] == pytest.approx(wilson_interval(2, 4))
    assert ends[1][0] < ends[0][0] < 0.5 < ends[0][1] < ends[1][1]
    low, high = score_interval([0.5] * 30)
    assert 0.4 < low < 0.47 < 0.53 < high < 0.6  # all alike is no certainty
    assert score_interval([1, 0.5, 0], [2, 2, 2]) == pytest.approx(score_interval([1, 0.5, 0]))
    low, high = score_interval([1, 0.5, 0], [3, 1, 1])
    assert low < 0.7 < high
    for scores in ([], [0.5, 1.5], [-1]):
        with pytest.raises(ValueError, match=r"needs scores in \[0, 1\], and at least one, got"):
            score_interval(scores)


def test_intervals_of_prompts_with_very_unequal_numbers_of_pairs_cover_the_truth():
    rng, covered = np.random.default_rng(0), []
    for _ in range(500):
        sizes = rng.choice([1, 1, 1, 30], size=10)
        low, high = score_interval(rng.binomial(sizes, rng.beta(1.4, 0.93, size=10)) / sizes, sizes)  # mean 0.6, intraclass 0.3
        covered.append(low <= 1.4 / 2.33 <= high)
    assert np.mean(covered) >= 0.94  # as of equal prompts: 0.82


@pytest.mark.parametrize("share", [0.5, 0.75, 0.95])
def test_wilson_interval_covers_the_truth_95_times_in_100(share):
    for trials in (50, 500):
        drawn = np.random.default_rng(1).binomial(trials, share, size=4000)
        bounds = np.array([wilson_interval(k, trials) for k in range(trials + 1)])[drawn]
        covered = np.mean((bounds[:, 0] <= share) & (share <= bounds[:, 1]))
        assert 0.93 <= covered <= 0.97


@pytest.mark.parametrize(("loss", "at_reference"), [(DPO, math.log(2)), (functools.partial(ipo_loss, beta=0.1), 25.0)])
def test_the_reference_itself_has_accuracy_one_half(loss, at_reference):
    summary = preference_summary(REF, REF, loss=loss)
    assert summary["loss"] == pytest.approx(at_reference, rel=1e-6)
    assert summary["rewards/accuracies"] == 0.5
    assert summary["rewards/accuracies_low"] < 0.5 < summary["rewards/accuracies_high"]
    zero = ("rewards/margins", "rewards/chosen", "rewards/rejected", "displacement/chosen", "displacement/rejected")
    assert [summary[name] for name in zero] == [0.0] * 5


def test_swapping_the_pairs_mirrors_the_summary():
    logps = REF + RNG.normal(0, 3, size=REF.shape).astype(np.float32)
    one, other = (preference_summary(x, ref, loss=DPO) for x, ref in ((logps, REF), (logps[:, ::-1], REF[:, ::-1])))
    assert one["rewards/accuracies"] == pytest.approx(1 - other["rewards/accuracies"])
    assert one["rewards/margins"] == pytest.approx(-other["rewards/margins"])
    assert one["displacement/chosen"] == pytest.approx(other["displacement/rejected"])
    assert one["loss"] - other["loss"] == pytest.approx(
        -one["rewards/margins"], rel=1e-5
    )  # log sigmoid(x) - log sigmoid(-x) = x


def test_right_wrong_and_tied_pairs():
    log_ratios = np.array([[2, 1], [1, 2], [3, 3], [-5, -6]], np.float32)
    summary = preference_summary(REF[:4] * 0 + log_ratios, np.zeros((4, 2), np.float32), loss=DPO)
    assert summary["rewards/accuracies"] == (1 + 0 + 0.5 + 1) / 4
    assert summary["rewards/margins"] == pytest.approx(0.1 * (1 - 1 + 0 + 1) / 4)
    assert (summary["displacement/chosen"], summary["displacement/rejected"]) == pytest.approx((0.25, 0.0))
    assert summary["rewards/accuracies_low"] == score_interval([1, 0, 0.5, 1])[0]


@pytest.mark.parametrize("kind", ["plain", "shared", "packed"])
def test_held_out_values_come_back_in_the_order_of_the_data(kind):
    pairs = random_pairs(11)
    layout = plan_layout(pairs, kind=kind, batch=4, multiple=2)

    def lengths(rows):  # stands for a model: the number of scored tokens tells the completions apart
        counts = (np.asarray(rows.slot)[:, :, None] == np.arange(rows.slots)).sum(axis=1)
        return counts.reshape(-1, 2).astype(np.float32)

    found = held_out_logps(lengths, eval_batches(pairs, layout=layout, batch=4), pairs=11)
    np.testing.assert_array_equal(found, [[len(pair.chosen), len(pair.rejected)] for pair in pairs])


def test_a_policy_that_gives_nan_is_not_summarized():
    pairs = random_pairs(6)
    layout = plan_layout(pairs, kind="shared", batch=4)

    def broken(rows):
        values = np.zeros((len(rows.index), 2), np.float32)
        values[1, 0] = np.nan
        return values

    with pytest.raises(NonFiniteLogps, match="1: the policy gives the log-probabilities nan, 0 "):
        held_out_logps(broken, eval_batches(pairs, layout=layout, batch=4), pairs=6)


def test_mean_with_error():
    assert mean_with_error(np.array([3.0])) == (3.0, 0.0)
    mean, error = mean_with_error(np.arange(5.0))
    assert (mean, error) == pytest.approx((2.0, math.sqrt(2.5 / 5)))


def test_pairs_of_one_prompt_count_once_in_the_interval():
    """Six pairs of four completions are no six prompts. Accuracy and the other means stay those of pairs."""
    rng = np.random.default_rng(0)
    logps = np.repeat(rng.normal(size=(40, 2)), 6, axis=0)
    reference = np.zeros_like(logps)
    loss = functools.partial(dpo_loss, beta=0.1)
    apart, once = (
        preference_summary(logps, reference, loss=loss, prompts=prompts)
        for prompts in (None, np.repeat(np.arange(40), 6).tolist())
    )
    alone = preference_summary(logps[::6], reference[::6], loss=loss)
    ends = ("rewards/accuracies_low", "rewards/accuracies_high")
    assert [once[end] for end in ends] == pytest.approx([alone[end] for end in ends], abs=1e-12)
    assert {k: v for k, v in once.items() if k not in ends} == {k: v for k, v in apart.items() if k not in ends}
    assert once[ends[1]] - once[ends[0]] > 2 * (apart[ends[1]] - apart[ends[0]])
    distinct = preference_summary(logps, reference, loss=loss, prompts=[*range(240)])
    assert distinct == pytest.approx(apart)
    # As training and `eval` call it, with the pairs themselves.
    pairs = [Encoded(np.full(3, number, np.int32), *np.ones((2, 2), np.int32), uid=f"{number}") for number in range(40)]
    assert summary_by_source([pair for pair in pairs for _ in range(6)], logps, reference, loss=loss) == pytest.approx(once)
