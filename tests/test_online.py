"""Online DPO: which prompts and pairs are chosen, the log of labels, and the files of a round."""

import collections
import functools
from typing import Any

import numpy as np
import pytest

import dpo_jax
from dpo_jax.online.choices import beta_of_round, choose_pairs, choose_prompts, draw_prompts, shares_won, soft_labels
from dpo_jax.online.labels import LabelLog, compared, scored
from dpo_jax.online.stage import Stage
from dpo_jax.training.fingerprint import RunMismatch

RNG = np.random.default_rng(0)


class Killed(BaseException):
    """Stands for SIGKILL: nothing is saved on the way out."""


# What is chosen

TEXTS = [[(" a", " b", " c", " d")[RNG.integers(4)] for _ in range(4)] for _ in range(60)]
REWARDS = RNG.integers(0, 5, size=(60, 4)) / 2


def test_the_best_is_paired_with_the_worst():
    pairs, counts = choose_pairs(TEXTS, REWARDS, how="best_worst")
    assert counts.pairs == 60
    assert len(pairs) == counts.labeled > 20
    assert counts.ties + counts.identical > 0
    for prompt, chosen, rejected in pairs.tolist():
        assert REWARDS[prompt, chosen] == REWARDS[prompt].max() > REWARDS[prompt].min() == REWARDS[prompt, rejected]
    assert choose_pairs([[" a", " b"]], np.zeros((1, 2)), how="best_worst")[1].ties == 1
    # Two completions have one pair, however it is chosen.
    two = [[" x", " y"]] * 60
    best, every = choose_pairs(two, REWARDS[:, :2], how="best_worst")[0], choose_pairs(two, REWARDS[:, :2], how="all")[0]
    assert best.tolist() == every.tolist()


def test_an_unusable_text_does_not_cost_the_prompt_its_pair():
    texts = [[" good", " ok", ""], [" a</s>", " b", " c"], ["", " ", " z"]]
    pairs, counts = choose_pairs(texts, np.array([[2.0, 1.0, -3.0]] * 3), how="best_worst", eos="</s>")
    assert pairs.tolist() == [[0, 0, 1], [1, 1, 2]]
    assert (counts.labeled, counts.empty) == (2, 1)


def test_all_pairs_are_those_that_label_makes():
    names: Any = (("all", "argmax"), ("bradley_terry", "bradley_terry"))
    for how, labels in names:
        pairs, counts = choose_pairs(TEXTS, REWARDS, how=how, seed=3)
        expected, its = dpo_jax.label([f"{n}" for n in range(60)], TEXTS, REWARDS, how=labels, seed=3)
        found = [(f"{n}", TEXTS[n][chosen], TEXTS[n][rejected]) for n, chosen, rejected in pairs.tolist()]
        assert found == [(one.prompt, one.chosen, one.rejected) for one in expected]
        assert counts == its
    with pytest.raises(ValueError, match="use 'best_worst', 'all', 'bradley_terry' or 'soft'"):
        choose_pairs(TEXTS, REWARDS, how="best")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="the reward is nan"):
        choose_pairs(TEXTS, np.where(REWARDS > 1, np.nan, REWARDS), how="all")


def test_soft_pairs_have_the_expected_loss_of_bradley_terry_draws():
    """Also where the better completion is the unlikely one, and rewards are far apart."""
    rewards = np.array([[3.0, -1.0, 0.5], [700.0, 0.0, 699.0]])
    pairs, counts = choose_pairs([[" a", " b", " c"]] * 2, rewards, how="soft")
    assert pairs.tolist() == choose_pairs([[" a", " b", " c"]] * 2, rewards, how="all")[0].tolist()
    assert counts.labeled == 6
    logps, ref_logps = np.random.default_rng(0).normal(size=(2, 6, 2))
    lost = soft_labels(rewards, pairs)
    assert np.all((lost >= 0) & (lost < 0.5))
    found, _ = dpo_jax.dpo_loss(logps, ref_logps, beta=0.7, label_smoothing=lost)
    won, flipped = (dpo_jax.dpo_loss(x, y, beta=0.7)[0] for x, y in ((logps, ref_logps), (logps[:, ::-1], ref_logps[:, ::-1])))
    chances = [1 / (1 + np.exp(-(rewards[n, w] - rewards[n, l]))) for n, w, l in pairs.tolist()]
    np.testing.assert_allclose(found, [p * a + (1 - p) * b for p, a, b in zip(chances, won, flipped, strict=True)], rtol=1e-5)


