import collections
import math

import numpy as np
import pytest

from dpo_jax.data.label import label

RNG = np.random.default_rng(0)
PROMPTS = [f"prompt {i}" for i in range(50)]
# Few texts and few rewards, so that every cause of a drop is here.
TEXTS = [[(" a", " b", " c", " d", " ")[RNG.integers(5)] for _ in range(4)] for _ in PROMPTS]
REWARDS = RNG.integers(0, 4, size=(50, 4)) / 4
BY_TEXT = {
    (prompt, text): reward
    for prompt, ts, rs in zip(PROMPTS, TEXTS, REWARDS, strict=True)
    for text, reward in zip(ts, rs, strict=True)
}


@pytest.mark.parametrize("how", ["argmax", "bradley_terry"])
def test_every_pair_is_accounted_for(how):
    preferences, counts = label(PROMPTS, TEXTS, REWARDS, how=how, seed=1)
    assert counts.pairs == 50 * 6
    assert counts.labeled == len(preferences)
    assert counts.labeled + counts.ties + counts.identical + counts.empty + counts.eos == counts.pairs
    assert min(counts.labeled, counts.ties, counts.identical, counts.empty) > 0
    assert len({preference.uid for preference in preferences}) == len(preferences)
    for preference in preferences:
        assert preference.chosen != preference.rejected
        assert preference.chosen.strip()
        assert preference.rejected.strip()


def test_argmax_chooses_the_higher_reward():
    texts = [[f" {k} of {i}" for k in range(4)] for i in range(50)]
    rewards = {text: reward for ts, rs in zip(texts, REWARDS, strict=True) for text, reward in zip(ts, rs, strict=True)}
    preferences, counts = label(PROMPTS, texts, REWARDS, how="argmax", seed=0)
    assert all(rewards[preference.chosen] > rewards[preference.rejected] for preference in preferences)
    assert counts.against == 0
    ties = sum(a == b for row in REWARDS for i, a in enumerate(row) for b in row[:i])
    assert (counts.ties, counts.identical, counts.empty) == (ties, 0, 0)
    assert preferences == label(PROMPTS, texts, REWARDS, how="argmax", seed=1)[0]
    by_prompt = collections.Counter(
        preference.prompt for preference in label(["p"], [texts[0]], np.array([[1, 2, 3, 4]]), how="argmax", seed=0)[0]
    )
    assert by_prompt == {"p": 6}


def test_bradley_terry_draws_with_the_stated_chances():
    values = np.array([0.0, 0.5, 1.5, 4.0])
    texts, n = [" a", " b", " c", " d"], 4000
    preferences, counts = label(["p"] * n, [texts] * n, np.tile(values, (n, 1)), how="bradley_terry", seed=3)
    wins = collections.Counter((preference.chosen, preference.rejected) for preference in preferences)
    for i, first in enumerate(texts):
        for j, second in enumerate(texts[:i]):
            expected = 1 / (1 + math.exp(values[j] - values[i]))
            error = math.sqrt(expected * (1 - expected) / n)
            assert wins[first, second] + wins[second, first] == n
            assert abs(wins[first, second] / n - expected) < 4 * error
    assert counts.against == sum(wins[a, b] for i, a in enumerate(texts) for b in texts[i + 1 :])


def test_labels_repeat_with_the_seed_and_extreme_gaps_are_certain():
    texts = [[f" {k}" for k in range(4)]] * 50
    rewards = RNG.normal(size=(50, 4))
    first, again, other = (label(PROMPTS, texts, rewards, how="bradley_terry", seed=seed)[0] for seed in (5, 5, 6))
    assert first == again
    assert first != other
    # Labels of the later prompts do not hang on what the first prompt's pairs were dropped for.
    tied = rewards.copy()
    tied[0] = 0.0
    assert label(PROMPTS, texts, tied, how="bradley_terry", seed=5)[0] == [p for p in first if p.prompt != PROMPTS[0]]
    certain, counts = label(["p"], [[" bad", " good"]], np.array([[-1e9, 1e9]]), how="bradley_terry", seed=0)
    assert (certain[0].chosen, counts.against) == (" good", 0)


def test_what_does_not_agree_is_refused():
    with pytest.raises(ValueError, match=r"2 prompts, 1 lists of \[2\] completions and rewards of shape \(1, 2\)"):
        label(["p", "q"], [[" a", " b"]], np.zeros((1, 2)), how="argmax", seed=0)
    with pytest.raises(ValueError, match=r"lists of \[1, 2\] completions"):
        label(["p", "q"], [[" a", " b"], [" a"]], np.zeros((2, 2)), how="argmax", seed=0)
    with pytest.raises(ValueError, match="prompt 0, completion 1: the reward is nan"):
        label(["p"], [[" a", " b"]], np.array([[0, math.nan]]), how="argmax", seed=0)
    with pytest.raises(ValueError, match="how='best'"):
        label(["p"], [[" a", " b"]], np.zeros((1, 2)), how="best", seed=0)  # pyright: ignore[reportArgumentType]
    assert label([], [], np.zeros((0, 0)), how="argmax", seed=0) == ([], (0, 0, 0, 0, 0, 0, 0))


def test_ties_are_labeled_at_random_on_request():
    """Where the reward of a text depends on chance, leaving out ties would keep the pairs that chance made unequal."""
    texts = [[" a", " b"]] * 2000
    rewards = np.array([[0.0, 0.0]] * 1000 + [[8.0, 0.0]] * 1000)
    kept, counts = label([""] * 2000, texts, rewards, how="bradley_terry", seed=0, keep_ties=True)
    assert (counts.labeled, counts.ties) == (2000, 0)
    assert sum(one.chosen == " a" for one in kept[:1000]) == pytest.approx(500, abs=65)
    assert counts.against < 10
    without, counts = label([""] * 2000, texts, rewards, how="bradley_terry", seed=0)
    assert (without, counts.ties) == (kept[1000:], 1000)
    assert label([""] * 2000, texts, rewards, how="argmax", seed=0, keep_ties=True)[1].ties == 1000


def test_samples_that_were_cut_are_marked():
    finished = [[True, False], [False, False], [True, True]]
    kept, _ = label(
        ["p"] * 3, [[" a", " b"]] * 3, np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]), how="argmax", seed=0, finished=finished
    )
    assert [one.unended for one in kept] == [("rejected",), ("chosen", "rejected"), ()]
