"""Texts for supervised fine-tuning: conversations, prompts with a completion, plain texts."""

import json
import re

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chat_templates import CHATML, chat_tokenizer
from conftest import GOLDEN
from tiny_run import _compilation_cache as _compilation_cache
from tiny_run import _plots_once as _plots_once
from tiny_run import call, refused

from dpo_jax.cli.commands.sft import _targets
from dpo_jax.cli.config import load_config
from dpo_jax.data.pairs import Cause, DataError
from dpo_jax.data.prepare import encode_all, encode_targets
from dpo_jax.data.sources import load_preferences
from dpo_jax.data.tokenizer import load_tokenizer, save_tokenizer
from dpo_jax.models.decoder import make_model
from dpo_jax.models.families import decoder_config, hf_config
from dpo_jax.models.hf import save_hf
from dpo_jax.runtime.metrics import read_metrics

LIMITS = {"max_length": 40, "max_prompt_length": 12}
USER, ANSWER = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}
AGAIN, LAST = {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes."}


def write(path, *rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(folder, *rows, tokenizer=None, **options):
    return load_preferences(write(folder / "train.jsonl", *rows), "train", rows="any", tokenizer=tokenizer, **options)


def texts_of(loaded, tokenizer, *, score_prompt=False, **limits):
    """(prompt, completion, scored tokens) of each text that is trained on, as strings."""
    limits = {**LIMITS, **limits}
    assert len(encode_all(loaded, tokenizer, **limits)) == len(loaded)
    found = []
    for prompt, completion, *scored in encode_targets(loaded, tokenizer, **limits, score_prompt=score_prompt)[0]:
        marks = scored[0] if scored and scored[0] is not None else np.ones(len(completion), bool)
        found.append(tuple(tokenizer.decode(ids) for ids in (prompt, completion, completion[marks])))
    return found


def test_all_turns_of_the_assistant_are_learned(tmp_path):
    tokenizer = chat_tokenizer(CHATML)
    loaded = load(
        tmp_path, {"messages": [USER, ANSWER, AGAIN, LAST], "prompt": "2 + 2?", "prompt_id": "a"}, tokenizer=tokenizer
    )
    assert loaded.report.format == "sft_messages"
    assert "columns that are not read: 'prompt', 'prompt_id'" in loaded.report.notes
    prompt = "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    between = "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n"
    limits = {"max_length": 200, "max_prompt_length": 100}
    [(text, completion, scored)] = texts_of(loaded, tokenizer, **limits)
    whole = f"{prompt}4<|im_end|>\n{between}Yes.<|im_end|>"
    assert (text, text + completion) == (prompt, whole)
    assert scored == "4<|im_end|>Yes.<|im_end|>"  # what transformers marks between {% generation %} and {% endgeneration %}
    assert texts_of(loaded, tokenizer, score_prompt=True, **limits) == [("", whole, whole)]
    shared = [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]
    row = {"conversations": shared, "sys": "Count."}
    [pair] = load(tmp_path, row, tokenizer=tokenizer, columns="messages=conversations,system=sys")
    assert pair.prompt == f"<|im_start|>system\nCount.<|im_end|>\n{prompt}"
    assert (pair.chosen, pair.desirable, pair.demonstration) == ("4", True, True)


@pytest.mark.parametrize(
    ("messages", "cause", "message"),
    [
        ([USER], Cause.EMPTY, "messages: empty: no turn of the assistant"),
        ([ANSWER, AGAIN, LAST], Cause.NO_PROMPT, "messages: no_prompt: the assistant speaks first"),
        ([USER, {"role": "assistant", "content": " "}], Cause.EMPTY, "messages: empty: the completion is empty or blank"),
        ([USER, {"role": "assistant"}], Cause.MISSING_COLUMN, r"messages\.1\.content"),
        ([USER, {"role": "assistant", "content": "a<|im_end|>"}], Cause.EOS_IN_TEXT, r"messages\.1\.content"),
    ],
)
def test_conversations_that_teach_nothing_are_refused(messages, cause, message, tmp_path):
    with pytest.raises(DataError, match=message) as caught:
        load(tmp_path, {"messages": messages}, tokenizer=chat_tokenizer(CHATML))
    assert caught.value.causes[0] == cause


def test_prompts_with_completions(tmp_path, tokenizer):
    rows = [{"prompt": "The sky is", "completion": " blue."}, {"prompt": "Grass is", "completion": " green and" * 20}]
    loaded = load(tmp_path, *rows)
    assert loaded.report.format == "sft_completion"
    first, second = texts_of(loaded, tokenizer)
    assert first == ("The sky is", " blue.<|endoftext|>", " blue.<|endoftext|>")
    ids = tokenizer(second[0] + second[1])["input_ids"]
    assert (second[0], len(ids)) == ("Grass is", 40)  # the prompt leaves the rest of max_length to the completion
    assert load(tmp_path, rows[0] | {"label": True}).report.format == "unpaired"
    chat = {"prompt": [USER], "completion": [ANSWER]}
    [pair] = load(tmp_path, chat, tokenizer=chat_tokenizer(CHATML))
    assert (pair.chat, pair.chosen) == (True, "4")


def test_images_are_not_left_out_silently(tmp_path):
    rows = {"messages": [USER, ANSWER]}, {"prompt": "a", "completion": " b"}
    rows = (*rows, {"prompt": "a", "completion": " b", "label": True}, {"prompt": "a", "completions": [" b", " c"]})
    for number, row in enumerate(rows):
        tokenizer, folder = chat_tokenizer(CHATML), tmp_path / str(number)
        folder.mkdir()
        assert load(folder, row | {"images": []}, tokenizer=tokenizer)
        pq.write_table(pa.Table.from_pylist([row | {"images": ["a.png"]}]), folder / "test.parquet")
        for source, split in ((write(folder / "train.jsonl", row | {"images": ["a.png"]}), "train"), (folder, "test")):
            with pytest.raises(DataError, match="images: unread_column: images are read in the format trl only"):
                load_preferences(source, split, rows="any", tokenizer=tokenizer)


def test_plain_texts(tmp_path, tokenizer):
    loaded = load(tmp_path, *({"text": f"The sky is {word}."} for word in ("blue", "gray", "red")))
    assert loaded.report.format == "sft_text"
    assert texts_of(loaded, tokenizer)[1] == ("", "The sky is gray.<|endoftext|>", "The sky is gray.<|endoftext|>")
    assert texts_of(loaded, tokenizer, max_length=4, max_prompt_length=2)[0][1] == tokenizer.decode(
        tokenizer("The sky is blue.")["input_ids"][:4]
    )
    assert not encode_all(loaded, tokenizer, **LIMITS).report.notes[1:]  # nothing of KTO's mismatched completions
    with pytest.raises(DataError, match="text: empty"):
        load(tmp_path, {"text": " "})


def test_rows_of_preferences_are_not_taken_for_texts(tmp_path):
    row = {"text": "Which sky?", "good": "A blue one.", "bad": "None."}
    for suffix in ("jsonl", "parquet"):
        folder = tmp_path / suffix
        write(folder / "train.jsonl", row)
        if suffix == "parquet":
            (folder / "train.jsonl").unlink()
            pq.write_table(pa.Table.from_pylist([row]), folder / "train.parquet")
        with pytest.raises(DataError, match="--data.columns prompt=text,chosen=good,rejected=bad"):
            load_preferences(folder, "train")
    with pytest.raises(DataError, match="holds texts for supervised fine-tuning, but pairs are needed here: `dpo-jax sft`"):
        load_preferences(write(tmp_path / "train.jsonl", {"text": "The sky is blue."}), "train")
    pq.write_table(pa.Table.from_pylist([{"messages": [USER, ANSWER], "id": "a"}]), tmp_path / "train.parquet")
    loaded = load_preferences(tmp_path / "train.parquet", "train", rows="any", tokenizer=chat_tokenizer(CHATML))
    assert (loaded.report.format, loaded[0].chosen) == ("sft_messages", "4")


CONFIG = """\
run: {{dir: {dir}}}
data: {{path: {data}, max_length: 40, max_prompt_length: 24, test_share: 0.3}}
model: {{path: {model}}}
sft: {{batch: 4, lr: 1.0e-2, warmup_steps: 0, epochs: 3}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    sizes = {"width": 16, "layers": 1, "heads": 2, "max_positions": 64}
    model = make_model(decoder_config(hf_config("gpt_neox", vocab_size=511, eos_token_id=0, **sizes)))
    save_hf(folder / "model", model, jax.tree.map(np.asarray, jax.jit(model.init)(jax.random.key(0))))
    save_tokenizer(load_tokenizer(GOLDEN / "tokenizer"), folder / "model")
    write(folder / "text" / "train.jsonl", *({"text": f"Number {i} is here."} for i in range(30)))
    write(folder / "both" / "train.jsonl", *({"prompt": f"Number {i}", "completion": " is here."} for i in range(30)))
    return folder


def configured(folder, kind):
    config = folder / f"{kind}.yaml"
    config.write_text(CONFIG.format(dir=folder / f"run-{kind}", data=folder / kind, model=folder / "model"))
    return config


def test_sft_trains_on_plain_texts(folder):
    """By the mean over tokens: of a batch, and of all held-out texts."""
    config = configured(folder, "text")
    assert "train with dpo-jax sft" in " ".join(call("audit", config).out.split())
    result = call("sft", config, "--sft.loss", "mean")
    assert result.code == 0, result
    train, held_out = map(int, re.search(r"(\d+) texts to train on, (\d+) held out", result.out).groups())
    assert (train + held_out, held_out > 3) == (30, True)  # divided by the texts, as there are no prompts
    assert "have a prompt of" not in result.out
    rows = read_metrics(folder / "run-text" / "sft" / "metrics.jsonl")
    assert rows[-1]["eval/loss"] < 0.8 * rows[0]["loss"]
    assert rows[0]["loss"] == pytest.approx(rows[0]["nll_per_token"], rel=1e-6)
    assert rows[-1]["eval/loss"] == rows[-1]["eval/nll_per_token"]
    for command in ("dpo", "refs"):
        assert "texts for supervised fine-tuning" in refused(65, command, config, "--dpo.policy", folder / "model")
    assert "which have no prompts" in refused(2, "sample", config, "--sample.policy", folder / "model")


def test_sft_on_texts_scores_what_preferences_would(folder, tokenizer):
    """The same texts as the better side of preferences give the same examples."""
    config = configured(folder, "both")
    write(
        folder / "pairs" / "train.jsonl",
        *({"prompt": f"Number {i}", "chosen": " is here.", "rejected": " no"} for i in range(30)),
    )
    of_texts, of_pairs = (_targets(load_config(file), tokenizer) for file in (config, configured(folder, "pairs")))
    for one, other in zip((*of_texts.train, *of_texts.held_out), (*of_pairs.train, *of_pairs.held_out), strict=True):
        assert [ids.tolist() for ids in one[:2]] == [ids.tolist() for ids in other[:2]]


def test_texts_that_repeat_count_once_and_are_told(folder, tokenizer, capsys):
    rows = [{"prompt": f"Number {i}", "chosen": " is here.", "rejected": f" no {k}"} for i in range(30) for k in range(2)]
    write(folder / "twice" / "train.jsonl", *rows)
    found = _targets(load_config(configured(folder, "twice")), tokenizer)
    said = dict(
        re.findall(
            r"note: (\w+) split: (\d+ texts to learn in \d+ rows) \(a repeated text counts once", capsys.readouterr().out
        )
    )
    parts = {"train": found.train, "test": found.held_out}
    assert said == {name: f"{len(texts)} texts to learn in {2 * len(texts)} rows" for name, texts in parts.items()}
