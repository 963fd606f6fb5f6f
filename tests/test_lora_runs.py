"""The program with an adapter, and with a part of the weights: what is saved, how it continues, what else reads it."""

import dataclasses
import functools
import json
import shutil

import jax
import numpy as np
import pytest
from conftest import GOLDEN
from safetensors.numpy import load_file
from tiny_run import call, refused, with_weights

from dpo_jax.cli import build
from dpo_jax.cli.config import Config, LoraConfig, MeshConfig, RunConfig
from dpo_jax.cli.exports import write_lora
from dpo_jax.cli.trainable import planned_trainable
from dpo_jax.data.encode import Encoded
from dpo_jax.data.layout import plain_rows
from dpo_jax.data.tokenizer import load_tokenizer, save_tokenizer
from dpo_jax.models.decoder import make_model
from dpo_jax.models.digest import weights_digest
from dpo_jax.models.families import decoder_config, hf_config
from dpo_jax.models.hf import load_hf, save_hf
from dpo_jax.models.lora import LORA, new_adapter
from dpo_jax.reward_model import HEAD, reward_step, scalar_head, with_scalar_head
from dpo_jax.runtime.checkpoint import newest_meta
from dpo_jax.runtime.metrics import is_evaluation, read_metrics

CONFIG = """\
run: {{dir: {dir}/run, save_every_steps: 2}}
data: {{source: reviews, reviews_train: 32, reviews_test: 16, max_length: 96, max_prompt_length: 48, layout: shared}}
model: {{path: {dir}/base}}
lora: {{rank: 2, alpha: 8, targets: all}}
sft: {{batch: 16, lr: 1.0e-2, warmup_steps: 0}}
refs: {{batch: 16}}
dpo: {{batch: 8, policy: {dir}/base, lr: 1.0e-2, warmup_steps: 0}}
eval: {{batch: 16, samples: 2, max_new_tokens: 4}}
sample: {{prompts: 1, max_new_tokens: 4, temperature: 0}}
"""
FROZEN = "gpt_neox.layers.0.mlp.dense_h_to_4h.weight"  # not of the last layer


def base_model(folder, seed=0):
    sizes = {"vocab_size": 511, "width": 32, "layers": 2, "heads": 2, "max_positions": 128, "eos_token_id": 0}
    model = make_model(decoder_config(hf_config("gpt_neox", **sizes)))
    save_hf(folder, model, jax.jit(model.init)(jax.random.key(seed)))
    save_tokenizer(load_tokenizer(GOLDEN / "tokenizer"), folder)


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch):
    monkeypatch.setattr(
        "dpo_jax.plotting.training_curves.plot_training", lambda rows, directory: directory.mkdir(exist_ok=True)
    )


