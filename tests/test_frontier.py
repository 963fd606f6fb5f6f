"""Worlds small enough to count: every estimate of the frontier against the sum it estimates."""

import functools
import itertools
import math

import jax
import numpy as np
import pytest

from dpo_jax.data.encode import Encoded
from dpo_jax.data.layout import causal_rows, completion_rows, plain_rows, shared_rows
from dpo_jax.evals.frontier import (
    best_of_n,
    bootstrap_interval,
    envelope,
    measured,
    mixture_log_ratios,
    optimum,
    regret,
    sequence_kl,
)
from dpo_jax.models.decoder import make_model
from dpo_jax.models.families import decoder_config, hf_config

V, EOS, LONGEST = 4, 0, 3
SIZES = {"vocab_size": V, "width": 16, "layers": 1, "heads": 2, "max_positions": 16, "eos_token_id": EOS}
MODEL = make_model(decoder_config(hf_config("llama", **SIZES)))
PROMPTS = [[1], [2, 3, 1, 1]]
COMPLETIONS = [
    [*start, last]
    for length in range(LONGEST)
    for start in itertools.product(range(1, V), repeat=length)
    for last in (range(V) if length == LONGEST - 1 else [EOS])
]
KL = jax.jit(functools.partial(sequence_kl, MODEL), static_argnames="chunk")


@pytest.fixture(scope="module")
def policies():
    """Two policies, far from each other and from uniform."""
    init = jax.jit(MODEL.init)
    return [jax.tree.map(lambda x: x * 3, init(jax.random.key(seed))) for seed in (0, 1)]


@pytest.fixture(scope="module")
def rows():
    return completion_rows([(np.array(p), np.array(c)) for p in PROMPTS for c in COMPLETIONS], length=8)


@jax.jit
def every_logit(variables, tokens):
    rows = causal_rows(np.zeros(tokens.shape)).replace(tokens=tokens)
    return MODEL.unembed(variables, MODEL.forward(variables, rows))


def literal(variables, prompt):
    """Of each completion of `prompt`: float64[T, V], log-probabilities of every next token, one softmax at a time."""
    tokens = np.zeros((len(COMPLETIONS), 8), np.int32)
    for row, completion in zip(tokens, COMPLETIONS, strict=True):
        row[: len(prompt) + len(completion)] = [*prompt, *completion]
    results = []
    for logits, completion in zip(np.asarray(every_logit(variables, tokens), np.float64), COMPLETIONS, strict=True):
        steps = []
        for at in range(len(prompt), len(prompt) + len(completion)):
            weights = np.exp(logits[at - 1] - logits[at - 1].max())
            steps.append(np.log(weights / weights.sum()))
        results.append(np.array(steps))
    return results


def test_a_policy_is_at_no_distance_from_itself(policies, rows):
    exact, sampled = KL(policies[0], policies[0], rows)
    assert exact.shape == sampled.shape == (2 * len(COMPLETIONS),)
    assert not np.any(exact)
    assert not np.any(sampled)


def test_kl_is_the_literal_sum_over_steps_and_vocabulary(policies, rows):
    exact, sampled = (x.reshape(2, -1) for x in KL(policies[0], policies[1], rows))
    for number, prompt in enumerate(PROMPTS):
        for y, steps, ref_steps, *found in zip(
            COMPLETIONS, *(literal(variables, prompt) for variables in policies), exact[number], sampled[number], strict=True
        ):
            log_ratios = steps - ref_steps
            expected = sum(math.exp(p) * ratio for p, ratio in zip(steps.ravel(), log_ratios.ravel(), strict=True))
            assert found == pytest.approx([expected, sum(log_ratios[range(len(y)), y])], rel=1e-5, abs=1e-5)


