"""Reading and writing Hugging Face folders: nothing lost, nothing guessed, and what is wrong is named."""

import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN
from huggingface_hub.utils import filter_repo_objects
from safetensors.numpy import load_file, save_file
from test_models import CASES, GEMMA3_4B, golden, logits_of, text_rows
from transformers import AutoConfig

from dpo_jax.models.decoder import make_model
from dpo_jax.models.families import FAMILIES, decoder_config, hf_config
from dpo_jax.models.generation import float_type
from dpo_jax.models.hf import end_tokens, load_config, load_hf, save_hf
from dpo_jax.models.hf_settings import older_rotary_keys
from dpo_jax.models.hub import resolve
from dpo_jax.types import Model
from dpo_jax.untrusted import Unreadable

MODELS = GOLDEN / "models"


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def copy_of(case, folder, change=None, **config):
    """A golden checkpoint in `folder` with changed tensors (a function of the dict) and changed settings."""
    tensors = load_file(MODELS / case / "model.safetensors")
    folder.mkdir(exist_ok=True)
    save_file(change(tensors) or tensors if change else tensors, folder / "model.safetensors")
    content = load_config(MODELS / case) | config
    (folder / "config.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("case", CASES)
def test_saved_tensors_and_settings_equal_the_original(case, tmp_path):
    model, variables, _, _ = golden(case)
    save_hf(tmp_path / "out", model, variables)
    saved, original = load_file(tmp_path / "out/model.safetensors"), load_file(MODELS / case / "model.safetensors")
    assert saved.keys() == original.keys()
    for name, array in original.items():
        assert saved[name].dtype == array.dtype
        np.testing.assert_array_equal(saved[name], array, err_msg=name)
    settings = load_config(MODELS / case)
    older = older_rotary_keys(settings, FAMILIES[settings["model_type"]].defaults)
    assert load_config(tmp_path / "out") == settings | older
    again, loaded = load_hf(tmp_path / "out")
    assert_same(loaded, variables)
    assert dataclasses.replace(again.config, hf_json="") == dataclasses.replace(model.config, hf_json="")
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


@pytest.mark.parametrize("case", [case for case in CASES if "rope_parameters" in load_config(MODELS / case)])
def test_programs_that_know_only_the_keys_of_transformers_4_find_the_same_rotary_settings(case):
    settings = load_config(MODELS / case)
    older = older_rotary_keys(settings, FAMILIES[settings["model_type"]].defaults)
    alone = {key: value for key, value in settings.items() if key != "rope_parameters"} | older
    assert decoder_config(alone).ropes == decoder_config(settings | older).ropes == decoder_config(settings).ropes
    read = [AutoConfig.for_model(**json.loads(json.dumps(one))).rope_parameters for one in (settings, settings | older, alone)]
    assert read[0] == read[1] == read[2]
    assert {"rope_theta", "rotary_emb_base"} & older.keys()


def test_sharded_folder_with_index(tmp_path):
    model, variables, _, _ = golden("gpt_neox")
    save_hf(tmp_path / "out", model, variables, max_shard_bytes=40_000)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    shards = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert sorted(set(index["weight_map"].values())) == shards
    assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in jax.tree.leaves(variables))
    assert_same(load_hf(tmp_path / "out")[1], variables)
    (tmp_path / "out" / shards[1]).unlink()
    with pytest.raises(FileNotFoundError, match=f"names {shards[1]}"):
        load_hf(tmp_path / "out")


def test_saving_over_an_earlier_model_replaces_it_and_keeps_the_tokenizer(tmp_path):
    model, variables, _, _ = golden("gpt_neox")
    out = tmp_path / "out"
    save_hf(out, model, variables, max_shard_bytes=40_000)
    (out / "tokenizer.json").write_text("{}")
    other = jax.tree.map(lambda x: x + 1, variables)
    save_hf(out, model, other)
    assert sorted(file.name for file in out.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert_same(load_hf(out)[1], other)


def test_weights_of_several_types_lose_nothing(tmp_path):
    """Such as a bfloat16 base in which `merge_adapter` made some kernels float32."""
    model, variables, _, _ = golden("gpt_neox")
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), variables)
    mixed = {"params": {**rounded["params"], "layers": variables["params"]["layers"]}}
    saved = load_hf(save_hf(tmp_path / "mixed", model, mixed))[1]
    assert_same(saved, jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), mixed))
    save_hf(tmp_path / "one", model, rounded)
    size = {name: (tmp_path / name / "model.safetensors").stat().st_size for name in ("mixed", "one")}
    assert size["one"] < 0.6 * size["mixed"]


