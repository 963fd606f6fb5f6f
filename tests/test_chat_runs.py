"""A chat model through the whole program: another end token than the tokenizer's, bfloat16 weights, a chat template."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN
from safetensors.numpy import load_file
from tiny_run import call, refused
from tokenizers import AddedToken

from dpo_jax.cli import build
from dpo_jax.cli.commands.export import write_model
from dpo_jax.cli.commands.frontier import ppo_method
from dpo_jax.cli.config import ConfigError, load_config
from dpo_jax.cli.experiment import make_world
from dpo_jax.data.tokenizer import load_tokenizer, save_tokenizer
from dpo_jax.models.decoder import make_model
from dpo_jax.models.families import decoder_config, hf_config
from dpo_jax.models.hf import load_config as load_hf_config
from dpo_jax.models.hf import load_hf, save_hf
from dpo_jax.ppo import completion_ids, prompt_batch
from dpo_jax.runtime.metrics import read_metrics

TEMPLATE = (
    "{% for m in messages %}<|header|>{{ m.role }}\n{{ m.content }}<|turn|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|header|>assistant\n{% endif %}"
)
CONFIG = """\
run: {{dir: {dir}, save_every_steps: 0}}
data: {{source: files, path: {data}, max_length: 96, max_prompt_length: 64}}
model: {{path: {model}}}
sft: {{batch: 4, lr: 1.0e-9, warmup_steps: 1}}
dpo: {{batch: 4, lr: 1.0e-9, warmup_steps: 1}}
eval: {{batch: 4, samples: 2, max_new_tokens: 4}}
sample: {{prompts: 2, max_new_tokens: 4}}
"""
SAMPLING = '{"eos_token_id": [0, 512], "temperature": 0.7}\n'


@pytest.fixture(scope="module", autouse=True)
def _compilation_cache():
    before = jax.config.jax_compilation_cache_dir
    yield
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder in bfloat16 whose model always draws <|turn|>: its last hidden state is constant, and only that row sees it."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    tokenizer = load_tokenizer(GOLDEN / "tokenizer")
    tokenizer.add_tokens([AddedToken(token, special=True) for token in ("<|header|>", "<|turn|>")])
    tokenizer.chat_template = TEMPLATE
    turn = tokenizer.convert_tokens_to_ids("<|turn|>")
    assert json.loads(SAMPLING)["eos_token_id"] == [tokenizer.eos_token_id, turn]
    sizes = {"width": 16, "layers": 1, "heads": 2, "max_positions": 128}
    model = make_model(decoder_config(hf_config("gpt_neox", vocab_size=turn + 1, eos_token_id=0, **sizes)))
    params = jax.tree.map(np.asarray, jax.jit(model.init)(jax.random.key(0))["params"])
    params["final_norm"] = {"scale": np.zeros(16, np.float32), "bias": np.ones(16, np.float32)}
    params["head_kernel"] = np.where(np.arange(turn + 1)[:, None] == turn, np.float32(4), np.zeros((1, 16), np.float32))
    save_hf(folder, model, {"params": params}, dtype=jnp.bfloat16)
    (folder / "generation_config.json").write_text(SAMPLING)
    save_tokenizer(tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def done(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    rows = [
        {
            "prompt": [{"role": "user", "content": f"Is {i} even?\x1b[2J"}],
            "chosen": [{"role": "assistant", "content": "Look."}],
            "rejected": [{"role": "assistant", "content": "No idea."}],
        }
        for i in range(4)
    ]
    rows[0]["chosen"] += [{"role": "user", "content": "So?"}, {"role": "assistant", "content": "Yes."}]
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = folder / "chat.yaml"
    config.write_text(CONFIG.format(dir=folder / "run", data=folder, model=model))
    printed = {}
    for command in ("sft", "dpo", "eval", "sample"):
        result = call(command, config)
        assert result.code == 0, (command, result)
        printed[command] = result
    return folder, config, printed


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
        assert 'library_name: "transformers"' in (export / "README.md").read_text(), name
        assert load_hf_config(export).get("source_dtype") == ("bfloat16" if name == "run/sft/export" else None)
    # DPO starts from the trained weights themselves, and so from its reference.
    first = read_metrics(folder / "run" / "dpo" / "metrics.jsonl")[0]
    assert math.isclose(first["loss"], math.log(2), rel_tol=1e-6)
    assert {abs(first[f"displacement/{side}"]) < 1e-9 for side in ("chosen", "rejected")} == {True}


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
    with pytest.raises(ConfigError, match=r"export.dtype: tensor gpt_neox.embed_in.weight: .* too large for float16"):
        write_model(tmp_path / "out", net, variables, tokenizer, dtype="float16", **options)
    folder, dtype = write_model(tmp_path / "out", net, variables, tokenizer, dtype=None, **options)
    assert dtype == load_hf_config(folder)["dtype"] == "float32"
    assert "written as float32, and not as float16" in capsys.readouterr().out


def test_every_end_token_of_the_model_stops_it(done, model):
    folder, _, printed = done
    assert build.stop_ids(load_tokenizer(model), str(model)) == (0, 512)
    report = json.loads((folder / "run" / "eval" / "report.json").read_text())
    assert report["policy"]["tokens"] == report["reference"]["tokens"] == 1
    lines = [json.loads(line) for line in printed["sample"].out.splitlines()]
    assert [(line["completion"], line["tokens"]) for line in lines] == [("", 1)] * 2
    assert "stopped before their end" not in printed["sample"].err


def test_ppo_stops_there_too(done, model):
    config = load_config(done[1])
    frontier = dataclasses.replace(config.frontier, max_new_tokens=4, prompts=4, test_prompts=4)
    config = dataclasses.replace(config, dpo=dataclasses.replace(config.dpo, policy=str(model)), frontier=frontier)
    world, _ = make_world(config, train="prompts", test="test_prompts", reward=lambda prompts, texts: np.zeros(len(texts)))
    method = ppo_method(config, world)
    prompts = prompt_batch(world.train.ids, jax.random.key(0), length=world.width - 4)
    collected = method.collect((method._begin().variables, world.reference), prompts)
    assert [list(ids) for ids in completion_ids(collected.rows)] == [[512]] * 4


def test_people_see_turns(done):
    folder, _, printed = done
    assert "prompt      user: Is 0 even?\\x1b[2J\n" in printed["eval"].out
    lines = (folder / "run" / "eval" / "samples.jsonl").read_text().splitlines()
    for line in [json.loads(lines[0]), json.loads(printed["sample"].out.splitlines()[0])]:
        assert line["turns"] == [{"role": "user", "content": "Is 0 even?\x1b[2J"}]
        assert line["prompt"] == "<|header|>user\nIs 0 even?\x1b[2J<|turn|>\n<|header|>assistant\n"
    assert not any("\x1b" in result.out + result.err for result in printed.values())


def test_the_audit_shows_the_turns_that_are_scored(done):
    """Training and evaluation, which read these rows, have ended well."""
    _, config, _ = done
    shown = call("audit", config).out
    lines = shown.partition("  chosen    ")[2].partition("  rejected  ")[0].splitlines()
    tokens = "".join(line.strip() for line in lines).replace("·", "")
    assert tokens == r"[Look.<|turn|>]\n<|header|>user\nSo?<|turn|>\n<|header|>assistant\n[Yes.<|turn|>\n<|endoftext|>]"


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
