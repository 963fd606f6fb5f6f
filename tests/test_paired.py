"""Gains at equal KL from the rewards of every prompt: mixtures, and differences of policies on the same prompts."""

import doctest
import json

import numpy as np
import pytest

from dpo_jax.evals.frontier import best_mixture, envelope
from dpo_jax.lab import paired
from dpo_jax.lab.paired import Policy, best_setting, gain_lost, gains_at_kl, mean_gain, plot_points, policy
from dpo_jax.lab.robust import difference
from dpo_jax.lab.sweep import Result, Run
from dpo_jax.untrusted import Unreadable

PROMPTS = 400


def of(seed, kl, gain, scatter=0.0, label="beta 1"):
    """A policy whose gains are `gain` on average, and scatter by the prompt in a way that all policies share."""
    by_prompt = np.random.default_rng(0).normal(size=PROMPTS)
    return Policy(label, seed, kl, gain + scatter * (by_prompt - by_prompt.mean()))


def test_a_mixture_has_the_reward_of_the_envelope():
    rng = np.random.default_rng(0)
    for _ in range(50):
        kls, gains = np.append(0.0, rng.uniform(0, 5, 6)), np.append(0.0, rng.normal(size=6))
        shares = best_mixture(kls, gains, 2.0)
        assert shares @ gains == pytest.approx(envelope(kls, gains, 2.0))
        assert shares @ kls <= 2.0 + 1e-9
        assert (shares.sum(), (shares >= 0).all(), (shares > 0).sum() <= 2) == (pytest.approx(1), True, True)


def test_gains_of_seeds_and_those_that_do_not_reach_the_kl():
    far = [of(0, 1.0, 2.0), of(0, 4.0, 4.0)]
    found = gains_at_kl([*far, of(1, 0.5, 1.0)], 2.5)
    assert found[0] == pytest.approx(3.0)  # half way between gains of 2 and 4
    assert found[1] is None
    assert mean_gain(found, seed=0) == pytest.approx({"": 3.0, "_low": 3.0, "_high": 3.0, "seeds": 1, "of": 2})
    assert mean_gain(gains_at_kl([of(1, 0.5, 1.0)], 2.5), seed=0) is None
    both = mean_gain(gains_at_kl([of(0, 2.5, 1.0), of(1, 2.5, 2.0)], 2.5), seed=0)
    assert both["_low"] == pytest.approx(1.5 - 12.706 / 2)  # Student's t of two seeds that are 1 apart


def test_a_loss_on_the_same_prompts_is_seen_where_each_gain_scatters_more():
    home, away = (gains_at_kl([of(seed, 1.0, gain, scatter=3.0) for seed in (0, 1, 2)], 1.0) for gain in (5.0, 4.8))
    apart = difference(mean_gain(home, seed=0), mean_gain(away, seed=0))
    assert apart["_low"] < 0 < apart["_high"]
    assert gain_lost(home, away, seed=0) == pytest.approx({"": 0.2, "_low": 0.2, "_high": 0.2, "seeds": 3, "of": 3})
    assert gain_lost(home, {1: away[1]}, seed=0)["seeds"] == 1
    assert gain_lost(home, {0: None}, seed=0) is None


def test_intervals_of_a_loss_hold_for_prompts_and_seeds_that_scatter():
    rng, held = np.random.default_rng(1), 0
    for trial in range(200):
        shared = rng.normal(0, 3, 50)
        seeds = {where: rng.normal(0, 0.3, 3) for where in ("home", "away")}
        gains = {w: {s: 1 + x + shared + rng.normal(0, 1, 50) for s, x in enumerate(seeds[w])} for w in seeds}
        lost = gain_lost(gains["home"], gains["away"], seed=trial)
        held += lost["_low"] <= 0 <= lost["_high"]
    assert held / 200 > 0.93


def test_a_gain_has_the_scatter_of_the_reference_that_it_does_not_share():
    rng, rewards = np.random.default_rng(0), np.random.default_rng(1).normal(5, 2, PROMPTS)
    result = Result(Run("dpo", "beta 1", {}, 3), [{"kl": 1.0}], 1.0)
    for reference, wide in ((rewards - 1, 0.0), (rng.normal(4, 2, PROMPTS), 2 * 1.96 * np.sqrt(2 * 4 / PROMPTS))):
        one = policy(result, 0, rewards, reference)
        assert (one.label, one.seed, one.kl) == ("beta 1", 3, 1.0)
        ((_, gain, low, high),) = plot_points([one], seed=0)
        assert gain == pytest.approx(1.0, abs=0.3)
        assert high - low == pytest.approx(wide, rel=0.15, abs=1e-9)


def test_the_best_setting_is_that_of_the_highest_mean_over_seeds():
    some = [of(0, 1.0, 3.0), of(1, 3.0, 1.0), of(0, 4.0, 2.5, label="beta 2"), of(1, 6.0, 2.5, label="beta 2")]
    found = best_setting(some, seed=0)
    assert (found["label"], found["kl"], found["gain"][""]) == ("beta 2", 5.0, pytest.approx(2.5))


def test_rows_of_prompts_are_read_as_they_were_written(tmp_path):
    rows = [{"reward": np.array([1.5, -2.0])}, {"reward": np.array([0.25, 3.0])}]
    paired.write_prompts(tmp_path, rows)
    assert paired.read_prompts(tmp_path, 2) == [{"reward": [1.5, -2.0]}, {"reward": [0.25, 3.0]}]
    with pytest.raises(Unreadable, match="lines are missing; delete the folder"):
        paired.read_prompts(tmp_path, 3)
    (tmp_path / paired.PROMPTS).write_text(json.dumps({"reward": "1"}) + "\n")
    with pytest.raises(Unreadable):
        paired.read_prompts(tmp_path, 1)


def test_the_example_of_the_docstring():
    (example,) = doctest.DocTestFinder().find(best_mixture, globs={"best_mixture": best_mixture})
    assert tuple(doctest.DocTestRunner().run(example)) == (0, 1)
