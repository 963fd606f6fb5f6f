"""Robustness: what theory says of flipped labels, flips themselves, topics of prompts, and the fits of over-optimization."""

import dataclasses
import doctest
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.data import reviews
from dpo_jax.data.encode import Encoded
from dpo_jax.data.groups import group_pairs
from dpo_jax.data.reviews import TOPICS, review_prompts
from dpo_jax.evals import overoptimization
from dpo_jax.evals.frontier import best_of_n, optimum
from dpo_jax.evals.overoptimization import best_by, fit_gains, gain_at
from dpo_jax.lab import noise, seeds
from dpo_jax.lab.methods import PairData
from dpo_jax.lab.noise import METHODS, flipped, flips, implied_margin, implied_scores, predicted_curve
from dpo_jax.lab.robust import cell, gain_at_kl
from dpo_jax.losses import dpo_loss, ipo_loss, robust_loss
from dpo_jax.report.experiments import UNKNOWN, robustness
from dpo_jax.report.page import Table
from dpo_jax.report.run_record import read_run

BETA = 0.3
REWARDS = np.array([1.5, -0.5, 4.0, 1.5, 0.25])


def losses(rate):
    return {
        "dpo": functools.partial(dpo_loss, beta=BETA),
        "cdpo": functools.partial(dpo_loss, beta=BETA, label_smoothing=rate),
        "robust": functools.partial(robust_loss, beta=BETA, label_smoothing=rate),
        "ipo": functools.partial(ipo_loss, beta=BETA),
    }


def minimizer(loss, rewards, rate):
    """beta u of the tabular policy that Newton's method finds for the expected loss over all ordered pairs, in float64."""
    ref = jax.nn.log_softmax(jnp.asarray(np.random.default_rng(0).normal(size=len(rewards))))
    first, second = np.where(rewards[:, None] != rewards[None, :])
    chance = 1 / (1 + np.exp(rewards[second] - rewards[first]))
    weights = (1 - rate) * chance + rate * (1 - chance)

    def expected(logits, weights):
        logps = jax.nn.log_softmax(ref + logits)
        pairs, ref_pairs = (jnp.stack([x[first], x[second]], axis=1) for x in (logps, ref))
        return (weights * loss(pairs, ref_pairs)[0]).mean() + (logits.mean()) ** 2  # the mean is free

    logits, slopes = np.zeros(len(rewards)), jax.jit(lambda *given: (jax.grad(expected)(*given), jax.hessian(expected)(*given)))
    for _ in range(60):
        slope, curvature = map(np.asarray, slopes(logits, weights))
        step = np.linalg.solve(curvature, slope)
        logits = logits - step * min(1.0, 2.0 / max(np.abs(step).max(), 1e-300))
    u = np.asarray(jax.nn.log_softmax(ref + logits) - ref)
    return BETA * (u - u.mean())


@pytest.mark.parametrize("method", METHODS)
def test_the_policy_of_least_expected_loss_is_the_one_that_theory_names(method):
    with jax.enable_x64(True):
        for rate in (0.0, 0.2):
            loss = losses(rate)[method]
            two = minimizer(loss, REWARDS[:2], rate)
            assert two[0] - two[1] == pytest.approx(float(implied_margin(method, 2.0, rate=rate)), abs=1e-9)
            several = minimizer(loss, REWARDS, rate)
            np.testing.assert_allclose(several, implied_scores(method, REWARDS, rate=rate), atol=1e-8)


def test_what_flips_do_in_closed_form():
    r = np.linspace(-40, 40, 33)
    odds = lambda chance: np.log(chance / (1 - chance))  # noqa: E731
    assert implied_margin("dpo", 40.0, rate=0.1) == pytest.approx(odds(0.9))  # the bound
    np.testing.assert_allclose(implied_margin("dpo", r, rate=0.0), r)
    np.testing.assert_allclose(implied_margin("robust", r, rate=0.3), r)
    np.testing.assert_allclose(implied_margin("cdpo", r, rate=0.2), implied_margin("dpo", r, rate=2 * 0.2 * 0.8))
    np.testing.assert_allclose(implied_margin("ipo", r, rate=0.3), 0.4 * implied_margin("ipo", r, rate=0.0))
    with pytest.raises(ValueError, match="robust has no minimum: it assumes 20% of flips"):
        implied_margin("robust", r, rate=0.1, assumed=0.2)


