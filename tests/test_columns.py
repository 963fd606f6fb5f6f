"""Prompts and system texts in other columns: read where `data.columns` says so, refused by name where it does not."""

import json
import re
import shlex

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_sources import load, turn, write
from test_sources import tokenizer as tokenizer

from dpo_jax.cli import splits
from dpo_jax.cli.config import ConfigError, load_config
from dpo_jax.cli.flags import parse
from dpo_jax.cli.identity import data_record
from dpo_jax.data.column_map import ColumnMap
from dpo_jax.data.pairs import DataError
from dpo_jax.data.sources import peek
from dpo_jax.training.fingerprint import data_changes

SIDES = {"chosen": "An apple is a fruit.", "rejected": "An orange brick is a fruit."}
CHAT = "<|im_start|>user\nName a fruit.<|endoftext|>\n<|im_start|>assistant\n"
SYSTEM = "<|im_start|>system\nBe short.<|endoftext|>\n"
ASKED, GOOD, BAD = turn("user", "Name a fruit."), turn("assistant", "An apple."), turn("assistant", "A brick.")
Q = "Name a fruit."


def written(path, *rows):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
        return path
    return write(path, *rows)


def option_in(message):
    """The value of the first `--data.columns` of a message, as a shell reads it."""
    return shlex.split(re.findall(r"--data\.columns ('[^']*'|[^\s;]+)", message)[0])[0]


