"""The laboratory: a sweep that never runs anything twice, and its tables."""

import json
import math
import threading

import numpy as np
import pytest

from dpo_jax.evals.frontier import optimum
from dpo_jax.lab import report
from dpo_jax.lab.labels import label_table, label_words, shares_by_labels
from dpo_jax.lab.sweep import Result, Run, sweep

RUNS = [Run("dpo", f"beta {beta:g}", {"beta": beta}, 0) for beta in (0.1, 1.0, 5.0)]


def point(step, kl, reward):
    around = {
        f"{name}_{end}": value + d
        for name, value in (("kl", kl), ("reward", reward))
        for end, d in (("low", -0.1), ("high", 0.1))
    }
    return {"step": float(step), "kl": kl, "reward": reward, **around}


def performing(done, *, killed_at=None):
    """A `perform` that notes what it was asked for, and dies in the middle of run number `killed_at`."""

    def perform(run, folder):
        (folder / "half").write_text("written before the end")
        if len(done) == killed_at:
            raise KeyboardInterrupt
        done.append(run.name)
        return [point(1, run.settings["beta"], 1 / run.settings["beta"])]

    return perform


def test_labels_are_counted_to_where_a_share_of_the_gain_is_reached():
    best = optimum(np.random.default_rng(0).normal(size=(50, 4000)), [np.inf, *np.geomspace(20, 0.25, 60)], seed=0)
    gain = np.interp(np.sqrt(1.5), np.sqrt(best.kl), best.reward) - best.reference

    def result(method, seed, *spent):
        """Policies of KL 1.5, each after so many labels with a share of the possible gain; the last lies beyond."""
        points = [point(n, 1.5, best.reference + share * gain) | {"labels": labels} for n, (labels, share) in enumerate(spent)]
        return Result(Run(method, "", {}, seed), [*points, point(9, 30.0, 9.0) | {"labels": 1e6}], 0.0)

    slow, fast = ((100, 0.2), (200, 0.6), (300, 0.4), (400, 0.7)), ((100, 0.8),)
    offline = Result(RUNS[0], [point(1, 1.0, 1.0)], 0.0)
    results = [result("a", 0, *slow), result("a", 1, *fast), result("b", 0, (100, 0.1)), offline]
    a, b = label_table(results, best, share=0.4, at=1.5)
    assert (a["method"], a["each"]) == ("a", pytest.approx([150.0, 50.0], rel=1e-2))
    assert a["labels"] == pytest.approx(100.0, rel=1e-2)
    assert a["labels_low"] < 0 < a["labels_high"]  # of two seeds little is known
    assert (b["each"], b["labels"]) == ([None], None)
    assert "not reached" in label_words([a, b])
    assert label_table([offline], best) == []
    _, shares = shares_by_labels(results[0].points, 1.5, best, best.reference)
    assert np.all(np.diff(shares) >= 0)
    assert np.isnan(shares_by_labels(results[0].points, 1e3, best, best.reference)[1]).all()


def test_labels_of_two_betas_are_not_those_of_more_seeds():
    best = optimum(np.random.default_rng(0).normal(size=(50, 4000)), [np.inf, *np.geomspace(20, 0.25, 60)], seed=0)

    def result(beta, seed, kl, reward):
        return Result(Run("online", f"beta {beta}", {"beta": beta}, seed), [point(1, kl, reward) | {"labels": 100.0}], 0.0)

    far, near = [result(0.2, seed, 1.5, 1.7) for seed in (0, 1)], [result(0.6, seed, 0.01, 0.1) for seed in (0, 1)]
    some, none = label_table([*far, *near], best, share=0.4, at=1.5)
    assert (some["label"], none["label"]) == ("beta 0.2", "beta 0.6")
    assert (len(some["each"]), none["each"]) == (2, [None, None])
    assert 0 < some["labels"] < 100
    assert "beta 0.6" in label_words([some, none])


def table_of(results):
    return [(r.run, r.points) for r in results]


def test_a_sweep_that_was_killed_repeats_nothing_and_ends_in_the_same_table(tmp_path):
    said, whole, first, second = [], [], [], []
    expected = sweep(RUNS, tmp_path / "whole", shared={"seed": 0}, perform=performing(whole), say=said.append)
    assert whole == [run.name for run in RUNS]
    assert len(said) == 3
    with pytest.raises(KeyboardInterrupt):
        sweep(RUNS, tmp_path / "cut", shared={"seed": 0}, perform=performing(first, killed_at=1), say=said.append)
    found = sweep(RUNS, tmp_path / "cut", shared={"seed": 0}, perform=performing(second), say=said.append)
    assert first + second == whole
    assert table_of(found) == table_of(expected)
    again = sweep(RUNS, tmp_path / "cut", shared={"seed": 0}, perform=performing([], killed_at=0), say=said.append)
    assert table_of(again) == table_of(expected)