def test_predicted_curves():
    """Robust DPO and DPO without flips are the optimum of eq. 4; IPO's curve is the same at every rate; DPO's falls."""
    rewards = np.random.default_rng(1).normal(0, 3, size=(20, 64)).round(1)
    betas = [8.0, 4.0, 2.0]
    best = optimum(rewards, betas, seed=0)
    for method, rate in (("robust", 0.3), ("dpo", 0.0)):
        kl, reward = predicted_curve(method, rewards, betas, rate=rate)
        np.testing.assert_allclose(kl, best.kl, atol=1e-9)
        np.testing.assert_allclose(reward, best.reward, atol=1e-9)
    flipless, turned = (predicted_curve("ipo", rewards, [b * f for b in (0.2, 0.1)], rate=e) for e, f in ((0, 1), (0.3, 0.4)))
    np.testing.assert_allclose(flipless, turned, atol=1e-9)
    kl, reward = predicted_curve("dpo", rewards, [0.2], rate=0.3)
    exact_kl, exact = predicted_curve("dpo", rewards, np.geomspace(20, 0.5, 60), rate=0.0)
    assert reward[0] < np.interp(kl[0], exact_kl, exact) - 0.05


def test_flips_are_counted_nested_and_turn_pairs_around():
    turned = [flips(1000, rate, seed=3) for rate in (0.0, 0.1, 0.2)]
    assert [int(mask.sum()) for mask in turned] == [0, 100, 200]
    assert (turned[2] | turned[1]).sum() == 200
    assert not (flips(1000, 0.1, seed=4) == turned[1]).all()
    with pytest.raises(ValueError, match=r"rate=0.5: a share of flipped labels in \[0, 0.5\)"):
        flips(10, 0.5, seed=0)
    ids = lambda *tokens: np.array(tokens, np.int32)  # noqa: E731
    pairs = [Encoded(ids(1), ids(a), ids(b), uid=f"{a}-{b}") for a, b in ((2, 3), (4, 2), (3, 4))]
    pairs.append(Encoded(ids(5), ids(2), ids(4), uid="last"))
    groups = group_pairs(pairs)
    logps = np.arange(2 * 3 * 2, dtype=np.float32).reshape(2, 3, 2)
    data = PairData(groups, logps, layout=None, batch=1, microbatches=1)  # pyright: ignore[reportArgumentType]
    found, count = flipped(data, 0.49, seed=0)
    assert count == 2
    mask = flips(4, 0.49, seed=0)
    before, after = ([tuple(pair) for group in one.groups for pair in group.pairs.tolist()] for one in (data, found))
    assert after == [pair[::-1] if turn else pair for pair, turn in zip(before, mask, strict=True)]
    rows = np.concatenate([found.ref_logps[0], found.ref_logps[1, :1]])
    expected = np.concatenate([logps[0], logps[1, :1]])
    np.testing.assert_array_equal(rows, np.where(mask[:, None], expected[:, ::-1], expected))
    rest = [field.name for field in dataclasses.fields(groups[0]) if field.name != "pairs"]
    assert all(getattr(a, name) is getattr(b, name) for a, b in zip(found.groups, groups, strict=True) for name in rest)
    np.testing.assert_array_equal(data.ref_logps, np.arange(12).reshape(2, 3, 2))


def test_topics_part_the_prompts():
    every = review_prompts(400, 0, split="test")
    by_topic = {topic: review_prompts(40, 0, split="test", topics=[topic]) for topic in TOPICS}
    for topic, mine in by_topic.items():
        assert mine == [prompt for prompt in every if prompt in set(mine)][:40]  # those of the split, without the others
        assert not set(mine) & {prompt for other in TOPICS if other != topic for prompt in by_topic[other]}
    both = review_prompts(40, 0, split="test", topics=["plot", "acting"])
    assert set(both) & set(by_topic["plot"])
    assert set(both) & set(by_topic["acting"])
    with pytest.raises(ValueError, match="topics of reviews are acting, plot, craft, film, got plots"):
        review_prompts(1, 0, topics=["plots"])


@pytest.mark.parametrize(("form", "a", "b", "peak"), [("bon", 3.0, 0.5, 9.0), ("rl", 2.0, 1.25, math.exp(1.2))])
def test_a_planted_curve_is_found_with_its_peak(form, a, b, peak):
    kl = np.linspace(0.0, 14.0, 15)
    d = np.sqrt(kl)
    curve = d * (a - b * (d if form == "bon" else np.log(np.maximum(d, 1e-9))))
    noisy = curve + np.random.default_rng(2).normal(0, 1.0, size=(300, 15))
    found = fit_gains(kl, noisy, form=form, seed=0)
    assert found.a_interval[0] < a < found.a_interval[1]
    assert found.b_interval[0] < b < found.b_interval[1]
    assert found.falls_interval[0] < peak < found.falls_interval[1]
    assert found.falls
    assert found.words.startswith(f"after KL {found.falls_after:.2f} (")
    np.testing.assert_allclose(gain_at(found, kl), curve, atol=0.3)
    near = fit_gains(kl[:3], noisy[:, :3], form=form, seed=0)  # KL 2: before the peak
    assert (near.falls, near.words) == (False, "not seen up to KL 2.00")


