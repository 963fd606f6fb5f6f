"""`--check`, before money is spent: what it finds, what it takes for granted, and that the command itself finds the same."""

import dataclasses
import fcntl
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import GOLDEN

from dpo_jax.cli import finished, fixed, model_folders
from dpo_jax.cli import main as program
from dpo_jax.cli.command_table import COMMANDS
from dpo_jax.cli.config import Config, ModelConfig, RunConfig, dump_config, load_config
from dpo_jax.cli.flags import parse
from dpo_jax.cli.preflight import run as preflight

ROOT = Path(__file__).parent.parent
ROWS = [{"prompt": f"{number} and", "chosen": " one more.", "rejected": " no."} for number in range(10)]


def write_rows(file, rows=ROWS):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_model(folder):
    shutil.copytree(GOLDEN / "gpt_neox" / "init", folder, dirs_exist_ok=True)
    for file in (GOLDEN / "tokenizer").iterdir():
        shutil.copy(file, folder)


def make_place(tmp_path, monkeypatch):
    """A folder with data, a starting policy in a run directory, and a configuration of both."""
    monkeypatch.chdir(tmp_path)
    for split in ("train", "test"):
        write_rows(tmp_path / "pairs" / f"{split}.jsonl")
    write_model(tmp_path / "runs" / "one" / "sft" / "export")
    write_config(tmp_path)
    return tmp_path


@pytest.fixture
def place(tmp_path, monkeypatch):
    return make_place(tmp_path, monkeypatch)


def write_config(place, **sections):
    data = {"path": "pairs", "max_length": 32, "max_prompt_length": 16, "layout": "shared"}
    whole = {"run": {"dir": "runs/one"}, "data": data, "dpo": {"batch": 4}}
    for section, options in sections.items():
        whole[section] = whole.get(section, {}) | options
    (place / "c.yaml").write_text(yaml.safe_dump(whole))


def check(name, *flags, capsys, config="c.yaml"):
    code = program.main([name, config, *flags])
    told = capsys.readouterr()
    return code, told.out + told.err


def test_it_says_what_would_run_and_leaves_nothing_behind(place, capsys):
    before = sorted(place.rglob("*"))
    code, told = check("dpo", "--check", capsys=capsys)
    assert code == 0
    assert told.splitlines() == [
        "dpo c.yaml: no problems found",
        "  data     pairs: train (trl, 1 file, 10 rows), test (trl, 1 file, 10 rows)",
        "  model    runs/one/sft/export: gpt_neox, 2 layers x 64",
        "  devices  one",
        "  training batches of 4, 1 epochs, at most 3 steps",
        "  run      runs/one/dpo",
    ]
    assert sorted(place.rglob("*")) == before


