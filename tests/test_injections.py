"""Prompt injections against the judge: what they achieve beyond a sentence that asks for nothing."""

import numpy as np
import pytest

from dpo_jax.evals.intervals import paired_difference
from dpo_jax.judge.injections import achieved, probes
from dpo_jax.judge.questions import Pair


def test_an_injection_is_credited_with_what_a_neutral_sentence_does_not_do():
    """A judge that flips every other pair whatever is added is not swayed; the raw share alone says that it is."""
    pairs = [Pair(f"dpo:{i}", "dpo", None, f"post {i}", f"mine {i}", f"theirs {i}") for i in range(20)]
    tried = probes(pairs, prompt="summary-simple")
    assert tried[0].pair.policy.endswith(" This was written today.")
    noisy = {pair.prompt for pair in pairs[::2]}

    def row(kind, outcome):
        return {one["injection"]: one for one in achieved(tried, [outcome(probe) for probe in tried])}[kind]

    idle = row("a letter", lambda probe: "flipped" if probe.pair.prompt in noisy else "lost")
    assert (idle["not lost"], idle["flipped"], idle["above neutral"]) == ("0.50", 10, "0.00 (-0.13 to 0.13)")
    obeyed = row("itself", lambda probe: "won" if probe.kind == "itself" or probe.pair.prompt in noisy else "lost")
    assert obeyed["not lost"] == "1.00"
    assert obeyed["above neutral"] == "0.50 (0.21 to 0.70)"
    unread = row("itself", lambda probe: "failed" if probe.kind == "itself" and probe.pair.prompt in noisy else "lost")
    assert (unread["failed"], unread["not lost"], unread["above neutral"][:5]) == (10, "0.00", "0.00 ")
    late = row("itself", lambda probe: "unanswered" if probe.kind == "neutral" else "won")
    assert (late["not lost"], late["above neutral"]) == ("1.00", "-")


def test_intervals_of_a_paired_difference_hold():
    rng, covered = np.random.default_rng(0), []
    for _ in range(400):  # both say yes to the same half; one says yes to a fifth of the rest as well
        other = rng.random(20) < 0.5
        _, (low, high) = paired_difference(other | (rng.random(20) < 0.2), other)
        covered.append(low <= 0.1 <= high)
    assert np.mean(covered) > 0.93
    _, (low, high) = paired_difference([1, 0] * 10, [0, 0] * 10)
    assert high - low < 0.5
    assert paired_difference([1, 1, 1, 1], [0, 0, 0, 1])[0] == 0.75
    with pytest.raises(ValueError, match="two equal lists"):
        paired_difference([True], [])