def test_beta_changes_in_equal_ratios():
    betas = [beta_of_round(2.0, 0.5, number=number, rounds=5) for number in range(5)]
    np.testing.assert_allclose(np.divide(betas[1:], betas[:-1]), 0.25**0.25)
    assert (betas[0], betas[-1]) == (2.0, pytest.approx(0.5))
    assert [beta_of_round(2.0, last, number=number, rounds=n) for last, number, n in ((None, 3, 5), (0.5, 0, 1))] == [2.0, 2.0]


def test_prompts_come_in_passes_and_none_twice_in_a_round():
    rounds = [draw_prompts(10, 4, seed=1, number=number) for number in range(5)]
    assert all(len(set(one.tolist())) == 4 for one in rounds)
    assert set(np.concatenate(rounds[:2]).tolist()) | set(rounds[2][:2].tolist()) == set(range(10))
    assert (
        rounds[0].tolist() == draw_prompts(10, 4, seed=1, number=0).tolist() != draw_prompts(10, 4, seed=2, number=0).tolist()
    )
    with pytest.raises(ValueError, match="11 distinct prompts of 10"):
        draw_prompts(10, 11, seed=0, number=0)


def test_elicitation_asks_where_estimates_scatter_or_cannot_tell():
    texts = [[" a", " b", " c"]] * 5
    estimates = np.array([[0, 0, 0], [0, 1, 2], [5, 5, 5.5], [9, -9, 0], [1, 1, 1]], float)
    texts[4] = [" same", " same", " same"]
    assert choose_prompts(estimates, texts, 2, how="uniform").tolist() == [0, 1]
    assert choose_prompts(estimates, texts, 2, how="disagreement").tolist() == [1, 3]
    assert choose_prompts(estimates, texts, 2, how="uncertainty").tolist() == [0, 2]
    # Shifts of a prompt's rewards, which implicit rewards leave open, change nothing; nor does their unit.
    for how in ("disagreement", "uncertainty"):
        shifted = 3 * estimates + RNG.normal(size=(5, 1))
        assert choose_prompts(shifted, texts, 3, how=how).tolist() == choose_prompts(estimates, texts, 3, how=how).tolist()


def test_scores_of_comparisons_are_shares_won():
    nan = np.nan
    outcomes = np.array([[[nan, 1, 1], [nan, nan, 0.5], [nan, nan, nan]], [[nan, nan, nan], [nan, nan, 0], [nan, nan, nan]]])
    expected = np.array([[1, 0.25, 0.25], [nan, 0, 1]])
    np.testing.assert_array_equal(shares_won(outcomes), expected)


# Labels


