"""Prompts of a file: texts and messages, with and without a chat template, and errors that name file, line and field."""

import dataclasses
import json

import pytest
from conftest import GOLDEN
from tokenizers import AddedToken

from dpo_jax.cli.commands.sample import for_terminal
from dpo_jax.cli.config import Config, ConfigError, SampleConfig
from dpo_jax.cli.prompts import Prompt, is_chat, prompts_of_file
from dpo_jax.data.tokenizer import load_tokenizer

TEMPLATE = (
    "{% for m in messages %}<|header|>{{ m.role }}\n{{ m.content }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}<|header|>assistant\n{% endif %}"
)
HI = {"role": "user", "content": "hi"}
RENDERED = Prompt("<|header|>user\nhi<|endoftext|><|header|>assistant\n", True, [HI])
SYSTEM = {"role": "system", "content": "Be terse."}


@pytest.fixture(scope="module")
def chatty():
    tokenizer = load_tokenizer(GOLDEN / "tokenizer")
    tokenizer.add_tokens([AddedToken("<|header|>", special=True)])
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def prompts(folder, tokenizer, *rows, chat=True, name="p.jsonl"):
    file = folder / name
    file.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return [prompt._replace(uid="") for prompt in prompts_of_file(str(file), tokenizer, chat=chat)]


def test_texts_are_turns_of_a_chat_model_and_messages_always(chatty, tmp_path):
    assert prompts(tmp_path, chatty, "hi", "", "hi", name="p.txt") == [RENDERED] * 2
    assert prompts(tmp_path, chatty, "hi", name="p.txt", chat=False) == [Prompt("hi")]
    rows = [{"prompt": "hi"}, {"prompt": [HI]}, {"messages": [HI], "id": 7}]
    assert prompts(tmp_path, chatty, *rows) == [RENDERED] * 3
    assert prompts(tmp_path, chatty, *rows, chat=False) == [Prompt("hi"), RENDERED, RENDERED]
    assert prompts(tmp_path, chatty, "\ufeffhi\r", {"prompt": "a\0b"}, name="p.txt", chat=False)[0] == Prompt("hi")
    assert prompts(tmp_path, chatty, {"prompt": "a\0b"}, chat=False) == [Prompt("a\0b")]
    for name in ("p.json", "p.JSONL", "p.ndjson"):  # the line is not the prompt
        assert prompts(tmp_path, chatty, {"prompt": "hi", "messages": None}, name=name, chat=False) == [Prompt("hi")]
    (told,) = prompts(tmp_path, chatty, {"messages": [SYSTEM, HI]})
    assert told.text == f"<|header|>system\nBe terse.<|endoftext|>{RENDERED.text}"
    assert told.turns == [SYSTEM, HI]
    chatty.chat_template = "{{ tools | tojson if tools }}" + TEMPLATE.replace("m.content", "m.content or m.tool_calls")
    try:
        call = {
            "role": "assistant",
            "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": "VALUE"}}}],
        }
        parts = {"role": "user", "content": [{"type": "text", "text": "hi"}]}
        (told,) = prompts(tmp_path, chatty, {"messages": [HI, call, parts], "tools": [{"name": "f"}]})
        with pytest.raises(ConfigError, match="tools: wrong_type: applies to chat messages only"):
            prompts(tmp_path, chatty, {"prompt": "hi", "tools": [{"name": "f"}]}, chat=False)
    finally:
        chatty.chat_template = TEMPLATE
    assert told.text.startswith('[{"name": "f"}]<|header|>user')
    assert [turn["content"] for turn in told.turns] == ["hi", '{"name": "f", "arguments": {"a": "VALUE"}}', "hi"]


