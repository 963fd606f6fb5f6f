"""How a run of the program continues: after a stop, with other settings, on other devices."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import xla_flags
from safetensors.numpy import load_file, save_file
from test_step import random_pairs
from tiny_run import ROOT, STEPS, bytes_of, call, refused
from tiny_run import _compilation_cache as _compilation_cache
from tiny_run import _plots_once as _plots_once
from tiny_run import copy as copy
from tiny_run import done as done

from dpo_jax.cli import build
from dpo_jax.cli.config import Config, DataConfig, load_config
from dpo_jax.data.loader import train_batches
from dpo_jax.evals import preference
from dpo_jax.reference import RECORD
from dpo_jax.runtime.metrics import is_evaluation, read_metrics
from dpo_jax.runtime.parallel import split_rows
from dpo_jax.runtime.pauses import pause
from dpo_jax.runtime.rundir import RunDir


def test_a_finished_run_takes_no_further_step(copy):
    before = {name: (copy / "dpo" / name).read_bytes() for name in ("metrics.jsonl", "data_report.json")}
    export = bytes_of(copy / "dpo" / "export")
    assert call("dpo", copy.config).code == 0
    assert {name: (copy / "dpo" / name).read_bytes() for name in before} == before
    assert bytes_of(copy / "dpo" / "export") == export
    assert not (copy / "dpo" / "resumes.jsonl").exists()  # it was not interrupted
    assert f"is finished after {STEPS} steps" in call("dpo", copy.config).out
    model = copy / "dpo" / "export" / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-1] + b"!")
    assert f"continuing {copy / 'dpo'} after {STEPS} steps" in call("dpo", copy.config).out
    assert bytes_of(copy / "dpo" / "export") == export


# When one of several reads fails, the callbacks of the others find orbax's event loop closed, and Python prints that: noise.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("how", ["killed", "damaged", "evaluating"])
def test_a_run_resumed_from_the_middle_equals_the_uninterrupted_one(done, copy, how, monkeypatch):
    newest = copy / "dpo" / "checkpoints" / "8"
    shutil.rmtree(copy / "dpo" / "export")
    if how != "damaged":
        shutil.rmtree(newest)
    else:
        biggest = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
        content = bytearray(biggest.read_bytes())
        content[len(content) // 2] ^= 1
        biggest.write_bytes(content)
    begin = 6
    if how == "evaluating":  # a signal ends the last evaluation after its first batch
        with monkeypatch.context() as patched:
            patched.setattr(preference, "pause", lambda: (os.kill(os.getpid(), signal.SIGTERM), pause()))
            stopped = call("dpo", copy.config)
        assert (stopped.code, "stopped by SIGTERM after 8 steps; the state is saved" in stopped.err) == (143, True)
        begin = 8  # of 8: only the evaluation is left
    result = call("dpo", copy.config)
    assert (result.code, f"continuing {copy / 'dpo'} after {begin} steps" in result.out) == (0, True)
    assert (copy / "dpo" / "checkpoints" / "quarantine").is_dir() == (how == "damaged")
    assert [json.loads(line)["step"] for line in (copy / "dpo" / "resumes.jsonl").read_text().splitlines()] == [6]
    assert bytes_of(copy / "dpo" / "export") == bytes_of(done / "dpo" / "export")
    ours, theirs = (read_metrics(run / "dpo" / "metrics.jsonl") for run in (copy, done))
    timeless = [[{k: v for k, v in row.items() if not k.endswith("_per_second")} for row in rows] for rows in (ours, theirs)]
    assert timeless[0] == timeless[1]


@pytest.mark.parametrize(
    ("flag", "value", "named"),
    [
        ("--dpo.beta", 0.2, "beta: was 0.1, is 0.2"),
        ("--dpo.lr", 0.01, "lr: was 0.001, is 0.01"),
        ("--dpo.schedule", "linear", "schedule: was 'constant', is 'linear'"),
    ],
)
def test_another_setting_in_the_same_directory_is_refused_by_name_at_once(done, flag, value, named, monkeypatch):
    monkeypatch.setattr(build, "tokenizer_of", None)  # neither data nor a model is read
    before = {name: (done / "dpo" / name).read_bytes() for name in ("config.yaml", "env.json", "data_report.json")}
    message = refused(2, "dpo", done.config, flag, value)
    assert named in message
    assert sum("was" in line for line in message.splitlines()) == 1
    assert "Continue it with its own settings (its config.yaml), or choose another --run.dir" in message
    assert {name: (done / "dpo" / name).read_bytes() for name in before} == before


def test_other_data_in_the_same_directory_are_refused_for_what_changed(done):
    before = {name: (done / "dpo" / name).read_bytes() for name in ("config.yaml", "env.json", "data_report.json")}
    message = refused(2, "dpo", done.config, "--data.max-train", 60)
    assert "holds a run with other data:\n" in message
    assert "  data.max_train: was None, is 60\n" in message
    assert "  train split, kept: was 64, is 60\n" in message
    assert sum("was" in line for line in message.splitlines()) <= 4  # and rows and candidates read
    assert {name: (done / "dpo" / name).read_bytes() for name in before} == before


def test_a_longer_run_continues_and_is_as_if_it_had_always_been_longer(done, copy, tmp_path):
    result = call("dpo", copy.config, "--dpo.epochs", 2.5)
    assert (result.code, f"continuing {copy / 'dpo'} after {STEPS} steps" in result.out) == (0, True), result
    assert "the length of the run is now 2.5 epochs; it was 2" in result.out
    aside = copy / "dpo" / "export-before-1"  # if the longer run is killed, nothing may take this for its result
    assert f"the model of fewer steps in {copy / 'dpo' / 'export'} is now {aside}" in result.out
    assert bytes_of(aside).keys() == bytes_of(done / "dpo" / "export").keys()
    at_once = ("--run.dir", tmp_path / "at-once", "--dpo.policy", done / "sft" / "export", "--refs.cache", done / "refs")
    assert call("dpo", done.config, *at_once, "--dpo.epochs", 2.5).code == 0
    assert bytes_of(copy / "dpo" / "export") == bytes_of(tmp_path / "at-once" / "dpo" / "export")
    assert load_config(copy / "dpo" / "config.yaml").dpo.epochs == 2.5


def test_a_warm_up_longer_than_the_run_is_said(done, tmp_path):
    start = ("--run.dir", tmp_path, "--dpo.policy", done / "sft" / "export", "--refs.cache", done / "refs")
    told = call("dpo", done.config, *start, "--dpo.warmup-steps", 31, "--run.no-tensorboard").out
    assert f"note: warm-up takes 31 steps, and the run has {STEPS}: the learning rate reaches only 25% of 0.001" in told
    assert "note: warm-up" not in done.printed["dpo"]


def test_held_out_pairs_may_change_and_it_is_said(copy):
    shutil.rmtree(copy / "dpo" / "checkpoints" / "8")
    result = call("dpo", copy.config, "--data.max-test", 20)
    assert result.code == 0, result
    assert "note: the held-out pairs changed; evaluations before and after cannot be compared\n" in result.out
    assert "  test split, kept: was 24, is 20" in result.out


def test_other_held_out_pairs_judge_a_finished_run_anew(copy):
    metrics = copy / "dpo" / "metrics.jsonl"
    before = read_metrics(metrics)
    for again in (False, True):  # a second time also without the note that the run is finished
        if again:
            (copy / "dpo" / "finished.json").unlink()
        result = call("dpo", copy.config, "--data.max-test", 20)
        assert (result.code, "note: the held-out pairs changed" in result.out) == (0, True)
        after = read_metrics(metrics)
        assert [row["step"] for row in after if is_evaluation(row)] == [4, STEPS]
        assert after[:-1] == before[:-1]
        assert after[-1]["eval/loss"] != before[-1]["eval/loss"]


def test_a_run_does_not_become_shorter_than_it_is(done):
    before = bytes_of(done / "dpo" / "export")
    message = refused(2, "dpo", done.config, "--dpo.epochs", 1)
    assert f"has taken {STEPS} steps, but 4 are asked for: a run can be made longer, not shorter" in message
    assert bytes_of(done / "dpo" / "export") == before


def test_a_policy_is_not_silently_measured_against_another_reference(copy):
    weights = copy / "sft" / "export" / "model.safetensors"
    tensors = load_file(weights)
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name] * 1.5}, weights, metadata={"format": "pt"})
    told = call("eval", copy.config, "--eval.samples", 0, "--refs.cache", copy / "other-refs").out
    assert "note: the policy was trained against a different reference" in told
    message = refused(2, "dpo", copy.config, "--refs.cache", copy / "other-refs")
    assert "reference: was '" in message  # before the reference pass


def test_a_second_round_may_keep_the_first_reference(done, tmp_path):
    second = ("--run.dir", tmp_path, "--dpo.policy", done / "dpo" / "export", "--dpo.reference", done / "sft" / "export")
    result = call("dpo", done.config, *second, "--refs.cache", done / "refs")
    assert result.code == 0, result
    assert "88 of 88 pairs are already cached" in result.out  # those of the first round
    first_step = next(row for row in read_metrics(tmp_path / "dpo" / "metrics.jsonl") if row["step"] == 0)
    assert abs(first_step["displacement/chosen"]) > 0.01  # it starts elsewhere, and that is no error
    evaluated = call("eval", done.config, *second, "--refs.cache", done / "refs", "--eval.samples", 0)
    assert evaluated.code == 0, evaluated
    settings = json.loads((tmp_path / "eval" / "report.json").read_text())["settings"]
    assert settings["reference"] == str(done / "sft" / "export")
    message = refused(2, "dpo", done.config, *second[:4], "--dpo.reference", done / "dpo" / "export")
    assert "reference: was '" in message


def test_another_model_is_refused_before_anything_is_read(done, tmp_path):
    wider = ("--run.dir", tmp_path, "--tokenizer.path", done / "tokenizer", "--model.width", 64, "--run.seed", 0)
    shutil.copytree(done / "sft", tmp_path / "sft")
    message = refused(2, "sft", done.config, *wider)
    assert "float32[450, 32] there, float32[450, 64] here" in message
    assert sorted(path.name for path in (tmp_path / "sft" / "checkpoints").iterdir()) == ["3", "4"]


def test_a_run_not_to_resume_is_refused_before_anything_is_computed(done, tmp_path):
    message = refused(2, "dpo", done.config, "--run.no-resume", "--dpo.policy", tmp_path / "nothing")
    assert "run.resume: is off, but " in message
    assert "dpo/checkpoints holds checkpoints; turn it on, or choose another --run.dir" in message


def test_checkpoints_may_lie_elsewhere(done, tmp_path):
    flags = ("--run.dir", tmp_path / "run", "--run.checkpoints", tmp_path / "elsewhere")
    start = ("--dpo.policy", done / "sft" / "export", "--refs.cache", done / "refs")
    saving = ("--run.save-every-steps", 0, "--run.save-every-minutes", 1e-9, "--run.max-to-keep", 3)
    assert call("dpo", done.config, *flags, *start, *saving).code == 0
    assert {path.name for path in (tmp_path / "elsewhere" / "dpo").iterdir() if path.name.isdigit()} == {"6", "7", "8"}
    assert not (tmp_path / "run" / "dpo" / "checkpoints").exists()
    assert bytes_of(tmp_path / "run" / "dpo" / "export") == bytes_of(done / "dpo" / "export")
    assert f"after {STEPS} steps" in call("dpo", done.config, *flags, *start).out
    other = ("--run.dir", tmp_path / "other", *flags[2:], *start)
    with RunDir(tmp_path / "elsewhere" / "dpo"):
        assert "another run" in refused(73, "dpo", done.config, *other)
    assert call("export", tmp_path / "run" / "dpo" / "config.yaml", "--export.out", tmp_path / "again").code == 0
    assert bytes_of(tmp_path / "again") == bytes_of(done / "dpo" / "export")


def test_checkpoints_of_which_none_verifies_are_not_trained_over(copy):
    for path in (copy / "dpo" / "checkpoints").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    rows = read_metrics(copy / "dpo" / "metrics.jsonl")
    assert "no checkpoint verifies (steps [8, 6], now in" in refused(74, "dpo", copy.config)
    assert "there are only steps [6, 8] in" in refused(74, "dpo", copy.config)  # as a scheduler would start it again
    assert read_metrics(copy / "dpo" / "metrics.jsonl") == rows


def test_a_run_stopped_during_its_last_step_is_judged_when_it_is_started_again(done, copy):
    metrics = copy / "dpo" / "metrics.jsonl"
    rows = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(rows[:-1]))
    assert call("dpo", copy.config).code == 0
    assert read_metrics(metrics) == read_metrics(done / "dpo" / "metrics.jsonl")


@pytest.mark.parametrize(
    "devices",
    [("pmap",), ("mesh", "--mesh.fsdp", 2, "--mesh.tensor", 2), ("mesh", "--mesh.fsdp", 2, "--mesh.context", 2)],
    ids=["pmap", "mesh", "context"],
)
def test_four_devices_give_the_same_metrics(devices, done, tmp_path):
    flags = ("--dpo.policy", done / "sft" / "export", "--refs.cache", done / "refs", "--run.devices", *devices)
    result = call("dpo", done.config, *flags, "--run.dir", tmp_path, "--data.layout", "plain", "--dpo.microbatches", 2)
    assert result.code == 0, result.err
    assert f"{done / 'refs'}: 88 of 88 pairs are already cached" in result.out
    ours, theirs = ([row for row in read_metrics(run / "dpo" / "metrics.jsonl")] for run in (tmp_path, done))
    for name in ("eval/loss", "eval/rewards/margins", "eval/displacement/chosen"):
        assert [row[name] for row in ours if name in row] == pytest.approx(
            [row[name] for row in theirs if name in row], abs=1e-3
        )
    for name in ("loss", "grad_norm"):
        assert [r[name] for r in ours if name in r] == pytest.approx([r[name] for r in theirs if name in r], rel=1e-3)


@pytest.mark.parametrize("sizes", [("--mesh.data", 2), ("--mesh.context", 4)], ids=["data", "context"])
def test_a_run_continues_on_another_mesh(sizes, done, copy):
    """Saved on one device, continued on four: the state is the same, the rest of the steps nearly so."""
    shutil.rmtree(copy / "dpo" / "checkpoints" / "8")
    mesh = ("--run.devices", "mesh", "--mesh.fsdp", -1, *sizes)
    result = call("dpo", copy.config, *mesh)
    assert result.code == 0, result.err
    assert "after 6 steps" in result.out
    ours, theirs = (read_metrics(run / "dpo" / "metrics.jsonl") for run in (copy, done))
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    assert [r["loss"] for r in ours if "loss" in r] == pytest.approx([r["loss"] for r in theirs if "loss" in r], rel=1e-3)


def test_rows_in_pieces_are_refused_where_whole_ones_are_read(done, tmp_path):
    here = ("--dpo.policy", done / "sft" / "export", "--run.dir", tmp_path, "--mesh.context", 2)
    for more in ((), ("--check",)):
        assert "mesh.context: sample needs whole rows on each device: set mesh.context 1" in refused(
            2, "sample", done.config, "--run.devices", "mesh", *here[2:], *more
        )
        assert "mesh.context: run.devices pmap does not split rows: set run.devices mesh, or mesh.context 1" in refused(
            2, "dpo", done.config, "--run.devices", "pmap", *here, *more
        )
    assert "mesh.context: must be a number" in refused(2, "dpo", done.config, *here[:-1], -1)


def test_a_mesh_that_does_not_fit_is_refused_before_any_weights_are_read(done, tmp_path):
    here = ("--dpo.policy", done / "sft" / "export", "--run.dir", tmp_path, "--run.devices", "mesh")
    assert "mesh data 1 x fsdp -1 x tensor 3: 3 does not divide the 4" in refused(
        2, "dpo", done.config, *here, "--mesh.tensor", 3
    )
    assert (
        "head_kernel (450, 32): axis 'vocab' of 450 cannot be split over tensor 4; the nearest size that can is 2"
        in refused(2, "dpo", done.config, *here, "--mesh.tensor", 4)
    )
    assert "mesh.fsdp: only one size can be -1" in refused(2, "dpo", done.config, *here, "--mesh.data", -1)
    assert "data 3 x fsdp 1 x tensor 1: 3 does not equal the 4 devices; the nearest mesh is data 4 x fsdp 1" in refused(
        2, "dpo", done.config, *here, "--mesh.data", 3, "--mesh.fsdp", 1
    )
    new = ("--run.dir", tmp_path, "--run.devices", "mesh", "--tokenizer.path", done / "tokenizer", "--model.vocab-size", 512)
    assert "axis 'kv_heads' of 2 x 16 cannot be split over tensor 4; the nearest size that can is 2" in refused(
        2, "sft", done.config, *new, "--mesh.tensor", 4
    )
    assert not list(tmp_path.glob("*/checkpoints"))


@pytest.mark.parametrize("layout", ["plain", "shared", "packed"])
def test_the_reference_pass_fits_any_batch_to_any_number_of_devices(done, tmp_path, layout):
    flags = ("--dpo.policy", done / "sft" / "export", "--refs.cache", tmp_path / "cache", "--run.dir", tmp_path)
    some = ("--data.max-train", 5, "--data.max-test", 2, "--data.layout", layout, "--run.devices", "pmap")
    assert call("refs", done.config, *flags, *some, "--refs.batch", 3).code == 0
    live, ours = (entries(folder) for folder in (done / "refs", tmp_path / "cache"))
    assert len(ours) == 7
    for key, values in ours.items():
        np.testing.assert_allclose(values, live[key], atol=1e-4)


@pytest.mark.parametrize("layout", ["plain", "shared", "packed"])
@pytest.mark.parametrize(("batch", "parts"), [(3, 3), (6, 3), (4, 4), (5, 5)])
def test_every_batch_divides_into_the_parts_without_tearing_a_pair(layout, batch, parts):
    pairs = random_pairs(7)  # the last batch is a part of one
    config = Config(data=DataConfig(layout=layout))
    at = train_batches(pairs, layout=build.row_layout(config, pairs, batch=batch, parts=parts), batch=batch, seed=0, epochs=1)
    for step in range(-(-7 // batch)):
        rows = split_rows(at(step).rows, parts)  # raises where it does not divide
        assert rows.tokens.shape[1] * rows.slots == 2 * rows.index.shape[1] == 2 * rows.weight.shape[1]
        assert rows.weight.sum() == len(at(step).uids)


def entries(folder):
    records = np.frombuffer((folder / "logps-00000.bin").read_bytes(), RECORD)
    return {record["key"].tobytes(): record["logps"] for record in records}


def start(config, *flags):
    """The real program in a process of its own, on one device."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": xla_flags(1), "PYTHONUNBUFFERED": "1"}
    arguments = [sys.executable, "-m", "dpo_jax.cli.main", "dpo", str(config), *map(str, flags)]
    return subprocess.Popen(arguments, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_steps(process, metrics, count):
    until = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= count):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.01)