def test_both_estimates_have_the_true_kl_as_their_mean(policies, rows):
    exact, sampled = (np.asarray(x, np.float64).reshape(2, -1) for x in KL(policies[0], policies[1], rows))
    for number, prompt in enumerate(PROMPTS):
        logp, ref_logp = (
            np.array([steps[range(len(y)), y].sum() for y, steps in zip(COMPLETIONS, literal(variables, prompt), strict=True)])
            for variables in policies
        )
        p = np.exp(logp)
        assert p.sum() == pytest.approx(1, abs=1e-6)
        true = (p * (logp - ref_logp)).sum()
        assert true > 0.05
        assert (p * exact[number]).sum() == pytest.approx(true, rel=1e-5)
        assert (p * sampled[number]).sum() == pytest.approx(true, rel=1e-5)
        # Why the exact steps are worth their cost.
        scatter = [(p * (x[number] - true) ** 2).sum() for x in (exact, sampled)]
        assert scatter[0] < 0.5 * scatter[1]


def test_kl_depends_neither_on_chunks_nor_on_the_layout(policies, rows):
    expected = KL(*policies, rows)
    for chunk in (1, len(COMPLETIONS) * 4, len(COMPLETIONS) * 4 + 1):
        for one, other in zip(KL(*policies, rows, chunk=chunk), expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    pairs = [Encoded(*(np.array(ids, np.int32) for ids in (PROMPTS[1], [1, 2, 0], [3, 0])))]
    for one, other in zip(
        KL(*policies, plain_rows(pairs, length=10)), KL(*policies, shared_rows(pairs, length=10)), strict=True
    ):
        assert one.shape == (2,)
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


# A world without a model: outcomes with known probabilities and rewards, the same for every prompt, so that all that
# scatters is the samples.
OUTCOMES = np.random.default_rng(3).dirichlet(np.full(40, 0.7))
WORTH = np.random.default_rng(4).normal(0, 2, 40)
BETAS = (math.inf, 8.0, 4.0, 2.0, 1.5, 1.0)


def exact_optimum(beta):
    weights = OUTCOMES * np.exp(WORTH / beta)
    best = weights / weights.sum()
    return best @ WORTH, (best[best > 0] * np.log(best[best > 0] / OUTCOMES[best > 0])).sum()


def drawn(prompts, samples, seed=0, chances=OUTCOMES):
    return np.random.default_rng(seed).choice(len(OUTCOMES), p=chances, size=(prompts, samples))


@pytest.fixture(scope="module")
def curve():
    return optimum(WORTH[drawn(64, 4000)], BETAS, seed=0)


def test_the_optimum_is_that_of_the_enumerated_world(curve):
    assert curve.samples == 4000
    for number, beta in enumerate(curve.beta):
        reward, kl = exact_optimum(beta)
        assert curve.reward[number] == pytest.approx(reward, abs=0.05)
        assert curve.kl[number] == pytest.approx(kl, abs=0.05)
        assert np.diff(curve.band[:, number]) < 0.1


def test_another_reward_of_the_optimum_is_weighed_as_its_own(curve):
    rewards = np.random.default_rng(0).normal(size=(5, 300))
    log_ratios = np.random.default_rng(1).normal(size=(5, 300)) / 3
    betas = [math.inf, 2.0, 0.5]
    own = optimum(rewards, betas, seed=0, log_ratios=log_ratios)
    line = optimum(rewards, betas, seed=0, log_ratios=log_ratios, beside=2 * rewards + 1).beside
    np.testing.assert_allclose(line.reward, 2 * own.reward + 1)
    assert line.reference == pytest.approx(2 * own.reference + 1)
    assert (line.band[0] < line.reward).all()
    assert (line.reward < line.band[1]).all()
    apart = optimum(rewards, betas, seed=0, beside=np.random.default_rng(2).normal(size=(5, 300))).beside
    assert np.ptp(apart.reward) < 0.3  # it has nothing to do with what was maximized
    assert own.beside is None
    with pytest.raises(ValueError, match=r"beside has shape \(5, 2\), but rewards \(5, 300\)"):
        optimum(rewards, betas, seed=0, beside=rewards[:, :2])


def test_the_band_of_the_optimum_covers_the_enumerated_world():
    exact_reward, exact_kl = np.array([exact_optimum(beta) for beta in (math.inf, *np.geomspace(200, 0.5, 500))]).T
    covered = []
    for seed in range(100):
        world = optimum(WORTH[drawn(64, 500, seed)], BETAS, seed=seed, resamples=200)
        assert world.trusted.all()
        best, (low, high) = np.interp(np.sqrt(world.kl), np.sqrt(exact_kl), exact_reward), world.band
        covered.append((low - 1e-12 <= best) & (best <= high + 1e-12))
    assert 0.93 <= np.mean(covered) <= 0.97
    assert (np.mean(covered, axis=0) >= 0.89).all()


def test_the_curve_begins_at_the_reference_and_rises(curve):
    assert list(curve.beta) == sorted(BETAS, reverse=True)
    assert (curve.kl[0], curve.reward[0], curve.ess[0]) == pytest.approx((0.0, curve.reference, 1.0), abs=1e-12)
    assert (np.diff(curve.kl) > 0).all()
    assert (np.diff(curve.reward) > 0).all()
    assert ((curve.ess > 0) & (curve.ess <= 1 + 1e-12)).all()
    assert (np.diff(curve.ess) < 0).all()
    low, high = curve.band
    assert (low <= curve.reward).all()
    assert (curve.reward <= high).all()
    assert curve.trusted.all()
    assert curve.reach == curve.kl[-1]


def test_few_samples_are_not_trusted_far_out():
    rough = optimum(WORTH[drawn(8, 200)], (math.inf, 8.0, 0.5, 0.05), seed=0)
    assert rough.trusted.tolist() == [True, True, False, False]
    assert rough.reach == rough.kl[1]
    assert rough.ess[-1] * 200 >= 1
    assert rough.kl[-1] <= math.log(200)


def test_samples_of_a_better_policy_reach_further(curve):
    beta = 0.35
    tilted = OUTCOMES * np.exp(WORTH / 0.5)
    tilted /= tilted.sum()
    outcomes = np.concatenate([drawn(64, 100, 1), drawn(64, 300, 2, tilted)], axis=1)
    log_ratios = mixture_log_ratios(np.log(np.stack([OUTCOMES, tilted], axis=-1))[outcomes], [0.25, 0.75])
    assert log_ratios.max() <= math.log(4) + 1e-12
    far = optimum(WORTH[outcomes], (math.inf, 4.0, beta), seed=0, log_ratios=log_ratios)
    near = optimum(WORTH[drawn(64, 400)], (math.inf, 4.0, beta), seed=0)
    assert far.ess[-1] > 4 * near.ess[-1]
    assert far.kl[0] == 0
    assert far.reference == pytest.approx(OUTCOMES @ WORTH, abs=0.1)
    for number, beta in enumerate(far.beta):
        reward, kl = exact_optimum(beta)
        assert far.reward[number] == pytest.approx(reward, abs=0.1)
        assert far.kl[number] == pytest.approx(kl, abs=0.1)
    with pytest.raises(ValueError, match="shares must be positive, sum to 1"):
        mixture_log_ratios(np.zeros((2, 2)), [0.5, 0.6])


def test_what_is_added_to_the_rewards_of_a_prompt_changes_only_the_reward():
    rewards = WORTH[drawn(6, 300)]
    shifts = np.arange(6.0)
    one, other = (optimum(r, BETAS, seed=0) for r in (rewards, rewards + shifts[:, None]))
    np.testing.assert_allclose(one.kl, other.kl, atol=1e-9)
    np.testing.assert_allclose(one.ess, other.ess, atol=1e-9)
    np.testing.assert_allclose(one.reward + shifts.mean(), other.reward, atol=1e-9)


def test_regret(curve):
    inside = slice(1, None)
    np.testing.assert_allclose(regret(curve.reward, curve.kl, curve, curve.reference)[inside], 0, atol=1e-12)
    np.testing.assert_allclose(regret(np.full(6, curve.reference), curve.kl, curve, curve.reference)[inside], 1, atol=1e-12)
    half = (curve.reward + curve.reference) / 2
    np.testing.assert_allclose(regret(half, curve.kl, curve, curve.reference)[inside], 0.5, atol=1e-12)
    assert regret(curve.reference - 1, curve.kl[2], curve, curve.reference) > 1
    # Nothing to gain at KL 0, and no curve beyond its end.
    assert np.isnan(regret(1.0, 0.0, curve, curve.reference))
    assert np.isnan(regret(1.0, curve.kl[-1] + 0.01, curve, curve.reference))
    # Between its points, and before the first, the curve is not far from the one with ten times as many.
    few, many = (optimum(WORTH[drawn(4, 500)], np.geomspace(20, 1, n), seed=0) for n in (8, 80))
    missed = regret(many.reward, many.kl, few, few.reference)
    assert np.abs(missed).max() < 0.03


def test_envelope_is_what_mixtures_reach():
    kls, rewards = np.array([0.0, 1.0, 2.0, 4.0]), np.array([0.0, 3.0, 2.0, 4.5])
    assert envelope(kls, rewards, 0.5) == 1.5
    assert envelope(kls, rewards, 1.0) == 3.0
    assert envelope(kls, rewards, 2.0) == pytest.approx(3.5)  # a third of the last, two of the second: better than the third
    assert envelope(kls, rewards, 9.0) == 4.5
    assert envelope(np.array([0.0, 1.0, 5.0]), np.array([0.0, 3.0, -4.0]), 2.0) == 3.0  # nobody must use all of the KL
    assert math.isnan(envelope(np.array([2.0]), np.array([1.0]), 1.0))
    # Mixing two distributions has less KL than their mean, which is why the line is within reach.
    p, q = (np.random.default_rng(seed).dirichlet(np.ones(9)) for seed in (1, 2))
    divergence = lambda mixed: (mixed * np.log(mixed * 9)).sum()  # noqa: E731
    assert divergence((p + q) / 2) < (divergence(p) + divergence(q)) / 2


def test_best_of_n_is_the_mean_over_all_subsets():
    rewards = np.random.default_rng(0).integers(0, 5, size=(3, 7)).astype(float)
    for n in range(1, 8):
        expected = [np.mean([max(subset) for subset in itertools.combinations(row, n)]) for row in rewards]
        np.testing.assert_allclose(best_of_n(rewards, n).reward, expected)
    np.testing.assert_allclose(best_of_n(rewards, 1).reward, rewards.mean(axis=1))
    with pytest.raises(ValueError, match="1 <= n <= 7"):
        best_of_n(rewards, 8)


def test_another_reward_of_the_best_of_n_is_that_of_the_sample_that_is_taken():
    rng = np.random.default_rng(0)
    rewards, beside = rng.integers(0, 4, size=(3, 7)).astype(float), rng.normal(size=(3, 7))

    def taken(row, other, subset):  # of equal rewards any
        best = max(row[i] for i in subset)
        return np.mean([other[i] for i in subset if row[i] == best])

    for n in (1, 2, 5, 7):
        subsets = list(itertools.combinations(range(7), n))
        expected = [np.mean([taken(*both, subset) for subset in subsets]) for both in zip(rewards, beside, strict=True)]
        np.testing.assert_allclose(best_of_n(rewards, n, beside=beside).beside, expected)
        np.testing.assert_allclose(best_of_n(rewards, n, beside=rewards).beside, best_of_n(rewards, n).reward)


def test_best_of_n_rises_with_n_and_keeps_to_its_bound():
    rewards = np.random.default_rng(0).normal(size=(4, 2000))
    results = [best_of_n(rewards, n) for n in (1, 2, 4, 16, 64, 128)]
    assert results[0].kl_bound == 0
    np.testing.assert_allclose(results[0].kl, 0, atol=1e-9)
    assert results[3].kl_bound == pytest.approx(math.log(16) - 15 / 16)
    for fewer, more in itertools.pairwise(results):
        assert (more.reward > fewer.reward).all()
        assert (more.kl > fewer.kl).all()
    for result in results:  # without ties the bound is the KL
        assert (result.kl <= result.kl_bound + 1e-9).all()
        np.testing.assert_allclose(result.kl, result.kl_bound, atol=0.002)


def test_best_of_n_with_ties_is_the_kl_of_two_outcomes():
    share, n = 0.3, 8
    rewards = np.array([[1.0] * 300 + [0.0] * 700])
    wins = 1 - (1 - share) ** n
    expected = wins * math.log(wins / share) + (1 - wins) * math.log((1 - wins) / (1 - share))
    result = best_of_n(rewards, n)
    assert result.kl == pytest.approx(expected)
    assert result.kl < 0.8 * result.kl_bound
    assert result.reward == pytest.approx(wins, abs=0.001)
    assert best_of_n(np.full((1, 50), 3.0), 50).kl == pytest.approx(0)


def test_best_of_n_lies_below_the_optimum():
    rewards = np.random.default_rng(1).normal(size=(16, 4000))
    curve = optimum(rewards, np.geomspace(10, 0.4, 60), seed=0)
    for n in (2, 4, 8):
        result = best_of_n(rewards, n)
        assert 0 < regret(result.reward.mean(), result.kl.mean(), curve, curve.reference) < 0.12


def test_bootstrap_intervals_cover_the_mean():
    covered = 0
    for seed in range(200):
        values = np.random.default_rng(seed).gamma(4.0, size=60)
        low, high = bootstrap_interval(values, seed, resamples=400)
        assert low < values.mean() < high
        covered += low <= 4.0 <= high
    assert 0.90 <= covered / 200 <= 0.99


@pytest.mark.parametrize("prompts", [4, 12])
def test_bootstrap_intervals_of_few_prompts_cover_the_mean(prompts):
    """The percentile interval covers 80 and 90 %."""
    values = np.random.default_rng(0).normal(size=(400, prompts))
    ends = np.array([bootstrap_interval(row, seed, resamples=300) for seed, row in enumerate(values)])
    assert 0.925 <= np.mean((ends[:, 0] <= 0) & (ends[:, 1] >= 0)) <= 0.985


def test_measured_points():
    rewards, kls = np.random.default_rng(0).normal(size=(2, 50)) + 3
    point = measured("DPO", "0.1", rewards=rewards, kls=kls, seed=7)
    assert (point.method, point.setting, point.reward, point.kl) == ("DPO", "0.1", rewards.mean(), kls.mean())
    assert point.reward_interval == bootstrap_interval(rewards, 7)
    assert point.kl_interval == bootstrap_interval(kls, 7)
    assert bootstrap_interval(np.array([2.0]), 0) == (2.0, 2.0)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda: optimum(np.array([[1.0, math.nan]]), [1.0], seed=0), r"rewards\[0, 1\] is not finite"),
        (lambda: optimum(np.zeros(3), [1.0], seed=0), r"2 axes and at least one value, got the shape \(3,\)"),
        (lambda: optimum(np.zeros((2, 3)), [1.0, 0.0], seed=0), "betas must be positive"),
        (lambda: optimum(np.zeros((2, 3)), [], seed=0), "betas must be positive"),
        (lambda: optimum(np.zeros((2, 3)), [1.0], seed=0, log_ratios=np.zeros((2, 4))), "log_ratios has shape"),
        (lambda: bootstrap_interval(np.array([]), 0), "at least one value"),
    ],
)
def test_refusals(use, message):
    with pytest.raises(ValueError, match=message):
        use()
