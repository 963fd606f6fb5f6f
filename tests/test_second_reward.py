"""Sweeps with several seeds and a second reward: tables, what they say in words, and the page about them."""

import csv
import math

import numpy as np
import pytest

from dpo_jax.evals.frontier import optimum
from dpo_jax.lab import report
from dpo_jax.lab.optimum import Drawn, kept_in
from dpo_jax.lab.second_reward import gains, over_optimized, summary
from dpo_jax.lab.seeds import over_seeds
from dpo_jax.lab.sweep import Result, Run
from dpo_jax.report.experiments import frontier
from dpo_jax.report.run_record import read_run
from dpo_jax.runtime.rundir import write_json


def point(kl, reward, half=0.1, **others):
    values = {"kl": kl, "reward": reward, **others}
    return {
        "step": 1.0,
        **{f"{k}{end}": v + d for k, v in values.items() for end, d in (("", 0), ("_low", -half), ("_high", half))},
    }


def result(method, label, *points, seed=0):
    return Result(Run(method, label, {}, seed), list(points), 1.0)


@pytest.fixture(scope="module")
def best():
    rng = np.random.default_rng(0)
    rewards = rng.normal(size=(20, 2000))
    return optimum(rewards, list(np.geomspace(50, 0.4, 30)), seed=0, beside=rewards + rng.normal(size=(20, 2000)))


def test_two_seeds_have_the_interval_of_students_t_and_prompts_together():
    half = math.hypot(0.1, 12.706 * math.sqrt(2) * 0.1 / math.sqrt(2))  # the seeds are 0.2 apart
    found = over_seeds([point(1, 1.0), point(1, 1.2)], "reward")
    assert (found[""], found["_low"], found["_high"]) == pytest.approx((1.1, 1.1 - half, 1.1 + half))
    assert over_seeds([point(1, 1.0, half=0.3)], "reward") == pytest.approx({"": 1.0, "_low": 0.7, "_high": 1.3})


def test_methods_at_equal_kl_are_means_over_seeds_with_their_interval(best):
    both = [result("dpo", "beta 1", point(1.0, reward), seed=seed) for seed, reward in enumerate((0.8, 1.0))]
    one = result("dpo", "beta 0.1", point(4.0, 1.5), seed=1)  # the other seed does not go that far
    rows = {row["kl"]: row for row in report.at_equal_kl([*both, one, result("reference", "", point(0, 0))], best)}
    expected = over_seeds([point(1, 0.8), point(1, 1.0)], "reward")
    assert (rows[1.0]["seeds"], rows[3.0]["seeds"], rows[6.0]["seeds"]) == (2, 1, 0)
    assert [rows[1.0][f"reward{end}"] for end in expected] == pytest.approx(list(expected.values()))
    assert rows[3.0]["reward"] == pytest.approx(1.0 + 0.5 * 2 / 3)  # a mixture of that seed's own policies
    assert rows[6.0]["reward"] is None
    far = [*both, one, result("dpo", "beta 0.01", point(10.0, 1.2), seed=1)]
    beyond = {row["kl"]: row["reward"] for row in report.at_equal_kl(far, best)}
    assert (rows.keys(), [*beyond]) == ({1.0, 3.0, 6.0}, [1.0, 3.0, 6.0, 9.0])
    assert beyond[9.0] == pytest.approx(1.5)  # the best within this KL
    assert "(few samples)" in report.summary(far, best)
    assert "over prompts and seeds" in report.summary([*both, one], best)


def test_the_figure_has_one_marker_for_the_seeds_of_a_setting_and_all_of_preferred_ft():
    runs = [result("dpo", "beta 1", point(0.5, 0.4), point(1.0, reward), seed=seed) for seed, reward in enumerate((0.8, 1.0))]
    runs += [result("preferred-ft", "", point(0.2, 0.1), seed=seed) for seed in range(3)]
    found = report.points([result("reference", "", point(0, 0)), *runs])
    dpo = [one for one in found if one.method == "dpo"]
    assert [(one.seed, one.reward) for one in dpo[:-1]] == [("0", 0.4), ("0", 0.8), ("1", 0.4), ("1", 1.0)]
    assert (dpo[-1].seed, dpo[-1].setting, dpo[-1].reward) == ("", "beta 1", pytest.approx(0.9))
    assert dpo[-1].reward_interval[1] - 0.9 > 0.6
    assert [one.setting for one in found if one.method == "preferred-ft"] == ["seed 0", "seed 1", "seed 2"]


@pytest.fixture(scope="module")
def results():
    """A method that learns the scorer's quirks, one that does so in the end, an honest one, and one that does nothing."""
    return [
        result("reference", "", point(0.0, 0.0, second_reward=0.0, tokens=20.0, learned_reward=-3.0)),
        result("quirk", "beta 1", point(2.0, 1.0, second_reward=0.02, tokens=30.0, learned_reward=0.0)),
        result("late", "beta 1", point(1.0, 1.0, second_reward=1.0, tokens=21.0, learned_reward=-2.0)),
        result("late", "beta 0.1", point(4.0, 2.0, second_reward=0.5, tokens=25.0, learned_reward=0.0)),
        result("honest", "beta 1", point(2.0, 1.0, second_reward=0.6, tokens=20.0, learned_reward=-2.0)),
        result("worse", "beta 1", point(2.0, 1.0, second_reward=-0.6, tokens=20.0, learned_reward=-2.0)),
        result("idle", "", point(0.1, 0.05, second_reward=0.9, tokens=20.0, learned_reward=-3.0)),
        result("best-of-n", "N 4", point(0.6, 1.0, second_reward=0.9)),
    ]


