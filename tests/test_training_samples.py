"""Completions of held-out prompts at each evaluation of training."""

import json
import shutil

import numpy as np
import pytest
from tiny_run import _compilation_cache as _compilation_cache
from tiny_run import _plots_once as _plots_once
from tiny_run import bytes_of, call
from tiny_run import done as done

from dpo_jax.runtime.metrics import is_evaluation, read_metrics


def test_samples_at_each_evaluation_change_nothing_and_are_the_same_after_a_kill(done, tmp_path):
    run = tmp_path / "run"
    flags = ("--run.dir", run, "--dpo.policy", done / "sft" / "export", "--refs.cache", done / "refs")
    flags = (*flags, "--dpo.eval-samples", 3, "--eval.max-new-tokens", 40, "--run.eval-at-start")
    result = call("dpo", done.config, *flags)
    assert (result.code, result.out.count("\nsample @")) == (0, 3), result
    assert bytes_of(run / "dpo" / "export") == bytes_of(done / "dpo" / "export")
    files = bytes_of(run / "dpo" / "samples")
    assert list(files) == [f"step-{step:08}.jsonl" for step in (0, 4, 8)]
    first, *_, last = ([json.loads(line) for line in content.splitlines()] for content in files.values())
    assert [line["prompt"] for line in first] == [line["prompt"] for line in last]
    assert len({line["prompt"] for line in first}) == 3
    assert [line["completion"] for line in first] != [line["completion"] for line in last]
    rows = {row["step"]: row for row in read_metrics(run / "dpo" / "metrics.jsonl") if is_evaluation(row)}
    assert all(0 < row["eval/samples/tokens"] <= 40 for row in rows.values())
    assert [row["eval/samples/cut"] for row in rows.values()] == [
        pytest.approx(np.mean([not json.loads(line)["finished"] for line in content.splitlines()]))
        for content in files.values()
    ]
    shutil.rmtree(run / "dpo" / "checkpoints" / "8")
    shutil.rmtree(run / "dpo" / "export")
    (run / "dpo" / "samples" / "step-00000008.jsonl").write_text("torn")
    assert call("dpo", done.config, *flags).code == 0
    assert bytes_of(run / "dpo" / "samples") == files


@pytest.mark.long
@pytest.mark.parametrize("devices", [("pmap",), ("mesh", "--mesh.fsdp", 4)])
def test_samples_of_training_are_those_of_one_device(done, tmp_path, devices):
    files = []
    for flags in ((), ("--run.devices", *devices)):
        run = tmp_path / f"run {len(flags)}"
        start = ("--run.dir", run, "--dpo.policy", done / "sft" / "export", "--refs.cache", done / "refs")
        samples = ("--dpo.eval-samples", 3, "--eval.max-new-tokens", 12, "--run.eval-at-start")
        short = ("--dpo.steps", 1, "--dpo.epochs", 1)
        assert call("dpo", done.config, *start, *samples, *short, *flags).code == 0
        files.append((run / "dpo" / "samples" / "step-00000000.jsonl").read_bytes())
    assert files[0] == files[1]
