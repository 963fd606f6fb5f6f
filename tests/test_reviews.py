import hashlib
import re

import pytest

from dpo_jax.data.reviews import (
    LEXICON,
    MAX_REWARD,
    MODIFIERS,
    NEGATORS,
    generate_reviews,
    opinions,
    review_preferences,
    review_prompts,
    reward,
)


@pytest.mark.parametrize(
    ("text", "points"),
    [
        ("", 0),
        ("It runs for two hours.", 0),
        ("The cast is superb.", 3),
        ("SUPERB", 3),
        ("The plot is very dull.", -3),
        ("The script is rather clever, but the music grates.", 1 - 2),
        ("never dull", 1),
        ("not very funny", -1.5),
        ("We never once smiled.", -0.5),
        ("not, funny", 2),  # a negator acts within its clause
        ("not dull and funny", 1 + 2),
        ("not one two three four funny", 2),  # and across three words
        ("not one two three funny", -1),
        ("not not funny", -1),
        ("very slightly funny", 1),
        ("superb superb very superb", 3),  # each word counts once, as it was used first
        ("not not never very \x00 \ud800 ńot 你好 !!!", 0),
    ],
)
def test_reward_follows_the_documented_rules(text, points):
    assert reward(text) == points


def test_reward_is_limited_and_opinions_explain_it():
    assert reward(" ".join(word for word, points in LEXICON.items() if points > 0)) == MAX_REWARD
    assert reward(" ".join(word for word, points in LEXICON.items() if points < 0)) == -MAX_REWARD
    assert opinions("The music is not very ugly. I loved it.") == [("ugly", 1.5), ("loved", 3.0)]


def test_prompts_are_neutral_and_the_splits_disjoint():
    train, test = review_prompts(2000, 0), review_prompts(500, 0, split="test")
    assert {reward(prompt) for prompt in train + test} == {0.0}
    assert not set(train) & set(test)
    assert not set(review_prompts(2000, 1)) & set(test)
    assert len(set(train)) > 1950
    words = set(re.findall("[a-z]+", " ".join(train).lower()))
    assert not words & (LEXICON.keys() | MODIFIERS.keys() | set(NEGATORS))
    with pytest.raises(ValueError, match="validation"):
        review_prompts(1, 0, split="validation")  # pyright: ignore[reportArgumentType]


def test_preferences_have_no_ties_and_are_reproducible():
    pairs = review_preferences(500, 3)
    assert pairs == review_preferences(500, 3)
    assert pairs[:20] == review_preferences(20, 3)
    assert [pair.prompt for pair in pairs] == review_prompts(500, 3)
    assert len({pair.uid for pair in pairs}) == 500
    for pair in pairs:
        assert reward(pair.prompt + pair.chosen) > reward(pair.prompt + pair.rejected)
        assert pair.sft_target is not None
        assert {text[0] for text in (pair.chosen, pair.rejected, pair.sft_target)} == {" "}
    gap = min(
        reward(pair.prompt + pair.chosen) - reward(pair.prompt + pair.rejected)
        for pair in review_preferences(200, 3, min_gap=2)
    )
    assert gap >= 2
    with pytest.raises(ValueError, match="min_gap"):
        review_preferences(1, 0, min_gap=0)


def test_known_review():
    """Numbers are promised across Python versions and machines: a changed grammar is a new data set, and changes this test."""
    assert generate_reviews(2, 0)[1] == (
        "This is my review of The Golden Violin. The leading pair is bland and the whole thing is muddled."
        " The dialogue stumbles. We hated it."
    )
    texts = [(pair.prompt, pair.chosen, pair.rejected, pair.sft_target) for pair in review_preferences(500, 0)]
    assert hashlib.sha256(repr(texts).encode()).hexdigest()[:16] == "ed2973a983e3da41"


def test_reviews_are_graded_and_balanced():
    rewards = [reward(review) for review in generate_reviews(4000, 1)]
    assert abs(sum(rewards) / 4000) < 0.3
    assert len(set(rewards)) > 50
    share = [sum(value >= limit for value in rewards) / 4000 for limit in (0.25, 5, 10)]
    assert 0.4 < share[0] < 0.55
    assert 0.1 < share[1] < 0.2
    assert 0 < share[2] < 0.02