def test_it_needs_no_jax(place):
    code = """
import sys
from dpo_jax.cli.main import main
assert main(["dpo", "c.yaml", "--check"]) == 0
assert main(["eval", "c.yaml", "--check-after=dpo"]) == 0
assert main(["dpo", "c.yaml", "--run.devices", "mesh", "--check-devices=2"]) == 0
assert main(["agree", "c.yaml", "--agree.ratings", "pairs/train.jsonl", "--check"]) == 0
assert main(["bench", "c.yaml", "--bench.contenders", "jax-live", "--bench.lengths", "30/4/4", "--check"]) == 2  # no sizes
heavy = {"jax", "flax", "transformers", "orbax", "tensorflow_datasets", "huggingface_hub"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(ROOT)}, cwd=place, capture_output=True)


def a_pointer(place):
    (place / "pairs" / "train.jsonl").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def no_tokenizer(place):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (place / "runs/one/sft/export" / name).unlink()


def another_config(place):
    file = place / "runs/one/sft/export/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_hidden_layers": 3}))


def half_a_vocabulary(place):
    file = place / "runs/one/sft/export/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"vocab_size": 100}))


def other_values(name, **values):
    def damage(place):
        file = place / "runs/one/sft/export" / name
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return damage


FAULTS = {
    "no such folder": (lambda p: shutil.rmtree(p / "pairs"), [], 65, "pairs: bad_layout: no such file or folder"),
    "another split": (
        lambda p: None,
        ["--data.test-split", "validation"],
        65,
        "no file of split 'validation'; .*; choose among the splits test, train",
    ),
    "git-lfs": (a_pointer, [], 65, "train.jsonl: git_lfs_pointer"),
    "other columns": (
        lambda p: write_rows(p / "pairs/train.jsonl", [{"a": "b"}]),
        [],
        65,
        "no known format has the columns 'a'",
    ),
    "texts": (lambda p: None, ["--data.source", "snippets"], 2, "snippets holds texts, not preferences"),
    "no model": (lambda p: shutil.rmtree(p / "runs/one/sft"), [], 2, "Run `dpo-jax sft` first"),
    "no weights": (lambda p: (p / "runs/one/sft/export/model.safetensors").unlink(), [], 2, "holds no weights"),
    "no tokenizer": (no_tokenizer, [], 2, "tokenizer"),
    "a damaged config": (
        other_values("config.json", hidden_size="x"),
        [],
        74,
        "config.json: hidden_size = .x. is not a",
    ),
    "a damaged tokenizer": (other_values("tokenizer.json", model={}), [], 74, "dpo.policy: .*tokenizer"),
    "no supported family": (other_values("config.json", model_type="bert"), [], 2, "model_type .bert. is not supported"),
    "other weights": (another_config, [], 2, "missing in .*model.safetensors: not a complete gpt_neox"),
    "other vocabulary": (half_a_vocabulary, [], 2, "vocab|shape"),
    "too long": (lambda p: None, ["--data.max-length", "4096"], 2, "4096 tokens do not fit the"),
    "batch": (lambda p: None, ["--run.devices", "pmap", "--dpo.batch", "6"], 2, "dpo.batch: 6 cannot be split over 4 devices"),
    "mesh": (lambda p: None, ["--run.devices", "mesh", "--mesh.fsdp", "3"], 2, "3 does not equal the 4 devices"),
    "a file in the way": (lambda p: (p / "runs/one/dpo").touch(), [], 74, "runs/one/dpo"),
    "an old run": (
        lambda p: (p / "runs/one/dpo/checkpoints/3").mkdir(parents=True),
        ["--run.no-resume"],
        2,
        "holds checkpoints",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_check_finds_what_the_command_refuses(name, place, capsys):
    damage, flags, code, words = FAULTS[name]
    damage(place)
    found = check("dpo", *flags, "--check-devices=4", capsys=capsys)
    assert found[0] == code, found
    done = check("dpo", *flags, capsys=capsys)
    assert done[0] == code, done
    for told in (found[1], done[1]):
        assert re.search(words, told), told


def test_all_problems_are_told_and_the_first_is_the_code(place, capsys):
    shutil.rmtree(place / "pairs")
    code, told = check("dpo", "--check-devices=3", "--run.devices", "pmap", "--dpo.policy", "nowhere/at/all", capsys=capsys)
    assert code == 65
    first, *others = told.splitlines()
    assert first.startswith("dpo-jax: pairs: bad_layout")
    assert [line.partition(":")[0] for line in others] == ["dpo.policy", "dpo.batch"]


def test_results_of_earlier_commands_are_taken_for_granted(place, capsys):
    shutil.rmtree(place / "runs")
    for name, after in (("dpo", "sft"), ("eval", "sft,refs,dpo"), ("export", "sft,dpo"), ("export", "sft"), ("sample", "dpo")):
        assert check(name, "--check", capsys=capsys)[0] == 2
        code, told = check(name, f"--check-after={after}", capsys=capsys)
        assert code == 0, told
        assert f": will be made by: dpo-jax {after.rpartition(',')[2]}\n" in told
    reward = ["--ppo.reward-model", "runs/one/reward-model/export", "--data.source", "reviews", "--data.path", "None"]
    assert check("ppo", *reward, "--check-after=sft,reward-model", capsys=capsys)[0] == 0
    assert check("ppo", *reward, "--check-after=sft", capsys=capsys)[0] == 2
    assert check("dpo", "--data.path", "runs/one/label", "--check-after=sft,label", capsys=capsys)[0] == 0
    assert check("dpo", "--dpo.policy", "runs/two/sft/export", "--check-after=sft", capsys=capsys)[0] == 2  # another run's


def test_a_disk_of_other_machines_is_not_looked_for(place, capsys):
    far = ["--run.dir", "/mnt/far/hh", "--data.path", "/mnt/far/data"]
    code, told = check("dpo", *far, "--check-elsewhere=/mnt/far", capsys=capsys)
    assert code == 0, told
    assert told.count("on the hosts, not visible from here") == 3
    wrong = check("dpo", *far, "--check-elsewhere=/mnt/far", "--check-devices=6", "--run.devices", "mesh", capsys=capsys)
    assert wrong[0] == 2
    assert "dpo.batch: 4 cannot be split over 6 devices" in wrong[1]


def test_a_run_that_is_there_is_continued_or_refused(place, capsys):
    saved = place / "runs/one/dpo"
    (saved / "checkpoints" / "2").mkdir(parents=True)
    (saved / "config.yaml").write_text(dump_config(load_config("c.yaml")))
    assert "runs/one/dpo, continues after step 2" in check("dpo", "--check", capsys=capsys)[1]
    assert check("dpo", "--dpo.microbatches", "2", "--check", capsys=capsys)[0] == 0  # free to change
    code, told = check("dpo", "--dpo.beta", "0.5", "--run.seed", "1", "--check", capsys=capsys)
    assert code == 2
    assert "runs/one/dpo holds a run with other settings:\n  beta: was 0.1, is 0.5\n  seed: was 0, is 1\n" in told
    with open(saved / "run.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("pid 7")
        lock.flush()
        code, told = check("dpo", "--check", capsys=capsys)
    assert (code, "another run (pid 7) uses runs/one/dpo" in told) == (73, True)
    assert check("dpo", "--check", capsys=capsys)[0] == 0


@pytest.mark.parametrize(
    "flag", ["--check-devices=0", "--check-devices=", "--check-after", "--check-nothing=1", "--check-after=sft,dop"]
)
def test_a_check_that_is_not_understood_is_refused(place, capsys, flag):
    code, told = check("dpo", flag, capsys=capsys)
    assert code == 2
    assert told.startswith(f"dpo-jax: {flag}: ")


def test_one_device_of_many_is_told_or_refused(place, capsys):
    assert "one of 4: run.devices mesh or pmap takes all" in check("dpo", "--check-devices=4", capsys=capsys)[1]
    code, told = check("dpo", "--check-devices=16", "--distributed", "auto", capsys=capsys)
    assert (code, "single uses one device, but 16 are on several hosts" in told) == (2, True)


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("bench", ["--bench.lengths", "30/4/4", "--bench.contenders", "jax-live,jax-cached"]),
        ("sample", ["--sample.prompts-file", "pairs/train.jsonl", "--sample.policy", "runs/one/sft/export"]),
        ("plan", ["--topology", "h100:4", "--model.vocab-size", "512"]),
        ("study", ["--study.a", "pairs/train.jsonl", "--study.b", "pairs/test.jsonl"]),
        ("frontier", []),
    ],
)
def test_what_brings_its_own_data_needs_none(place, capsys, monkeypatch, name, flags):
    monkeypatch.setattr("dpo_jax.runtime.chips.plugin_is_here", lambda: True)
    sizes = {"family": "gpt_neox", "width": 64, "layers": 2, "heads": 4, "max_positions": 64}
    write_config(place, data={"path": None, "source": "reviews" if name == "frontier" else "files"}, model=sizes)
    code, told = check(name, *flags, "--check", capsys=capsys)
    assert code == 0, told


# A model and its devices

NEW = {"family": "gpt_neox", "width": 32, "layers": 1, "heads": 2, "max_positions": 64}
UNEVEN = {
    "embed": (6, ["--mesh.fsdp", "6"], "axis 'embed' of 32 cannot be split over fsdp 6; the nearest size that can is 2"),
    "heads": (4, ["--mesh.fsdp", "1", "--mesh.tensor", "4"], "axis 'kv_heads' of 2 x 16 cannot be split over tensor 4; "),
    "vocabulary": (4, ["--mesh.fsdp", "1", "--mesh.tensor", "4", "--model.vocab-size", "515"], "axis 'vocab' of 515 cannot"),
}


@pytest.mark.parametrize("name", UNEVEN)
@pytest.mark.parametrize(
    ("command", "scope"), [("sft", []), ("dpo", ["--check-after=sft"]), ("eval", ["--check-after=dpo"]), ("hub", [])]
)
def test_a_model_that_does_not_divide_among_the_devices_is_refused(place, capsys, name, command, scope):
    devices, flags, words = UNEVEN[name]
    shutil.rmtree(place / "runs")
    write_config(place, model=NEW | ({"path": "org/name"} if command == "hub" else {}), run={"devices": "mesh"})
    flags = [*flags, "--data.layout", "packed", *scope, f"--check-devices={devices}"]
    code, told = check("sft" if command == "hub" else command, *flags, capsys=capsys)
    assert (code, words in told) == (2, True), told
    assert check("sft", "--data.layout", "packed", f"--check-devices={2 if devices == 6 else devices}", capsys=capsys)[0] == 0


def test_training_refuses_the_same_mesh_in_the_same_words(place, capsys):
    write_config(place, model=NEW, run={"devices": "mesh"})
    devices, flags, words = UNEVEN["heads"]
    flags = [*flags, "--data.layout", "packed", "--model.vocab-size", "512"]
    shutil.rmtree(place / "runs/one/sft")  # no run has made it
    done = check("sft", *flags, capsys=capsys)  # on the 4 devices of the tests
    assert (done[0], devices, words in done[1]) == (2, 4, True), done


def test_a_plan_is_checked_with_its_mesh_and_its_compiler(place, capsys, monkeypatch):
    write_config(place, model=NEW | {"vocab_size": 512}, dpo={"batch": 48})
    plan = ["--dpo.policy", "org/name", "--check"]
    monkeypatch.setattr("dpo_jax.runtime.chips.plugin_is_here", lambda: True)
    code, told = check("plan", *plan, "--topology", "h100:6", capsys=capsys)
    assert (code, "axis 'embed' of 32 cannot be split over fsdp 6" in told) == (2, True), told
    assert check("plan", *plan, "--topology", "h100:4", capsys=capsys)[0] == 0
    code, told = check("plan", *plan, "--topology", "h100:4", "--mesh.fsdp", "3", capsys=capsys)
    assert (code, "3 does not equal the 4 devices" in told) == (2, True), told
    monkeypatch.setattr("dpo_jax.runtime.chips.plugin_is_here", lambda: False)
    code, told = check("plan", *plan, "--topology", "h100:4", "--mesh.fsdp", "3", capsys=capsys)
    assert told.startswith("dpo-jax: mesh: ")
    assert (code, "compiling for h100 needs JAX's CUDA plugin" in told) == (2, True), told


def test_devices_that_get_nothing_are_told(place, capsys):
    packed = ["--run.devices", "pmap", "--data.layout", "packed"]
    code, told = check("dpo", *packed, "--check-devices=8", capsys=capsys)
    assert code == 0
    assert told.startswith("dpo c.yaml: no error, 1 warning\n")
    assert "  warning  dpo.batch: with 4 examples a step, at least 4 of the 8 devices are idle\n" in told
    assert "warning" not in check("dpo", *packed, "--check-devices=4", capsys=capsys)[1]


# What is easily overlooked


def test_a_misspelled_folder_is_not_silently_a_model_of_the_hub(place, capsys):
    code, told = check("dpo", "--dpo.policy", "runs/nomodel", "--check", capsys=capsys)
    assert code == 0  # the Hub may have it
    assert "no error, 1 warning" in told
    assert "dpo.policy: there is no folder runs/nomodel, though there is runs/: is it misspelled?" in told
    assert "tokenizer.path: there is no" in check("dpo", "--tokenizer.path", "pairs/t", "--check", capsys=capsys)[1]
    assert "no problems found" in check("dpo", "--dpo.policy", "org/name", "--check", capsys=capsys)[1]


def a_run(place, *flags, rows=10, name="dpo"):
    """The records of a run that took two steps, as the training of the configuration in `place` leaves them."""
    config = parse(name, ["c.yaml", *flags])
    folder = place / "runs/one" / name
    (folder / "checkpoints" / "2").mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_config(config))
    files = (
        []
        if config.data.source == "reviews"
        else [{"path": "train.jsonl", "bytes": (place / "pairs/train.jsonl").stat().st_size}]
    )
    (folder / "data_report.json").write_text(json.dumps({"train": {"rows": rows, "files": files}}))
    return config


def test_a_run_on_other_data_is_refused_or_told(place, capsys):
    reviews = ["--data.source", "reviews", "--data.path", "None", "--data.reviews-train"]
    a_run(place, *reviews, "256", rows=256)
    assert check("dpo", *reviews, "256", "--check", capsys=capsys)[0] == 0
    code, told = check("dpo", *reviews, "128", "--check", capsys=capsys)
    assert code == 2
    assert "runs/one/dpo holds a run with other data:\n  train split, rows: was 256, is 128\n" in told
    assert check("dpo", *reviews, "512", "--data.max-train", "256", "--check", capsys=capsys)[0] == 0
    shutil.rmtree(place / "runs/one/dpo")
    a_run(place)
    assert "warning" not in check("dpo", "--check", capsys=capsys)[1]
    assert (
        "data.max_length: was 32, is 30: the run continues"
        in check("dpo", "--data.max-length", "30", "--check", capsys=capsys)[1]
    )
    write_rows(place / "pairs/train.jsonl", ROWS * 2)
    told = check("dpo", "--check", capsys=capsys)[1]
    assert "train.jsonl, bytes: has other contents; train split, rows: was 10, is 20: the run continues only if" in told


def test_a_finished_run_is_told(place, capsys):
    config = a_run(place)
    (place / "runs/one/fixed.json").write_text('{"date": "2026-11-01", "revisions": {}}')
    settings = finished._settings(fixed.fix(config), COMMANDS["dpo"].reads)  # as the command keeps them
    record = {"version": finished.VERSION, "settings": settings}
    (place / "runs/one/dpo/finished.json").write_text(json.dumps(record))
    assert "runs/one/dpo, finished after step 2: nothing is left to do" in check("dpo", "--check", capsys=capsys)[1]
    assert "continues after step 2" in check("dpo", "--dpo.microbatches", "2", "--check", capsys=capsys)[1]


def test_what_a_run_directory_fixes_must_be_readable(place, capsys):
    (place / "runs/one/fixed.json").write_text('{"date": "20')
    for flags in (["--check"], []):
        code, told = check("dpo", *flags, capsys=capsys)
        assert (code, "runs/one/fixed.json: damaged" in told) == (2, True), told


def without(monkeypatch, *packages):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in packages else find(name, *rest))


def test_packages_of_each_command_are_looked_for(place, capsys, monkeypatch):
    write_config(place, model=NEW)
    without(monkeypatch, "sklearn", "array_record", "vaderSentiment")
    monkeypatch.setattr("dpo_jax.bench.race.installed", lambda packages, python: False)
    snippets = ["--frontier.reward", "linear", "--data.source", "snippets"]
    (place / "tfds/1.0.0").mkdir(parents=True)
    for name in ("features.json", "dataset_info.json"):
        (place / "tfds/1.0.0" / name).write_text("{}")
    for name, flags, words in (
        ("bench", ["--bench.lengths", "30/4/4"], "has no torch or no trl: "),
        ("bench", ["--bench.sampling", "2/8/8"], "bench.sampling: .* has no torch: "),
        ("optimum", snippets, "frontier.reward: needs the package scikit-learn: "),
        ("optimum", ["--frontier.second-reward", "vader"], "frontier.second_reward: needs the package vaderSentiment: "),
        ("prepare", [], "prepare: needs the package array_record"),
        ("dpo", ["--data.path", "tfds"], "data.source: files: needs the package array_record"),
    ):
        code, told = check(name, *flags, "--check", capsys=capsys)
        assert code in (2, 65), told
        assert re.search(words, told), told
    assert "scikit-learn" not in check("optimum", *snippets, "--check-elsewhere=/mnt", capsys=capsys)[1]


def test_ratings_that_are_missing_are_told(place, capsys):
    for flags, words in (
        ([], "agree.ratings: runs/one/study/ratings is empty"),
        (["--agree.ratings", "pairs/no.jsonl"], "pairs/no.jsonl: no such file"),
        (["--agree.ratings", "pairs/train.jsonl", "--agree.key", "no.json"], "agree.key: no.json does not exist"),
        (["--agree.ratings", "pairs/train.jsonl", "--agree.judge", "no.jsonl"], "agree.judge: no.jsonl: no such file"),
    ):
        code, told = check("agree", *flags, "--check", capsys=capsys)
        assert (code, words in told) == (2, True), told


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_that_reads_a_configuration_can_be_checked(name):
    assert preflight.LOOKS[name]


def test_tfds_folders_are_known_by_their_description(place, capsys):
    folder = place / "tfds" / "preferences" / "1.0.0"
    folder.mkdir(parents=True)
    (folder / "features.json").write_text("{}")
    splits = [{"name": "train", "shardLengths": ["7", "5"]}, {"name": "held_out", "shardLengths": ["3"]}]
    (folder / "dataset_info.json").write_text(json.dumps({"splits": splits}))
    flags = ["--data.source", "tfds", "--data.path", "tfds", "--check"]
    code, told = check("dpo", *flags, capsys=capsys)
    assert code == 65
    assert "no split 'test'; there are train, held_out" in told
    code, told = check("dpo", *flags, "--data.test-split", "held_out", capsys=capsys)
    assert code == 0
    assert "train (TFDS, 12 rows), held_out (TFDS, 3 rows)" in told


# Model folders that are not there


def remedy_of(place, path, *, model=None, **run):
    config = Config(run=RunConfig(dir=str(place / "one"), **run), model=ModelConfig(path=model))
    return model_folders.remedy(config, f"{place / path}")


def test_a_missing_model_is_named_with_what_is_left_to_do(tmp_path):
    assert remedy_of(tmp_path, "one/dpo/export").startswith(f"There is no run directory {tmp_path / 'one'}: check --run.dir")
    assert "sft` first, or start from model.path itself: --dpo." in remedy_of(tmp_path, "one/sft/export", model="a/b")
    (tmp_path / "one").mkdir()
    assert remedy_of(tmp_path, "one/sft/export") == "Run `dpo-jax sft` first, or name the model."
    assert remedy_of(tmp_path, "one/dpo/export") == "Run `dpo-jax sft`, then `dpo-jax dpo` first, or name the model."
    (tmp_path / "one/sft/export").mkdir(parents=True)
    assert remedy_of(tmp_path, "one/dpo/export") == "Run `dpo-jax dpo` first, or name the model."
    assert remedy_of(tmp_path, "one/reward-model/export") == "Run `dpo-jax reward-model` first, or name the model."
    for step in ("4", "12", "quarantine"):
        (tmp_path / "one/dpo/checkpoints" / step).mkdir(parents=True)
    interrupted = remedy_of(tmp_path, "one/dpo/export")
    assert "has step 12. Continue it with `dpo-jax dpo`, which writes the model when it ends" in interrupted
    assert interrupted.endswith("with `dpo-jax export`.")
    (tmp_path / "one/sft/checkpoints/3").mkdir(parents=True)
    assert remedy_of(tmp_path, "one/sft/export").endswith(
        f"`dpo-jax export --export.checkpoint {tmp_path}/one/sft/checkpoints`."
    )
    assert "If gs://b/x/dpo holds steps, continue" in remedy_of(tmp_path, "one/dpo/export", checkpoints="gs://b/x")
    assert remedy_of(tmp_path, "one/other") == ""


def test_an_interrupted_run_is_not_sent_back_to_sft(place, capsys):
    (place / "runs/one/dpo/checkpoints/20").mkdir(parents=True)
    code, told = check("eval", capsys=capsys)
    assert code == 2
    assert "no model folder runs/one/dpo/export" in told
    assert "runs/one/dpo/checkpoints has step 20. Continue it with `dpo-jax dpo`" in told
    assert "dpo-jax sft" not in told


# A configuration to begin with


def test_the_file_to_fill_in_passes_its_check_once_the_data_are_there(place, capsys):
    assert program.main(["init", "new/mine.yaml"]) == 0
    told = capsys.readouterr().out
    commands = re.findall(r"^  (dpo-jax .*?)(?:  |$)", told, flags=re.MULTILINE)
    assert [words.split()[1] for words in commands] == ["dpo", "audit", "sft", "dpo", "eval"]
    assert program.main(["init", "new/mine.yaml"]) == 2
    assert "new/mine.yaml already exists and is left as it is" in capsys.readouterr().err
    assert check("sft", "--check", config="new/mine.yaml", capsys=capsys)[0] == 65
    shutil.move(place / "pairs", place / "data" / "mine")
    for name, after in (("sft", ""), ("dpo", "-after=sft"), ("eval", "-after=sft,dpo")):
        code, told = check(name, f"--check{after}", config="new/mine.yaml", capsys=capsys)
        assert code == 0, told
    section = load_config("new/mine.yaml").dpo
    assert dataclasses.replace(section, lr=1e-6, microbatches=1, warmup_steps=150) == Config().dpo
    assert program.main(["init", "--help"]) == 0
    assert program.main(["init", "a.yaml", "b.yaml"]) == 2
