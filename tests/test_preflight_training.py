"""`--check` of what is trained and how it is rendered: adapters' layers, named parameters, chat templates, unread sections."""

import dataclasses
import re
import shutil
import types

import jax
import numpy as np
import optax
import pytest
from conftest import GOLDEN
from test_preflight import ROWS, check, make_place, write_config, write_model, write_rows

from dpo_jax.cli import announcement
from dpo_jax.cli.commands import label
from dpo_jax.cli.config import Config, ConfigError, DataConfig, DpoConfig, ModelConfig, RunConfig, SftConfig
from dpo_jax.cli.earlier import earlier_run
from dpo_jax.cli.preflight.devices import empty_rows
from dpo_jax.models.decoder import make_model
from dpo_jax.models.families import decoder_config
from dpo_jax.models.folder import read_config
from dpo_jax.models.partial import chosen_parameters
from dpo_jax.models.targets import chosen_names, parameters
from dpo_jax.runtime.rundir import RunDir
from dpo_jax.step import init_state

SPEAKERS = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
CHATS = [{name: [{"role": role, "content": name}] for name, role in SPEAKERS.items()}]


@pytest.fixture
def place(tmp_path, monkeypatch):
    return make_place(tmp_path, monkeypatch)


FAULTS = {
    "adapter": (
        ["--lora.rank", "2", "--lora.targets", "q_proj"],
        2,
        "lora.targets: a gpt_neox has no q_proj; it has all, attention, mlp, query, query_key_value,",
    ),
    "trainable": (
        ["--dpo.trainable", "head"],
        2,
        "dpo.trainable: no parameter matches 'head'; there are last_layer, last_layers:N, final_norm.bias,",
    ),
    "layers": (["--dpo.trainable", "last_layers:2"], 2, "dpo.trainable: last_layers:2: the model has 2 layers"),
    "all": (["--dpo.trainable", "*"], 2, "dpo.trainable: all parameters are named"),
    "chats": (
        ["--data.path", "chats"],
        65,
        "train.jsonl:11: chat_template: .*: pass a folder whose tokenizer has one: --tokenizer.path FOLDER",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_check_finds_what_training_refuses(name, place, capsys):
    flags, code, words = FAULTS[name]
    shutil.copytree(place / "pairs", place / "chats")
    write_rows(place / "chats" / "train.jsonl", [*ROWS, *CHATS])
    for told in (check("dpo", *flags, "--check", capsys=capsys), check("dpo", *flags, capsys=capsys)):
        assert told[0] == code, told
        assert re.search(words, told[1]), told


def test_sweeps_know_what_an_adapter_trains(place, capsys):
    """`frontier` also finds it; `dialogue` and `robust` share its checks."""
    write_config(place, data={"source": "reviews", "path": None}, model={"path": "runs/one/sft/export"})
    flags = ["--dpo.policy", "runs/one/sft/export", "--lora.rank", "2", "--check"]
    code, told = check("frontier", *flags, "--lora.targets", "q_proj", capsys=capsys)
    assert (code, "lora.targets: a gpt_neox has no q_proj" in told) == (2, True), told
    assert "lora.targets" not in check("frontier", *flags, capsys=capsys)[1]


def test_an_adapter_needs_a_model(place, capsys):
    sizes = ["--model.family", "gpt_neox", "--model.width", "16", "--model.layers", "1", "--model.heads", "2"]
    told = check("sft", *sizes, "--model.max-positions", "64", "--lora.rank", "2", "--check", capsys=capsys)[1]
    assert "lora.rank: an adapter needs a pretrained model, but this one is new; set model.path" in told


def test_a_model_that_sft_will_make_is_checked_by_its_start(place, capsys):
    shutil.move("runs/one/sft/export", "start")
    flags = ["--model.path", "start", "--check-after=sft", "--dpo.trainable"]
    assert check("dpo", *flags, "final_norm.*", capsys=capsys)[0] == 0
    assert "no parameter matches 'norm.*'" in check("dpo", *flags, "norm.*", capsys=capsys)[1]
    assert "sft.trainable: no parameter" in check("sft", *flags[:2], "--sft.trainable", "norm.*", "--check", capsys=capsys)[1]


def test_chats_need_a_template_wherever_the_tokenizer_comes_from(place, capsys):
    write_rows(place / "pairs" / "train.jsonl", CHATS)
    needed = "conversational rows need a tokenizer with a chat template"
    assert needed in check("dpo", "--check", capsys=capsys)[1]
    assert needed in check("audit", "--check", capsys=capsys)[1]  # a tokenizer is trained
    write_model(place / "chat")
    (place / "chat" / "chat_template.jinja").write_text("{{ messages }}")
    assert check("dpo", "--tokenizer.path", "chat", "--check", capsys=capsys)[0] == 0
    assert check("dpo", "--dpo.policy", "chat", "--check", capsys=capsys)[0] == 0
    assert check("dpo", "--tokenizer.path", "org/name", "--check", capsys=capsys)[0] == 0  # of the Hub: not known


def test_a_mesh_that_no_device_would_follow_is_refused(place, capsys):
    """Like an option of LoRA without a rank. `plan` and `audit` use no devices of their own."""
    flags = ["--mesh.fsdp", "2", "--check-devices=4"]
    for devices in ([], ["--run.devices", "pmap"]):
        code, told = check("dpo", *flags, *devices, capsys=capsys)
        assert (code, "mesh.fsdp: is read only with run.devices mesh, which is" in told) == (2, True), told
    assert check("dpo", *flags, "--mesh.data", "2", "--run.devices", "mesh", capsys=capsys)[0] == 0
    assert check("audit", *flags[:2], "--check", capsys=capsys)[0] == 0
    write_config(place, mesh={"tensor": 2})
    assert re.search(r"c.yaml:\d+: mesh.tensor: is read only", check("dpo", "--check", capsys=capsys)[1])
    assert check("dpo", "--run.devices", "mesh", "--check-devices=4", "--mesh.fsdp", "2", capsys=capsys)[0] == 0


def test_the_file_of_a_mesh_can_be_tried_on_one_device_by_one_flag(place, capsys):
    write_config(place, run={"devices": "mesh"}, mesh={"tensor": 2})
    assert check("dpo", "--run.devices", "single", "--check", capsys=capsys)[0] == 0
    code, told = check("dpo", "--run.devices", "single", "--mesh.fsdp", "2", "--check", capsys=capsys)
    assert (code, "mesh.fsdp: is read only with run.devices mesh, which is single" in told) == (2, True), told


CASES = sorted(folder.name for folder in (GOLDEN / "models").iterdir())


@pytest.mark.parametrize("case", CASES)
def test_parameters_have_the_names_of_the_models_variables(case):
    """`trainable` is read alike with and without JAX."""
    config = decoder_config(read_config(GOLDEN / "models" / case))
    model = make_model(config)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0)))["params"]
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    assert parameters(config) == [".".join(key.key for key in path) for path, _ in leaves]
    if case == "gpt_neox":
        assert chosen_names("last_layer,final_norm.*", parameters(config), layers=config.layers) == chosen_parameters(
            "last_layer,final_norm.*", model
        )