@pytest.fixture(scope="module", autouse=True)
def _compilation_cache():
    before = jax.config.jax_compilation_cache_dir
    yield
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """An adapter trained by DPO on a base, in folder/run/dpo."""
    folder = tmp_path_factory.mktemp("lora")
    base_model(folder / "base")
    (folder / "lora.yaml").write_text(CONFIG.format(dir=folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dpo_jax.plotting.training_curves.plot_training", lambda rows, directory: directory.mkdir(exist_ok=True))
        result = call("dpo", folder / "lora.yaml")
    assert result.code == 0, result
    assert "trained, " in result.out
    return folder


@pytest.fixture
def copy(done, tmp_path):
    """A copy of the run, to continue or to damage. The base is where it was."""
    shutil.copytree(done / "run", tmp_path / "run")
    return done / "lora.yaml", "--run.dir", tmp_path / "run"


def interrupted(run):
    """The run as it was before its last save."""
    shutil.rmtree(run / "dpo" / "checkpoints" / "4")
    for name in ("export", "plots"):
        shutil.rmtree(run / "dpo" / name)
    (run / "dpo" / "finished.json").unlink()
    metrics = run / "dpo" / "metrics.jsonl"
    rows = [line for line in metrics.read_text().splitlines() if json.loads(line)["step"] < 2]
    metrics.write_text("".join(f"{line}\n" for line in rows))


def test_a_run_starts_at_its_reference_and_saves_the_adapter_alone(done):
    rows = read_metrics(done / "run" / "dpo" / "metrics.jsonl")
    assert rows[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert rows[-2]["loss"] < rows[0]["loss"]
    record = json.loads((done / "run/dpo/checkpoints/4/record/metadata").read_text())
    names = {name for name in record["leaves"] if name.startswith("params")}
    assert names == {name for name in names if name.startswith("params.lora.layers.")}
    assert not any(name.startswith(("frozen", "params.params")) for name in record["leaves"])
    assert len(record["meta"]["fingerprint"]["base"]) == 64
    assert {path.name for path in (done / "run/dpo/export").iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors", "README.md", "tokenizer.json", "tokenizer_config.json")
    }
    card = (done / "run/dpo/export/README.md").read_text()
    assert 'library_name: "peft"' in card
    assert "LoRA of rank 2, alpha 8, on all" in card
    assert "AutoPeftModelForCausalLM" in card


def test_an_interrupted_run_ends_exactly_as_one_that_was_not(done, copy, tmp_path):
    interrupted(tmp_path / "run")
    result = call("dpo", *copy)
    assert (result.code, "after 2 steps" in result.out) == (0, True), result
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "run/dpo/export" / name).read_bytes() == (done / "run/dpo/export" / name).read_bytes()
    ours, theirs = (
        [row["loss"] for row in read_metrics(run / "dpo" / "metrics.jsonl") if not is_evaluation(row)]
        for run in (tmp_path / "run", done / "run")
    )
    assert ours == theirs


def test_another_base_or_another_adapter_is_refused(done, copy, tmp_path):
    interrupted(tmp_path / "run")
    assert "lora.rank: was 2, is 3" in refused(2, "dpo", *copy, "--lora.rank", 3)
    base_model(tmp_path / "other", seed=1)
    told = refused(2, "dpo", *copy, "--dpo.policy", tmp_path / "other", "--refs.cache", tmp_path / "refs")
    assert "holds a run with other settings" in told
    assert "reference: was " in told
    # The base under its own name has changed since: the adapter does not belong to it.
    moved = tmp_path / "moved"
    shutil.copytree(done / "run/dpo/export", moved)
    content = json.loads((moved / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(json.dumps(content | {"base_model_name_or_path": str(tmp_path / "other")}))
    assert "was trained on different weights from those of" in refused(2, "sample", *copy, "--sample.policy", moved)


def test_eval_sample_and_export_read_an_adapter_with_its_base(copy, tmp_path):
    result = call("eval", *copy)
    assert result.code == 0, result
    report = json.loads((tmp_path / "run/eval/report.json").read_text())
    last = read_metrics(tmp_path / "run/dpo/metrics.jsonl")[-1]
    assert report["policy"]["loss"] == pytest.approx(last["eval/loss"], abs=1e-5)
    assert abs(report["reference"]["kl"]) < 1e-3
    before = (tmp_path / "run/dpo/export/adapter_model.safetensors").read_bytes()
    assert call("export", *copy, "--export.out", tmp_path / "again").code == 0
    assert (tmp_path / "again" / "adapter_model.safetensors").read_bytes() == before
    assert call("export", *copy, "--export.merge").code == 0
    merged, beside = (load_hf(tmp_path / "run/dpo" / name)[1] for name in ("export-merged", "export"))
    jax.tree.map(np.testing.assert_array_equal, merged, beside)
    lines = [
        json.loads(call("sample", *copy, "--sample.policy", tmp_path / "run/dpo" / name).out)
        for name in ("export", "export-merged")
    ]
    assert lines[0] == lines[1]
    cards = {name: (tmp_path / "run/dpo" / name / "README.md").read_text() for name in ("export", "export-merged")}
    assert {name: "peft" in card for name, card in cards.items()} == {"export": True, "export-merged": False}


def test_an_adapter_is_trained_further(done, copy, tmp_path):
    """SFT with an adapter, then DPO of the same adapter: the reference is base and adapter as they were."""
    result = call("sft", *copy)
    assert result.code == 0, result
    first = tmp_path / "run/sft/export"
    assert "train it further" in refused(
        2, "dpo", *copy, "--run.dir", tmp_path / "next", "--dpo.policy", first, "--lora.rank", 3
    )
    result = call("dpo", *copy, "--run.dir", tmp_path / "next", "--dpo.policy", first)
    assert result.code == 0, result
    rows = read_metrics(tmp_path / "next/dpo/metrics.jsonl")
    assert rows[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    content = json.loads((tmp_path / "next/dpo/export/adapter_config.json").read_text())
    assert content["base_model_name_or_path"] == str(done / "base")
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (first, tmp_path / "next/dpo/export"))
    assert before.keys() == after.keys()
    assert any((before[name] != after[name]).any() for name in before)


def test_a_reference_moves_to_base_and_adapter(done, tmp_path):
    runs = [
        ("dpo", done / "lora.yaml", "--run.dir", tmp_path / name, "--refs.cache", done / "run/refs", "--dpo.epochs", 2)
        for name in ("whole", "run")
    ]
    moving = ("--dpo.refresh-reference-steps", 3)
    result = call(*runs[0], *moving)
    assert (result.code, [line.partition(":")[0] for line in result.out.splitlines() if line.startswith("reference from")]) == (
        *(0, ["reference from step 3", "reference from step 6"]),
    ), result
    rows = read_metrics(tmp_path / "whole/dpo/metrics.jsonl")
    assert [row["step"] for row in rows if abs(row.get("loss", 0) - np.log(2)) < 1e-5] == [0, 3, 6]
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    for name in ("checkpoints/8", "export", "references"):  # that of step 6 is made again from its checkpoint
        shutil.rmtree(tmp_path / "run/dpo" / name)
    (tmp_path / "run/dpo/finished.json").unlink()
    assert "reference_steps: was 3, is None" in refused(2, *runs[1])
    result = call(*runs[1], *moving)
    assert (result.code, "after 6 steps" in result.out) == (0, True), result
    exported = "dpo/export/adapter_model.safetensors"
    assert (tmp_path / "run" / exported).read_bytes() == (tmp_path / "whole" / exported).read_bytes()


@pytest.mark.parametrize(("rslora", "scale"), [(False, 8 / 4), (True, 8 / 2)])
def test_the_scale_of_the_configuration_reaches_the_adapter_and_its_files(rslora, scale, tmp_path):
    base_model(tmp_path / "base")
    model, base = load_hf(tmp_path / "base")
    config = dataclasses.replace(Config(), lora=LoraConfig(rank=4, alpha=8, targets="attention", rslora=rslora))
    part, digest = planned_trainable(config, config.dpo, model), weights_digest(base)
    assert part.lora.scale == scale
    adapter = jax.device_get(new_adapter(model.config, part.lora, jax.random.key(1)))
    source = str(tmp_path / "base")
    write_lora(tmp_path / "adapter", part, {**base, LORA: adapter}, source=source, digests={"base": digest})
    settings = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert [settings[name] for name in ("r", "lora_alpha", "use_rslora")] == [4, 8, rslora]


def test_only_the_last_layer_is_trained(done, tmp_path):
    flags = (done / "lora.yaml", "--lora.rank", "None", "--lora.alpha", 16, "--run.dir", tmp_path / "run")
    part = ("--dpo.trainable", "last_layer,final_norm.*")
    assert "dpo.trainable: with lora.rank only the adapter is trained" in refused(2, "dpo", done / "lora.yaml", *part)
    assert "no parameter matches 'head'" in refused(2, "dpo", *flags, "--dpo.trainable", "head")
    result = call("dpo", *flags, *part)
    assert result.code == 0, result
    rows = read_metrics(tmp_path / "run/dpo/metrics.jsonl")
    assert rows[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    before, after = (load_file(folder / "model.safetensors") for folder in (done / "base", tmp_path / "run/dpo/export"))
    changed = {name for name in before if (before[name] != after[name]).any()}
    assert changed
    assert all(name.startswith(("gpt_neox.layers.1.", "gpt_neox.final_layer_norm.")) for name in changed)
    record = json.loads((tmp_path / "run/dpo/checkpoints/4/record/metadata").read_text())
    sizes = [np.prod(leaf["shape"]) for name, leaf in record["leaves"].items() if name.startswith("params")]
    assert sum(sizes) < 0.5 * sum(x.size for x in before.values())
    finished = (tmp_path / "run/dpo/export/model.safetensors").read_bytes()
    assert newest_meta(tmp_path / "run/dpo/checkpoints") is not None
    interrupted(tmp_path / "run")
    assert call("dpo", *flags, *part).code == 0
    assert (tmp_path / "run/dpo/export/model.safetensors").read_bytes() == finished
    assert call("export", done / "lora.yaml", "--run.dir", tmp_path / "run", "--export.out", tmp_path / "again").code == 0
    assert (tmp_path / "again/model.safetensors").read_bytes() == finished
    # A tensor that was not trained has changed in the folder that the run began with.
    base = with_weights(done / "base", tmp_path / "base", lambda name, x: x + 1 if name == FROZEN else x)
    written = tmp_path / "run/dpo/config.yaml"
    written.write_text(written.read_text().replace(str(done / "base"), str(base)))
    told = refused(2, "export", done / "lora.yaml", "--run.dir", tmp_path / "run", "--export.out", tmp_path / "other")
    assert f"{base} is not the model that training began with" in told
    assert not (tmp_path / "other").exists()


@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")  # layers that are cut off their stack are copied
@pytest.mark.parametrize(
    ("section", "options"), [("lora", {"rank": 2, "targets": "query,up"}), ("dpo", {"trainable": "last_layer,final_norm.*"})]
)
def test_a_reward_model_of_a_part_lies_on_a_mesh(section, options):
    """Its head is trained too; whole weights come onto the mesh, and states of the part, as `fit_reward_model` puts them."""
    config = dataclasses.replace(Config(), run=RunConfig(devices="mesh"), mesh=MeshConfig(fsdp=2, tensor=2, data=-1))
    config = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **options)})
    sizes = {"vocab_size": 64, "width": 32, "layers": 2, "heads": 2, "max_positions": 64, "eos_token_id": 0}
    model = make_model(decoder_config(hf_config("llama", **sizes)))
    trainable, tx = planned_trainable(config, config.dpo, model), build.make_tx(config.dpo)
    partitioner = trainable.partitioner(config, head=True)
    placed = partitioner.put_variables({**jax.jit(model.init)(jax.random.key(0)), HEAD: scalar_head(32)})
    state = partitioner.init_state(functools.partial(trainable.state, tx=tx), placed)
    assert HEAD in state.params
    kernel = state.frozen["params"]["layers"]["attention"]["query"]["kernel"]
    assert not kernel.sharding.is_fully_replicated
    step = partitioner.compile_step(functools.partial(reward_step, model=with_scalar_head(trainable.model), tx=tx))
    pair = Encoded(*(np.arange(1, 6, dtype=np.int32) + i for i in range(3)), uid="0")
    state, metrics = step(state, plain_rows([pair] * 8, length=16))
    assert float(metrics["loss"]) == pytest.approx(np.log(2), abs=1e-6)
    best = partitioner.to_host(state.variables)
    again = partitioner.put_variables(best)
    jax.tree.map(np.testing.assert_array_equal, partitioner.to_host(again), best)
