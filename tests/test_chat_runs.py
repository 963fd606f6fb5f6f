"""A folder like those of Llama 3 through the whole program.

It has the scaled rotary positions of Llama 3.1, several end tokens, a tokenizer that begins texts with BOS, a padded
vocabulary, bfloat16 weights and a chat template.
"""

import dataclasses
import json
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN
from safetensors.numpy import load_file
from tiny_run import call, refused
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing

from dpo_jax.bench.work import read_pairs
from dpo_jax.cli import build, splits
from dpo_jax.cli.bench_contenders import not_raced
from dpo_jax.cli.commands.bench import freeze
from dpo_jax.cli.config import ConfigError, load_config
from dpo_jax.cli.experiment import make_world
from dpo_jax.cli.exports import write_model
from dpo_jax.cli.ppo_setup import ppo_method
from dpo_jax.data.tokenizer import load_tokenizer, save_tokenizer
from dpo_jax.models.decoder import make_model
from dpo_jax.models.families import decoder_config
from dpo_jax.models.hf import load_config as load_hf_config
from dpo_jax.models.hf import load_hf, save_hf
from dpo_jax.ppo import completion_ids, prompt_batch
from dpo_jax.runtime.metrics import read_metrics

SPECIAL = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]  # from 511 on
BOS, TURN = 511, 514
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA = {
    **{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "bos_token_id": BOS},
    **{"eos_token_id": [0, TURN], "vocab_size": 576, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256, "rms_norm_eps": 1e-5},
    **{"hidden_act": "silu", "tie_word_embeddings": False, "rope_theta": 500000.0},
    "rope_scaling": {
        **{"rope_type": "llama3", "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0},
        "original_max_position_embeddings": 64,
    },
}
CONFIG = """\
run: {{dir: {dir}, save_every_steps: 0}}
data: {{source: files, path: {data}, max_length: 96, max_prompt_length: 64}}
model: {{path: {model}}}
sft: {{batch: 4, lr: 1.0e-9, warmup_steps: 1}}
dpo: {{batch: 4, lr: 1.0e-9, warmup_steps: 1}}
eval: {{batch: 4, samples: 2, max_new_tokens: 4}}
sample: {{prompts: 2, max_new_tokens: 4}}
"""
SAMPLING = json.dumps({"bos_token_id": BOS, "eos_token_id": [0, TURN], "temperature": 0.6, "top_p": 0.9}) + "\n"


@pytest.fixture(scope="module", autouse=True)
def _compilation_cache():
    before = jax.config.jax_compilation_cache_dir
    yield
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder. Its model always draws <|eot_id|>: the first number of a hidden state outweighs the others."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    tokenizer = load_tokenizer(GOLDEN / "tokenizer")
    tokenizer.add_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.bos_token, tokenizer.chat_template = "<|begin_of_text|>", TEMPLATE
    begins = TemplateProcessing("<|begin_of_text|> $A", "<|begin_of_text|> $A $B", special_tokens=[("<|begin_of_text|>", BOS)])
    tokenizer.backend_tokenizer.post_processor = begins
    assert tokenizer.convert_tokens_to_ids([SPECIAL[0], SPECIAL[-1]]) == [BOS, TURN]
    model = make_model(decoder_config(LLAMA))
    params = dict(jax.tree.map(np.asarray, jax.jit(model.init)(jax.random.key(0))["params"]))
    params["token_embedding"] = np.where(np.arange(16) == 0, np.float32(9), params["token_embedding"])
    drawn = (np.arange(576)[:, None] == TURN) & (np.arange(16) == 0)
    params["head_kernel"] = np.where(drawn, np.float32(4), params["head_kernel"] * (np.arange(16) > 0))
    save_hf(folder, model, {"params": params}, dtype=jnp.bfloat16)
    (folder / "config.json").write_text(json.dumps(LLAMA))
    (folder / "generation_config.json").write_text(SAMPLING)
    save_tokenizer(tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def done(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    for split, numbers in (("train", range(4, 8)), ("test", range(4))):
        rows = [
            {
                "prompt": [{"role": "user", "content": f"Is {i} even?\x1b[2J"}],
                "chosen": [{"role": "assistant", "content": "Look."}],
                "rejected": [{"role": "assistant", "content": "No idea."}],
            }
            for i in numbers
        ]
        rows[0]["chosen"] += [{"role": "user", "content": "So?"}, {"role": "assistant", "content": "Yes."}]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = folder / "chat.yaml"
    config.write_text(CONFIG.format(dir=folder / "run", data=folder, model=model))
    printed = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dpo_jax.plotting.training_curves.plot_training", lambda rows, directory: directory.mkdir(exist_ok=True))
        for command in ("audit", "sft", "refs", "dpo", "eval", "sample"):
            result = call(command, config)
            assert result.code == 0, (command, result)
            printed[command] = result
    return folder, config, printed


def test_nothing_is_warned_of_but_the_size_of_these_data(done):
    notes = {line for result in done[2].values() for line in result.out.splitlines() if line.startswith("note: ")}
    assert notes == {
        "note: 4 test pairs are too few to tell policies apart by their accuracy: hold",
        "note: warm-up takes 1 steps, and the run has 1: the learning rate reaches only 50% of 1e-09 (warmup_steps)",
    }
    assert not any("warning" in (result.out + result.err).lower() for result in done[2].values())


def test_a_prompt_begins_with_bos_once(done):
    audit = done[2]["audit"].out
    assert "prompts begin with BOS, '<|begin_of_text|>'" in audit
    assert audit.count("<|begin_of_text|>·") == 1


def test_exports_keep_what_servers_read(done, model):
    folder, config, _ = done
    assert call("export", config, "--export.out", folder / "out").code == 0
    assert call("export", config, "--export.out", folder / "wide", "--export.dtype", "float32").code == 0
    types = {"run/sft/export": "float32", "run/dpo/export": "bfloat16", "out": "bfloat16", "wide": "float32"}
    for name, dtype in types.items():
        export = folder / name
        assert load_hf_config(export)["dtype"] == dtype, name
        assert {x.dtype.name for x in load_file(export / "model.safetensors").values()} == {dtype}, name
        assert (export / "generation_config.json").read_text() == SAMPLING, name
        assert load_tokenizer(export).chat_template == TEMPLATE
        assert load_tokenizer(export)("hello")["input_ids"][:2] == [
            BOS,
            *load_tokenizer(GOLDEN / "tokenizer")("hello")["input_ids"][:1],
        ]
        assert json.loads((export / "config.json").read_text()).items() >= (LLAMA | {"dtype": dtype}).items(), name
        assert 'library_name: "transformers"' in (export / "README.md").read_text(), name
        assert load_hf_config(export).get("source_dtype") == ("bfloat16" if name == "run/sft/export" else None)
    # DPO starts from the trained weights themselves, and so from its reference.
    first = read_metrics(folder / "run" / "dpo" / "metrics.jsonl")[0]
    assert math.isclose(first["loss"], math.log(2), rel_tol=1e-6)
    assert {abs(first[f"displacement/{side}"]) < 1e-4 for side in ("chosen", "rejected")} == {True}


def test_weights_too_large_for_the_type_of_the_source(model, tmp_path, capsys):
    """A type that was asked for is refused. That of the source gives way: training is over, and must leave a model."""
    net, variables = load_hf(model)
    config = json.loads((model / "config.json").read_text()) | {"dtype": "float16"}
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config))
    variables["params"]["token_embedding"] = variables["params"]["token_embedding"] + 1e5
    options = {"source": str(source), "card": "# Card"}
    tokenizer = load_tokenizer(model)
    with pytest.raises(ConfigError, match=r"export.dtype: tensor model.embed_tokens.weight: .* too large for float16"):
        write_model(tmp_path / "out", net, variables, tokenizer, dtype="float16", **options)
    folder, dtype = write_model(tmp_path / "out", net, variables, tokenizer, dtype=None, **options)
    assert dtype == load_hf_config(folder)["dtype"] == "float32"
    assert "written as float32, and not as float16" in capsys.readouterr().out


def test_every_end_token_of_the_model_stops_it(done, model):
    folder, _, printed = done
    assert build.stop_ids(load_tokenizer(model), str(model)) == (0, TURN)
    report = json.loads((folder / "run" / "eval" / "report.json").read_text())
    assert report["policy"]["tokens"] == report["reference"]["tokens"] == 1
    lines = [json.loads(line) for line in printed["sample"].out.splitlines()]
    assert [(line["completion"], line["tokens"]) for line in lines] == [("", 1)] * 2
    assert "completions were cut off" not in printed["sample"].err


def test_the_race_takes_the_weights_and_the_tokens_of_the_folder(done, model, tmp_path):
    """Bit for bit, and pairs as a run of `dpo` has them. What it cannot race is told."""
    folder, config, _ = done
    rows = (folder / "train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join(rows[1:]))
    config = load_config(config)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, path=str(tmp_path)))
    bench = dataclasses.replace(config.bench, steps=1, gate_steps=2)
    config = dataclasses.replace(config, bench=bench, dpo=dataclasses.replace(config.dpo, batch=3, trainable="final_norm"))
    lora = dataclasses.replace(config, lora=dataclasses.replace(config.lora, rank=2))
    assert not_raced(lora) == ["dpo.trainable", "lora.rank"]
    tokenizer = load_tokenizer(model)
    expected = {
        tuple(pair.prompt) for pair in splits.encode_split(config, splits.load_split(config, "train", tokenizer), tokenizer)
    }
    for number, lengths in enumerate((None, "9/3/5")):
        asked = dataclasses.replace(config, bench=dataclasses.replace(bench, lengths=lengths))
        work = freeze(asked, types.SimpleNamespace(path=tmp_path / str(number)))
        raced, start = (load_file(path / "model.safetensors") for path in (work.model, model))
        assert raced.keys() == start.keys()
        for name, weights in start.items():
            assert raced[name].dtype == np.float32
            np.testing.assert_array_equal(raced[name], weights.astype(np.float32))
        pairs = read_pairs(work)
        assert len(pairs) == 6
        if lengths is None:
            assert {tuple(pair.prompt) for pair in pairs} == expected
        else:
            assert {(len(pair.prompt), len(pair.chosen), len(pair.rejected)) for pair in pairs} == {(9, 3, 5)}
    (tmp_path / "train.jsonl").write_text("".join(rows))
    with pytest.raises(ConfigError, match=r"train.jsonl:1\S* and \d other pairs of the benchmark have unscored turns"):
        freeze(config, types.SimpleNamespace(path=tmp_path / "turns"))