@pytest.mark.parametrize("shard", [40_000, 10**9])
def test_a_kill_while_a_model_is_replaced_leaves_no_mixture(shard, tmp_path, monkeypatch):
    model, old, _, _ = golden("gpt_neox")
    new = jax.tree.map(lambda leaf: leaf + 1, old)
    replace, refused = os.replace, 0
    for moves in range(20):
        out = save_hf(tmp_path / f"after_{moves}", model, old, max_shard_bytes=shard)
        left = iter(range(moves))

        def killed(source, target, left=left):
            if next(left, None) is None:
                raise InterruptedError
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", killed)
            try:
                save_hf(out, model, new, max_shard_bytes=shard)
                break
            except InterruptedError:
                pass
        try:
            assert_same(load_hf(out)[1], old)  # nothing was moved in yet
        except (ValueError, FileNotFoundError):
            refused += 1
    assert refused >= 1
    assert_same(load_hf(out)[1], new)


def test_saving_into_a_folder_of_something_else_is_refused(tmp_path):
    model, variables, _, _ = golden("gpt2")
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters/to_mother.txt").write_text("Dear")
    with pytest.raises(FileExistsError, match="not a model folder"):
        save_hf(tmp_path / "letters", model, variables)


def test_saving_variables_of_another_model_is_refused(tmp_path):
    model, variables, _, _ = golden("llama")
    with pytest.raises(ValueError, match=r"final_norm/bias does not fit this gpt_neox: expected \(32,\), found nothing"):
        save_hf(tmp_path / "out", golden("gpt_neox")[0], variables)
    fewer = variables["params"] | {"token_embedding": np.zeros((60, 32), np.float32)}
    with pytest.raises(ValueError, match=r"token_embedding does not fit this llama: expected \(61, 32\), found \(60, 32\)"):
        save_hf(tmp_path / "out", model, {"params": fewer})


def test_collections_that_would_be_lost_are_named(tmp_path):
    model, variables, _, _ = golden("llama")
    with pytest.raises(ValueError, match=r"save_hf writes the collection params, and lora, scalar_head would be lost"):
        save_hf(tmp_path / "out", model, {**variables, "scalar_head": {}, "lora": {"a": np.zeros(2)}})
    assert not (tmp_path / "out").exists()


def test_weights_may_be_read_by_whom_the_umask_lets(tmp_path):
    model, variables, _, _ = golden("gpt2")
    save_hf(tmp_path / "out", model, variables)
    modes = {file.stat().st_mode for file in (tmp_path / "out").iterdir()}
    (tmp_path / "other").touch()
    assert modes == {(tmp_path / "other").stat().st_mode}


def test_bfloat16_weights(tmp_path):
    model, variables, _, _ = golden("qwen2")
    save_hf(tmp_path / "out", model, variables, dtype=jnp.bfloat16)
    assert load_config(tmp_path / "out")["dtype"] == "bfloat16"
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), variables)
    _, wide = load_hf(tmp_path / "out")
    assert_same(wide, jax.tree.map(lambda x: x.astype(jnp.float32), rounded))
    assert_same(load_hf(tmp_path / "out", param_dtype=jnp.bfloat16)[1], rounded)


def test_values_that_the_type_cannot_hold_are_refused_by_tensor(tmp_path):
    model, variables, _, _ = golden("llama")
    params = variables["params"]
    large = np.array(params["token_embedding"])
    large[3] = 1e5
    for dtype, value in ((jnp.float16, 1e5), (jnp.bfloat16, 3.4e38)):
        large[3] = value
        with pytest.raises(OverflowError, match=r"model.embed_tokens.weight: 32 values .* use bfloat16 or float32"):
            save_hf(tmp_path / "out", model, {"params": params | {"token_embedding": large}}, dtype=dtype)
    assert not (tmp_path / "out").exists()
    large[3] = np.inf  # lost before
    save_hf(tmp_path / "out", model, {"params": params | {"token_embedding": large}}, dtype=jnp.float16)


