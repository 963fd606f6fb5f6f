"""What a run directory tells its report: which stages are done, and which of their files belong together."""

import json

import pytest

from dpo_jax.report.first import health_of
from dpo_jax.report.run_record import read_run
from dpo_jax.report.sections import samples


@pytest.mark.parametrize(
    ("stage", "result"),
    [
        *((stage, "summary.json") for stage in ("control", "scenes", "diffusion-digits", "robust-shift")),
        ("bench", "results.json"),
        ("bench", "sampling.json"),
        ("dpo", "export/adapter_config.json"),
    ],
)
def test_a_stage_is_done_when_its_result_is_there(tmp_path, stage, result):
    (tmp_path / stage).mkdir()
    (tmp_path / stage / "config.yaml").touch()
    (before,) = read_run(tmp_path, name="r").stages.values()
    assert before.state.startswith("not finished")
    assert any("is missing; run the same command again" in problem for problem in before.problems)
    (tmp_path / stage / result).parent.mkdir(exist_ok=True)
    (tmp_path / stage / result).write_text("{}")
    (after,) = read_run(tmp_path, name="r").stages.values()
    assert (after.state.partition(",")[0], after.problems) == ("done", [])


@pytest.fixture
def evaluated(tmp_path):
    """A run whose training accuracy is 0.99, the held-out one 0.75; and the function that changes its evaluation's report."""
    for stage in ("dpo", "eval"):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "config.yaml").touch()
    rows = [{"step": step, "loss": 0.1, "rewards/accuracies": 0.99} for step in range(20)]
    (tmp_path / "dpo" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "eval" / "samples.jsonl").write_text(json.dumps({"prompt": "p", "reference": "a", "policy": "b"}) + "\n")
    accuracy = {"rewards/accuracies": 0.75, "rewards/accuracies_low": 0.6, "rewards/accuracies_high": 0.86}

    def with_report(**values):
        report = {"pairs": 40, "reference": {}, "policy": accuracy, **values}
        (tmp_path / "eval" / "report.json").write_text(json.dumps(report))
        return read_run(tmp_path, name="r")

    return with_report


def test_samples_of_an_earlier_evaluation_are_not_shown(evaluated):
    assert samples([evaluated(sampling={"prompts": 1})], 3) is not None
    assert samples([evaluated()], 3) is None  # eval --eval.samples 0


@pytest.mark.parametrize(("told", "expected"), [({}, True), ({"of_run": True}, True), ({"of_run": False}, False)])
def test_training_explains_no_figures_of_another_policy(evaluated, told, expected):
    names = [note.name for note in health_of(evaluated(**told)).notes]
    assert ("train/held-out gap" in names) == expected