def test_ppo_stops_there_too(done, model):
    config = load_config(done[1])
    frontier = dataclasses.replace(config.frontier, max_new_tokens=4, prompts=4, test_prompts=4)
    config = dataclasses.replace(config, dpo=dataclasses.replace(config.dpo, policy=str(model)), frontier=frontier)
    world, _ = make_world(config, train="prompts", test="test_prompts", reward=lambda prompts, texts: np.zeros(len(texts)))
    method = ppo_method(config, world)
    prompts = prompt_batch(world.train.ids, jax.random.key(0), length=world.width - 4)
    collected = method.collect((method._begin().variables, world.reference), prompts)
    assert [list(ids) for ids in completion_ids(collected.rows)] == [[TURN]] * 4


def test_people_see_turns(done):
    folder, _, printed = done
    assert "prompt      user: Is 0 even?\\x1b[2J\n" in printed["eval"].out
    lines = (folder / "run" / "eval" / "samples.jsonl").read_text().splitlines()
    for line in [json.loads(lines[0]), json.loads(printed["sample"].out.splitlines()[0])]:
        assert line["turns"] == [{"role": "user", "content": "Is 0 even?\x1b[2J"}]
        assert line["prompt"] == (
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nIs 0 even?\x1b[2J<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n"
        )
    assert not any("\x1b" in result.out + result.err for result in printed.values())


def test_the_audit_shows_the_turns_that_are_scored(done):
    """Training and evaluation, which read these rows, have ended well."""
    _, config, _ = done
    shown = call("audit", config).out
    lines = shown.partition("  chosen    ")[2].partition("  rejected  ")[0].splitlines()
    tokens = "".join(line.strip() for line in lines).replace("·", "")
    head = "<|start_header_id|>{}<|end_header_id|>\\n\\n"
    assert tokens.startswith(f"[Look.<|eot_id|>]{head.format('user')}So?")
    assert tokens.endswith(f"{head.format('assistant')}[Yes.<|eot_id|>]")


def test_ones_own_prompts_are_rendered_as_in_training(done, tmp_path):
    _, config, printed = done
    held_out = [json.loads(line) for line in printed["sample"].out.splitlines()]
    (tmp_path / "p.txt").write_text("Is 0 even?\x1b[2J\nIs 1 even?\x1b[2J\n")
    result = call("sample", config, "--sample.prompts-file", tmp_path / "p.txt")
    assert [json.loads(line) for line in result.out.splitlines()] == held_out
    assert "a text is rendered as a user's turn (--sample.chat off: as it stands)" in result.err
    (tmp_path / "m.jsonl").write_text(json.dumps({"messages": [{"role": "assistant", "content": "a"}]}))
    assert "m.jsonl:1: messages: no_prompt" in refused(2, "sample", config, "--sample.prompts-file", tmp_path / "m.jsonl")
    assert "no\\x1b[2Jfile" in refused(2, "sample", config, "--sample.prompts-file", "no\x1b[2Jfile")


@pytest.mark.parity
def test_transformers_loads_the_policy_and_stops_where_it_does(done):
    from transformers import AutoModelForCausalLM

    folder, _, printed = done
    export = folder / "run" / "dpo" / "export"
    policy, tokenizer = AutoModelForCausalLM.from_pretrained(export), load_tokenizer(export)
    for line in map(json.loads, printed["sample"].out.splitlines()):
        ids = tokenizer(line["prompt"], add_special_tokens=False, return_tensors="pt")
        drawn = policy.generate(**ids, max_new_tokens=4)[0, ids["input_ids"].shape[1] :]
        assert drawn.tolist() == [TURN]
