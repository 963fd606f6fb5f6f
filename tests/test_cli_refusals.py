"""What the program refuses: by exit code, with the place and the remedy."""

import importlib
import json
import os
import shutil
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import CONFIG, ROOT, call, refused, with_weights
from tiny_run import _compilation_cache as _compilation_cache
from tiny_run import _plots_once as _plots_once
from tiny_run import copy as copy
from tiny_run import done as done

from dpo_jax.cli import build, splits
from dpo_jax.cli.commands.dpo import loss_at_reference
from dpo_jax.cli.config import DpoConfig, load_config
from dpo_jax.evals.preference import preference_summary
from dpo_jax.reference import ReferenceCache
from dpo_jax.runtime.rundir import RunDir
from dpo_jax.training.start_check import TOLERANCE, WrongStart, starts_at_reference


def test_a_policy_that_is_missing_comes_with_a_hint(done, tmp_path):
    for command in ("refs", "dpo"):
        message = refused(2, command, done.config, "--run.dir", tmp_path)
        assert message.startswith(f"dpo-jax: dpo.policy: no model folder {tmp_path}/sft/export")
        assert "Run `dpo-jax sft` first, or name the model." in message
    assert "eval.policy" in refused(2, "eval", done.config, "--run.dir", tmp_path)
    assert "sample.policy" in refused(2, "sample", done.config, "--run.dir", tmp_path)
    assert "no run wrote checkpoints here" in refused(2, "export", done.config, "--run.dir", tmp_path)
    assert not (tmp_path / "dpo" / "checkpoints").exists()


def test_export_after_sft_alone_writes_its_model_and_otherwise_names_the_checkpoints(done, tmp_path):
    shutil.copytree(done / "sft", tmp_path / "sft")
    result = call("export", done.config, "--run.dir", tmp_path, "--export.out", tmp_path / "out")
    assert result.code == 0, result
    assert f"the run has no folder {tmp_path}/dpo, so the model of sft is exported" in result.out
    assert f"of {tmp_path}/sft as float32" in result.out
    (tmp_path / "dpo").mkdir()
    for flags in ((), ("--check",)):
        message = refused(2, "export", done.config, "--run.dir", tmp_path, *flags)
        choose = f"no run wrote checkpoints here; there are others: --export.checkpoint {tmp_path}/sft/checkpoints"
        assert message.strip() == f"dpo-jax: export.checkpoint: {tmp_path}/dpo/checkpoints: {choose}"


def test_checkpoints_of_a_reward_model_are_not_exported(done, tmp_path):
    folder = tmp_path / "reward-model"
    (folder / "checkpoints").mkdir(parents=True)
    named = ("--run.dir", tmp_path, "--export.checkpoint", folder / "checkpoints")
    assert "run `dpo-jax reward-model` to its end" in refused(2, "export", done.config, *named)
    shutil.copytree(done / "sft" / "export", folder / "export")
    message = refused(2, "export", done.config, *named).strip()
    assert message.endswith(f"itself writes to {folder}/export; to upload it: hf upload ORGANIZATION/NAME {folder}/export")


def test_the_model_itself_is_offered_as_the_policy(done, tmp_path):
    model = ("--model.path", done / "sft" / "export")
    message = refused(2, "dpo", done.config, *model, "--run.dir", tmp_path)
    assert "Run `dpo-jax sft` first, or name the model, or start from model.path itself: --dpo.policy model." in message
    assert call("refs", done.config, *model, "--run.dir", tmp_path, "--dpo.policy", "model").code == 0


def test_too_little_memory_is_met_with_options_that_need_less(done, tmp_path, monkeypatch):
    """The error is XLA's own: no machine has four exabytes."""
    monkeypatch.setattr(importlib.import_module("dpo_jax.cli.commands.dpo"), "run", lambda config: jnp.ones((2**30, 2**30)))
    message = refused(71, "dpo", done.config, "--run.dir", tmp_path)
    first, *remedies = message.splitlines()
    assert "a device ran out of memory: RESOURCE_EXHAUSTED: " in first
    assert "  --dpo.microbatches 2  a batch of 16 in 2 parts (now 1)" in remedies
    same, other = message.split("start a new run")
    for option in ("--model.remat full", "--run.devices mesh", "--refs.batch 8"):
        assert option in same
    for option in ("--run.precision bfloat16", "--dpo.param-dtype bfloat16", "--lora.rank 16"):
        assert option in other
    full = ("--dpo.microbatches", 16, "--model.remat", "full", "--run.devices", "mesh", "--run.precision", "bfloat16")
    message = refused(71, "dpo", done.config, "--run.dir", tmp_path, *full, "--lora.rank", 2)
    assert "--lora.base-dtype bfloat16" in message
    assert not {"microbatches", "remat", "precision", "param-dtype", "rank"} & {*message.replace(".", " ").split()}
    # Four devices: a batch of 4 has no parts, one of 8 has two.
    for batch, offered in ((4, False), (8, True)):
        plain = ("--data.layout", "plain", "--run.devices", "pmap", "--dpo.batch", batch)
        assert ("microbatches 2" in refused(71, "dpo", done.config, "--run.dir", tmp_path, *plain)) == offered


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


