"""A finished run is recognized by its files alone, and by nothing less than all of them."""

import dataclasses
import json
import shutil
import subprocess
import sys

import pytest

from dpo_jax.cli.command_table import COMMANDS
from dpo_jax.cli.config import load_config
from dpo_jax.cli.finished import RECORD, FinishedRun
from dpo_jax.cli.fixed import fix
from dpo_jax.runtime.rundir import RunDir, RunLocked

CONFIG = """
run: {{dir: {0}/run}}
data: {{path: {0}/data}}
dpo: {{policy: {0}/start, batch: 16}}
"""
FILES = (
    *("data/train.jsonl", "data/test.jsonl", "start/config.json", "start/model.safetensors"),
    *(f"run/dpo/{name}" for name in ("config.yaml", "env.json", "data_report.json", "README.md", "plots/loss.png")),
    *(f"run/dpo/export/{name}" for name in ("config.json", "model.safetensors", "tokenizer.json", "README.md")),
    *("run/dpo/checkpoints/8/files.json", "run/dpo/checkpoints/8/state/d/0"),
)


@pytest.fixture
def folder(tmp_path):
    """What a run of `dpo` reads and leaves, as far as it is looked at, with its record."""
    for name in FILES:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"the content of {name}")
    (tmp_path / "run/dpo/metrics.jsonl").write_text('{"step": 7}\n{"step": 8, "eval/loss": 0.5}\n')
    (tmp_path / "tiny.yaml").write_text(CONFIG.format(tmp_path))
    finished(tmp_path).record()
    return tmp_path


def finished(folder, **changes):
    config = fix(load_config(folder / "tiny.yaml"))
    for section, values in changes.items():
        config = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})
    return FinishedRun("dpo", config, COMMANDS["dpo"].reads)


def test_a_finished_run_says_so_without_jax_or_reading_its_data(folder):
    program = (
        "import sys\nfrom dpo_jax.cli.main import main\ncode = main(sys.argv[1:])\n"
        "heavy = {'jax', 'numpy', 'transformers', 'tokenizers', 'safetensors', 'orbax', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\nsys.exit(code)"
    )
    told = subprocess.run(
        [sys.executable, "-c", program, "dpo", folder / "tiny.yaml"], capture_output=True, text=True, check=False
    )
    assert told.returncode == 0, told.stderr  # of these data and this model not a byte could be used
    assert told.stdout.splitlines() == [
        f"{folder}/run/dpo is finished after 8 steps, and nothing has changed since",
        f"the policy is in {folder}/run/dpo/export",
    ]


@pytest.mark.parametrize("how", ["changed", "gone"])
@pytest.mark.parametrize("name", [*FILES, "run/dpo/metrics.jsonl"])
def test_whatever_differs_is_left_to_training(folder, name, how):
    card, file = name.endswith("README.md"), folder / name
    content = file.read_bytes()
    if how == "gone":
        file.unlink()
    else:
        file.write_bytes(content[:-1] + b"!")
    # `dpo-jax eval` writes its table into the model cards; but they have to be there.
    assert finished(folder).steps() == (8 if card and how == "changed" else None)
    file.write_bytes(content)
    assert finished(folder).steps() == 8


@pytest.mark.parametrize("new", ["data/train-2.jsonl", "start/extra.safetensors", "run/dpo/checkpoints/9/record"])
def test_a_file_more_is_a_change(folder, new):
    (folder / new).parent.mkdir(exist_ok=True)
    (folder / new).write_text("new")
    assert finished(folder).steps() is None


def test_files_behind_a_linked_folder_are_compared(folder):
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "a.jsonl").write_text("one")
    (folder / "elsewhere" / "loop").symlink_to(folder / "data", target_is_directory=True)
    (folder / "data" / "train").symlink_to(folder / "elsewhere", target_is_directory=True)
    finished(folder).record()
    assert finished(folder).steps() == 8
    (folder / "elsewhere" / "a.jsonl").write_text("two")
    assert finished(folder).steps() is None


def test_a_readme_of_data_counts_and_that_of_a_model_does_not(folder):
    """The first may say which files are read; the second is written anew by `eval`."""
    (folder / "start" / "README.md").write_text("new")
    assert finished(folder).steps() == 8
    (folder / "data" / "README.md").write_text("new")
    assert finished(folder).steps() is None


@pytest.mark.parametrize(
    "changes",
    [
        {"dpo": {"beta": 0.2}},
        {"data": {"max_train": 5}},
        {"run": {"resume": False}},
        {"run": {"distributed": "auto"}},
        {"run": {"seed": 1}},
        {"dpo": {"policy": "organization/model"}},
    ],
    ids=str,
)
def test_another_setting_is_left_to_training(folder, changes):
    assert finished(folder, **changes).steps() is None
    assert finished(folder).steps() == 8


def test_the_settings_of_other_commands_do_not_matter(folder):
    assert finished(folder, eval={"samples": 3}, sft={"lr": 0.5}, run={"process_id": 0}).steps() == 8


def test_another_version_of_the_code_is_left_to_training(folder):
    record = json.loads((folder / "run/dpo" / RECORD).read_text())
    for name in ("code", "jax"):
        other = {**record, "made_by": {**record["made_by"], name: "another"}}
        (folder / "run/dpo" / RECORD).write_text(json.dumps(other))
        assert finished(folder).steps() is None
    (folder / "run/dpo" / RECORD).write_text("{")
    assert finished(folder).steps() is None


def test_what_changes_while_a_run_is_running_was_not_read_by_it(folder):
    (folder / "run/dpo" / RECORD).unlink()
    run = finished(folder)
    (folder / "data/train.jsonl").write_text("edited after the run had read it")
    run.record()
    assert not (folder / "run/dpo" / RECORD).exists()


def test_a_run_in_use_is_not_called_finished(folder):
    with RunDir(folder / "run/dpo"), pytest.raises(RunLocked):
        finished(folder).steps()


def test_large_files_are_told_by_size_and_time(folder, monkeypatch):
    monkeypatch.setattr("dpo_jax.cli.finished.HASHED_BYTES", 8)
    assert finished(folder).steps() is None
    finished(folder).record()
    assert finished(folder).steps() == 8
    weights = folder / "start/model.safetensors"
    weights.write_bytes(weights.read_bytes()[::-1])
    assert finished(folder).steps() is None


@pytest.mark.parametrize("what", ["a link to nothing", "too many files", "no plots"])
def test_a_run_without_a_record_is_no_error(folder, monkeypatch, what):
    (folder / "run/dpo" / RECORD).unlink()
    if what == "a link to nothing":
        (folder / "data/link.jsonl").symlink_to(folder / "nothing")
    elif what == "too many files":
        monkeypatch.setattr("dpo_jax.cli.finished.MOST_FILES", 3)
    else:
        shutil.rmtree(folder / "run/dpo/plots")
    run = finished(folder)
    assert run.steps() is None
    run.record()
    assert not (folder / "run/dpo" / RECORD).exists()
