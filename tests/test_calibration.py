"""What the implicit reward is judged by: identities, worked numbers, and intervals that hold what was planted."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dpo_jax.dpo import preference_metrics
from dpo_jax.evals.calibration import (
    _weights,
    accuracy,
    accuracy_by,
    correlations,
    length_bias,
    margins_of,
    mean_share,
    overconfidence_interval,
    reliability,
    reward_variants,
)
from dpo_jax.evals.calibration_plot import plot_reliability
from dpo_jax.evals.intervals import score_interval, wilson_interval
from dpo_jax.evals.preference import preference_summary
from dpo_jax.evals.rewardbench import CODE, MATH, SECTIONS, SUBSETS, is_rewardbench, section_scores
from dpo_jax.losses import dpo_loss

RNG = np.random.default_rng(0)
REF = RNG.normal(-30, 5, size=(200, 2)).astype(np.float32)
LOGPS = REF + RNG.normal(0, 3, size=REF.shape).astype(np.float32)
TOKENS = RNG.integers(1, 40, size=REF.shape)
DRAWS = 1000


def logistic(x):
    return 1 / (1 + np.exp(-np.asarray(x)))


def covered(intervals, truth):
    low, high = np.asarray(intervals).T
    return np.mean((low <= truth) & (truth <= high))


# Rewards and accuracies.


def test_the_four_rewards_of_a_pair_by_hand():
    found = reward_variants([[-10.0, -20.0]], [[-14.0, -18.0]], [[4, 5]], beta=0.5)
    assert {name: values.tolist() for name, values in found.items()} == {
        "implicit": [[2.0, -1.0]],
        "per_token": [[0.5, -0.2]],
        "reference_free": [[-5.0, -10.0]],
        "reference_free_per_token": [[-1.25, -2.0]],
    }


def test_a_policy_that_is_its_reference_judges_nothing():
    rewards = reward_variants(REF, REF, TOKENS, beta=0.1)
    margins = rewards["implicit"][:, 0] - rewards["implicit"][:, 1]
    assert accuracy(margins)["accuracy"] == 0.5
    found = reliability(margins, seed=0, resamples=50)
    assert (found.ece, found.expected_ece, found.overconfidence) == (0, 0, 0)
    assert all(row["belief"] == row["accuracy"] == 0.5 for row in found.bins)
    assert correlations(margins, TOKENS[:, 0] - TOKENS[:, 1], seed=0, resamples=50)["spearman"] is None


def up_by_rounding(logps):
    """Every second log-probability a step of float32 higher: what the same weights give in rows of another shape."""
    steps = np.arange(logps.size).reshape(logps.shape) // 3 % 2 == 0
    return np.where(steps, np.nextafter(logps, np.float32(0)), logps)


@pytest.mark.parametrize("logps", [LOGPS, REF, up_by_rounding(REF), np.concatenate([up_by_rounding(REF[:90]), LOGPS[90:]])])
def test_accuracy_is_that_of_the_table_of_eval(logps):
    ours = accuracy(margins_of(reward_variants(logps, REF, TOKENS, beta=0.1), logps, REF)["implicit"])
    table = preference_summary(logps, REF, loss=lambda a, b: dpo_loss(a, b, beta=0.1))
    trained = preference_metrics(jnp.asarray(logps), REF, rewards=dpo_loss(logps, REF, beta=0.1)[1])
    assert ours["accuracy"] == pytest.approx(float(trained["rewards/accuracies"].mean()), rel=1e-6)
    for name, theirs in (("accuracy", "rewards/accuracies"), ("low", "rewards/accuracies_low"), ("margin", "rewards/margins")):
        assert ours[name] == pytest.approx(table[theirs], rel=1e-5, abs=1e-6)


def test_subsets_make_up_the_whole():
    margins = np.array([1, -1, 0, 2, -3, 5.0])
    rows = accuracy_by(margins, ["b", "a", "b", "a", "c", "b"])
    assert [(row["subset"], row["pairs"], row["accuracy"]) for row in rows] == [("a", 2, 0.5), ("b", 3, 2.5 / 3), ("c", 1, 0.0)]
    assert rows[1]["low"] == score_interval([1, 0.5, 1])[0]
    whole = mean_share(rows, [row["pairs"] for row in rows])
    assert whole["accuracy"] == pytest.approx(accuracy(margins)["accuracy"])
    assert mean_share(rows[:1]) == pytest.approx({name: rows[0][name] for name in ("accuracy", "low", "high")})
    assert mean_share(rows)["accuracy"] == pytest.approx((0.5 + 2.5 / 3) / 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: accuracy([1.0, math.nan]), "pair 1 is not finite"),
        (lambda: accuracy([]), "at least one pair"),
        (lambda: accuracy_by([1.0], ["a", "b"]), "1 margins and 2 labels"),
        (lambda: mean_share([], None), "0 shares"),
        (lambda: reward_variants(REF, REF[:3], TOKENS, beta=1), "200 log-probabilities, 3 of the reference"),
        (lambda: reward_variants(REF, REF, TOKENS * 0, beta=1), "at least one token"),
        (lambda: correlations([1.0, 2.0], [1.0], seed=0), "2 margins and 1 differences"),
    ],
)
def test_what_cannot_be_judged_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Calibration.


def test_reliability_by_hand():
    # Beliefs of 0.6 and 0.9, four pairs each, of which two and four are right.
    low, high = (math.log(p / (1 - p)) for p in (0.6, 0.9))
    margins = np.array([low, high, -low, high, low, high, -low, high])
    found = reliability(margins, seed=0, bins=2)
    assert [row["pairs"] for row in found.bins] == [4, 4]
    assert [(row["belief"], row["accuracy"]) for row in found.bins] == [
        pytest.approx((0.6, 0.5)),
        pytest.approx((0.9, 1.0)),
    ]
    assert (found.bins[0]["low"], found.bins[0]["high"]) == pytest.approx(wilson_interval(2, 4))
    assert found.ece == pytest.approx((0.1 + 0.1) / 2)
    assert found.overconfidence == pytest.approx(0.75 - 0.75)
    # Of four pairs right with 0.6 each, |share - 0.6| is 0.1680 on average, and 0.1296 if it is 0.9 (binomial, by hand).
    exact = [sum(stats.binom.pmf(k, 4, p) * abs(k / 4 - p) for k in range(5)) for p in (0.6, 0.9)]
    assert found.expected_ece == pytest.approx(np.mean(exact), abs=0.01)


def test_swapping_the_sides_of_all_pairs_keeps_beliefs_and_mirrors_who_is_right():
    margins = RNG.normal(1, 1, 100)
    one, other = (reliability(sign * margins, seed=0, resamples=20) for sign in (1, -1))
    for row, mirrored in zip(one.bins, other.bins, strict=True):
        assert row["belief"] == mirrored["belief"]
        assert row["accuracy"] == pytest.approx(1 - mirrored["accuracy"])


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_calibration_error_that_was_planted_is_found(scale):
    """Truth: a pair is right with probability logistic(z). The reward is `scale` times as sure as it should be."""
    rng = np.random.default_rng(1)
    z = np.abs(rng.normal(0, 1.5, size=(DRAWS, 300)))
    margins = scale * z * np.where(rng.random(z.shape) < logistic(z), 1, -1)
    many = np.abs(rng.normal(0, 1.5, size=10**6))
    planted = np.mean(logistic(scale * many) - logistic(many))  # of one sign, so ECE is its size
    found = [reliability(row, seed=number, resamples=150) for number, row in enumerate(margins)]
    assert 0.93 <= covered([x.ece_interval for x in found], planted) <= 0.97
    assert 0.93 <= covered([x.overconfidence_interval for x in found], planted) <= 0.97
    if scale == 1:
        assert np.mean([x.ece for x in found]) == pytest.approx(np.mean([x.expected_ece for x in found]), rel=0.02)
        assert np.mean([x.ece > x.expected_ece_high for x in found]) == pytest.approx(0.05, abs=0.02)


@pytest.mark.parametrize(
    ("pairs", "belief", "high"), [(100, 0.97, 0.97), (30, 0.9, 0.97), (50, 0.75, 0.97), (300, 0.97, 0.97), (100, 0.99, 0.999)]
)
def test_exact_coverage_of_overconfidence_where_a_policy_is_sure_and_right(pairs, belief, high):
    """All pairs have one belief, which is true. A normal interval holds the 0 in 81, 80, 94, 94 and 64 % of the cases."""
    beliefs = np.full(pairs, belief)
    found = [overconfidence_interval((np.arange(pairs) < right) - beliefs, beliefs) for right in range(pairs + 1)]
    held = [low <= 0 <= top for low, top in found]
    assert 0.93 <= stats.binom.pmf(np.arange(pairs + 1), pairs, belief) @ held <= high


@pytest.mark.parametrize("sizes", [(400,), (30, 200, 1000), (20, 20, 20, 20, 20)])
def test_accuracy_that_was_planted_is_found(sizes):
    rng = np.random.default_rng(2)
    shares = np.linspace(0.55, 0.9, len(sizes))
    counts = rng.binomial(sizes, shares, size=(DRAWS, len(sizes)))
    tables = [[{"accuracy": k / n, "pairs": n} for k, n in zip(row, sizes, strict=True)] for row in counts]
    for weights in (np.ones(len(sizes)), np.array(sizes)):
        found = [mean_share(rows, weights) for rows in tables]
        truth = weights @ shares / weights.sum()
        assert 0.93 <= covered([(row["low"], row["high"]) for row in found], truth) <= 0.97


# Length.


def test_correlations_are_scipys():
    x = RNG.normal(size=60).round(1)  # with ties
    y = (x + RNG.normal(size=60)).round(1)
    found = correlations(x, y, seed=0)
    assert found["pearson"] == pytest.approx(stats.pearsonr(x, y).statistic)
    assert found["spearman"] == pytest.approx(stats.spearmanr(x, y).statistic)
    assert correlations(x, -y, seed=0)["spearman"] == pytest.approx(-found["spearman"])
    # A resample is judged as if its pairs were all there were: ranks taken anew, a pair drawn twice tied with itself.
    (weights,) = _weights(np.arange(60), seed=0, resamples=200)
    repeated = [stats.spearmanr(np.repeat(x, w), np.repeat(y, w)).statistic for w in weights.astype(int)]
    interval = np.quantile(repeated, [0.025, 0.975])
    again = correlations(x, y, seed=0, resamples=200)
    assert [again["spearman_low"], again["spearman_high"]] == pytest.approx(interval)


def test_correlations_that_were_planted_are_found():
    rho, rng = 0.5, np.random.default_rng(3)
    x, noise = rng.normal(size=(2, DRAWS, 150))
    found = [
        correlations(a, rho * a + math.sqrt(1 - rho**2) * b, seed=number, resamples=150)
        for number, (a, b) in enumerate(zip(x, noise, strict=True))
    ]
    for name, truth in (("pearson", rho), ("spearman", 6 / math.pi * math.asin(rho / 2))):
        assert 0.93 <= covered([(row[f"{name}_low"], row[f"{name}_high"]) for row in found], truth) <= 0.97


def test_a_reward_that_is_a_ruler():
    differences = TOKENS[:, 0] - TOKENS[:, 1]
    found = length_bias(0.1 * differences, TOKENS, seed=0, resamples=50)
    assert (found["pearson"], found["spearman"]) == pytest.approx((1, 1))
    by_length = {row["subset"]: row["accuracy"] for row in found["accuracy"]}
    assert by_length == {"chosen longer": 1.0, "rejected longer": 0.0, "same length": 0.5}
    assert sum(row["pairs"] for row in found["accuracy"]) == 200
    assert found["chosen_longer"] == accuracy(differences)["accuracy"]
    assert found["mean_tokens"] == TOKENS.mean(axis=0).tolist()


# RewardBench.

# Pairs of each subset (the paper's table 1; those of XSTest and Do-Not-Answer from its data set card): 2,985 in all.
COUNTS = dict(
    zip(
        (name for names in SECTIONS.values() for name in names),
        [100, 95, 95, 28, 40, 37, 100, 134, 92, 47, 46, 100, 100, 154, 250, 136, 447, *[164] * 6],
        strict=True,
    )
)


def test_sections_of_rewardbench_weigh_mathematics_as_much_as_code():
    assert (sum(COUNTS.values()), len(SUBSETS)) == (2985, 23)
    right = {name: 0.9 if name in ("mt-bench-easy", MATH) else 0.5 for name in COUNTS}
    rows = [{"subset": name, "pairs": n, "accuracy": right[name]} for name, n in COUNTS.items()]
    found = section_scores(rows)
    scores = {row["section"]: row["accuracy"] for row in found["sections"]}
    assert scores == pytest.approx(
        {"Chat": (0.9 * 28 + 0.5 * 330) / 358, "Chat Hard": 0.5, "Safety": 0.5, "Reasoning": (0.9 * 984 + 0.5 * 984) / 1968}
    )
    assert found["score"]["accuracy"] == pytest.approx(np.mean(list(scores.values())))
    assert found["missing"] == []
    assert found["sections"][1] == {"section": "Chat Hard", "pairs": 456, **mean_share(rows[5:11], [37, 100, 134, 92, 47, 46])}
    assert all(row["low"] < row["accuracy"] < row["high"] for row in (*found["sections"], found["score"]))
    assert {row["section"]: row["pairs"] for row in found["sections"]}["Reasoning"] == 447 + 984
    some = section_scores([row for row in rows if row["subset"] in (MATH, "donotanswer")])
    assert [(row["section"], row["accuracy"]) for row in some["sections"]] == [
        ("Safety", pytest.approx(0.5)),
        ("Reasoning", pytest.approx(0.9)),
    ]
    assert len(some["missing"]) == 21
    assert is_rewardbench({MATH, *CODE})
    assert not is_rewardbench({MATH, "other"})
    assert not is_rewardbench(set())


def test_the_diagram_is_drawn_also_of_a_single_pair(tmp_path):
    for margins in (RNG.normal(1, 2, 50), np.array([0.3]), np.zeros(4)):
        path = plot_reliability(reliability(margins, seed=0, resamples=10), margins, tmp_path / "r.png", title="t")
        assert path.read_bytes().startswith(b"\x89PNG")


def test_pairs_of_one_prompt_count_once():
    """Nine copies of every pair, with its prompt, say no more than one."""
    margins, subsets = LOGPS[:, 0] - LOGPS[:, 1], ["x", "y"] * (len(LOGPS) // 2)
    prompts = [*range(len(margins))]
    often, of_prompts = np.tile(margins, 9), prompts * 9
    once, many = accuracy(margins), accuracy(often, of_prompts)
    assert {**many, "pairs": len(margins)} == pytest.approx(once)
    for one, other in zip(accuracy_by(margins, subsets), accuracy_by(often, subsets * 9, of_prompts), strict=True):
        assert {**other, "pairs": one["pairs"], "subset": 0} == pytest.approx({**one, "subset": 0})
    assert mean_share(accuracy_by(often, subsets * 9, of_prompts)) == pytest.approx(mean_share(accuracy_by(margins, subsets)))
    differences = TOKENS[:, 0] - TOKENS[:, 1]
    few, same = correlations(margins, differences, seed=0), correlations(often, np.tile(differences, 9), of_prompts, seed=0)
    assert same == pytest.approx(few, abs=0.01)
    single, tiled = reliability(margins, seed=0), reliability(often, of_prompts, seed=0)
    assert tiled.ece_interval == pytest.approx(single.ece_interval, abs=0.03)
    assert tiled.overconfidence_interval == pytest.approx(single.overconfidence_interval, abs=0.01)
    low, high = reliability(often, seed=0).overconfidence_interval
    assert high - low == pytest.approx((single.overconfidence_interval[1] - single.overconfidence_interval[0]) / 3, rel=0.05)
    with pytest.raises(ValueError, match="2 pairs and 1 prompts"):
        correlations([1.0, 2.0], [1.0, 2.0], ["p"], seed=0)