def test_the_sampling_settings_of_the_source_are_kept(tmp_path):
    model, variables, _, _ = golden("llama")
    source = copy_of("llama", tmp_path / "source", eos_token_id=1)
    text = '{"eos_token_id": [2, 4],\n  "temperature": 0.7}'
    (source / "generation_config.json").write_text(text)
    out = save_hf(tmp_path / "out", model, variables, source=source)
    assert (out / "generation_config.json").read_text() == text
    assert end_tokens(source) == [1, 2, 4]
    save_hf(out, model, variables)  # a source is not named: what lies there stays
    assert (out / "generation_config.json").read_text() == text
    (source / "generation_config.json").unlink()
    save_hf(out, model, variables, source=source)
    assert not (out / "generation_config.json").exists()
    assert end_tokens(source) == [1]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "JSONDecodeError: "),
        ("[]", "ValueError: expected a JSON object, got an array; delete it"),
        ('{"eos_token_id": ["</s>"]}', r'eos_token_id = \["</s>"\] is not a token id or an array of them'),
    ],
)
def test_broken_sampling_settings_are_refused(content, told, tmp_path):
    source = copy_of("llama", tmp_path / "source")
    (source / "generation_config.json").write_text(content)
    with pytest.raises(ValueError, match=rf"generation_config.json: {told}"):
        end_tokens(source)


def test_end_tokens_of_a_multimodal_model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"eos_token_id": [1, 106], "text_config": {"eos_token_id": 1}}))
    assert end_tokens(folder) == [1, 106]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": "float16"}, "float16"),
        ({"torch_dtype": "torch.bfloat16"}, "bfloat16"),
        ({"text_config": {"torch_dtype": "bfloat16"}}, "bfloat16"),
        ({"dtype": "float32", "source_dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": "float64"}, "float32"),
        ({"dtype": None}, "float32"),
        ({}, "float32"),
    ],
)
def test_the_type_of_a_model(config, expected):
    assert float_type(config) == expected


def test_trunk_without_prefix_and_with_buffers(tmp_path):
    """As the official GPT-2 is published."""

    def bare(tensors):
        tensors = {name.removeprefix("transformer."): array for name, array in tensors.items()}
        for layer in range(3):
            tensors[f"h.{layer}.attn.bias"] = np.ones((1, 1, 32, 32), np.float32)
            tensors[f"h.{layer}.attn.masked_bias"] = np.array(-1e4, np.float32)
        return tensors

    assert_same(load_hf(copy_of("gpt2", tmp_path / "bare", bare))[1], golden("gpt2")[1])


def test_neox_buffers_and_the_other_name_of_its_head(tmp_path):
    """As Pythia is published, and as transformers 5 names the head inside."""

    def published(tensors):
        tensors["lm_head.weight"] = tensors.pop("embed_out.weight")
        for layer in range(3):
            tensors[f"gpt_neox.layers.{layer}.attention.bias"] = np.ones((1, 1, 64, 64), bool)
            tensors[f"gpt_neox.layers.{layer}.attention.masked_bias"] = np.array(-1e9, np.float32)
            tensors[f"gpt_neox.layers.{layer}.attention.rotary_emb.inv_freq"] = np.ones(2, np.float32)

    assert_same(load_hf(copy_of("gpt_neox", tmp_path / "published", published))[1], golden("gpt_neox")[1])


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_text_part_of_a_multimodal_gemma3(tmp_path, prefix):
    def multimodal(tensors):
        tensors = {name.replace("model.", prefix, 1): array for name, array in tensors.items()}
        return tensors | {"vision_tower.patch.weight": np.ones(3, np.float32)}

    folder = copy_of("gemma3_text", tmp_path / "multimodal", multimodal)
    text = load_config(MODELS / "gemma3_text")
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text, "vision_config": {}}))
    model, variables = load_hf(folder)
    assert_same(variables, golden("gemma3_text")[1])
    save_hf(tmp_path / "text", model, variables)
    assert load_config(tmp_path / "text")["architectures"] == ["Gemma3ForCausalLM"]
    assert_same(load_hf(tmp_path / "text")[1], variables)


