"""The program from end to end on a tiny model: what a run leaves, how it continues, and what it refuses, by exit code."""

import contextlib
import gc
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from conftest import xla_flags
from safetensors.numpy import load_file, save_file
from test_step import random_pairs

from dpo_jax.cli import build
from dpo_jax.cli.config import Config, DataConfig, DpoConfig, load_config
from dpo_jax.cli.dpo import TOLERANCE, WrongStart, loss_at_reference, starts_at_reference
from dpo_jax.cli.fixed import fix
from dpo_jax.cli.main import main
from dpo_jax.data.loader import stream
from dpo_jax.data.reviews import reward
from dpo_jax.evals.completion_files import read_completions
from dpo_jax.evals.preference import preference_summary
from dpo_jax.models.hf import load_hf
from dpo_jax.reference import RECORD, ReferenceCache
from dpo_jax.runtime.compiling import COMPILED
from dpo_jax.runtime.metrics import is_evaluation, read_metrics
from dpo_jax.runtime.parallel import split_rows
from dpo_jax.runtime.rundir import RunDir

ROOT = Path(__file__).parent.parent
COMMANDS = ("audit", "sft", "refs", "dpo", "eval", "sample", "export")
STEPS = 8  # 64 pairs, 16 a step, twice
CONFIG = """\
run: {{dir: {dir}, save_every_steps: 3, eval_every_examples: 64}}
data: {{source: reviews, reviews_train: 64, reviews_test: 24, max_length: 96, max_prompt_length: 48, layout: shared}}
tokenizer: {{vocab_size: 450}}
model: {{family: gpt_neox, width: 32, layers: 1, heads: 2, max_positions: 128}}
sft: {{batch: 16, lr: 1.0e-3, optimizer: adamw, warmup_steps: 2}}
refs: {{batch: 16}}
dpo: {{batch: 16, epochs: 2, lr: 1.0e-3, warmup_steps: 2}}
eval: {{batch: 16, samples: 4, max_new_tokens: 6}}
sample: {{prompts: 2, max_new_tokens: 6, temperature: 0}}
"""


class Run(NamedTuple):
    dir: Path
    config: str  # path of the YAML file
    printed: dict[str, str]  # command -> standard output

    def __truediv__(self, name):
        return self.dir / name


class Result(NamedTuple):
    code: int
    out: str
    err: str


def call(command, config, *flags):
    """`dpo-jax COMMAND CONFIG FLAGS` in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([command, str(config), *map(str, flags)])
    return Result(code, out.getvalue(), err.getvalue())


def refused(code, command, config, *flags):
    """The message with which a command ends that must end with `code`, without a traceback."""
    result = call(command, config, *flags)
    assert (result.code, "Traceback" in result.err) == (code, False), result
    return result.err


def bytes_of(folder):
    """Content by name of the files of a folder, model cards apart."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "README.md"}