def test_no_label_is_asked_twice_not_even_after_a_kill(tmp_path):
    prompts, texts = ["p", "q"], [[" a", " bb", " a"], [" a", " ccc", ""]]
    asked = collections.Counter()

    def reward(prompts, completions, *, dies=False):
        if dies and asked:
            raise Killed
        asked.update(zip(prompts, completions, strict=True))
        return np.array([len(text) / 3 for text in completions])

    def run(**options):
        log = LabelLog(tmp_path / "labels.jsonl", {"reward": "length"})
        return log, scored(prompts, texts, functools.partial(reward, **options), log, number=1, batch=2)

    with pytest.raises(Killed):
        run(dies=True)
    assert sum(asked.values()) == 2
    with (tmp_path / "labels.jsonl").open("ab") as file:
        file.write(b'{"round": 1, "prompt": "q", "comple')  # a line that a kill has torn
    said = []
    LabelLog(tmp_path / "labels.jsonl", {"reward": "length"}, say=said.append)
    assert "line 4: no JSON object" in said[0]
    log, rewards = run()
    np.testing.assert_array_equal(rewards, [[len(text) / 3 for text in its] for its in texts])
    assert set(asked.values()) == {1}
    assert (len(asked), log.count(1), log.count(0), log.total(1)) == (5, 5, 0, 5)
    # A number that was changed is not believed, but asked again.
    content = (tmp_path / "labels.jsonl").read_text()
    (tmp_path / "labels.jsonl").write_text(content.replace('"label": 1.0', '"label": 2.0'))
    run()
    assert [key for key, count in asked.items() if count > 1] == [("p", " bb")]
    with pytest.raises(RunMismatch, match="reward: was 'length', is 'words'"):
        LabelLog(tmp_path / "labels.jsonl", {"reward": "words"})
    with pytest.raises(ValueError, match="the reward of ' x', after 'p', is nan"):
        scored(["p"], [[" x"]], lambda prompts, completions: np.array([np.nan]), log, number=1)


def test_whoever_compares_is_asked_about_texts_that_differ(tmp_path):
    asked = []

    def compare(number, comparisons):
        asked.extend((number, *comparison) for comparison in comparisons)
        return [
            None if " ?" in one.completions else float(len(one.completions[0]) > len(one.completions[1])) for one in comparisons
        ]

    log = LabelLog(tmp_path / "labels.jsonl", {})
    texts = [[" a", " bb", " bb"], [" a", " ?", " "], [" ", " bb", " a"]]
    prompts = ["p", "q", "r"]
    found = compared(prompts, texts, compare, log, number=0)
    np.testing.assert_array_equal(found, [[0, 0.75, 0.75], [np.nan, np.nan, 0], [0, 1, 0]])
    assert asked == [(0, "p", (" a", " bb")), (0, "q", (" a", " ?")), (0, "r", (" bb", " a"))]
    # A blank completion costs no prompt: the others make its pair.
    assert choose_pairs(texts[2:], found[2:], how="best_worst")[0].tolist() == [[0, 1, 2]]
    again = LabelLog(tmp_path / "labels.jsonl", {})
    np.testing.assert_array_equal(compared(prompts, texts, compare, again, number=3), found)
    assert (len(asked), again.count(0), again.count(3)) == (3, 3, 0)


# The files of a round


def test_a_stage_vouches_for_what_is_whole_and_its_own(tmp_path):
    said, rows = [], [{"number": 1}, {"number": 2}]
    of: dict[str, Any] = {"settings": {"prompts": 8}, "weights": {"policy": "a"}, "say": said.append}
    stage = Stage(tmp_path / "round-000", **of)
    stage.put("samples.jsonl", rows)
    again = Stage(tmp_path / "round-000", **of)
    assert again.has("samples.jsonl")
    assert not again.has("scores.jsonl")
    assert again.rows("samples.jsonl", {"number": int}) == rows
    assert not again.finished
    again.finish({"labels": 2})
    assert Stage(tmp_path / "round-000", **of).finished
    with pytest.raises(RunMismatch, match="prompts: was 8, is 9"):
        Stage(tmp_path / "round-000", **{**of, "settings": {"prompts": 9}})
    assert not Stage(tmp_path / "round-000", **{**of, "weights": {"policy": "b"}}).finished
    assert "made with other weights (policy); it is made again" in said.pop()
    (tmp_path / "round-000" / "samples.jsonl").write_text('{"number": 3}\n')
    assert not Stage(tmp_path / "round-000", **of).finished
    assert "samples.jsonl: damaged or changed; it is made again" in said.pop()
    file = tmp_path / "round-000" / "stage.json"
    file.write_text(file.read_text().replace('"labels": 2', '"labels": 3'))
    assert not Stage(tmp_path / "round-000", **of).finished
    assert "differs from its digest; the round is made again" in said.pop()
