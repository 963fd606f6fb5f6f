"""Damaged and hostile weights are read as what they say, or refused by file, tensor and cause."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from mutate import mutants, mutations, time_limit
from safetensors.numpy import load_file, save, save_file
from test_fuzz_models import CONFIGS, MODELS, read

from dpo_jax.cli.config import ConfigError
from dpo_jax.models.families import decoder_config
from dpo_jax.models.folder import read_config
from dpo_jax.models.scorer import BIAS, read_head
from dpo_jax.models.tensors import SCORE, contents
from dpo_jax.models.weights import INDEX, Checkpoint
from dpo_jax.untrusted import Unreadable


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A folder of a tiny Llama of one layer, its tensors and its configuration."""
    folder = tmp_path_factory.mktemp("llama")
    content = CONFIGS["llama"] | {"num_hidden_layers": 1}
    kept = {
        name: array
        for name, array in load_file(MODELS / "llama" / "model.safetensors").items()
        if "layers." not in name or "layers.0." in name
    }
    save_file(kept, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(content))
    return SimpleNamespace(folder=folder, tensors=kept, config=decoder_config(content))


def weights_of(folder, config, shapes):
    with Checkpoint(folder, contents(config)) as checkpoint:
        checkpoint.check_names()
        return {name: checkpoint.get(name, shapes[name]) for name in checkpoint.expected}


def as_written(content):
    """The tensors of a safetensors file, read without its library."""
    size = int.from_bytes(content[:8], "little")
    types = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    header.pop("__metadata__", None)
    return {
        name: np.frombuffer(data[slice(*entry["data_offsets"])], types[entry["dtype"]]).reshape(entry["shape"])
        for name, entry in header.items()
        if entry["dtype"] in types
    }


def test_weights_are_those_of_the_file_or_refused(llama, tmp_path):
    file = tmp_path / "model.safetensors"
    shapes = {name: array.shape for name, array in llama.tensors.items()}
    good = save(llama.tensors)
    size = 8 + int.from_bytes(good[:8], "little")
    refused = 0
    for mutant in mutations(good[:size], count=mutants(150)):
        file.write_bytes(mutant + good[size:])
        found = read(lambda: weights_of(tmp_path, llama.config, shapes), tmp_path, "model.safetensors")
        refused += isinstance(found, Exception)
        if isinstance(found, dict):
            written = as_written(mutant + good[size:])
            for name, array in found.items():
                np.testing.assert_array_equal(array, written[name])
    for cut in (0, 7, 8, size - 1, size, len(good) - 1):
        file.write_bytes(good[:cut])
        assert isinstance(read(lambda: weights_of(tmp_path, llama.config, shapes), tmp_path, "model.safetensors"), Unreadable)
    assert refused > 30


def test_types_that_are_no_floating_point_are_named(llama, tmp_path):
    """Also those that numpy has no name for."""
    good = save(llama.tensors)
    shapes = {name: array.shape for name, array in llama.tensors.items()}
    for kind in ("F8_E4M3", "F8_E5M2", "I8", "BOOL", "U64"):
        size = int.from_bytes(good[:8], "little")
        header = json.loads(good[8 : 8 + size])
        entry = header["model.norm.weight"]
        entry |= {
            "dtype": kind,
            "shape": [(entry["data_offsets"][1] - entry["data_offsets"][0]) // (8 if kind == "U64" else 1)],
        }
        text = json.dumps(header).encode()
        (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + good[8 + size :])
        found = read(lambda: weights_of(tmp_path, llama.config, shapes), tmp_path, "model.safetensors")
        assert isinstance(found, ConfigError)
        assert f"tensor model.norm.weight in {tmp_path}/model.safetensors is {kind}; expected one of F64" in str(found)


def test_an_index_leads_to_the_weights_or_is_refused(llama, tmp_path):
    shutil.copy(llama.folder / "model.safetensors", tmp_path / "a.safetensors")
    shapes = {name: array.shape for name, array in llama.tensors.items()}
    good = json.dumps({"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(llama.tensors, "a.safetensors")}).encode()
    refused = 0
    for mutant in mutations(good, count=mutants(100)):
        (tmp_path / INDEX).write_bytes(mutant)
        found = read(lambda: weights_of(tmp_path, llama.config, shapes), tmp_path, str(tmp_path))
        refused += isinstance(found, Exception)
        if isinstance(found, dict):
            assert all(np.array_equal(found[name], llama.tensors[name]) for name in found)
    assert refused > 30


def test_files_of_another_kind_or_name_are_no_weights(llama, tmp_path):
    """A FIFO would wait for ever. A name need not be UTF-8."""
    os.mkfifo(tmp_path / "model.safetensors")
    os.mkfifo(tmp_path / "config.json")
    with time_limit():
        assert "no weights" in str(read(lambda: Checkpoint(tmp_path, contents(llama.config)), tmp_path, str(tmp_path)))
        assert "does not exist" in str(read(lambda: read_config(tmp_path), tmp_path, str(tmp_path)))
    folder = Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9"))
    shutil.copytree(llama.folder, folder)
    (folder / "model.safetensors").rename(Path(os.fsdecode(bytes(folder) + b"/\xff.safetensors")))
    shapes = {name: array.shape for name, array in llama.tensors.items()}
    found = read(lambda: weights_of(folder, llama.config, shapes), folder, "")
    assert all(np.array_equal(found[name], llama.tensors[name]) for name in llama.tensors)


def test_the_score_of_a_reward_model_is_that_of_the_file_or_refused(tmp_path):
    file = tmp_path / "model.safetensors"
    refused = 0
    for mutant in mutations(save({SCORE: np.arange(4, dtype=np.float32)[None]}), count=mutants(150)):
        file.write_bytes(mutant)
        found = read(lambda: read_head(tmp_path, {BIAS: 0.5}, width=4), tmp_path, "")
        refused += not isinstance(found, dict)
        if isinstance(found, dict):
            assert np.array_equal(found["kernel"], as_written(mutant)[SCORE][0])
            assert found["bias"] == 0.5
    assert refused > 50
    file.write_bytes(save({SCORE: np.full((1, 4), np.nan, np.float32)}))
    assert "not finite" in str(read(lambda: read_head(tmp_path, {}, width=4), tmp_path, SCORE))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"id2label": {"0": "a", "1": "b"}}, "id2label has 2 outputs, but a reward model has one"),
        ({BIAS: "1"}, f"{BIAS} = '1' is not a finite number"),
        ({BIAS: float("nan")}, f"{BIAS} = 'nan' is not a finite number"),
        ({}, "has shape (1, 4); this config.json asks for (1, 5)"),
    ],
)
def test_a_folder_that_is_no_reward_model_says_why(content, message, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(save({SCORE: np.zeros((1, 4), np.float32)}))
    assert message in str(read(lambda: read_head(tmp_path, content, width=5 if not content else 4), tmp_path, ""))