def test_sigterm_saves_and_the_same_command_continues(copy):
    shutil.rmtree(copy / "dpo")
    flags = ("--dpo.epochs", 30, "--run.save-every-steps", 0, "--run.eval-every-examples", 0)
    metrics = copy / "dpo" / "metrics.jsonl"
    process = start(copy.config, *flags)
    wait_for_steps(process, metrics, 2)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 143, err
    assert "SIGTERM: finishing this step, then saving" in err
    assert "the state is saved" in err
    assert "PyTorch" not in err
    assert "88 of 88 pairs are already cached" in out
    (saved,) = (int(path.name) for path in (copy / "dpo" / "checkpoints").iterdir())
    assert 2 <= saved < 120
    assert [row["step"] for row in read_metrics(metrics)] == list(range(saved))
    result = call("dpo", copy.config, *flags)
    assert (result.code, f"after {saved} steps" in result.out) == (0, True)
    assert [row["step"] for row in read_metrics(metrics) if not is_evaluation(row)] == list(range(120))


@pytest.mark.soak
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_stopped_again_and_again_equals_the_uninterrupted_one(copy, tmp_path, number):
    flags = (
        "--dpo.policy",
        copy / "sft" / "export",
        "--refs.cache",
        copy / "refs",
        "--dpo.epochs",
        40,
        "--run.save-every-steps",
        5,
    )
    process = start(copy.config, *flags, "--run.dir", tmp_path / "whole")
    process.communicate()
    assert process.returncode == 0
    rng = np.random.default_rng(0)
    stopped, here = 0, (*flags, "--run.dir", tmp_path / "stopped")
    metrics = tmp_path / "stopped" / "dpo" / "metrics.jsonl"
    while True:
        process = start(copy.config, *here)
        have = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
        with contextlib.suppress(AssertionError):  # the last start runs to the end
            wait_for_steps(process, metrics, have + 20)
            time.sleep(rng.uniform(0, 0.2))
            process.send_signal(number)
        process.communicate()
        if process.returncode == 0:
            break
        assert process.returncode == (143 if number == signal.SIGTERM else -number)
        stopped += 1
        assert stopped < 20
    assert stopped >= 2
    assert bytes_of(tmp_path / "stopped" / "dpo" / "export") == bytes_of(tmp_path / "whole" / "dpo" / "export")
    steps = [row["step"] for row in read_metrics(metrics) if not is_evaluation(row)]
    assert steps == list(range(160))