def test_a_tied_head_may_be_repeated_but_not_differ(tmp_path):
    def repeated(tensors):
        return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].copy()}

    def different(tensors):
        return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}

    assert_same(load_hf(copy_of("qwen3", tmp_path / "repeated", repeated))[1], golden("qwen3")[1])
    with pytest.raises(ValueError, match="lm_head.weight in .* differs from the embedding although config.json ties them"):
        load_hf(copy_of("qwen3", tmp_path / "different", different))


def _drop(name):
    return lambda tensors: {key: array for key, array in tensors.items() if key != name}


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        (
            "llama",
            _drop("model.layers.1.mlp.up_proj.weight"),
            r"model\.layers\.1\.mlp\.up_proj\.weight missing in .*model\.safetensors",
        ),
        (
            "llama",
            lambda t: t | {"extra.weight": np.ones(2, np.float32)},
            r"extra\.weight in .*model\.safetensors: no such tensor in a llama",
        ),
        (
            "llama",
            lambda t: t | {"model.norm.weight": np.ones(31, np.float32)},
            r"tensor model\.norm\.weight in .*model\.safetensors has shape \(31,\); this config\.json asks for \(32,\)",
        ),
        (
            "gpt_neox",
            lambda t: t | {"gpt_neox.layers.0.attention.query_key_value.weight": np.ones((95, 32), np.float32)},
            r"query_key_value\.weight in .* has shape \(95, 32\); this config\.json asks for \(96, 32\)",
        ),
        (
            "gpt2",
            lambda t: t | {"transformer.wte.weight": np.ones((61, 32), np.int8)},
            r"wte\.weight in .* is I8; expected one of F64, F32",
        ),
        ("gpt2", lambda t: t | {"wte.weight": t["transformer.wte.weight"]}, r"tensor .*wte\.weight of .* is also in"),
    ],
    ids=["missing", "unknown", "shape", "fused-shape", "integers", "twice"],
)
def test_wrong_tensors_are_named(tmp_path, case, change, message):
    with pytest.raises(ValueError, match=message):
        load_hf(copy_of(case, tmp_path / "wrong", change))


def test_fewer_layers_in_the_config_than_in_the_file(tmp_path):
    with pytest.raises(ValueError, match=r"model\.layers\.2\.input_layernorm\.weight in .*no such tensor"):
        load_hf(copy_of("llama", tmp_path / "wrong", num_hidden_layers=2))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickled_weights_are_refused_by_name(tmp_path, name):
    shutil.copy(MODELS / "gpt2/config.json", tmp_path)
    (tmp_path / name).write_bytes(b"anything")
    with pytest.raises(FileNotFoundError, match=f"only {name}, which can run code when read"):
        load_hf(tmp_path)


