"""Each public format gives the pairs that its rows mean."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import GOLDEN
from test_sources import FINE, SHP_ROW, TLDR_ROW, hh_row, load, turn, write
from test_sources import tokenizer as tokenizer

from dpo_jax.cli.config import DataConfig, help_text
from dpo_jax.data import format_table
from dpo_jax.data.chat import chat_preference
from dpo_jax.data.format_table import FORMATS, detect_format
from dpo_jax.data.formats import common_prompt
from dpo_jax.data.html import strip_html
from dpo_jax.data.pairs import BadRow, Cause, DataError, Preference
from dpo_jax.data.transcripts import split_hh


def test_hh_split_is_the_originals():
    cases = json.loads((GOLDEN / "hh_prompt_split.json").read_text())
    assert len(cases) == 50
    assert all(split_hh(case["chosen"], case["rejected"]) == case["prompt"] for case in cases)


def test_formats_are_recognized_by_their_columns(tmp_path):
    for format, row in FINE.items():
        assert load(write(tmp_path / "train.jsonl", row)).report.format == format
    # the first row alone would look like TRL's implicit prompt
    rows = [{"chosen": "", "rejected": ""}, FINE["hh"], FINE["hh"]]
    assert load(write(tmp_path / "train.jsonl", *rows), on_bad="drop").report.format == "hh"
    with pytest.raises(DataError, match="no known format has the columns 'instruction', 'output'; if the first"):
        load(write(tmp_path / "train.jsonl", {"instruction": "a", "output": "b"}))
    with pytest.raises(ValueError, match="unknown format 'csv'"):
        load(tmp_path, format="csv")
    with pytest.raises(ValueError, match="on_bad"):
        load(tmp_path, on_bad="ignore")


def test_the_table_of_formats_is_that_of_the_readme():
    assert format_table.markdown() in (GOLDEN.parent.parent / "dpo_jax/data/README.md").read_text(encoding="utf-8")
    assert all(name in help_text(DataConfig, "format") for name in FORMATS)


@pytest.mark.parametrize("format", FORMATS.values(), ids=lambda format: format.name)
def test_the_table_of_formats_is_true(format, tmp_path, tokenizer):
    """The example is recognized and gives a pair; each column that the table calls needed is, and the others are not."""

    def without(row, column):
        outer, _, inner = column.partition(".")
        if not inner:
            return {name: value for name, value in row.items() if name != outer}
        parts = row[outer]
        cut = [without(part, inner) for part in parts] if isinstance(parts, list) else without(parts, inner)
        return row | {outer: cut}

    assert detect_format(format.example) == (format.name if format.told_by else {"chat_texts": "trl"}.get(format.name, "hh"))
    asked = "auto" if format.told_by else format.name
    rows = "any" if format.rows == "demonstrations" else format.rows
    pairs = load(write(tmp_path / "train.jsonl", format.example), format=asked, tokenizer=tokenizer, rows=rows)
    assert (pairs.report.format, len(pairs)) == (format.name, 1)
    for name, column in format.reads.items():
        rows = [("row", without(format.example, name))]
        _, found = next(iter(format.candidates(rows, tokenizer=tokenizer)))
        missing = isinstance(found, BadRow) and found.cause == Cause.MISSING_COLUMN
        assert missing == column.needed, (name, found)


def test_columns_of_another_format_are_answered_with_those_it_needs(tmp_path):
    pq.write_table(pa.Table.from_pylist([{"instruction": "a"}]), tmp_path / "train.parquet")
    with pytest.raises(DataError, match=r"none of the columns 'instruction'; it needs history, human_ref_A, .*score_B; if"):
        load(tmp_path, format="shp")


def test_hh(tmp_path):
    [pair] = load(write(tmp_path / "train.jsonl", hh_row("q\n\nAssistant: a\n\nHuman: r", " yes", " no")))
    prompt = "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant:"
    assert pair == Preference(prompt, " yes", " no", "train.jsonl:1")


def test_hh_as_chats_is_trl_of_the_same_messages(tmp_path, tokenizer):
    row = hh_row("q\n\nAssistant: a\n\nHuman: r ", " yes\n", " no")
    asked = [turn("user", "q"), turn("assistant", "a"), turn("user", "r")]
    messages = {"prompt": asked, "chosen": [turn("assistant", "yes")], "rejected": [turn("assistant", "no")]}
    [pair] = load(write(tmp_path / "hh" / "train.jsonl", row), format="hh_chat", tokenizer=tokenizer)
    [same] = load(write(tmp_path / "trl" / "train.jsonl", messages), tokenizer=tokenizer)
    assert pair == same
    assert pair.prompt.count("<|im_start|>") == 4


def test_texts_as_turns_are_trl_of_the_same_messages(tmp_path, tokenizer):
    row, asked = {"prompt": "r ", "chosen": "yes\n", "rejected": " no"}, [turn("user", "r ")]
    messages = {"prompt": asked, "chosen": [turn("assistant", "yes\n")], "rejected": [turn("assistant", " no")]}
    [pair] = load(write(tmp_path / "texts" / "train.jsonl", row), format="chat_texts", tokenizer=tokenizer)
    [same] = load(write(tmp_path / "trl" / "train.jsonl", messages), tokenizer=tokenizer)
    assert pair == same


@pytest.mark.parametrize(
    ("row", "cause", "field"),
    [
        ({"chosen": "So\n\nHuman: q\n\nAssistant: a", "rejected": "So\n\nHuman: q\n\nAssistant: b"}, "no_prompt", "chosen"),
        ({side: f"\n\nHuman: \n\nAssistant: {side}" for side in ("chosen", "rejected")}, "empty", "chosen"),
        (hh_row("q", " ", " b"), "empty", "chosen"),
        (hh_row("q", " a", ""), "empty", "rejected"),
    ],
)
def test_hh_as_chats_refuses_what_is_no_chat(row, cause, field, tokenizer):
    [(_, found)] = FORMATS["hh_chat"].candidates([("row", row)], tokenizer=tokenizer)
    assert isinstance(found, BadRow)
    assert (found.cause, found.field.partition(".")[0]) == (cause, field)


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is blue.", "The sky is green.", "The sky is"),
        ("The sky is blue.", "The sky is black.", "The sky is"),  # TRL cuts at "bl"
        ("Q: why?\nA: so", "Q: why?\nA: no", "Q: why?\nA:"),
        ("Q: why?\nso", "Q: why?\nno", "Q: why?\n"),
        ("The sky is", "The sky is blue", "The sky"),  # TRL leaves the first completion empty
        ("Yes: a", "Yes:\nb", "Yes:"),
    ],
)
def test_the_implicit_prompt_of_texts_ends_at_a_word(chosen, rejected, prompt):
    assert chosen[: common_prompt(chosen, rejected)] == prompt
    assert rejected.startswith(prompt)


def test_trl_chat_with_explicit_and_implicit_prompt(tmp_path, tokenizer):
    question, good, bad = turn("user", "What color?"), turn("assistant", "Blue."), turn("assistant", "Green.")
    explicit = {"prompt": [question], "chosen": [good], "rejected": [bad]}
    implicit = {"chosen": [question, good], "rejected": [question, bad]}
    beside = {**implicit, "prompt": "What color?"}  # as in UltraFeedback
    loaded = load(write(tmp_path / "train.jsonl", explicit, implicit, beside), tokenizer=tokenizer)
    prompt = "<|im_start|>user\nWhat color?<|endoftext|>\n<|im_start|>assistant\n"
    assert {(p.prompt, p.chosen, p.rejected, p.chat) for p in loaded} == {(prompt, "Blue.", "Green.", True)}
    whole = tokenizer.apply_chat_template([question, good], tokenize=False)
    assert whole == prompt + "Blue." + tokenizer.eos_token + "\n"  # encoding appends the EOS
    pq.write_table(pa.Table.from_pylist([explicit]), tmp_path / "train.parquet")
    assert load(tmp_path / "train.parquet", tokenizer=tokenizer)[0].chosen == "Blue."
    with pytest.raises(DataError, match="need a tokenizer with a chat template"):
        load(tmp_path / "train.jsonl")


def test_arena(tmp_path, tokenizer):
    row = FORMATS["arena"].example
    winners = ("model_a", "model_b", "tie", "tie (bothbad)", "both_bad", "model_c")
    path = write(tmp_path / "train.jsonl", *[{**row, "winner": winner} for winner in winners])
    loaded = load(path, on_bad="drop", tokenizer=tokenizer)
    assert [(pair.chosen, pair.rejected) for pair in loaded] == [("4", "5"), ("5", "4")]
    assert loaded[0].prompt.endswith("2 + 2?<|endoftext|>\n<|im_start|>assistant\n")
    assert loaded.report.dropped == {"tie": 3, "out_of_range": 1}
    assert "expected model_a, model_b, tie" in loaded.report.examples["out_of_range"][0]
    parts = [
        [{**turn, "content": [{"type": "text", "text": turn["content"], "image": None}]} for turn in row[side]]
        for side in ("conversation_a", "conversation_b")
    ]
    longer = [*parts[1], {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "No."}]
    changed = {**row, "conversation_a": parts[0], "conversation_b": longer, "winner": "model_b"}
    [pair] = load(write(path, changed), tokenizer=tokenizer)
    assert [pair.chosen[begin:end] for begin, end in pair.chosen_spans] == ["5<|endoftext|>", "No."]
    other = [{"role": "user", "content": "3 + 3?"}, *row["conversation_b"][1:]]
    with pytest.raises(DataError, match="conversation_a: different_prompts: a completion begins with a turn of the assistant"):
        load(write(path, {**row, "conversation_b": other}), tokenizer=tokenizer)


def test_helpsteer3(tmp_path, tokenizer):
    row = FORMATS["helpsteer3"].example
    scores = (-3, 1, 0, 4)
    rows = [{**row, "overall_preference": score} for score in scores]
    loaded = load(write(tmp_path / "train.jsonl", *rows), on_bad="drop", tokenizer=tokenizer)
    assert [(pair.chosen, pair.rejected, pair.subset) for pair in loaded] == [("4", "5", "stem"), ("5", "4", "stem")]
    assert loaded[0].prompt == tokenizer.apply_chat_template(row["context"], tokenize=False, add_generation_prompt=True)
    assert loaded.report.dropped == {"tie": 1, "out_of_range": 1}
    other = {**row, "subset": "x"}  # a column that this format does not read
    pq.write_table(pa.Table.from_pylist([other]), tmp_path / "train.parquet")
    for path in (write(tmp_path / "train.jsonl", other), tmp_path / "train.parquet"):
        assert [pair.subset for pair in load(path, tokenizer=tokenizer)] == ["stem"]
    with pytest.raises(DataError, match="train.jsonl:1: domain: wrong_type"):
        load(write(tmp_path / "train.jsonl", {**row, "domain": ["stem"]}), tokenizer=tokenizer)


USER, SAID = turn("user", "q"), turn("assistant", "a")
BAD_CHATS = {
    "nothing said": (Cause.EMPTY, [USER], [turn("assistant", " ")], [SAID]),
    "one side ends early": (Cause.EMPTY, None, [USER], [USER, SAID]),
    "no messages": (Cause.EMPTY, [USER], [], [SAID]),
    "same": (Cause.IDENTICAL, [USER], [SAID], [SAID]),
    "no shared message": (Cause.NO_PROMPT, None, [SAID], [turn("assistant", "b")]),
    "prompt of the assistant": (Cause.NO_PROMPT, [USER, SAID], [SAID], [turn("assistant", "b")]),
    "two questions": (Cause.DIFFERENT_PROMPTS, None, [USER, SAID], [turn("user", "r"), SAID]),
    "EOS in a message": (Cause.EOS_IN_TEXT, [turn("user", "q<|endoftext|>")], [SAID], [turn("assistant", "b")]),
    "no role": (Cause.MISSING_COLUMN, [{"content": "q"}], [SAID], [turn("assistant", "b")]),
    "content of parts": (
        Cause.WRONG_TYPE,
        [{"role": "user", "content": [{"type": "image"}]}],
        [SAID],
        [turn("assistant", "b")],
    ),
    "a user completes": (Cause.DIFFERENT_PROMPTS, [USER], [USER, SAID], [turn("assistant", "b")]),
    "only the shared turn is of the assistant": (Cause.EMPTY, None, [USER, SAID, USER], [USER, SAID, turn("user", "r")]),
    "text for messages": (Cause.WRONG_TYPE, None, "q a", [USER, SAID]),
    "texts for messages": (Cause.WRONG_TYPE, None, ["q", "a"], [USER, SAID]),
}


@pytest.mark.parametrize("name", BAD_CHATS)
def test_bad_chats(name, tokenizer):
    cause, prompt, chosen, rejected = BAD_CHATS[name]
    with pytest.raises(BadRow) as problem:
        chat_preference(prompt, chosen, rejected, uid="here", tokenizer=tokenizer)
    assert problem.value.cause == cause


@pytest.mark.parametrize(
    ("template", "detail"),
    [
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{{ messages | length }} messages", "does not begin with the rendered prompt"),
    ],
)
def test_a_template_that_does_not_fit_is_named(template, detail, tokenizer):
    fitting = tokenizer.chat_template
    tokenizer.chat_template = template
    try:
        with pytest.raises(BadRow, match=detail) as problem:
            chat_preference([USER], [SAID], [turn("assistant", "b")], uid="here", tokenizer=tokenizer)
    finally:
        tokenizer.chat_template = fitting
    assert problem.value.cause == Cause.CHAT_TEMPLATE


def test_shp_keeps_clear_preferences_and_names_the_best_as_sft_target(tmp_path):
    rows = [
        {**SHP_ROW, "labels": 0, "score_A": 3, "score_B": 9},
        {**SHP_ROW, "human_ref_A": "c", "human_ref_B": "d", "score_A": 3, "score_B": 2},  # less than a factor of two
        {**SHP_ROW, "human_ref_A": "e", "human_ref_B": "f", "score_A": 20, "score_B": 10},
    ]
    loaded = load(write(tmp_path / "train.jsonl", *rows))
    prompt = "\n\nHuman: q\n\nAssistant:"
    assert list(loaded) == [
        Preference(prompt, " b", " a", "train.jsonl:1", sft_target=" e"),
        Preference(prompt, " e", " f", "train.jsonl:3"),
    ]
    assert loaded.report.dropped == {"score_ratio": 1}
    assert loaded.report.bad_share == 0


def test_stack_exchange_pairs_by_score(tmp_path):
    answers = [{"text": f"<p>{name}</p>", "pm_score": score} for name, score in (("a", 2), ("b", 5), ("c", 2), ("", 0))]
    rows = [
        {"question": "<p>Q</p>", "answers": answers[:3]},
        {"question": "<p>Q</p>", "answers": answers[:1]},
        {"question": "<p>R</p>", "answers": [answers[0], answers[3]]},
    ]
    loaded = load(write(tmp_path / "train.jsonl", *rows), on_bad="drop")
    prompt = "\n\nHuman: Q\n\nAssistant:"
    assert list(loaded) == [
        Preference(prompt, " b", " a", "train.jsonl:1#0-1"),
        Preference(prompt, " b", " c", "train.jsonl:1#1-2"),
    ]
    report = loaded.report
    assert (report.rows, report.read, report.kept) == (3, 5, 2)
    assert report.dropped == {"tie": 1, "no_pair": 1, "empty": 1}
    worse = {"question": "<p>Q</p>", "answers": [{"text": f"<p>{s}</p>", "pm_score": s} for s in (1, 3, 2)]}
    assert [p.sft_target for p in load(write(tmp_path / "train.jsonl", worse))] == [None, " 3", None]
    worse["answers"].append({"text": "<ul><li>4</li></ul>", "pm_score": 4})  # nothing is left of it without its HTML
    loaded = load(write(tmp_path / "train.jsonl", worse), on_bad="drop")
    assert [p.sft_target for p in loaded] == [None, " 3", None]
    assert loaded.report.dropped == {"empty": 3}


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("<p>One &amp; two</p>\n<p>three</p>", "One & two\n\nthree"),
        ("<p>See <a href='x'>this</a>, <br>now</p>", "See , now"),
        ("<pre class='l'><code>x &lt; 1\n</code></pre>", "<code>x < 1\n</code>"),
        ("<ul><li>lost</li></ul><p>kept</p>text", "kept"),
        ("<code>a<b>b</b></code>", "<code>ab</code>"),
        ("<blockquote><p>lost</p></blockquote>", ""),
    ],
)
def test_html_is_reduced_as_in_the_original(markup, text):
    assert strip_html(markup) == text


def test_tldr(tmp_path):
    spaceless = {**TLDR_ROW, "summaries": [{"text": "a"}, {"text": " b"}], "choice": 0}
    pairs = load(write(tmp_path / "train.jsonl", TLDR_ROW, spaceless))
    assert pairs[0] == Preference("SUBREDDIT: r/tifu\nTITLE: T\nPOST: P\nTL;DR:", " second", " first", "train.jsonl:1")
    assert (pairs[1].chosen, pairs[1].rejected) == (" a", " b")


# -- the set ------------------------------------------------------------------------------------------------------------------
