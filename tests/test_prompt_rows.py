"""Prompts alone: what reads them, and what refuses them."""

import json

import jax
import numpy as np
import pytest
from chat_templates import CHATML, chat_tokenizer
from conftest import GOLDEN
from tiny_run import _compilation_cache as _compilation_cache
from tiny_run import call, refused

from dpo_jax.cli.config import load_config
from dpo_jax.cli.experiment import prompts_of
from dpo_jax.data.pairs import Cause, DataError
from dpo_jax.data.sources import load_preferences
from dpo_jax.data.tokenizer import load_tokenizer, save_tokenizer
from dpo_jax.models.decoder import make_model
from dpo_jax.models.families import decoder_config, hf_config
from dpo_jax.models.hf import save_hf

USER, SYSTEM = {"role": "user", "content": "2 + 2?"}, {"role": "system", "content": "Be brief."}
ANSWERS = {name: [{"role": "assistant", "content": text}] for name, text in (("chosen", "4"), ("rejected", "5"))}
CONFIG = """\
run: {{dir: {dir}}}
data: {{path: {data}, max_length: 40, max_prompt_length: 24, on_bad: drop, max_dropped_share: 0.5}}
dpo: {{policy: {model}}}
sample: {{max_new_tokens: 4, prompts: 3}}
"""


def write(path, *rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(folder, *rows, wanted="prompts", **options):
    return load_preferences(write(folder / "train.jsonl", *rows), "train", rows=wanted, **options)


def test_a_prompt_is_the_one_of_a_preference(tmp_path):
    """The same text and digest, from messages, from a system column, and from text."""
    tokenizer = chat_tokenizer(CHATML)
    for row in ({"prompt": [SYSTEM, USER]}, {"prompt": [USER], "system": "Be brief."}, {"prompt": "2 + 2?", "system": " "}):
        options = {"tokenizer": tokenizer, "columns": "system=system" if "system" in row else None}
        [alone], [pair] = load(tmp_path, row, **options), load(tmp_path, {**row, **ANSWERS}, **options)
        assert (alone.prompt, alone.chat, alone.prompt_digest) == (pair.prompt, True, pair.prompt_digest)
        assert (alone.chosen, alone.rejected) == ("", "")
    loaded = load(tmp_path, {"prompt": "The sky is", "subset": "sky", "answer": 4}, {"prompt": "Grass is"})
    assert [(one.prompt, one.subset) for one in loaded] == [("The sky is", "sky"), ("Grass is", None)]
    assert "columns that are not read: 'answer'" in loaded.report.notes
    loaded = load(tmp_path, {"question": "Why?", "answer": "So."}, columns="prompt=question")
    assert [one.prompt for one in loaded] == ["Why?"]


def test_bad_prompts_are_counted(tmp_path):
    rows = [{"prompt": "a"}, {"prompt": ""}, {"prompt": None}, {"prompt": [USER]}, {"prompt": "b", "images": ["x.png"]}]
    report = load(tmp_path, *rows, on_bad="drop", tokenizer=chat_tokenizer(CHATML)).report
    assert (report.read, report.kept, sum(report.dropped.values())) == (5, 2, 3)


@pytest.mark.parametrize("wanted", ["pairs", "unpaired", "rankings", "any"])
def test_what_needs_completions_refuses_prompts_alone(wanted, tmp_path):
    with pytest.raises(
        DataError, match="holds prompts alone, but .* are needed here: commands that sample read them"
    ) as caught:
        load(tmp_path, {"prompt": "a"}, wanted=wanted)
    assert caught.value.causes == (Cause.MISSING_COLUMN,)


@pytest.mark.parametrize("row", [{"prompt": "a", "chosen": "b"}, {"prompt": "a", "chosen_answer": "b", "rejected_answer": "c"}])
def test_preferences_under_other_names_are_not_taken_for_prompts(row, tmp_path):
    with pytest.raises(DataError, match="no known format has the columns"):
        load(tmp_path, row)


@pytest.mark.parametrize("other", [{"prompt": "c", "chosen": " d", "rejected": " e"}, {"prompt": "c", "completion": " d"}])
def test_prompts_come_from_all_formats(other, tmp_path):
    assert [one.prompt for one in load(tmp_path, other)] == ["c"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, and prompts alone: nine to train on, five held out, one bad row in each."""
    folder = tmp_path_factory.mktemp("prompts")
    sizes = {"width": 16, "layers": 1, "heads": 2, "max_positions": 64}
    model = make_model(decoder_config(hf_config("gpt_neox", vocab_size=511, eos_token_id=0, **sizes)))
    save_hf(folder / "model", model, jax.tree.map(np.asarray, jax.jit(model.init)(jax.random.key(0))))
    save_tokenizer(load_tokenizer(GOLDEN / "tokenizer"), folder / "model")
    for split, count in (("train", 9), ("test", 5)):
        write(folder / "data" / f"{split}.jsonl", *({"prompt": f"{split} {i}:"} for i in range(count)), {"prompt": ""})
    (folder / "c.yaml").write_text(CONFIG.format(dir=folder / "run", data=folder / "data", model=folder / "model"))
    return folder


def test_commands_that_sample_take_them(folder):
    config, tokenizer = load_config(folder / "c.yaml"), load_tokenizer(folder / "model")
    prompts = prompts_of(config, "prompts", tokenizer)
    assert prompts.texts == [f"train {i}:" for i in range(9)]
    result = call("sample", folder / "c.yaml", "--sample.policy", folder / "model", "--sample.out", folder / "samples.jsonl")
    assert result.code == 0, result
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [f"test {i}:" for i in range(3)]
    result = call("online", folder / "c.yaml", "--online.reward", "people", "--online.completions", 2, "--check")
    assert "train (prompts, 1 file, 10 rows)" in result.out, result


@pytest.mark.parametrize("command", ["dpo", "sft", "audit", "refs"])
def test_commands_that_train_on_them_refuse_them(command, folder):
    for flags in ((), ("--check",)):
        message = refused(65, command, folder / "c.yaml", "--model.path", folder / "model", *flags)
        assert "holds prompts alone, but" in message