# A row -> the columns that are named, the option that is offered, and the prompt that it gives.
ELSEWHERE = {
    "alpaca, no input": ({"instruction": Q, "input": "", **SIDES}, "'instruction'", "prompt=instruction+input", Q),
    "alpaca": ({"instruction": "Name", "input": "a fruit.", **SIDES}, "'input'", "prompt=instruction+input", "Name\na fruit."),
    "orca": (
        {"system": "Be short.", "question": Q, **SIDES},
        "'system', 'question'",
        "prompt=question,system=system",
        SYSTEM + CHAT,
    ),
    "orca of argilla": (
        {"system": "", "input": Q, **SIDES, "generations": ["a", "b"], "rationale": "It is so.", "original_chosen": "An a b"},
        "'input'",
        "prompt=input",
        Q,
    ),
    "context": (
        {"context": "Fruit grows.", "question": Q, **SIDES},
        "'question'",
        "prompt=context+question",
        f"Fruit grows.\n{Q}",
    ),
    "query": ({"id": "a b c", "query": Q, **SIDES}, "'query'", "prompt=query", Q),
    "another language": ({"pregunta": Q, **SIDES}, "'pregunta'", "prompt=pregunta", Q),
    "prompt by another name": ({"User Prompt": Q, **SIDES}, "'User Prompt'", "prompt=User Prompt", Q),
    "Prompt": ({"Prompt": Q, **SIDES}, "'Prompt'", "prompt=Prompt", Q),
    "messages": ({"messages": [ASKED], **SIDES}, "'messages'", "prompt=messages", CHAT),
    "ShareGPT": (
        {
            "conversations": [{"from": "human", "value": Q}],
            "chosen": {"from": "gpt", "value": "An apple."},
            "rejected": {"from": "gpt", "value": "A brick."},
        },
        "'conversations'",
        "prompt=conversations",
        CHAT,
    ),
    "answers as messages": ({"question": Q, "chosen": [GOOD], "rejected": [BAD]}, "'question'", "prompt=question", CHAT),
    "system and prompt": ({"system": "Be short.", "prompt": Q, **SIDES}, "'system'", "system=system", SYSTEM + CHAT),
    "system and messages": (
        {"system_prompt": "Be short.", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
        "'system_prompt'",
        "system=system_prompt",
        SYSTEM + CHAT,
    ),
    "other case": (
        {"Prompt": Q, "Chosen": "An a.", "Rejected": "A b."},
        "'Prompt', 'Chosen', 'Rejected'",
        "prompt=Prompt,chosen=Chosen,rejected=Rejected",
        Q,
    ),
    "sides by other names": (
        {"question": Q, "answer_chosen": "An a.", "answer_rejected": "A b.", "chosen_score": 1},
        "'answer_chosen'",
        "prompt=question,chosen=answer_chosen,rejected=answer_rejected",
        Q,
    ),
    "StackExchange in pairs": (
        {"qid": 1, "question": Q, "date": "2020-01-01", "response_j": "An a.", "response_k": "A b."},
        "'response_j'",
        "prompt=question,chosen=response_j,rejected=response_k",
        Q,
    ),
    "UltraFeedback of argilla": (
        {"instruction": Q, "chosen_response": "An a.", "rejected_response": "A b.", "chosen_model": "m", "source": "a b"},
        "'instruction'",
        "prompt=instruction,chosen=chosen_response,rejected=rejected_response",
        Q,
    ),
}


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_prompt_in_another_column_is_refused_with_the_option_that_reads_it(name, suffix, tmp_path, tokenizer):
    row, named, option, prompt = ELSEWHERE[name]
    path = written(tmp_path / f"train.{suffix}", row)
    for reading in (lambda: load(path, on_bad="drop", tokenizer=tokenizer), lambda: peek(path, "train")):
        with pytest.raises(DataError) as refusal:
            reading()
        assert named in str(refusal.value)
        assert option_in(str(refusal.value)) == option
    [pair] = load(path, columns=option, tokenizer=tokenizer)
    assert (pair.prompt, pair.chat) == (prompt, prompt.startswith("<|im_start|>"))
    assert pair.chosen != pair.rejected
    assert pair.chosen in json.dumps(row)


def test_the_remedy_for_unknown_columns_is_also_that_of_sft(tmp_path):
    path = written(tmp_path / "train.jsonl", {"question": Q, "answer": "A."})
    with pytest.raises(DataError, match=r"rejected=NAME; for sft prompt=NAME,completion=NAME or text=NAME$"):
        load(path, rows="any")
    assert len(load(path, rows="any", columns="prompt=question,completion=answer")) == 1


def test_the_remedy_says_what_it_does_not_read(tmp_path):
    """LLaMA-Factory's rows: earlier turns are in `history`."""
    row = {"instruction": Q, "input": "", "history": [["Hi", "Hello"]], **SIDES}
    with pytest.raises(DataError) as refusal:
        load(written(tmp_path / "train.jsonl", row))
    wanted = "--data.columns prompt=instruction+input reads 'instruction', but not 'history' (give messages instead)"
    assert wanted in str(refusal.value)


AS_BEFORE = {
    "UltraFeedback": (
        {"prompt": Q, "prompt_id": "a1", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD], "messages": [ASKED, GOOD]},
        CHAT,
        "'prompt_id', 'messages'",
    ),
    "a question beside whole conversations": (
        {"question": Q, "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD], "source": "a b c"},
        CHAT,
        "'question', 'source'",
    ),
    "a system text that is in the messages": (
        {
            "system": "Be short.",
            **{side: [turn("system", "Be short."), ASKED, last] for side, last in (("chosen", GOOD), ("rejected", BAD))},
        },
        SYSTEM + CHAT,
        None,
    ),
    "no system text": ({"system": None, "prompt": Q, **SIDES}, Q, None),
    "columns about the row": (
        {
            **{"chosen": "The sky is blue.", "rejected": "The sky is green.", "id": "a b", "source": "a web page"},
            **{"score_chosen": 1.0, "chosen_model": "a model", "created": "2020-01-01 10:00", "prompt_id": "x y", "input": " "},
        },
        "The sky is",
        "'id', 'source', 'score_chosen', 'chosen_model', 'created', 'prompt_id', 'input'",
    ),
    "a prompt and answers as messages": ({"prompt": Q, "chosen": [GOOD], "rejected": [BAD]}, CHAT, None),
    "messages and answers as texts": ({"prompt": [ASKED], "chosen": "An apple.", "rejected": "A brick."}, CHAT, None),
}


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("name", AS_BEFORE)
def test_other_columns_are_ignored_and_listed(name, suffix, tmp_path, tokenizer):
    row, prompt, ignored = AS_BEFORE[name]
    loaded = load(written(tmp_path / f"train.{suffix}", row), tokenizer=tokenizer)
    assert loaded[0].prompt == prompt
    notes = [note for note in loaded.report.notes if "not read" in note]
    assert notes == ([f"columns that are not read: {ignored}"] if ignored else [])


def test_a_system_text_in_some_rows_refuses_these_rows(tmp_path, tokenizer):
    rows = [{"system": text, "prompt": Q, **SIDES} for text in (None, "", "Be short.")]
    path = write(tmp_path / "train.jsonl", *rows)
    loaded = load(path, on_bad="drop", tokenizer=tokenizer)
    assert (len(loaded), loaded.report.dropped) == (2, {"unread_column": 1})
    assert not any(pair.chat for pair in loaded)
    assert option_in(loaded.report.examples["unread_column"][0]) == "system=system"
    read = load(path, columns="system=system", tokenizer=tokenizer)
    assert [pair.prompt for pair in read] == [CHAT, CHAT, SYSTEM + CHAT]
    assert [pair.prompt for pair in load(path, columns={"system": ""})] == [Q] * 3
    with pytest.raises(DataError, match="need a tokenizer with a chat template") as refusal:
        load(path, columns="system=system")
    assert option_in(str(refusal.value)) == "prompt=system+prompt"
    assert [p.prompt for p in load(path, columns="prompt=system+prompt")] == [Q, Q, f"Be short.\n{Q}"]


@pytest.mark.parametrize("answers", [SIDES, {"completion": "A.", "label": True}, {"completions": ["A.", "B."]}], ids=" ".join)
def test_rows_without_a_system_text_are_conversations_where_others_have_one(answers, tmp_path, tokenizer):
    rows = [{"setting": text, "prompt": Q, **answers} for text in ("Be short.", "", " ", None)]
    loaded = load(write(tmp_path / "train.jsonl", *rows), columns="system=setting", rows="any", tokenizer=tokenizer)
    assert [pair.chat for pair in loaded] == [True] * 4
    assert [pair.prompt for pair in loaded] == [SYSTEM + CHAT, CHAT, CHAT, CHAT]


def test_a_refusal_of_all_rows_names_what_any_of_them_has(tmp_path):
    rows = [{"system": text, "question": Q, **SIDES} for text in (None, "Be short.", "")]
    with pytest.raises(DataError, match=r"train.jsonl:2: unread_column") as refusal:
        load(write(tmp_path / "train.jsonl", *rows), on_bad="drop")
    assert option_in(str(refusal.value)) == "prompt=question,system=system"
    with pytest.raises(DataError) as refusal:
        load(write(tmp_path / "train.jsonl", {"prompt": None, "question": Q, **SIDES}))
    assert option_in(str(refusal.value)) == "prompt=question"


def test_names_inside_columns_and_what_is_not_there(tmp_path):
    row = {"info": {"title": Q, "id": 1}, "output": ["An a.", "A b."], "meta.x": "dotted"}
    columns = {"prompt": "info.title", "chosen": "output.0", "rejected": "output.1", "subset": "meta.x"}
    for name in ("train.jsonl", "train.parquet"):
        path = written(tmp_path / name, row)
        [pair] = load(path, columns=columns)
        assert (pair.prompt, pair.chosen, pair.rejected, pair.subset) == (Q, "An a.", "A b.", "dotted")
        with pytest.raises(DataError, match=r"'?infos.title'?.*--data.columns reads (it )?as prompt"):
            load(path, columns=columns | {"prompt": "infos.title"})
    with pytest.raises(DataError, match=r"prompt: wrong_type: expected a string, got int \(read from 'info.id'\)"):
        load(tmp_path / "train.jsonl", columns=columns | {"prompt": "info.id"})
    with pytest.raises(DataError, match="output.2: missing_column: --data.columns reads it as chosen, but here is a list"):
        load(tmp_path / "train.jsonl", columns=columns | {"chosen": "output.2"})
    with pytest.raises(DataError, match="output: wrong_type: expected a string to join, got list"):
        load(tmp_path / "train.jsonl", columns=columns | {"prompt": "info.title+output"})


def test_of_parquet_only_mapped_columns_are_decoded(tmp_path):
    """`time` holds what Python has no value for. A column that nobody maps is not looked into."""
    columns = {name: pa.array([name + " one"]) for name in ("question", "good", "bad", "note")}
    columns["when"] = pa.array([2**62 + 1], pa.timestamp("ns"))
    pq.write_table(pa.table(columns), tmp_path / "train.parquet")
    [pair] = load(tmp_path, columns="prompt=question,chosen=good,rejected=bad")
    assert (pair.prompt, pair.chosen, pair.rejected) == ("question one", "good one", "bad one")
    with pytest.raises(DataError, match="train.parquet:1: when: wrong_type"):
        load(tmp_path, columns="prompt=when,chosen=good,rejected=bad")


def test_a_map_of_columns_is_checked_at_once(tmp_path):
    known = "prompt=a+b, system= ,chosen=c.d"
    assert ColumnMap.of(known).columns == {"prompt": ("a", "b"), "system": (), "chosen": ("c.d",)}
    for wrong, words in (
        ("prompt", "'prompt' has no ="),
        ("prompt=a,prompt=b", "prompt is mapped twice"),
        ("prompt=a+", "a + without a name"),
        ("promt=a", "not a column that any format reads; did you mean 'prompt'"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            load(tmp_path, columns=wrong)
    with pytest.raises(DataError, match="a TFDS folder has its own columns: leave out --data.columns prompt=a"):
        load(tmp_path, columns="prompt=a", format="tfds")
    with pytest.raises(ValueError, match=r"'prompt' is not a column that format shp reads \(history"):
        load(tmp_path, columns="prompt=a", format="shp")


def test_the_option_is_a_mapping_in_yaml_and_a_flag(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("data:\n  path: x\n  columns:\n    prompt: instruction+input\n    system:\n    chosen: 'a b'\n")
    assert load_config(path).data.columns == "prompt=instruction+input,system=,chosen=a b"
    assert parse("audit", [str(path), "--data.columns", "prompt=question,system="]).data.columns == "prompt=question,system="
    for text, words in (
        ("{prompt: [a, b]}", "a.yaml:1: data.columns: expected a name and a text, got a list"),
        ("{prompt: 'a,b'}", "a name with ',' cannot be given: rename 'a,b'"),
        ("[a]", "expected a mapping of texts"),
        ("{promt: a}", "a.yaml:1: data.columns: 'promt' is not a column that any format reads; did you mean 'prompt'"),
        ("{prompt: a}, source: reviews", "renames the columns of files, but source is reviews"),
    ):
        path.write_text(f"data: {{columns: {text}}}\n")
        with pytest.raises(ConfigError, match=re.escape(words)):
            load_config(path)


def test_a_run_reads_the_mapped_columns_and_keeps_them_in_mind(tmp_path, tokenizer):
    write(tmp_path / "train.jsonl", {"question": Q, **SIDES})
    path = tmp_path / "a.yaml"
    path.write_text(f"data: {{path: {tmp_path}, columns: {{prompt: question}}}}\n")
    loaded = splits.load_split(load_config(path), "train")
    assert loaded[0].prompt == Q
    record = data_record(load_config(path), tokenizer, [loaded.report], held_out="")
    path.write_text(f"data: {{path: {tmp_path}, columns: {{prompt: other}}}}\n")
    [line] = data_changes(record, data_record(load_config(path), tokenizer, [loaded.report], held_out=""))
    assert line == "  data.columns: was 'prompt=question', is 'prompt=other'"
    with pytest.raises(DataError, match="question: missing_column|other: missing_column"):
        splits.load_split(load_config(path), "train")


@pytest.mark.parametrize("name", ["the question, please", "a+b", " question"])
def test_a_name_that_the_option_cannot_say_is_not_offered(name, tmp_path):
    with pytest.raises(DataError, match=r"rename the column to read it, --data.columns prompt= goes without"):
        load(write(tmp_path / "train.jsonl", {name: Q, **SIDES}))


# -- texts that hold more than they should ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "transcript",
    ["Human: q\n\nAssistant: {}", "\r\n\r\nHuman: q\r\n\r\nAssistant: {}", " \n\nHuman: q\n\nAssistant: {}"],
    ids=["stripped", "CRLF", "space"],
)
def test_transcripts_of_hh_without_their_first_white_space(transcript, tmp_path):
    """They were taken for texts with a common beginning: "It" became a part of the prompt."""
    loaded = load(write(tmp_path / "train.jsonl", {side: transcript.format(f"It {side}.") for side in ("chosen", "rejected")}))
    [pair] = loaded
    assert (loaded.report.format, pair.prompt + pair.chosen) == ("hh", transcript.format("It chosen."))
    assert (pair.chosen, pair.rejected) == (" It chosen.", " It rejected.")


def test_a_prompt_that_its_completions_repeat_is_read_once(tmp_path, tokenizer):
    rows = [{"prompt": f"\n\nHuman: {i}\n\nAssistant:", "chosen": " yes", "rejected": " no"} for i in range(3)]
    whole = [
        row | {side: row["prompt"].lstrip(strip) + row[side] for side in SIDES}
        for row, strip in zip(rows, ("", "\n", ""), strict=True)
    ]
    loaded = load(write(tmp_path / "train.jsonl", *whole))
    assert [(p.prompt, p.chosen, p.rejected) for p in loaded] == [tuple(row.values()) for row in rows]
    assert "the prompt is removed from the completions of all 3 rows, which repeat it" in loaded.report.notes
    some = load(write(tmp_path / "train.jsonl", whole[0], *rows[1:]))
    assert some[0].chosen == whole[0]["chosen"]
    assert "1 of 3 rows repeat their prompt in the completions; they are left unchanged" in some.report.notes
    with pytest.raises(DataError, match="train.jsonl:31: chosen, rejected: different_prompts: 30 of the first 31 rows repeat"):
        load(write(tmp_path / "train.jsonl", *whole * 10, rows[2]))
    only = write(tmp_path / "train.jsonl", whole[0], {**whole[1], "chosen": whole[1]["prompt"]})
    assert load(only, on_bad="drop").report.dropped == {"empty": 1}
    chat = write(tmp_path / "train.jsonl", {"prompt": [ASKED], "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]})
    with pytest.raises(DataError, match="different_prompts: it begins with the whole prompt") as refusal:
        load(chat, tokenizer=tokenizer)
    assert load(chat, columns=option_in(str(refusal.value)), tokenizer=tokenizer)[0].prompt == CHAT


# -- formats ------------------------------------------------------------------------------------------------------------------

OPENAI = {
    "input": {"messages": [ASKED], "tools": [], "parallel_tool_calls": True},
    **{"preferred_output": [GOOD], "non_preferred_output": [BAD]},
}


def test_openai(tmp_path, tokenizer):
    for name in ("train.jsonl", "train.parquet"):
        loaded = load(written(tmp_path / name, OPENAI | {"subset": "a"}), tokenizer=tokenizer)
        assert [(p.prompt, p.chosen, p.rejected, p.chat, p.subset) for p in loaded] == [
            (CHAT, "An apple.", "A brick.", True, "a")
        ]
        assert (loaded.report.format, loaded[0].uid) == ("openai", f"{name}:1")
    for changes, words in (
        ({"input": "x"}, "input: wrong_type: expected an object"),
        ({"input": {"messages": [turn("user", 3)]}}, "input.messages.0.content: wrong_type"),
        ({"preferred_output": [turn("assistant", " ")]}, "preferred_output: empty"),
        ({"non_preferred_output": "A brick."}, "non_preferred_output: wrong_type: expected a list of messages"),
    ):
        with pytest.raises(DataError, match=re.escape(words)):
            load(write(tmp_path / "train.jsonl", OPENAI | changes), tokenizer=tokenizer)


def test_pku(tmp_path, tokenizer):
    row = {"prompt": Q, "response_0": "An apple.", "response_1": "A brick.", "is_response_0_safe": True}
    path = write(tmp_path / "train.jsonl", *[{**row, "better_response_id": better} for better in (0, 1, 2)])
    loaded = load(path, on_bad="drop", tokenizer=tokenizer)
    assert [(p.prompt, p.chosen) for p in loaded] == [(CHAT, "An apple."), (CHAT, "A brick.")]
    assert loaded.report.dropped == {"out_of_range": 1}
    plain = load(path, on_bad="drop")
    assert (plain[0].prompt, plain[0].chosen) == (f"\n\nHuman: {Q}\n\nAssistant:", " An apple.")
    assert "as there is no chat template" in plain.report.notes[-1]
