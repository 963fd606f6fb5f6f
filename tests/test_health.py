"""Every health note: numbers that call for it, numbers that do not, and what it tells."""

import numpy as np
import pytest

from dpo_jax.report.health import CHECKS, examine, examine_run, repetition

REFERENCE = {"tokens": 20.0, "cut": 0.0, "repetition": 0.01, "kl": 0.0}
POLICY = {
    "rewards/accuracies": 0.8,
    "rewards/accuracies_low": 0.75,
    "rewards/accuracies_high": 0.85,
    "displacement/chosen": -0.4,
    "kl": 2.0,
    "cut": 0.02,
    "tokens": 22.0,
    "repetition": 0.02,
}


def training(accuracy=0.82, losses=(0.6, 0.5, 0.5)):
    rows = [{"step": step, "rewards/accuracies": 0.5 if step < 80 else accuracy} for step in range(100)]
    return rows + [{"step": 33 * (place + 1), "eval/loss": loss} for place, loss in enumerate(losses)]


def test_a_healthy_run_has_no_note_and_says_what_was_looked_at():
    health = examine(POLICY, REFERENCE, training())
    assert health.notes == []
    assert health.fine == list(CHECKS)
    assert health.summary == f"Nothing unusual in: {', '.join(CHECKS)}."


@pytest.mark.parametrize(
    ("name", "changed", "rows", "told"),
    [
        ("accuracy", {"rewards/accuracies_low": 0.49}, {}, "the interval includes 0.5"),
        ("accuracy", {"rewards/accuracies_low": 0.3, "rewards/accuracies_high": 0.45}, {"accuracy": 0.4}, "below chance"),
        ("displacement of the chosen", {"displacement/chosen": -8.2}, {}, "less likely, by 8.2 nats"),
        ("KL", {"kl": 16.7}, {}, "is 16.7 nats per completion (noted above 10"),
        ("samples cut", {"cut": 0.34}, {}, "34% of the policy's samples were cut by the token limit, 0% of the reference's"),
        ("length", {"tokens": 30.0}, {}, "30.0 tokens, the reference's 20.0: 1.50 times (noted above 1.25)"),
        ("length", {"tokens": 8.0}, {}, "0.40 times (noted below 0.5)"),
        ("repetition", {"repetition": 0.3}, {}, "30% of the 4-grams"),
        ("train/held-out gap", {}, {"accuracy": 0.99}, "0.990 on the training pairs of the last 10 steps and 0.800"),
        ("held-out loss", {}, {"losses": (0.6, 0.4, 0.5)}, "lowest after 66 steps, 0.4000, and ended at 0.5000"),
    ],
)
def test_each_note_has_numbers_that_call_for_it(name, changed, rows, told):
    health = examine(POLICY | changed, REFERENCE, training(**rows))
    (note,) = health.notes
    assert note.name == name
    assert told in note.words
    assert note.meaning
    assert note.remedy[0].isupper()
    assert name not in health.fine


def test_a_note_waits_for_what_chance_and_the_reference_do_not_explain():
    wide = POLICY | {"rewards/accuracies_low": 0.6, "rewards/accuracies_high": 0.95}
    assert examine(wide, REFERENCE, training(accuracy=0.94)).notes == []  # a gap within the interval
    assert examine(POLICY | {"repetition": 0.2}, REFERENCE | {"repetition": 0.18}, training()).notes == []
    (note,) = examine(POLICY | {"cut": 0.5}, REFERENCE | {"cut": 0.5}, training()).notes
    assert "unlearned" not in note.words


def test_what_was_not_measured_is_not_called_fine():
    health = examine({"rewards/accuracies": 0.8, "rewards/accuracies_low": 0.7, "rewards/accuracies_high": 0.9}, {})
    assert health.fine == ["accuracy"]
    assert set(health.not_measured) == set(CHECKS) - {"accuracy"}
    assert examine({}, {}).summary.startswith("Not measured: accuracy")


def test_without_an_evaluation_the_last_one_of_training_is_judged():
    rows = [*training(), {"step": 100, "eval/displacement/chosen": -9.0, "eval/loss": 0.5}]
    assert [note.name for note in examine_run({}, rows).notes] == ["displacement of the chosen"]
    report = {"policy": POLICY, "reference": REFERENCE}
    assert examine_run(report, rows).notes == []


def test_repetition_is_the_share_of_4_grams_seen_before():
    assert repetition([]) == repetition([1, 2, 3]) == repetition(range(50)) == 0
    assert repetition([1] * 8) == pytest.approx(4 / 5)  # five 4-grams, one of them new
    assert repetition(np.array([1, 2, 3, 4, 1, 2, 3, 4])) == pytest.approx(1 / 5)