@pytest.fixture(scope="module", autouse=True)
def _compilation_cache():
    before = jax.config.jax_compilation_cache_dir
    yield
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.fixture(autouse=True)
def _plots_once(monkeypatch):
    """Only `done`, which is made before this, draws its plots: a third of the time of a run that has nothing to compile."""

    def stand_in(rows, directory):
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "loss.png").touch()

    monkeypatch.setattr("dpo_jax.evals.plots.plot_training", stand_in)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A whole run: every command once, in order."""
    folder = tmp_path_factory.mktemp("whole")
    config = folder / "tiny.yaml"
    config.write_text(CONFIG.format(dir=folder / "run"))
    printed, stamps = {}, {}
    for command in COMMANDS:
        result = call(command, config)
        assert result.code == 0, (command, result)
        printed[command] = result.out
        if command == "refs":
            stamps = {path: path.stat().st_mtime_ns for path in (folder / "run" / "refs").glob("logps-*")}
        if command == "dpo":
            assert stamps
            assert stamps == {path: path.stat().st_mtime_ns for path in (folder / "run" / "refs").glob("logps-*")}
    return Run(folder / "run", str(config), printed)


@pytest.fixture
def copy(done, tmp_path):
    """A copy of the whole run, to go on with or to damage."""
    shutil.copytree(done.dir, tmp_path / "run")
    config = tmp_path / "tiny.yaml"
    config.write_text(CONFIG.format(dir=tmp_path / "run"))
    return Run(tmp_path / "run", str(config), {})


def with_weights(source, target, change):
    """A copy of a model folder whose tensors went through `change`."""
    shutil.copytree(source, target)
    file = target / "model.safetensors"
    save_file({name: np.ascontiguousarray(change(name, x)) for name, x in load_file(file).items()}, file)
    return target


# What a run leaves behind.


def test_training_holds_weights_and_optimizer_state_once(done, tmp_path, monkeypatch):
    class Seen(Exception):
        pass

    def look(step, state, stream, **options):
        gc.collect()
        held = sum(array.nbytes for array in jax.live_arrays()) - before
        assert held <= 1.1 * sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        raise Seen

    monkeypatch.setattr("dpo_jax.training.run.fit", look)
    gc.collect()
    before = sum(array.nbytes for array in jax.live_arrays())
    with pytest.raises(Seen):
        call("dpo", done.config, "--run.dir", tmp_path, "--dpo.policy", done / "sft" / "export")


@pytest.mark.parametrize(
    ("task", "programs"),
    [("sft", ["jit(<lambda>)", "jit(init_state)"]), ("dpo", ["jit(dpo_loss)", "jit(init_state)", "jit(reference_logps)"])],
)
def test_before_training_hardly_anything_is_compiled(done, tmp_path, monkeypatch, task, programs):
    """New weights, or the reference pass and the loss at the reference; the optimizer state. No `jnp` function by itself."""

    class Stop(Exception):
        pass

    def stop(*args, **options):
        raise Stop

    compiled, listening = [], True

    def heard(event, seconds, **about):
        if listening and event == COMPILED:
            compiled.append(about["fun_name"])

    jax.clear_caches()
    jax.monitoring.register_event_duration_secs_listener(heard)
    monkeypatch.setattr("dpo_jax.training.run.fit", stop)
    with pytest.raises(Stop):
        call(task, done.config, "--run.dir", tmp_path, *(["--dpo.policy", done / "sft" / "export"] if task == "dpo" else []))
    listening = False
    assert sorted(compiled) == programs


@pytest.mark.parametrize("task", ["sft", "dpo"])
def test_a_training_run_leaves_everything_needed_to_judge_and_repeat_it(done, task):
    folder = done / task
    assert json.loads((folder / "env.json").read_text())["packages"]["jax"] == jax.__version__
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == {"sft": ["3", "4"], "dpo": ["6", "8"]}[task]
    plots = sorted((folder / "plots").glob("*.png"))
    assert {"loss.png", "lr.png"} <= {path.name for path in plots}
    assert all(path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") and path.stat().st_size > 2000 for path in plots)
    card = (folder / "README.md").read_text()
    assert card == (folder / "export" / "README.md").read_text()
    assert f"tags: [dpo_jax, {task}]" in card
    assert "preference accuracy" in card if task == "dpo" else "loss per token" in card
    assert "| train | 64 | 64 | none |" in card
    assert str(done.dir) not in card  # a path of this machine says nothing to others
    for split, pairs in (("train", 64), ("test", 24)):
        report = json.loads((folder / "data_report.json").read_text())[split]
        assert report["kept"] == pairs
        assert report["kept"] + sum(report["dropped"].values()) == report["read"] == report["rows"] == pairs


def test_the_resolved_config_can_be_run_again_as_it_is(done):
    resolved = load_config(done / "dpo" / "config.yaml")
    assert resolved == fix(load_config(done.config))
    assert fix(resolved) == resolved
    assert "reviews_train: 64" in (done / "dpo" / "config.yaml").read_text()
    result = call("dpo", done / "dpo" / "config.yaml")
    assert (result.code, f"{done / 'dpo'} is finished after {STEPS} steps" in result.out) == (0, True)


def test_metrics_hold_each_step_once_under_the_usual_names(done):
    rows = read_metrics(done / "dpo" / "metrics.jsonl")
    training = [row for row in rows if not is_evaluation(row)]
    assert [row["step"] for row in training] == list(range(STEPS))
    assert [row["step"] for row in rows if is_evaluation(row)] == [4, 8]
    sides = [f"{name}/{side}" for name in ("rewards", "logps", "displacement") for side in ("chosen", "rejected")]
    names = {"loss", "rewards/accuracies", "rewards/margins", "kl_reference_policy", "grad_norm", "lr", "padding", *sides}
    rates = {"pairs_per_second", "scored_tokens_per_second"}
    assert all(set(row) == {"step", *names, *rates} for row in training)
    first = training[0]
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert max(abs(first[name]) for name in sides if not name.startswith("logps")) < 1e-3
    assert first["rewards/accuracies"] == 0.5
    assert [row["lr"] for row in training[:4]] == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3, 1e-3])
    assert training[-1]["loss"] < first["loss"]


def test_the_policy_learns_and_eval_measures_it(done):
    report = json.loads((done / "eval" / "report.json").read_text())
    assert report["pairs"] == 24
    assert report["reference"]["rewards/accuracies"] == 0.5
    assert abs(report["reference"]["kl"]) < 1e-3
    last = [row for row in read_metrics(done / "dpo" / "metrics.jsonl") if is_evaluation(row)][-1]
    for name in ("loss", "rewards/accuracies", "rewards/margins", "displacement/chosen"):
        assert report["policy"][name] == pytest.approx(last[f"eval/{name}"], abs=1e-4)
    assert report["weights"]["policy"] != report["weights"]["reference"]
    table = done.printed["eval"]
    for expected in ("24 held-out pairs", "preference accuracy", "(95 %)", "KL(policy || reference)", "true reward"):
        assert expected in table
    assert table.count("\n  before ") == table.count("\n  after ") == 3
    assert max(len(line) for line in table.splitlines() if not line.startswith(("full report", str(done.dir)))) <= 80
    samples = [json.loads(line) for line in (done / "eval" / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 4
    for who in ("reference", "policy"):
        assert report[who]["cut"] == 1 - np.mean([line[f"{who}_finished"] for line in samples])
        assert 0 <= report[who]["repetition"] <= 1
    # Six new tokens are too few for a review, and the table says so.
    assert report["policy"]["cut"] > 0.1
    assert "samples cut" in [note["name"] for note in report["notes"]]
    assert "! samples cut: " in table


def test_the_export_is_a_model_folder_equal_to_the_checkpoint(done, tmp_path):
    folder = done / "dpo" / "export"
    names = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert set(bytes_of(folder)) == names
    model, variables = load_hf(folder)
    _, start = load_hf(done / "sft" / "export")
    assert model.config.max_positions == 128
    different = jax.tree.map(lambda a, b: bool((np.asarray(a) != np.asarray(b)).any()), variables, start)
    assert all(jax.tree.leaves(different))
    for task in ("dpo", "sft"):
        checkpoints = done / task / "checkpoints"
        assert call("export", done.config, "--export.checkpoint", checkpoints, "--export.out", tmp_path / task).code == 0
        assert bytes_of(tmp_path / task) == bytes_of(done / task / "export")
    half = ("--export.out", tmp_path / "half", "--export.dtype", "bfloat16")
    assert "step 8" in call("export", done.config, *half).out
    kinds = {x.dtype.name for x in jax.tree.leaves(load_hf(tmp_path / "half", param_dtype=jax.numpy.bfloat16)[1])}
    assert kinds == {"bfloat16"}
    size = (folder / "model.safetensors").stat().st_size
    assert (tmp_path / "half" / "model.safetensors").stat().st_size < 0.6 * size


def test_audit_reports_lengths_and_padding_before_any_training(done):
    page = " ".join(done.printed["audit"].split())
    assert all(text in page for text in ("rows of 128 tokens (shared)", "p99", "kept 64 24"))
    report = json.loads((done / "audit" / "data_report.json").read_text())
    assert report["train"]["lengths"]["prompt"]["max"] <= 48
    assert 0 < report["train"]["packing"]["padding"] < 1


def test_only_rows_that_hold_a_whole_pair_need_room_for_both_sides(done, tmp_path):
    limits = ("--run.dir", tmp_path, "--data.row-length", 96)
    assert call("audit", done.config, *limits, "--data.layout", "plain").code == 0
    assert "no_room" in refused(65, "audit", done.config, *limits, "--data.layout", "shared")


def test_sample_prints_or_writes_completions_of_ones_own_prompts(done, tmp_path):
    lines = [json.loads(line) for line in done.printed["sample"].splitlines()]
    assert [set(line) for line in lines] == [{"prompt", "completion", "logp", "tokens", "temperature"}] * 2
    own = tmp_path / "prompts.jsonl"
    prompts = [lines[1]["prompt"], "A film\u2028in two\nlines is", lines[0]["prompt"]]
    own.write_text("".join(json.dumps({"prompt": prompt}, ensure_ascii=False) + "\n" for prompt in prompts))
    out = tmp_path / "out" / "samples.jsonl"
    assert call("sample", done.config, "--sample.prompts-file", own, "--sample.out", out).code == 0
    written = [json.loads(line) for line in out.read_text().split("\n") if line]
    assert [line["prompt"] for line in written] == prompts
    assert [written[1 - i]["completion"] if i else written[2]["completion"] for i in range(2)] == [
        x["completion"] for x in lines
    ]
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    told = refused(2, "sample", done.config, "--sample.prompts-file", tmp_path / "bad.jsonl")
    assert 'bad.jsonl:2: missing_column: needs an object with a "prompt" or "messages", this has neither' in told


def test_several_temperatures_and_the_best_of_several_in_one_file(done, tmp_path):
    """What figures 2, 3 and 4 of the paper are made of: `judge --judge.by` reads the columns `temperature` and `best_of`."""

    def sampled(*flags):
        result = call("sample", done.config, "--sample.out", tmp_path / "s.jsonl", *flags)
        assert result.code == 0, result
        return [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()], result.err

    both, told = sampled("--sample.temperatures", "0,0.8")
    assert "longer than the policy was shown" not in told
    assert [row["temperature"] for row in both] == [0, 0, 0.8, 0.8]
    assert both[:2] == [json.loads(line) for line in done.printed["sample"].splitlines()]
    assert both[2]["completion"] != both[0]["completion"]
    assert "2 of 2 completions were stopped before their end" in sampled("--sample.max-new-tokens", 1)[1]
    own = tmp_path / "p.txt"
    own.write_text("A film " * 60 + "\nA film\n")
    best, told = sampled("--sample.prompts-file", own, "--sample.best-of", "1,4", "--sample.temperature", 0.8)
    assert "1 of 2 prompts are longer than the policy was shown: their last 48 tokens" in told
    assert [row["best_of"] for row in best] == [1, 1, 4, 4]
    assert [row["prompt"] for row in best] == 2 * own.read_text().splitlines()
    assert [row["reward"] for row in best] == [reward(row["prompt"] + row["completion"]) for row in best]
    assert [one.at for one in read_completions(tmp_path / "s.jsonl", by="best_of")] == [1, 1, 4, 4]
    wrong = ("--data.source", "files", "--data.path", tmp_path, "--sample.prompts-file", own, "--sample.best-of", 2)
    assert "sample.reward_model: best_of needs a reward" in refused(2, "sample", done.config, *wrong)
    assert "sample.best_of: must be whole numbers" in refused(2, "sample", done.config, "--sample.best-of", "1,0")
    assert "sample.temperatures: must be numbers" in refused(2, "sample", done.config, "--sample.temperatures", "0,hot")
    policy = ("--sample.best-of", 2, "--sample.reward-model", done / "sft" / "export")
    assert "sample.reward_model: " in refused(2, "sample", done.config, *policy)


def test_an_earlier_step_is_exported_beside_the_last(done):
    """Figure 3 right: win rates over training."""
    steps = sorted(int(path.name) for path in (done / "dpo" / "checkpoints").iterdir() if path.name.isdecimal())
    assert steps == [6, 8]
    assert "step 6 of" in call("export", done.config, "--export.step", 6).out
    assert "step 8 of" in call("export", done.config, "--export.step", 8).out
    early, late, last = (bytes_of(done / "dpo" / name) for name in ("export-6", "export-8", "export"))
    assert late == last != early
    assert set(early) == set(last)
    cards = [(done / "dpo" / name / "README.md").read_text() for name in ("export-6", "export-8")]
    assert "Held out, after 6 steps: not measured." in cards[0]
    assert cards[1] == (done / "dpo" / "README.md").read_text()
    assert "export.step: " in (told := refused(2, "export", done.config, "--export.step", 7))
    assert "has no step 7, but 6, 8" in told


# How a run continues.


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
@pytest.mark.parametrize("how", ["killed", "damaged"])
def test_a_run_resumed_from_the_middle_equals_the_uninterrupted_one(done, copy, how):
    newest = copy / "dpo" / "checkpoints" / "8"
    shutil.rmtree(copy / "dpo" / "export")
    if how == "killed":
        shutil.rmtree(newest)
    else:
        biggest = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
        content = bytearray(biggest.read_bytes())
        content[len(content) // 2] ^= 1
        biggest.write_bytes(content)
    result = call("dpo", copy.config)
    assert (result.code, f"continuing {copy / 'dpo'} after 6 steps" in result.out) == (0, True)
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
    result = call("dpo", copy.config, "--dpo.epochs", 3)
    assert (result.code, f"continuing {copy / 'dpo'} after {STEPS} steps" in result.out) == (0, True), result
    assert "the run is of 3 epochs now; it was of 2" in result.out
    at_once = ("--run.dir", tmp_path / "at-once", "--dpo.policy", done / "sft" / "export", "--refs.cache", done / "refs")
    assert call("dpo", done.config, *at_once, "--dpo.epochs", 3).code == 0
    assert bytes_of(copy / "dpo" / "export") == bytes_of(tmp_path / "at-once" / "dpo" / "export")
    assert load_config(copy / "dpo" / "config.yaml").dpo.epochs == 3


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
    result = call("dpo", copy.config, "--data.max-test", 20)
    assert (result.code, "note: the held-out pairs changed" in result.out) == (0, True)
    steps = [row["step"] for row in read_metrics(copy / "dpo" / "metrics.jsonl") if is_evaluation(row)]
    assert steps == [4, STEPS, STEPS]


def test_a_run_does_not_become_shorter_than_it_is(done):
    before = bytes_of(done / "dpo" / "export")
    message = refused(2, "dpo", done.config, "--dpo.epochs", 1)
    assert f"has taken {STEPS} steps, and is to have 4: a run can become longer, not shorter" in message
    assert bytes_of(done / "dpo" / "export") == before


def test_a_policy_is_not_silently_measured_against_another_reference(copy):
    weights = copy / "sft" / "export" / "model.safetensors"
    tensors = load_file(weights)
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name] * 1.5}, weights, metadata={"format": "pt"})
    told = call("eval", copy.config, "--eval.samples", 0, "--refs.cache", copy / "other-refs").out
    assert "note: the policy was trained against another reference" in told
    message = refused(2, "dpo", copy.config, "--refs.cache", copy / "other-refs")
    assert "reference: was '" in message  # before the reference pass


def test_a_second_round_may_keep_the_first_reference(done, tmp_path):
    second = ("--run.dir", tmp_path, "--dpo.policy", done / "dpo" / "export", "--dpo.reference", done / "sft" / "export")
    result = call("dpo", done.config, *second, "--refs.cache", done / "refs")
    assert result.code == 0, result
    assert "88 of 88 pairs are there already" in result.out  # those of the first round
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
    assert "run.resume: is off, and " in message
    assert "dpo/checkpoints holds checkpoints; turn it on, or choose another --run.dir" in message


def test_checkpoints_may_lie_elsewhere(done, tmp_path):
    flags = ("--run.dir", tmp_path / "run", "--run.checkpoints", tmp_path / "elsewhere")
    start = ("--dpo.policy", done / "sft" / "export", "--refs.cache", done / "refs")
    assert call("dpo", done.config, *flags, *start).code == 0
    assert {"6", "8"} <= {path.name for path in (tmp_path / "elsewhere" / "dpo").iterdir()}
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
    assert "no checkpoint verifies (steps [8, 6], now in" in refused(74, "dpo", copy.config)


def test_a_run_stopped_during_its_last_step_is_judged_when_it_is_started_again(done, copy):
    metrics = copy / "dpo" / "metrics.jsonl"
    rows = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(rows[:-1]))
    assert call("dpo", copy.config).code == 0
    assert read_metrics(metrics) == read_metrics(done / "dpo" / "metrics.jsonl")


@pytest.mark.parametrize("devices", [("pmap",), ("mesh", "--mesh.fsdp", 2, "--mesh.tensor", 2)], ids=["pmap", "mesh"])
def test_four_devices_give_the_same_metrics(devices, done, tmp_path):
    flags = ("--dpo.policy", done / "sft" / "export", "--refs.cache", done / "refs", "--run.devices", *devices)
    result = call("dpo", done.config, *flags, "--run.dir", tmp_path, "--data.layout", "plain", "--dpo.microbatches", 2)
    assert result.code == 0, result.err
    assert f"{done / 'refs'}: 88 of 88 pairs are there already" in result.out
    ours, theirs = ([row for row in read_metrics(run / "dpo" / "metrics.jsonl")] for run in (tmp_path, done))
    for name in ("eval/loss", "eval/rewards/margins", "eval/displacement/chosen"):
        assert [row[name] for row in ours if name in row] == pytest.approx(
            [row[name] for row in theirs if name in row], abs=1e-3
        )
    for name in ("loss", "grad_norm"):
        assert [r[name] for r in ours if name in r] == pytest.approx([r[name] for r in theirs if name in r], rel=1e-3)


def test_a_run_continues_on_another_mesh(done, copy):
    """Saved on one device, continued on four: the state is the same, the rest of the steps nearly so."""
    shutil.rmtree(copy / "dpo" / "checkpoints" / "8")
    mesh = ("--run.devices", "mesh", "--mesh.data", 2, "--mesh.fsdp", -1)
    result = call("dpo", copy.config, *mesh)
    assert result.code == 0, result.err
    assert "after 6 steps" in result.out
    ours, theirs = (read_metrics(run / "dpo" / "metrics.jsonl") for run in (copy, done))
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    assert [r["loss"] for r in ours if "loss" in r] == pytest.approx([r["loss"] for r in theirs if "loss" in r], rel=1e-3)


def test_a_mesh_that_does_not_fit_is_refused_before_any_weights_are_read(done, tmp_path):
    here = ("--dpo.policy", done / "sft" / "export", "--run.dir", tmp_path, "--run.devices", "mesh")
    assert "mesh data 1 x fsdp -1 x tensor 3: 3 does not divide the 4" in refused(
        2, "dpo", done.config, *here, "--mesh.tensor", 3
    )
    assert (
        "head_kernel (450, 32): axis 'vocab' of 450 does not divide among tensor 4; the nearest size that does is 2"
        in refused(2, "dpo", done.config, *here, "--mesh.tensor", 4)
    )
    assert "mesh.fsdp: only one size can be -1" in refused(2, "dpo", done.config, *here, "--mesh.data", -1)
    assert "data 3 x fsdp 1 x tensor 1: 3 does not equal the 4 devices; the nearest mesh is data 4 x fsdp 1" in refused(
        2, "dpo", done.config, *here, "--mesh.data", 3, "--mesh.fsdp", 1
    )
    new = ("--run.dir", tmp_path, "--run.devices", "mesh", "--tokenizer.path", done / "tokenizer", "--model.vocab-size", 512)
    assert "axis 'kv_heads' of 2 x 16 does not divide among tensor 4; the nearest size that does is 2" in refused(
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
    at = stream(pairs, layout=build.pair_layout(config, pairs, batch=batch, parts=parts), batch=batch, seed=0, epochs=1)
    for step in range(-(-7 // batch)):
        rows = split_rows(at(step).rows, parts)  # raises where it does not divide
        assert rows.tokens.shape[1] * rows.slots == 2 * rows.index.shape[1] == 2 * rows.weight.shape[1]
        assert rows.weight.sum() == len(at(step).uids)


def entries(folder):
    records = np.frombuffer((folder / "logps-00000.bin").read_bytes(), RECORD)
    return {record["key"].tobytes(): record["logps"] for record in records}


# What is refused.


def test_a_policy_that_is_missing_comes_with_a_hint(done, tmp_path):
    for command in ("refs", "dpo"):
        message = refused(2, command, done.config, "--run.dir", tmp_path)
        assert message.startswith(f"dpo-jax: dpo.policy: no model folder {tmp_path}/sft/export")
        assert "Run `dpo-jax sft` first, or name the model." in message
    assert "eval.policy" in refused(2, "eval", done.config, "--run.dir", tmp_path)
    assert "sample.policy" in refused(2, "sample", done.config, "--run.dir", tmp_path)
    assert "no run wrote checkpoints here" in refused(2, "export", done.config, "--run.dir", tmp_path)
    assert not (tmp_path / "dpo" / "checkpoints").exists()


ROWS = [{"prompt": f"We saw film {i}. It was", "chosen": f" good {i}.", "rejected": f" bad {i}."} for i in range(20)]


def files_with(folder, **changes):
    """A data folder with both splits; `changes` go into line 3 of the train split."""
    folder.mkdir()
    rows = [{**row, **(changes if i == 2 else {})} for i, row in enumerate(ROWS)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:5]))
    return ("--data.source", "files", "--data.path", folder)


@pytest.mark.parametrize(
    ("changes", "cause"),
    [({"rejected": " "}, "empty"), ({"chosen": " good.<|endoftext|> bad."}, "eos_in_text"), ({"prompt": 7}, "wrong_type")],
)
def test_bad_data_are_refused_by_file_and_line_or_dropped_and_counted(done, tmp_path, changes, cause):
    data = files_with(tmp_path / "data", **changes)
    here = ("--run.dir", tmp_path / "run", "--dpo.policy", done / "sft" / "export")
    for command in ("audit", "sft", "dpo"):
        flags = here if command == "dpo" else (*here[:2], "--tokenizer.path", done / "tokenizer")
        message = refused(65, command, done.config, *flags, *data)
        assert "train.jsonl:3: " in message
        assert f"{cause}:" in message
        assert "--data.on-bad drop" in message
    report = json.loads((tmp_path / "run" / "audit" / "data_report.json").read_text())["train"]
    assert (report["read"], report["kept"], report["dropped"]) == (20, 19, {cause: 1})

    drop = ("--data.on-bad", "drop", "--data.max-dropped-share")
    assert call("refs", done.config, *here, *data, *drop, 0.05).code == 0
    refs = json.loads((tmp_path / "run" / "refs" / "data_report.json").read_text())["train"]
    assert (refs["kept"], refs["dropped"]) == (19, {cause: 1})
    assert "5.0% of the rows were dropped as bad, more than" in refused(65, "dpo", done.config, *here, *data, *drop, 0.04)


def test_data_that_are_not_there_are_refused(done, tmp_path):
    flags = ("--data.source", "files", "--data.path", tmp_path / "nothing", "--run.dir", tmp_path / "run")
    assert str(tmp_path / "nothing") in refused(65, "audit", done.config, *flags)


def test_prepared_data_are_the_same_data(done, tmp_path):
    assert call("prepare", done.config, "--run.dir", tmp_path, "--prepare.out", tmp_path / "tfds").code == 0
    where = ("--data.source", "tfds", "--data.path", tmp_path / "tfds", "--run.dir", tmp_path)
    assert call("audit", done.config, *where, "--tokenizer.path", done / "tokenizer").code == 0
    ours, theirs = (json.loads((run / "audit" / "data_report.json").read_text()) for run in (tmp_path, done))
    assert {split: ours[split]["lengths"] for split in ours} == {split: theirs[split]["lengths"] for split in theirs}


def test_a_reference_with_nan_weights_is_refused_before_anything_is_cached(done, tmp_path):
    def poison(name, x):
        return np.where(np.arange(x.size).reshape(x.shape) == 0, np.float32("nan"), x)

    broken = with_weights(done / "sft" / "export", tmp_path / "broken", poison)
    flags = ("--dpo.policy", broken, "--run.dir", tmp_path / "run")
    message = refused(76, "dpo", done.config, *flags)
    assert "the reference model gives the log-probabilities nan" in message
    assert "reviews/train/0:" in message
    assert not (tmp_path / "run" / "refs" / "logps-00000.bin").exists()
    flags = ("--eval.policy", broken, "--eval.reference", done / "sft" / "export", "--run.dir", tmp_path / "run2")
    assert "the policy gives the log-probabilities nan" in refused(76, "eval", done.config, *flags)


def test_a_loss_that_explodes_stops_the_run_before_it_is_saved(done, tmp_path):
    flags = ("--dpo.policy", done / "sft" / "export", "--refs.cache", done / "refs", "--run.dir", tmp_path)
    message = refused(76, "dpo", done.config, *flags, "--dpo.lr", 1e30, "--run.save-every-steps", 1)
    assert "step 1: loss = nan" in message
    bad = json.loads((tmp_path / "dpo" / "bad_batch.json").read_text())
    assert (bad["step"], len(bad["uids"])) == (1, 16)
    assert not (tmp_path / "dpo" / "export").exists()
    assert [path.name for path in (tmp_path / "dpo" / "checkpoints").iterdir()] == ["1"]  # the state before the bad step


def test_a_cache_of_another_reference_is_refused_by_what_differs(done, tmp_path):
    start = ("--dpo.policy", done / "dpo" / "export", "--refs.cache", done / "refs", "--run.dir", tmp_path / "other")
    message = refused(2, "dpo", done.config, *start)
    assert "  weights: cached with" in message
    assert message.count("cached with") == 1
    same = ("--dpo.policy", done / "sft" / "export", "--refs.cache", done / "refs", "--run.dir", tmp_path)
    other = ("--data.max-length", 100, "--run.precision", "bfloat16", "--model.attention", "chunked")
    message = refused(2, "refs", done.config, *same, *other)
    named = [line.split(":")[0].strip() for line in message.splitlines() if "cached with" in line]
    assert named == ["dtype", "kernel", "max_length"]


def test_attention_that_this_machine_does_not_have(done):
    message = refused(2, "refs", done.config, "--model.attention", "splash")
    assert "model.attention: attention splash runs on a TPU, and this is a CPU" in message


def test_a_cache_that_lies_is_found_at_step_0(done, copy):
    identity = json.loads((copy / "refs" / "identity.json").read_text())["identity"]
    config = load_config(copy.config)
    tokenizer = build.load_tokenizer(copy / "tokenizer")
    pairs = build.encode_split(config, build.load_split(config, "train"), tokenizer)
    identity = {name: value for name, value in identity.items() if name != "version"}
    values = ReferenceCache(copy / "refs", identity).lookup(pairs)
    shutil.rmtree(copy / "refs")
    ReferenceCache(copy / "refs", identity).add(pairs, values + np.float32([[0.5, -0.5]]))
    shutil.rmtree(copy / "dpo")
    message = refused(2, "dpo", copy.config)
    assert "step 0 has loss 0.74" in message
    assert "where a policy equal to its reference has 0.693147" in message
    assert not any((copy / "dpo" / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("section", "at_reference"),
    [
        (DpoConfig(), np.log(2)),
        (DpoConfig(loss="ipo"), 25.0),
        (DpoConfig(loss="unlikelihood", alpha=0.5), None),  # but the displacement is 0 there, too
        (DpoConfig(loss="preferred_ft"), None),
    ],
    ids=lambda value: getattr(value, "loss", ""),
)
def test_the_guard_of_step_0(section, at_reference):
    expected = loss_at_reference(section)
    assert expected == (None if at_reference is None else pytest.approx(at_reference))
    assert loss_at_reference(DpoConfig(label_smoothing=0.2)) == pytest.approx(np.log(2))
    assert loss_at_reference(DpoConfig(reference_free=True)) is None
    ref = np.random.default_rng(0).normal(-30, 5, size=(16, 2)).astype(np.float32)
    for noise, precision, fine in (
        (0, "float32", True),
        (1e-4, "float32", True),
        (0.1, "float32", False),
        (0.1, "bfloat16", True),
    ):
        summary = preference_summary(ref + np.float32(noise), ref, loss=build.make_loss(section))
        check = {"expected_loss": expected, "tolerance": TOLERANCE[precision]}
        if fine:
            starts_at_reference(0, summary, **check)
        else:
            starts_at_reference(1, summary, **check)
            with pytest.raises(WrongStart, match="0.1000 nats from its reference"):
                starts_at_reference(0, summary, **check)


def test_a_tokenizer_that_does_not_fit_is_refused_before_compiling(done, tmp_path):
    golden = ROOT / "tests" / "golden" / "tokenizer"
    message = refused(
        2, "refs", done.config, "--run.dir", tmp_path, "--dpo.policy", done / "sft" / "export", "--tokenizer.path", golden
    )
    assert "the tokenizer has token id 510" in message
    assert "vocabulary has 450 entries" in message
    other = tmp_path / "other_eos"
    shutil.copytree(done / "sft" / "export", other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"eos_token_id": 5}))
    message = refused(2, "dpo", done.config, "--run.dir", tmp_path, "--dpo.policy", other)
    assert f"dpo.policy: {other}: eos_token_id is 0 in the tokenizer, but 5 in the model's config.json" in message
    assert not (tmp_path / "compiled").exists()


def test_a_model_folder_that_is_no_model_is_refused_by_its_option(done, tmp_path):
    policy = tmp_path / "policy"
    flags = ("--run.dir", tmp_path / "run", "--dpo.policy", policy)
    policy.mkdir()
    assert f"dpo.policy: {policy}: no tokenizer" in refused(2, "dpo", done.config, *flags)
    shutil.copytree(done / "sft" / "export", policy, dirs_exist_ok=True)
    (policy / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    message = refused(2, "dpo", done.config, *flags)
    assert message.startswith("dpo-jax: dpo.policy: ")
    assert "git-lfs" in message
    (policy / "config.json").write_text("{")
    assert refused(74, "dpo", done.config, *flags).startswith(
        "dpo-jax: dpo.policy: "
    )  # damaged, not of a kind that is not read


def test_impossible_sizes_are_refused_before_compiling(done, tmp_path):
    here = ("--run.dir", tmp_path, "--dpo.policy", done / "sft" / "export")
    pmap = ("--run.devices", "pmap", "--dpo.batch", 6)
    assert "dpo.batch: 6 does not divide among 4 devices x 1 microbatches; the nearest batch that does is 8" in refused(
        2, "dpo", done.config, *here, *pmap
    )
    assert "dpo.microbatches: must divide batch: 16 do not split into 3 equal parts; the nearest is 2" in refused(
        2, "dpo", done.config, *here, "--dpo.microbatches", 3
    )
    # The model of the config file is described as it is; only the folder that is loaded knows that 129 is too much for it.
    config = tmp_path / "other.yaml"
    config.write_text(CONFIG.format(dir=tmp_path).replace("max_positions: 128", "max_positions: 256"))
    assert "129 tokens do not fit the 128 positions" in refused(2, "dpo", config, *here[2:], "--data.max-length", 129)
    assert "tensorboardX" in refused(2, "dpo", done.config, *here, "--run.tensorboard")
    assert not list(tmp_path.glob("*/checkpoints"))


@pytest.mark.parametrize("command", ["sft", "dpo"])
def test_a_directory_in_use_is_locked(done, command):
    with RunDir(done / command):
        message = refused(73, command, done.config)
    assert f"another run (pid {os.getpid()}, host " in message
    assert f"uses {done / command}" in message


def test_eval_does_not_wait_for_a_run_that_trains(done):
    card = (done / "dpo" / "README.md").read_text()
    with RunDir(done / "dpo"):
        result = call("eval", done.config, "--eval.samples", 0)
    assert result.code == 0
    assert "the model card is left as it is: another run" in result.out
    assert "left as it is" in call("eval", done.config, "--eval.samples", 0, "--dpo.beta", 0.3).out
    assert (done / "dpo" / "README.md").read_text() == card


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
    flags = ("--dpo.epochs", 100, "--run.save-every-steps", 0, "--run.eval-every-examples", 0)
    metrics = copy / "dpo" / "metrics.jsonl"
    process = start(copy.config, *flags)
    wait_for_steps(process, metrics, 2)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 143, err
    assert "SIGTERM: finishing this step, then saving" in err
    assert "the state is saved" in err
    assert "PyTorch" not in err
    assert "88 of 88 pairs are there already" in out
    (saved,) = (int(path.name) for path in (copy / "dpo" / "checkpoints").iterdir())
    assert 2 <= saved < 400
    assert [row["step"] for row in read_metrics(metrics)] == list(range(saved))
    result = call("dpo", copy.config, *flags)
    assert (result.code, f"after {saved} steps" in result.out) == (0, True)
    assert [row["step"] for row in read_metrics(metrics) if not is_evaluation(row)] == list(range(400))


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