def test_what_training_refuses_is_not_prepared(tmp_path):
    data, config = files_with(tmp_path / "data", rejected=" "), tmp_path / "config.yaml"
    config.write_text(CONFIG.format(dir=tmp_path / "run"))
    drop = (*data, "--data.on-bad", "drop", "--data.max-dropped-share")
    assert "5.0% of the rows were dropped as bad, more than" in refused(65, "prepare", config, *drop, 0.04)
    assert not (tmp_path / "run" / "tfds").exists()
    assert call("prepare", config, *drop, 0.05).code == 0
    single = [{"prompt": f"{i}:", "completion": f" {i}", "label": i > 2} for i in range(5)]
    for split in ("train", "test"):
        (tmp_path / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in single))
    for flags in ((), ("--check",)):
        before = (tmp_path / "run" / "prepare" / "config.yaml").read_bytes()
        message = refused(65, "prepare", config, *data, *flags)
        assert (tmp_path / "run" / "prepare" / "config.yaml").read_bytes() == before
        assert "but pairs are needed here: a TFDS folder holds pairs; train on these files directly" in message


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
    assert "model.attention: attention splash runs on a TPU, but this is a CPU" in message


def test_a_cache_that_lies_is_found_at_step_0(done, copy):
    identity = json.loads((copy / "refs" / "identity.json").read_text())["identity"]
    config = load_config(copy.config)
    tokenizer = build.load_tokenizer(copy / "tokenizer")
    pairs = splits.encode_split(config, splits.load_split(config, "train"), tokenizer)
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


def test_impossible_sizes_are_refused_before_compiling(done, monkeypatch, tmp_path):
    here = ("--run.dir", tmp_path, "--dpo.policy", done / "sft" / "export")
    pmap = ("--run.devices", "pmap", "--dpo.batch", 6)
    assert "dpo.batch: 6 cannot be split over 4 devices x 1 microbatches; the nearest batch that can is 8" in refused(
        2, "dpo", done.config, *here, *pmap
    )
    assert "dpo.microbatches: must divide batch (16), got 3; the nearest is 2" in refused(
        2, "dpo", done.config, *here, "--dpo.microbatches", 3
    )
    # The model of the config file is described as it is; only the folder that is loaded knows that 129 is too much for it.
    config = tmp_path / "other.yaml"
    config.write_text(CONFIG.format(dir=tmp_path).replace("max_positions: 128", "max_positions: 256"))
    assert "129 tokens do not fit the 128 positions" in refused(2, "dpo", config, *here[2:], "--data.max-length", 129)
    monkeypatch.setitem(sys.modules, "tensorboardX", None)  # wherever it is installed
    assert "tensorboardX" in refused(2, "dpo", done.config, *here, "--run.tensorboard")
    assert not list(tmp_path.glob("*/checkpoints"))


@pytest.mark.parametrize("command", ["sft", "dpo"])
def test_a_directory_in_use_is_locked(done, command):
    with RunDir(done / command):
        message = refused(73, command, done.config)
    assert f"another run (pid {os.getpid()}, host " in message
    assert f"uses {done / command}" in message


def test_eval_does_not_wait_for_a_run_that_trains(copy):
    card = (copy / "dpo" / "README.md").read_text()
    with RunDir(copy / "dpo"):
        result = call("eval", copy.config, "--eval.samples", 0)
    assert result.code == 0
    assert "the model card is left as it is: another run" in result.out
    assert "left as it is" in call("eval", copy.config, "--eval.samples", 0, "--dpo.beta", 0.3).out
    assert (copy / "dpo" / "README.md").read_text() == card


def test_figures_of_other_pairs_stay_out_of_the_model_card(done, copy, tmp_path):
    own = ("--eval.samples", 0, "--eval.reference", done / "sft" / "export")  # the path that the copy was trained with
    cards = [copy / "dpo" / "README.md", copy / "dpo" / "export" / "README.md"]
    before = [card.read_bytes() for card in cards]
    rows = [{"prompt": f"Q {n}", "chosen": f" bad {n}", "rejected": f" good thing {n}"} for n in range(7)]
    (tmp_path / "other").mkdir()
    for split in ("train", "test"):
        (tmp_path / "other" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    other = ("--data.source", "files", "--data.path", tmp_path / "other")
    result = call("eval", copy.config, *own, *other)
    assert "is left as it is: these are not the held-out pairs of its training" in result.out, result
    assert [card.read_bytes() for card in cards] == before
    assert "left as it is" not in call("eval", copy.config, *own).out
    assert [card.read_bytes() for card in cards] != before  # the table now lacks the samples
    assert not (copy / "eval" / "samples.jsonl").exists()
    assert json.loads((copy / "eval" / "report.json").read_text())["of_run"] is True


@pytest.mark.parametrize(
    ("command", "option"), [("eval", "eval.reference"), ("eval", "eval.policy"), ("refs", "dpo.policy"), ("eval", "data.path")]
)
def test_a_refused_command_leaves_the_records_of_the_last_one(copy, tmp_path, command, option):
    names = ("config.yaml", "env.json", "data_report.json")
    before = [(copy / command / name).read_bytes() for name in names]
    flags = ("--data.source", "files") if option == "data.path" else ()
    result = call(command, copy.config, *flags, f"--{option}", tmp_path / "nowhere")
    assert result.code
    assert "nowhere" in result.err
    assert [(copy / command / name).read_bytes() for name in names] == before