@pytest.mark.parametrize(
    ("batch", "microbatches", "shards", "words"),
    [
        (64, 8, 8, None),
        (64, 16, 1, None),  # one device skips empty microbatches
        (4, 1, 8, "batch: with 4 examples a step, at least 4 of the 8 devices are idle"),
        (64, 16, 8, "microbatches: 16 x 8 devices make 128 rows a step, of which 64 examples fill at most 64: with 8 or less"),
    ],
)
def test_rows_without_an_example_are_told(batch, microbatches, shards, words):
    found = empty_rows(DpoConfig(batch=batch, microbatches=microbatches), shards)
    assert found is words is None or found.startswith(words)


def test_a_run_does_not_start_from_the_folder_that_it_writes(place):
    for task, section, changes in (
        ("dpo", DpoConfig(policy="runs/one/dpo/export"), {}),
        ("dpo", DpoConfig(policy="x", reference="runs/two/../one/dpo/export"), {}),
        ("sft", SftConfig(), {"model": ModelConfig(path="runs/one/sft/export")}),
    ):
        config = Config(run=RunConfig(dir="runs/one"), dpo=section if task == "dpo" else DpoConfig(), **changes)
        with pytest.raises(ConfigError, match="is where this run writes its own model; choose another --run.dir"):
            earlier_run(config, task, section)


def test_label_does_not_read_the_files_that_it_writes(place):
    config = Config(run=RunConfig(dir="runs/one"), data=DataConfig(path="runs/one/label"))
    with pytest.raises(ConfigError, match="data.path: runs/one/label is where label writes; choose another --run.dir"):
        label.run(config)


def test_a_disk_that_checkpoints_would_fill_is_told(tmp_path, monkeypatch):
    state = init_state({"params": {"w": np.zeros((250, 1000), np.float32)}}, optax.sgd(1.0))
    config = Config(run=RunConfig(dir=str(tmp_path), max_to_keep=2))
    for free, saved, place, told in (
        *((4e6, (), None, False), (2e6, (), None, True), (2e6, (), "gs://bucket/hh", False)),
        *((2e6, ("10", "20"), None, False), (5e5, ("10", "20"), None, True)),
    ):
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, checkpoints=place))
        for step in saved:
            (tmp_path / "dpo/checkpoints" / step).mkdir(parents=True, exist_ok=True)
        monkeypatch.setattr("shutil.disk_usage", lambda place, free=free: types.SimpleNamespace(free=int(free)))
        with RunDir(tmp_path / "dpo") as run:
            note = announcement._full_disk(config, run, state)
        words = f"the run needs space for {1 if saved else 3} more checkpoints of 0.0 GB, 0.0 GB in all, but"
        assert (note is not None and note.startswith(words)) == told


def test_a_reference_cache_that_cannot_be_written_is_refused_or_told(place, capsys, monkeypatch):
    cache = place / "cache"
    cache.touch()
    code, told = check("dpo", f"--refs.cache={cache}", "--check", capsys=capsys)
    assert (code, f"{cache}: is a file, but the run needs a folder {cache}" in told) == (74, True)
    cache.unlink()
    cache.mkdir()
    monkeypatch.setattr("os.access", lambda path, mode: path != cache)  # a user who may write everything runs the tests, too
    code, told = check("dpo", f"--refs.cache={cache}", "--check", capsys=capsys)
    assert (code, f"{cache}: Permission denied" in told) == (74, True)
    (cache / "identity.json").touch()
    code, told = check("dpo", f"--refs.cache={cache}", "--check", capsys=capsys)
    assert (code, "this works only if the cache holds all pairs" in told) == (0, True)