def test_a_curve_that_only_rises_has_no_peak_and_runs_widen_the_interval():
    kl = np.array([1.0, 4.0, 9.0] * 3)
    gains = np.tile(2 * np.sqrt(kl), (50, 1)) + np.repeat([-1.0, 0.0, 1.0], 3)
    found = fit_gains(kl, gains, form="bon", seed=0, runs=np.repeat([0, 1, 2], 3))
    alone = fit_gains(kl, gains, form="bon", seed=0)
    assert found.falls_interval[1] == math.inf
    assert not found.falls
    assert found.a_interval[1] - found.a_interval[0] > 0.5
    assert alone.a_interval[1] - alone.a_interval[0] < 1e-9  # all prompts are alike
    for points, words in ((1, "1 points beyond KL 0"), (2, "do not agree")):
        with pytest.raises(ValueError, match=words):
            fit_gains(np.ones(points), np.ones((1, 1)), form="bon", seed=0)


def test_best_by_itself_is_best_of_n_and_by_noise_is_the_mean():
    rewards = np.random.default_rng(0).normal(size=(5, 12))
    np.testing.assert_allclose(best_by(rewards, rewards, 4), best_of_n(rewards, 4).reward)
    np.testing.assert_allclose(best_by(-rewards, rewards, 12), rewards.min(axis=1))
    np.testing.assert_allclose(best_by(rewards, rewards, 1), rewards.mean(axis=1))


def test_gain_at_equal_kl_over_seeds():
    def point(kl, reward):
        return {"kl": kl, "reward": reward, "reward_low": reward - 0.1, "reward_high": reward + 0.1}

    far, near = [point(1.0, 3.0), point(4.0, 5.0)], [point(0.5, 2.0)]
    one = gain_at_kl([far], 2.5, reference=1.0)
    assert one == pytest.approx({"": 3.0, "_low": 2.9, "_high": 3.1, "seeds": 1, "of": 1})  # half way between gains of 2 and 4
    some = gain_at_kl([far, near], 2.5, reference=1.0)  # the second went nowhere near
    assert (some, cell(some)) == (one | {"of": 2}, "3.00 (2.90 to 3.10), 1 of 2 seeds")
    assert cell(one) == "3.00 (2.90 to 3.10)"
    assert gain_at_kl([near], 2.5, reference=1.0) is None


def test_the_report_says_where_the_true_reward_falls_or_that_nobody_knows(tmp_path):
    for stage in ("dpo", "robust-overoptimization"):
        (tmp_path / "run" / stage).mkdir(parents=True)
        (tmp_path / "run" / stage / "config.yaml").write_text("")
    fit = {"what": "width 64, 100 prompts, ppo", "words": "after KL 3.00 (2.00 to 4.00)"}
    table = {"caption": "fit", "columns": ["a"], "rows": [["ppo", "1.0"]], "note": ""}
    file = tmp_path / "run" / "robust-overoptimization" / "summary.json"
    file.write_text(json.dumps({"tables": [table], "falls": [fit]}))
    shown, falls = tables_of(tmp_path / "run")
    assert (shown.columns, shown.rows) == (["fit", "a"], [["ppo", "1.0"]])
    assert falls.rows == [[fit["what"], fit["words"], "robust-overoptimization, fitted"], ["dpo", UNKNOWN, "-"]]
    file.write_text(json.dumps({"tables": [{**table, "rows": [["ppo"]]}]}))  # a row without its cell is not shown
    (falls,) = tables_of(tmp_path / "run")
    assert falls.rows == [["dpo", UNKNOWN, "-"]]


def tables_of(folder):
    section = robustness([read_run(folder, name="r")])
    assert section is not None
    return [block for block in section.blocks if isinstance(block, Table)]


@pytest.mark.parametrize("module", [noise, overoptimization, reviews, seeds], ids=lambda module: module.__name__)
def test_the_examples_of_the_docstrings(module):
    found = doctest.testmod(module, extraglobs={"np": np})
    assert (found.failed, found.attempted > 0) == (0, True)
