"""CSV and TSV files of preferences: every cell arrives as it was written, and nothing is lost without a word."""

import copy
import csv
import gzip
import io
import json

import pytest

from dpo_jax.data.pairs import DataError
from dpo_jax.data.sources import load_preferences
from dpo_jax.untrusted import LIMITS

TEXTS = [
    'a "quoted" word',
    "two\nlines, and\r\n\r\na third",
    "semicolon; tab\tcomma,",
    " spaces ",
    "42",
    "[{'a': 1}]",
    "=1+1",
    "naïve 🙂",
]
ROWS = [{"prompt": f"Q{i} {text}", "chosen": text, "rejected": f"not {text}"} for i, text in enumerate(TEXTS)]
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def chatty(tokenizer):
    """A copy of the tokenizer that all tests share, with a chat template."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = CHAT
    return tokenizer


def table(rows, *, separator=",", **options):
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(rows[0]), delimiter=separator, **options)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode()


def load(tmp_path, content, *, name="train.csv", **options):
    (tmp_path / name).write_bytes(content)
    return load_preferences(tmp_path / name, "train", **options)


def test_every_cell_arrives_as_json_lines_would_bring_it(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    expected = [(p.prompt, p.chosen, p.rejected) for p in load_preferences(tmp_path / "rows.jsonl", "train")]
    files = {
        "comma.csv": table(ROWS),
        "quoted.csv": table(ROWS, quoting=csv.QUOTE_ALL),
        "unix.csv": table(ROWS, lineterminator="\n"),
        "excel.csv": b"\xef\xbb\xbf" + table(ROWS, separator=";"),
        "tabs.csv": table(ROWS, separator="\t"),
        "tabs.tsv": table(ROWS, separator="\t"),
        "packed.csv.gz": gzip.compress(table(ROWS)),
    }
    for name, content in files.items():
        found = load(tmp_path, content, name=name)
        assert [(p.prompt, p.chosen, p.rejected) for p in found] == expected, name
        assert all(type(side) is str for p in found for side in (p.prompt, p.chosen, p.rejected)), name
        assert found.report.read == found.report.kept == len(ROWS)


def test_a_row_is_named_by_the_line_where_it_begins(tmp_path):
    found = load(tmp_path, table(ROWS[:3], lineterminator="\n"))
    assert [pair.uid for pair in found] == ["train.csv:2", "train.csv:3", "train.csv:13"]


def test_numbers_and_truth_values(tmp_path):
    rows = [
        {"prompt": "p", "completion": f"c{i}", "label": label} for i, label in enumerate(["true", "False", "1", "0", "1.0"])
    ]
    found = load(tmp_path, table(rows), rows="unpaired")
    assert [one.desirable for one in found] == [True, False, True, False, True]
    shp = {"history": "How long?", "human_ref_A": "1", "human_ref_B": "2", "labels": "0", "score_A": "3", "score_B": "9"}
    [pair] = load(tmp_path, table([shp]), name="shp_train.csv")
    assert (pair.chosen.strip(), pair.rejected.strip()) == ("2", "1")


def test_messages_are_read_from_json_in_a_cell(tmp_path, tokenizer):
    tokenizer = chatty(tokenizer)
    rows = [
        {
            "prompt": json.dumps([{"role": "user", "content": 'say "hi"'}]),
            "chosen": json.dumps([{"role": "assistant", "content": "hi"}]),
            "rejected": json.dumps([{"role": "assistant", "content": "no"}]),
        }
    ]
    [pair] = load(tmp_path, table(rows), tokenizer=tokenizer)
    assert pair.chat
    assert 'say "hi"' in pair.prompt
    assert pair.chosen.startswith("hi")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'prompt,chosen,rejected\np,"a,b\np,c,d\n', "train.csv:2: bad_csv: a quote .* never closed"),
        (b'prompt,chosen,rejected\np,"a"b,c\n', "train.csv:2: bad_csv: quotes are wrong"),
        (b"prompt,chosen,chosen\np,a,b\n", "train.csv:1: duplicate_key: two columns are named 'chosen'"),
        (b"prompt,chosen,\np,a,b\n", "train.csv:1: missing_column: column 3 has no name"),
        (b"prompt,chosen,rejected\n", "train.csv: no_rows"),
        (b"", "train.csv: no_rows"),
        (b"prompt,chosen,rejected\np,a\n", "train.csv:2: wrong_type: 2 cells, but the first line names 3"),
        (
            "prompt,chosen,rejected\np,caf\xe9,b\n".encode("latin-1"),
            "train.csv:2: chosen: invalid_utf8: byte 0xe9 is not UTF-8",
        ),
        (b"prompt,chosen,rejected\np,a\0b,b\n", "train.csv:2: chosen: nul"),
        (b"prompt,chosen,rejected\np,\"[{'role': 'user'}]\",b\n", "train.csv:2: chosen: wrong_type: .*Python's notation"),
        (b"prompt,completion,label\np,c,maybe\n", "label: wrong_type: expected true, false, 1 or 0, got 'maybe'"),
        (b"prompt,chosen,rejected\rp,a,b\r", r"train.csv:1: bad_csv: a carriage return \(CR\) without LF"),
        (b"prompt,chosen,rejected,pr\xe9nom\np,a,b,c\n", "train.csv:1: invalid_utf8: name of column 4: byte 0xe9"),
        (b"prompt,chosen,rejected,a\0b\np,a,b,c\n", "train.csv:1: nul: name of column 4"),
        (b'prompt,chosen,rejected\np, "a",b\n', "train.csv:2: chosen: bad_csv: a space before the opening quote"),
        (b"prompt,chosen,rejected\np,\"{'role': 'assistant', 'content': 'a'}\",b\n", "chosen: wrong_type: .*Python's notation"),
        (b"prompt,chosen,rejected\np,\"[{'from': 'gpt', 'value': 'a'}]\",b\n", "chosen: wrong_type: .*Python's notation"),
        (b'prompt,chosen,rejected\np,"[{""role"": ""user"", ""con",b\n', "chosen: invalid_json: messages must be valid JSON"),
        (
            b"prompt,completions\np,\"['a', 'b']\"\n",
            "train.csv:2: completions: wrong_type: expected a list of completions, got str",
        ),
    ],
)
def test_what_is_wrong_is_named_by_line_and_column(content, words, tmp_path):
    with pytest.raises(DataError, match=words):
        load(tmp_path, content, rows="any")


def test_bad_rows_are_counted_if_dropped(tmp_path):
    content = b"prompt,chosen,rejected\np,a\n\nq,a,b\nr,caf\xe9,b\ns,,b\n"
    found = load(tmp_path, content, on_bad="drop")
    assert [pair.prompt for pair in found] == ["q"]
    assert (found.report.read, found.report.kept, sum(found.report.dropped.values())) == (4, 1, 3)


def test_an_open_quote_gathers_no_more_than_the_limit_of_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr(LIMITS, "line_mb", 1)
    with pytest.raises(DataError, match="train.csv:2: bad_csv: a quote .* never closed"):
        load(tmp_path, b'prompt,chosen,rejected\np,"' + b"a line\n" * 300_000)


def test_row_numbers_of_pandas_are_not_a_column_without_a_name(tmp_path):
    found = load(tmp_path, b",prompt,chosen,rejected\n0,p,a,b\n")
    assert [pair.prompt for pair in found] == ["p"]
    assert any("'index'" in note for note in found.report.notes)


FEW = [("p", "a; b", "c")]


@pytest.mark.parametrize(
    "content",
    [
        b'sep=;\r\nprompt;chosen;rejected\r\np;"a; b";c\r\n',
        b'"sep=|"\nprompt|chosen|rejected\np|a; b|c\n',
        b'\r\n;;\r\nprompt;chosen;rejected\r\np;"a; b";c\r\n',
        b'prompt, chosen, rejected\np, "a; b", c\n',
        b'"prompt", "chosen", "rejected"\n"p", "a; b", "c"\n',
        b",index,prompt,chosen,rejected\n0,0,p,a; b,c\n",
    ],
)
def test_first_lines_of_spreadsheets_and_of_people(content, tmp_path):
    found = load(tmp_path, content)
    assert [(pair.prompt, pair.chosen, pair.rejected) for pair in found] == FEW
    assert int(found[0].uid.rpartition(":")[2]) == content.count(b"\n")


def test_a_cell_may_begin_with_a_space_and_a_quote(tmp_path):
    [pair] = load(tmp_path, table([{"prompt": ' "p"', "chosen": ' "a", "b"', "rejected": ' "c"'}]))
    assert (pair.prompt, pair.chosen, pair.rejected) == (' "p"', ' "a", "b"', ' "c"')


def test_blank_rows_of_a_spreadsheet_are_skipped_and_counted(tmp_path):
    found = load(tmp_path, b"prompt;chosen;rejected\np;a;b\n;;\n\n ; ;\nq;a;b\n")
    assert [pair.prompt for pair in found] == ["p", "q"]
    assert "train.csv: 3 blank rows skipped" in found.report.notes


@pytest.mark.parametrize("indent", [None, 2])
def test_messages_in_every_form_that_json_lines_may_have(indent, tmp_path, tokenizer):
    tokenizer = chatty(tokenizer)
    user, good, bad = (
        {"role": role, "content": text} for role, text in (("user", "u"), ("assistant", "a"), ("assistant", "b"))
    )
    shared = [{"from": role, "value": text} for role, text in (("human", "u"), ("gpt", "a"), ("gpt", "b"))]
    rows = [([user], [good], [bad]), ("u", good, bad), tuple([turn] for turn in shared)]
    cells = [[one if isinstance(one, str) else json.dumps(one, indent=indent) for one in row] for row in rows]
    found = load(
        tmp_path, table([dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in cells]), tokenizer=tokenizer
    )
    assert [(pair.prompt, pair.chosen, pair.rejected) for pair in found] == [("<user>u<assistant>", "a", "b")] * 3


@pytest.mark.parametrize("text", ['[{"from": "A", "to": "B"}]', '{"role": 3}', '[{"a": 1', "[]", '{"value": 1, "from": 2}'])
def test_json_that_holds_no_messages_stays_text(text, tmp_path):
    [pair] = load(tmp_path, table([{"prompt": "p", "chosen": text, "rejected": "b"}]))
    assert pair.chosen == text


@pytest.mark.parametrize("column", ["system", "subset", "images", "image", "tools", "chat_template_kwargs"])
def test_an_empty_cell_of_an_optional_column_is_nothing(column, tmp_path):
    [pair] = load(tmp_path, f"prompt,chosen,rejected,{column}\np,a,b,\n".encode())
    assert (pair.prompt, pair.images, pair.subset) == ("p", (), None)


def test_where_no_row_can_be_read_the_rows_are_to_blame_and_not_their_kind(tmp_path):
    with pytest.raises(DataError, match="train.csv:2: wrong_type: 2 cells"):
        load(tmp_path, b"text\nhello, you\n", rows="demonstrations")