def test_runs_at_a_time_give_the_same_table(tmp_path):
    expected = sweep(RUNS, tmp_path / "one", shared={}, perform=performing([]), say=str)
    together, said = threading.Barrier(2, timeout=30), []

    def perform(run, folder):
        if run is not RUNS[2]:
            together.wait()  # ends only where two runs are performed at a time
        return performing([])(run, folder)

    found = sweep(RUNS, tmp_path / "two", shared={}, perform=perform, jobs=2, say=said.append)
    assert table_of(found) == table_of(expected)
    assert [line.split()[0] for line in said] == ["1/3", "2/3", "3/3"]
    done = []
    with pytest.raises(KeyboardInterrupt):
        sweep(RUNS, tmp_path / "cut", shared={}, perform=performing(done, killed_at=0), jobs=2, say=str)
    assert table_of(sweep(RUNS, tmp_path / "cut", shared={}, perform=performing(done), jobs=2, say=str)) == table_of(expected)


def test_other_settings_are_run_anew(tmp_path):
    sweep(RUNS, tmp_path, shared={"seed": 0, "data": {"limit": 8, "bos": 1}}, perform=performing([]), say=str)
    done, said, shared = [], [], {"seed": 1, "data": {"limit": 9, "bos": 1}}
    sweep(RUNS, tmp_path, shared=shared, perform=performing(done), say=said.append)
    assert len(done) == 3
    assert said[0] == "3 of 3 results are of other settings, and are replaced: seed, data.limit"
    done.clear()
    changed = [*RUNS[:2], Run("dpo", "beta 5", {"beta": 5.0, "epochs": 2}, 0)]
    sweep(changed, tmp_path, shared=shared, perform=performing(done), say=said.append)
    assert done == [changed[2].name]
    assert "1 of 3 results are of other settings, and are replaced: run.settings.epochs" in said


def test_a_torn_result_is_run_anew(tmp_path):
    sweep(RUNS, tmp_path, shared={}, perform=performing([]), say=str)
    (tmp_path / RUNS[0].name / "result.json").write_text('{"run": {"met')
    done = []
    sweep(RUNS, tmp_path, shared={}, perform=performing(done), say=str)
    assert done == [RUNS[0].name]


def test_two_runs_of_one_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match="two runs of a sweep have one name"):
        sweep([RUNS[0], RUNS[0]], tmp_path, shared={}, perform=performing([]), say=str)


@pytest.fixture(scope="module")
def best():
    rewards = np.random.default_rng(0).normal(size=(20, 2000))
    return optimum(rewards, list(np.geomspace(50, 0.4, 30)), seed=0)


def test_methods_are_compared_at_equal_kl(best, tmp_path):
    on_the_curve = float(np.interp(1.0, best.kl, best.reward))
    half = (on_the_curve + best.reference) / 2
    results = [
        Result(Run("good", "a", {}, 0), [point(1, 1.0, on_the_curve)], 1.0),
        Result(Run("poor", "a", {}, 0), [point(1, 1.0, half), point(2, 4.0, half)], 1.0),
    ]
    compared = report.at_equal_kl(results, best)
    shares = {(row["method"], row["kl"]): row["share_of_gain"] for row in compared}
    gain = on_the_curve - best.reference
    (exact, (low, high)) = best.gain(1.0)
    assert exact == pytest.approx(gain, abs=0.01)
    for end, sign, off in (("_low", -1, high - exact), ("_high", 1, exact - low)):
        both = math.hypot(0.1, off) / gain  # the policy's reward, and the optimum's gain
        assert compared[0][f"share_of_gain{end}"] == pytest.approx(1 + sign * both, abs=0.01)
    assert shares["good", 1.0] == pytest.approx(1.0, abs=0.01)
    assert shares["poor", 1.0] == pytest.approx(0.5, abs=0.01)
    assert shares["good", 3.0] is None  # it was never that far
    text = report.summary(results, best)
    assert "(100%, " in text
    assert "(50%, " in text
    assert "cannot be compared" not in text
    for reward, told in ((best.reference + 0.05, False), (best.reference + 0.5, True)):  # its interval is +- 0.1
        reference = Result(Run(report.REFERENCE, "", {}, 0), [point(0, 0.0, reward)], 1.0)
        assert ("cannot be compared" in report.summary([reference, *results], best)) is told
    table = report.rows(results, best)
    assert [row["regret"] for row in table[:2]] == [pytest.approx(0, abs=0.02), pytest.approx(0.5, abs=0.02)]
    report.write(tmp_path, table)
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert lines == table
    header, *rest = (tmp_path / "results.csv").read_text().splitlines()
    assert header.split(",") == list(report.COLUMNS)
    assert len(rest) == 3