def test_what_gains_only_in_the_first_reward_is_said_in_words(results, best):
    found = gains(results, best)
    rows = {row["method"]: row for row in found}
    assert {name: row["reading"] for name, row in rows.items()} == {
        "quirk": "only the first rises",
        "late": "both rise",
        "honest": "both rise",
        "worse": "the first rises, the second falls",
        "idle": "no gain beyond scatter",
        "best-of-n": "both rise",
        "optimum": "both rise",
    }
    assert (rows["late"]["label"], rows["late"]["turned"]) == ("beta 0.1", "beta 1")
    assert rows["honest"]["gain_low"] == pytest.approx(1 - math.hypot(0.1, 0.1))
    assert rows["best-of-n"]["second_gain"] == pytest.approx(0.9 - best.beside.reference)
    assert over_optimized(found) == (["late", "worse"], ["quirk"])
    text = summary(found, name="vader")
    assert "It shows here for late, worse: the second reward falls while the first rises." in text
    assert text.endswith("For quirk no gain in vader is seen beyond scatter: over-optimization, or too few prompts to tell.")
    assert "both rise; the second was higher at beta 1" in text
    honest = gains([one for one in results if one.run.method in ("reference", "honest")], best)
    assert "There is no sign of it here" in summary(honest, name="vader")
    assert "No policy gained enough to tell." in summary(gains([results[0], results[-2]], best)[:1], name="vader")
    assert gains([result("reference", "", point(0, 0)), results[1]], best) == []  # nothing was measured beside


def test_the_best_of_many_nearer_settings_must_be_higher_by_more():
    last = result("dpo", "beta 0.1", point(4.0, 2.0, second_reward=0.5))
    near = [result("dpo", f"beta {n}", point(1.0 + 0.1 * n, 1.0, second_reward=0.0)) for n in range(2, 9)]
    higher = result("dpo", "beta 1", point(1.0, 1.0, second_reward=0.5 + 1.2 * math.hypot(0.1, 0.1)))
    start = result("reference", "", point(0.0, 0.0, second_reward=0.0))
    best = optimum(np.random.default_rng(0).normal(size=(8, 50)), [1.0], seed=0)
    turned = [gains([start, last, higher, *others], best)[0]["turned"] for others in ([], near)]
    assert turned == ["beta 1", ""]  # alone, and as the best of eight


def test_the_page_has_lengths_the_learned_reward_and_the_second(results, best, tmp_path):
    folder = tmp_path / "run" / "frontier"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("")
    cut = [Result(one.run, [p | {"cut": 0.25} if "tokens" in p else p for p in one.points], 1.0) for one in results]
    report.write(folder, report.rows(cut, best))
    found = gains(results, best)
    write_json(folder / "summary.json", {"second_reward": {"name": "vader", "words": "As it is.", "gains": found}})
    record = read_run(tmp_path / "run", name="r")
    blocks = frontier([record], tmp_path).blocks
    assert record.stages["frontier"].problems == []
    tables = {block.caption: block for block in blocks if block.kind == "table"}
    assert tables.keys() == {"Beside a second reward", "Lengths", "Learned reward"}
    assert tables["Beside a second reward"].rows[0][-1] == "only the first rises"
    lengths = {row[0]: row[1:] for row in tables["Lengths"].rows}
    assert lengths["quirk beta 1"] == ["2.00", "30.0 (29.9 to 30.1)", "+10.0", "25%"]
    assert lengths["reference"][1] == "20.0 (19.9 to 20.1)"
    assert "best-of-n N 4" not in lengths
    learned = {row[0]: row[1:] for row in tables["Learned reward"].rows}
    assert learned["quirk beta 1"] == ["3.00 (2.90 to 3.10)", "1.00 (0.90 to 1.10)", "+2.00"]
    assert "As it is." in [block.words for block in blocks if block.kind == "text"]
    images = [path for block in blocks if block.kind == "figures" for path, _ in block.images]
    assert len(images) == 2
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in images)


def test_a_page_of_a_sweep_that_measured_neither_leaves_them_out(best, tmp_path):
    folder = tmp_path / "run" / "frontier"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("")
    with open(folder / "results.csv", "w") as file:
        writer = csv.DictWriter(file, ["method", "label", "seed", *point(1, 1)])
        writer.writeheader()
        writer.writerows({"method": name, "label": "", "seed": 0, **point(1, 1)} for name in ("reference", "dpo"))
    assert frontier([read_run(tmp_path / "run", name="r")], tmp_path) is None


def test_samples_of_the_optimum_are_drawn_once(tmp_path):
    drawn, said = [], []

    def draw(beside=None):
        drawn.append(1)
        return Drawn(np.ones((2, 3)), np.zeros((2, 3, 1)), beside)

    def kept(**identity):
        return kept_in(tmp_path / "optimum", identity, say=said.append)

    first, again = (kept(seed=0)(0, lambda: draw(np.ones((2, 3)))) for _ in range(2))
    assert len(drawn) == 1
    assert all(np.array_equal(one, other) for one, other in zip(first, again, strict=True))
    assert kept(seed=1)(0, draw).beside is None  # of other settings
    assert kept(seed=1)(0, draw).beside is None
    assert len(drawn) == 2
    file = tmp_path / "optimum" / "0.npz"
    file.write_bytes(file.read_bytes()[:-100])
    kept(seed=1)(0, draw)
    assert len(drawn) == 3
    assert len(said) == 1
    assert str(file) in said[0]
    judged = kept_in(tmp_path / "optimum", {"seed": 1}, say=said.append, learned=True)
    for _ in range(2):  # the file was written without the learned reward
        assert judged(0, lambda: draw()._replace(learned=np.ones((2, 3)))).learned is not None
    assert len(drawn) == 4
    for _ in range(2):
        judged(1, draw)  # only the reference's samples have it
    assert len(drawn) == 5