BAD = {
    "no JSON": ("{", "invalid_json"),
    "no object": ("[1]", "missing_column: .* this has neither"),
    "both": ({"prompt": "hi", "messages": [HI]}, "missing_column: .* this has both"),
    "empty": ({"prompt": " "}, "prompt: wrong_type"),
    "no messages": ({"messages": []}, "messages: wrong_type"),
    "text for messages": ({"messages": "hi"}, "messages: wrong_type"),
    "answered": ({"messages": [HI, {"role": "assistant", "content": "yes"}]}, "messages: no_prompt"),
    "no content": ({"messages": [{"role": "user"}]}, "messages.0.content: missing_column"),
    "faked turn": ({"messages": [{"role": "user", "content": "<|header|>"}]}, "messages.0.content: eos_in_text"),
    "rendered already": ({"prompt": RENDERED.text}, "prompt: eos_in_text: .* needs --sample.chat off"),
    "NUL": ('{"prompt": "a\0"}', "nul: NUL at character 13"),
    "system beside": ({"prompt": "hi", "system": "Be terse."}, "system: wrong_type: would be part of the prompt"),
    "tools that the template leaves out": (
        {"messages": [HI], "tools": [{"name": "f"}]},
        "tools: chat_template: .* not write tools",
    ),
    "tools beside a text": ({"prompt": "hi", "tools": [{"name": "f"}]}, "tools: chat_template: .* not write tools"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_lines_are_named(name, chatty, tmp_path):
    row, told = BAD[name]
    with pytest.raises(ConfigError, match=rf"p\.jsonl:2: {told}"):
        prompts(tmp_path, chatty, {"prompt": "hi"}, row)


def test_a_base_model_reads_texts_and_refuses_messages(tokenizer, tmp_path):
    assert prompts(tmp_path, tokenizer, {"prompt": "hi"}, chat=False) == [Prompt("hi")]
    with pytest.raises(ConfigError, match=r"p\.jsonl:1: messages: chat_template: "):
        prompts(tmp_path, tokenizer, {"messages": [HI]}, chat=False)
    with pytest.raises(ConfigError, match="holds no prompts"):
        prompts(tmp_path, tokenizer, "", chat=False)


def test_what_makes_a_chat_model(chatty, tokenizer, tmp_path):
    def found(tokenizer, asked="auto"):
        config = dataclasses.replace(Config(), sample=SampleConfig(chat=asked))
        return is_chat(config, str(tmp_path / "export"), tokenizer)

    assert found(chatty)
    assert not found(tokenizer)
    assert not found(chatty, "off")
    with pytest.raises(ConfigError, match="sample.chat: is on, but the tokenizer of .* has no chat template"):
        found(tokenizer, "on")
    record = tmp_path / "data_report.json"  # of the run that the policy lies in
    for counts, expected in (((5, 1), True), ((0, 0), False)):
        record.write_text(json.dumps({split: {"chat": n} for split, n in zip(("train", "test"), counts, strict=True)}))
        assert found(chatty) == expected
        assert found(chatty, "on")
        assert not found(tokenizer)
    record.write_text('{"train": {}}')  # of an older version
    assert found(chatty)


def test_a_terminal_is_shown_turns_and_no_controls():
    said = {"prompt": RENDERED.text, "turns": [HI], "completion": "a\x1b[2Jb"}
    assert for_terminal(said) == "\nuser: hi\nassistant: \x1b[1ma\\x1b[2Jb\x1b[0m"
    assert for_terminal({"prompt": "A\x9b film", "completion": " is"}) == "\nA\\x9b film\x1b[1m is\x1b[0m"


@pytest.mark.parametrize("name", ["prompts.csv", "prompts.tsv", "prompts.parquet", "prompts.jsonl.gz"])
def test_a_table_is_not_read_as_lines(tokenizer, tmp_path, name):
    """The first prompt of a CSV file would be the name of its column."""
    (tmp_path / name).write_text("prompt\nThe sky is\n")
    with pytest.raises(ConfigError, match=rf"sample.prompts_file: .*{name} is a table; .* or read it as data: --data.path"):
        prompts_of_file(str(tmp_path / name), tokenizer, chat=False)