def test_files_that_are_not_what_they_should_be(tmp_path):
    shutil.copy(MODELS / "gpt2/config.json", tmp_path)
    weights = tmp_path / "model.safetensors"
    with pytest.raises(FileNotFoundError, match="no weights"):
        load_hf(tmp_path)
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 99\n")
    with pytest.raises(ValueError, match=r"model\.safetensors is a git-lfs pointer, not weights"):
        load_hf(tmp_path)
    weights.write_bytes((MODELS / "gpt2/model.safetensors").read_bytes()[:-10])
    with pytest.raises(Unreadable, match=r"model\.safetensors is not a complete safetensors file"):
        load_hf(tmp_path)
    weights.rename(tmp_path / "one.safetensors")
    shutil.copy(tmp_path / "one.safetensors", tmp_path / "two.safetensors")
    with pytest.raises(FileNotFoundError, match="2 safetensors files but no model.safetensors.index.json"):
        load_hf(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(Unreadable, match="index.json: weight_map = null is not an object of tensors and their files"):
        load_hf(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../one.safetensors"}}')
    with pytest.raises(FileNotFoundError, match=r"names \.\./one\.safetensors"):
        load_hf(tmp_path)


def test_a_model_is_fetched_without_the_formats_that_are_not_read(monkeypatch, tmp_path):
    def snapshot(name, *, allow_patterns, ignore_patterns, **options):
        files = ["config.json", "consolidated.safetensors", "consolidated-00001-of-00002.safetensors", "model.bin"]
        files += ["model-00001-of-00001.safetensors", "model.safetensors.index.json", "tokenizer.json"]
        asked.extend(filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
        return str(tmp_path)

    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert resolve("org/mistral") == tmp_path
    assert asked == ["config.json", "model-00001-of-00001.safetensors", "model.safetensors.index.json", "tokenizer.json"]


def test_folders_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not look like a Hub id"):
        resolve(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="could not be fetched from the Hub"):
        resolve("no-such-organization/no-such-model")
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="give the model's folder"):
        resolve(tmp_path / "file")
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(Unreadable, match=r"config\.json: JSONDecodeError"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(Unreadable, match="expected a JSON object, got an array; save or fetch it again"):
        load_config(tmp_path)


def test_a_model_of_ones_own_has_no_hugging_face_form(tmp_path):
    own = Model(lambda key: {"params": {"w": jnp.ones(2)}}, lambda variables, rows: rows, lambda variables, hidden: hidden)
    with pytest.raises(ValueError, match="save_hf writes the model families that load_hf reads"):
        save_hf(tmp_path / "out", own, own.init(jax.random.key(0)))
    assert not (tmp_path / "out").exists()


LOAD_IN_TORCH = """
import sys, torch
from pathlib import Path
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM
for folder in map(Path, sys.argv[1:]):
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager", dtype=torch.float32)
    wrong = {key: sorted(map(str, value)) for key, value in report.items() if value}
    assert not wrong, (folder, wrong)
    with torch.no_grad():
        logits = model.eval()(torch.arange(12)[None] % 50).logits
    save_file({"logits": logits.numpy()}, folder / "torch_logits.safetensors")
"""


@pytest.mark.parity
def test_exports_load_in_torch_and_give_equal_logits(tmp_path):
    """Set DPO_JAX_TORCH_PYTHON to a Python with torch and transformers if this one has none."""
    python = os.environ.get("DPO_JAX_TORCH_PYTHON") or (sys.executable if importlib.util.find_spec("torch") else None)
    if python is None:
        pytest.skip("no torch here and DPO_JAX_TORCH_PYTHON is not set")
    ours = {}
    for family in FAMILIES:
        sizes = {"vocab_size": 50, "width": 32, "layers": 3, "heads": 4, "max_positions": 32, "eos_token_id": 0}
        model = make_model(decoder_config(hf_config(family, **sizes)))
        variables = jax.tree.map(
            lambda x: x + 0.05 * np.sin(np.arange(x.size, dtype=np.float32)).reshape(x.shape), model.init(jax.random.key(0))
        )
        save_hf(tmp_path / family, model, variables)
        ours[tmp_path / family] = logits_of(model, variables, text_rows(np.arange(12)[None]))
    for case in CASES:
        model, variables, _, _ = golden(case)
        save_hf(tmp_path / f"golden_{case}", model, variables, max_shard_bytes=50_000)
        ours[tmp_path / f"golden_{case}"] = logits_of(model, variables, text_rows(np.arange(12)[None] % 50))
    done = subprocess.run([python, "-c", LOAD_IN_TORCH, *ours], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for folder, logits in ours.items():
        theirs = load_file(folder / "torch_logits.safetensors")["logits"]
        np.testing.assert_allclose(logits, theirs, rtol=0, atol=1e-5, err_msg=folder.name)


def test_published_multimodal_configuration_has_the_known_size():
    """Gemma 3 4B: 3.88 billion parameters in its language model."""
    shapes = jax.eval_shape(make_model(decoder_config(GEMMA3_4B)).init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 3_880_263_168