def test_a_share_is_no_more_certain_than_the_optimum():
    """Four prompts, on which the possible gain differs by its own size: so does a share of it."""
    rewards = np.random.default_rng(0).normal(size=(4, 2000)) * np.array([[0.5], [1.0], [1.5], [2.0]])
    few = optimum(rewards, list(np.geomspace(50, 0.8, 30)), seed=0)
    gain, (low, high) = few.gain(1.0)
    assert low < 0.8 * gain
    assert high > 1.2 * gain
    sure = {"reward": few.reference + gain / 2, "reward_low": few.reference + gain / 2, "reward_high": few.reference + gain / 2}
    (row, *_) = report.at_equal_kl([Result(Run("half", "a", {}, 0), [point(1, 1.0, 0.0) | sure], 1.0)], few)
    assert row["share_of_gain"] == pytest.approx(0.5, abs=0.01)
    assert row["share_of_gain_low"] == pytest.approx(0.5 - 0.5 * (high / gain - 1), abs=0.01)
    assert row["share_of_gain_high"] == pytest.approx(0.5 + 0.5 * (1 - low / gain), abs=0.01)


def test_prompts_on_which_the_reference_is_better_are_no_gain_of_a_policy(best):
    """Policies are measured on the test prompts, the optimum and Best-of-N on others, each with a reference of its own."""
    gain = float(np.interp(1.0, np.sqrt(best.kl), best.reward)) - best.reference
    at_first = best.reference + 0.3
    results = [
        Result(Run(report.REFERENCE, "", {}, 0), [point(0, 0.0, at_first)], 1.0),
        Result(Run("idle", "a", {}, 0), [point(1, 1.0, at_first)], 1.0),
        Result(Run("half", "a", {}, 0), [point(1, 2.0, at_first + gain) | {"labels": 100.0}], 1.0),  # at KL 1 a mixture
        Result(Run("best-of-n", "N 4", {}, 0), [point(4, 1.0, best.reference + gain / 2)], 1.0),
    ]
    shares = {row["method"]: row["share_of_gain"] for row in report.at_equal_kl(results, best) if row["kl"] == 1}
    assert shares == pytest.approx({"idle": 0.0, "half": 0.5, "best-of-n": 0.5}, abs=0.01)
    missed = {row["method"]: row["regret"] for row in report.rows(results, best) if row["kl"] == 1}
    assert missed == pytest.approx({"idle": 1.0, "best-of-n": 0.5}, abs=0.01)
    (spent,) = label_table(results, best, share=0.25, at=1.0)
    assert spent["labels"] == pytest.approx(50.0, rel=0.02)


def test_best_of_n_is_a_point_with_its_bound():
    rewards = np.random.default_rng(1).normal(size=(50, 64))
    found = report.best_of(rewards, 4, seed=0)
    assert found["kl_bound"] == pytest.approx(math.log(4) - 3 / 4)
    assert found["reward_low"] < found["reward"] < found["reward_high"]
    assert found["reward"] == pytest.approx(1.03, abs=0.15)  # the expected maximum of four normal numbers


def test_best_of_n_by_another_reward_earns_what_that_one_picks_at_its_own_kl():
    rng = np.random.default_rng(1)
    rewards, second = rng.normal(size=(2, 50, 64))
    judge = np.sign(rewards)  # many ties, so less KL than the true reward
    true, by = (report.best_of_results(rewards, [1, 4, 99], seed=0, by=by, beside=second) for by in (None, judge))
    assert [(result.run.method, result.run.label) for result in (*true, *by)] == [
        (f"best-of-n, {name} reward", f"N {n}") for name in ("true", "learned") for n in (1, 4)
    ]
    first, four = (result.points[0] for result in by)
    assert (first["reward"], first["kl"]) == pytest.approx((rewards.mean(), 0.0), abs=1e-9)
    positive = 1 - 0.5**4  # the chance that one of four is above 0, where a sample has the mean sqrt(2 / pi)
    assert four["reward"] == pytest.approx((2 * positive - 1) * math.sqrt(2 / math.pi), abs=0.1)
    assert four["reward"] < true[1].points[0]["reward"] - 0.2
    assert four["kl"] < 0.8 * true[1].points[0]["kl"]
    assert abs(four["second_reward"] - second.mean()) < 0.1  # it was not selected by
