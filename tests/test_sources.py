"""Formats mean what they should, and each kind of bad input is named, refused by default and counted on request."""

import gzip
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import GOLDEN
from transformers import AutoTokenizer

from dpo_jax.data.pairs import Cause, DataError, DataReport, Preference, PreferenceSet
from dpo_jax.data.sources import load_preferences
from dpo_jax.data.splits import split_names

GOOD = {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(lines(*rows)) if path.suffix == ".gz" else lines(*rows))
    return path


def load(path, split="train", **options):
    return load_preferences(path, split, **options)


def hh_row(question, chosen, rejected):
    prompt = f"\n\nHuman: {question}\n\nAssistant:"
    return {"chosen": prompt + chosen, "rejected": prompt + rejected}


def turn(role, content):
    return {"role": role, "content": content}


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "tokenizer")
    tokenizer.chat_template = CHATML
    assert tokenizer.eos_token == "<|endoftext|>"
    return tokenizer


# -- bad rows -----------------------------------------------------------------------------------------------------------------

TWO_PROMPTS = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c\n\nHuman: d\n\nAssistant: e"}
SHP_ROW = {"history": "q", "human_ref_A": "a", "human_ref_B": "b", "labels": 1, "score_A": 4, "score_B": 2}
TLDR_ROW = {
    "info": {"subreddit": "tifu", "title": "T", "post": "P"},
    "summaries": [{"text": " first"}, {"text": " second"}],
    "choice": 1,
}
BAD_ROWS = {
    "empty completion": (Cause.EMPTY, "trl", lines({**GOOD, "chosen": ""}), "chosen"),
    "blank completion": (Cause.EMPTY, "trl", lines({**GOOD, "rejected": " \n\u00a0"}), "rejected"),
    "empty HH answer": (Cause.EMPTY, "hh", lines(hh_row("q", "", " b")), "chosen"),
    "blank prompt": (Cause.NO_PROMPT, "trl", lines({**GOOD, "prompt": " "}), "prompt"),
    "no shared prompt": (Cause.NO_PROMPT, "trl", lines({"chosen": "yes", "rejected": "no"}), "prompt"),
    "HH without an answer": (
        Cause.NO_PROMPT,
        "hh",
        lines({"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: a"}),
        "Assistant:",
    ),
    "HH with two prompts": (Cause.DIFFERENT_PROMPTS, "hh", lines(TWO_PROMPTS), "character 22 of chosen, 46 of rejected"),
    "endless": (Cause.TOO_LONG, "trl", lines({**GOOD, "chosen": "a" * 1_000_001}), "chosen: too_long: 1,000,001 characters"),
    "identical": (Cause.IDENTICAL, "trl", lines({**GOOD, "rejected": " blue."}), "same text"),
    "identical, prompt implicit": (Cause.IDENTICAL, "trl", lines({"chosen": "a b", "rejected": "a b"}), "same text"),
    "missing column": (Cause.MISSING_COLUMN, "trl", lines({"prompt": "a", "chosen": "b"}), "rejected"),
    "missing inner column": (Cause.MISSING_COLUMN, "tldr", lines({**TLDR_ROW, "info": {"title": "T"}}), "info.subreddit"),
    "null": (Cause.WRONG_TYPE, "trl", lines({**GOOD, "chosen": None}), "NoneType"),
    "number for text": (Cause.WRONG_TYPE, "trl", lines({**GOOD, "prompt": 3}), "int"),
    "text for number": (Cause.WRONG_TYPE, "shp", lines({**SHP_ROW, "score_A": "4"}), "score_A"),
    "true for number": (Cause.WRONG_TYPE, "tldr", lines({**TLDR_ROW, "choice": True}), "bool"),
    "three summaries": (Cause.WRONG_TYPE, "tldr", lines({**TLDR_ROW, "summaries": [{"text": "a"}] * 3}), "summaries"),
    "not an object": (Cause.WRONG_TYPE, "trl", b'["a", "b"]\n', "an array"),
    "choice of neither": (Cause.OUT_OF_RANGE, "tldr", lines({**TLDR_ROW, "choice": 2}), "choice"),
    "score without ratio": (Cause.OUT_OF_RANGE, "shp", lines({**SHP_ROW, "score_B": 0}), "score"),
    "duplicate key": (
        Cause.DUPLICATE_KEY,
        "trl",
        b'{"prompt": "a", "chosen": "b", "chosen": "c", "rejected": "d"}\n',
        "chosen",
    ),
    "duplicate inner key": (Cause.DUPLICATE_KEY, "tldr", b'{"info": {"post": "a", "post": "b"}}\n', "post"),
    "NaN": (Cause.NAN, "trl", b'{"prompt": "a", "chosen": NaN, "rejected": "d"}\n', "NaN"),
    "infinity": (Cause.NAN, "shp", lines(SHP_ROW).replace(b"4", b"1e999"), "score_A"),
    "invalid UTF-8": (Cause.INVALID_UTF8, "trl", b'{"prompt": "a", "chosen": "caf\xe9", "rejected": "d"}\n', "byte 30"),
    "cut UTF-8": (Cause.INVALID_UTF8, "trl", b'{"prompt": "a", "chosen": "\xf0\x9f\x98", "rejected": "d"}\n', "0xf0"),
    "UTF-16": (Cause.INVALID_UTF8, "trl", b"\xff\xfe{\x22}\n", "0xff"),
    "lone surrogate": (Cause.INVALID_UTF8, "trl", b'{"prompt": "a", "chosen": "b\\ud800", "rejected": "d"}\n', "surrogate"),
    "raw NUL": (Cause.NUL, "trl", b'{"prompt": "a", "chosen": "b\0", "rejected": "d"}\n', "byte 28"),
    "zeroed block": (Cause.NUL, "trl", b"\0" * 512 + b"\n", "byte 0"),
    "broken JSON": (Cause.INVALID_JSON, "trl", b'{"prompt": "a", \n', "property name"),
    "raw newline in text": (Cause.INVALID_JSON, "trl", b'{"prompt": "a\tb"}\n', "control character"),
    "deep nesting": (Cause.TOO_DEEP, "trl", b"[" * 200_000 + b"\n", "at least 101 levels deep; the limit is 100"),
    "last line cut off": (Cause.INVALID_JSON, "trl", b'{"prompt": "a", "chos', "cut off"),
}
FINE = {"trl": GOOD, "hh": hh_row("q", " a", " b"), "tldr": TLDR_ROW, "shp": SHP_ROW}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_refused_with_place_and_cause_or_dropped_and_counted(name, tmp_path):
    cause, format, bad, detail = BAD_ROWS[name]
    path = tmp_path / "data.jsonl"
    path.write_bytes(lines(FINE[format]) + bad)

    with pytest.raises(DataError) as refusal:
        load(path, format=format)
    assert refusal.value.causes == (cause,)
    for words in ("1 of 2 rows", "data.jsonl:2", cause, detail, "--data.on-bad drop"):
        assert words in str(refusal.value)

    kept = load(path, format=format, on_bad="drop")
    assert [p.uid for p in kept] == ["data.jsonl:1"]
    report = kept.report
    assert (report.read, report.kept, report.dropped) == (2, 1, {cause.value: 1})
    assert "data.jsonl:2" in report.examples[cause][0]
    assert report.bad_share == 0.5
    assert json.loads(json.dumps(report.to_json(), allow_nan=False)) == report.to_json()


def test_a_refusal_lists_the_first_ten_and_counts_all(tmp_path):
    path = write(tmp_path / "data.jsonl", GOOD, *[{**GOOD, "chosen": ""}] * 12, {"prompt": "a", "chosen": "b"})
    with pytest.raises(DataError) as refusal:
        load(path)
    message = str(refusal.value)
    assert "13 of 14 rows cannot be used (empty 12, missing_column 1)" in message
    assert message.count("data.jsonl:") == 10
    assert "and 3 more" in message
    assert len(load(path, on_bad="drop").report.examples["empty"]) == 5


# -- bad files: never dropped, because nobody knows how many rows are missing -------------------------------------------------

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 515523\n"
ZIPPED = gzip.compress(lines(*[{**GOOD, "prompt": f"Row {i} is"} for i in range(2000)]))
FLIPPED = ZIPPED[:-6] + bytes([ZIPPED[-6] ^ 1]) + ZIPPED[-5:]
BAD_FILES = {
    "git-lfs pointer": (Cause.GIT_LFS_POINTER, "train.jsonl.gz", LFS, "git lfs pull"),
    "git-lfs pointer for parquet": (Cause.GIT_LFS_POINTER, "train.parquet", LFS, "git lfs pull"),
    "truncated gzip": (Cause.BAD_GZIP, "train.jsonl.gz", ZIPPED[: len(ZIPPED) // 2], "cut off here"),
    "gzip with a wrong checksum": (Cause.BAD_GZIP, "train.jsonl.gz", FLIPPED, "CRC"),
    "text named gzip": (Cause.BAD_GZIP, "train.jsonl.gz", lines(GOOD), "not gzip"),
    "gzip named text": (Cause.BAD_GZIP, "train.jsonl", ZIPPED, "not named .gz"),
    "a web page named gzip": (Cause.BAD_GZIP, "train.jsonl.gz", b"<!DOCTYPE html>", "not gzip"),
    "empty file": (Cause.NO_ROWS, "train.jsonl", b"", "no rows"),
    "blank lines only": (Cause.NO_ROWS, "train.jsonl", b"\n \n", "no rows"),
    "cut JSON array": (Cause.INVALID_JSON, "train.json", b'[{"prompt": "a",\n "chosen"', "train.json:1.*begins in line 1"),
    "JSON array without a comma": (Cause.INVALID_JSON, "train.json", b'[{"a": 1}\n {"a": 2}]', "train.json:1.*a comma"),
    "JSON array with a comma too many": (Cause.INVALID_JSON, "train.json", b'[{"a": 1},]', "train.json:1.*a comma"),
    "more after a JSON array": (Cause.INVALID_JSON, "train.json", b'[{"a": 1}] [', "more after the end"),
    "empty JSON array": (Cause.NO_ROWS, "train.json", b"[ ]", "no rows"),
    "one JSON object": (Cause.BAD_LAYOUT, "train.json", b'{\n "data": []\n}\n', "one object per line"),
    "text named parquet": (Cause.BAD_PARQUET, "train.parquet", lines(GOOD), "named .parquet"),
    "cut parquet": (Cause.BAD_PARQUET, "train.parquet", b"PAR1" + b"\0" * 100, "damaged"),
}


@pytest.mark.parametrize("on_bad", ["refuse", "drop"])
@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_always_refused(name, on_bad, tmp_path):
    cause, file, content, detail = BAD_FILES[name]
    (tmp_path / file).write_bytes(content)
    with pytest.raises(DataError, match=detail) as refusal:
        load(tmp_path, on_bad=on_bad)
    assert refusal.value.causes == (cause,)
    assert file in str(refusal.value)


def test_nothing_left_is_an_error(tmp_path):
    path = write(tmp_path / "train.jsonl", {**GOOD, "chosen": ""})
    with pytest.raises(DataError, match="no preference is left") as refusal:
        load(path, on_bad="drop")
    assert "train.jsonl:1: chosen: empty" in str(refusal.value)


# -- files and layouts --------------------------------------------------------------------------------------------------------


def test_what_is_tolerated_is_noted(tmp_path):
    path = tmp_path / "train.jsonl"
    odd = {**GOOD, "chosen": " line\u2028separator\x85 stays"}
    path.write_bytes(
        b"\xef\xbb\xbf" + lines(GOOD).replace(b"\n", b"\r\n") + b"\n  \n" + json.dumps(odd, ensure_ascii=False).encode()
    )
    loaded = load(path)
    assert [p.uid for p in loaded] == ["train.jsonl:1", "train.jsonl:4"]
    assert loaded[1].chosen == odd["chosen"]
    assert loaded.report.notes == [
        "train.jsonl: byte order mark skipped",
        "train.jsonl: 2 blank lines skipped",
        "format 'trl': 2 of the first 2 readable rows have its columns",
    ]


@pytest.mark.parametrize(
    "names",
    [
        ["train.jsonl"],
        ["train.json.gz"],
        ["train/a.jsonl", "train/b.jsonl.gz"],
        ["harmless-base/train.jsonl.gz", "helpful-base/train.jsonl.gz"],
        ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"],
        ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"],
        ["comparisons/train-00000-of-00001.jsonl"],
        ["data/train-00000-of-00002-b21d99e2a8d3e3b0.jsonl", "data/train-00001-of-00002-0f3a5c7e9d1b2a48.jsonl"],
    ],
)
def test_layouts(names, tmp_path):
    for name in names:
        write(tmp_path / name, GOOD)
        write(tmp_path / name.replace("train", "test"), GOOD, GOOD)
    loaded = load(tmp_path)
    assert [p.uid for p in loaded] == [f"{name}:1" for name in names]
    assert [file["path"] for file in loaded.report.files] == names
    assert all(
        len(file["sha256"]) == 64 and file["bytes"] == (tmp_path / file["path"]).stat().st_size for file in loaded.report.files
    )
    assert len(load(tmp_path, "test")) == 2 * len(names)


@pytest.mark.parametrize(
    ("names", "detail"),
    [
        (["test.jsonl"], "no file of split 'train'; the folder holds test.jsonl"),
        (["train.xlsx"], "train.xlsx is not read: convert it to JSON Lines"),
        (["default/train/0000.jsonl"], "the split is in .*/default/train: give the folder .*/default"),
        (["a.jsonl", "b.jsonl"], "a, b with .*; several files of one split go into a folder, such as train/, or into data.mix"),
        (["train.jsonl", "train.jsonl.gz"], "same file twice"),
        (["train.jsonl", "train/a.jsonl"], "ambiguous"),
        (["train-00000-of-00003.jsonl", "train-00002-of-00003.jsonl"], r"shards \[1\] of 00003 are missing"),
        (["data/train-00000-of-00002-b21d99e2a8d3e3b0.jsonl"], r"shards \[1\] of 00002 are missing"),
        (["train-00000-of-00001.jsonl", "train-00000-of-00001-b21d99e2a8d3e3b0.jsonl"], "same file twice"),
        (
            [f"data/train_prefs-{n:05}-of-00002-b21d99e2a8d3e3b{n}.jsonl" for n in range(2)],
            "choose among the splits train_prefs with",
        ),
        (
            ["en/train-00000-of-00001.jsonl", "de/train-00000-of-00001.jsonl"],
            "ambiguous, .*(en/train.*de|de/train.*en)/train",
        ),
        (
            ["README.jsonl.md", "data/train_prefs-00000-of-00001.jsonl", "data/test_prefs-00000-of-00001.jsonl"],
            "choose among the splits test_prefs, train_prefs with --data.train-split and --data.test-split",
        ),
    ],
)
def test_a_layout_is_never_guessed(names, detail, tmp_path):
    for name in names:
        write(tmp_path / name, GOOD)
    with pytest.raises(DataError, match=detail) as refusal:
        load(tmp_path)
    assert refusal.value.causes == (Cause.BAD_LAYOUT,)


def test_the_descriptions_of_save_to_disk_are_no_rows(tmp_path):
    """A folder of a `DatasetDict`: Arrow files, with JSON files beside them."""
    for split in ("train", "test"):
        for name in ("data-00000-of-00001.arrow", "dataset_info.json", "state.json"):
            write(tmp_path / split / name, GOOD)
    write(tmp_path / "dataset_dict.json", GOOD)
    for folder in (tmp_path, tmp_path / "train"):
        with pytest.raises(DataError, match="Arrow files of `save_to_disk` are not read: write each split") as refusal:
            load(folder)
        assert "choose among" not in str(refusal.value)


@pytest.mark.parametrize("name", ["*.jsonl", "a.jsonl,b.jsonl", "train-?.jsonl"])
def test_names_of_several_files_are_told_where_to_put_them(name, tmp_path):
    with pytest.raises(DataError, match="no such file or folder; several files of one split go into a folder, such as train/"):
        load(tmp_path / name)


def test_a_shard_is_no_split(tmp_path):
    shards = ["train-00000-of-00002-b21d99e2a8d3e3b0", "train-00001-of-00002-0f3a5c7e9d1b2a48"]
    for name in shards:
        write(tmp_path / f"{name}.jsonl", GOOD)
    with pytest.raises(DataError, match=r"shards \[1\] of 00002 are missing"):
        load_preferences(tmp_path, shards[0])


def test_a_repository_of_the_hub_is_read_and_one_that_is_not_here_is_told_how_to_get(tmp_path, monkeypatch):
    for split in ("train_prefs", "test_prefs"):
        write(tmp_path / "data" / f"{split}-00000-of-00001.jsonl", GOOD)
    (tmp_path / ".cache" / "huggingface").mkdir(parents=True)
    (tmp_path / ".cache" / "huggingface" / "x.jsonl").touch()
    assert [p.uid for p in load(tmp_path, "test_prefs")] == ["data/test_prefs-00000-of-00001.jsonl:1"]
    assert split_names(tmp_path) == ["test_prefs", "train_prefs"]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as refusal:
        load("HuggingFaceH4/ultrafeedback_binarized")
    assert "no such file or folder; `dpo_jax.data.hub_files.open_dataset`" in str(refusal.value)
    (tmp_path / "Anthropic").mkdir()
    with pytest.raises(DataError, match="there is a folder Anthropic/ here, so that Anthropic/hh-rlhf is not taken for a data"):
        load("Anthropic/hh-rlhf")
    for name in ("data/nowhere", "nowhere", "a/b/c", "/no/where", "../no"):
        with pytest.raises(DataError, match="no such file or folder$"):
            load(name)


def test_a_subset_without_the_split_is_noted(tmp_path):
    write(tmp_path / "helpful-base/train.jsonl.gz", hh_row("q", " a", " b"))
    write(tmp_path / "helpful-online/test.jsonl.gz", hh_row("q", " a", " b"))
    assert "helpful-online/ has no file of split 'train'" in load(tmp_path).report.notes


def test_hidden_files_are_not_read(tmp_path):
    """What a killed writer leaves has the suffix of data, and so has the copy of an editor or of a backup."""
    for name in ("train/a.jsonl", "train/.1a2b3c4d-part.jsonl", ".backup/train.jsonl", "train/.a.jsonl"):
        write(tmp_path / name, GOOD)
    found = load(tmp_path)
    assert [p.uid for p in found] == ["train/a.jsonl:1"]
    assert not [note for note in found.report.notes if "backup" in note]


def test_a_pipe_is_told_as_what_it_is(tmp_path):
    os.mkfifo(tmp_path / "train.jsonl")
    with pytest.raises(
        DataError, match=r"train.jsonl: bad_layout: expected a file or a folder, got a pipe; write it to a file"
    ):
        load(tmp_path / "train.jsonl")


def test_one_file_does_not_serve_as_two_splits(tmp_path):
    path = write(tmp_path / "pairs.jsonl", GOOD)
    assert len(load(path)) == 1
    with pytest.raises(DataError, match="does not say 'test'"):
        load(path, "test")
    assert len(load(write(tmp_path / "pairs-test.jsonl", GOOD), "test")) == 1
    assert len(load(write(tmp_path / "train_prefs-v2.jsonl", GOOD), "train_prefs")) == 1
    for name in ("latest.jsonl", "train_prefs2.jsonl", "test.prefs.jsonl"):
        with pytest.raises(DataError, match="does not say 'test_prefs'"):
            load(write(tmp_path / name, GOOD), "test_prefs")
    with pytest.raises(DataError, match="no such file"):
        load(tmp_path / "nowhere")
    path.rename(tmp_path / "pairs.txt")
    with pytest.raises(DataError, match="not one of .jsonl"):
        load(tmp_path / "pairs.txt")


def test_parquet_equals_json_lines(tmp_path):
    rows = [{**GOOD, "prompt": f"Row {i} is"} for i in range(3000)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    write(tmp_path / "train.jsonl", *rows)
    pairs = [(p.prompt, p.chosen, p.rejected) for p in load(tmp_path / "train.jsonl")]
    assert [(p.prompt, p.chosen, p.rejected) for p in load(tmp_path / "train.parquet")] == pairs


def test_bad_parquet_rows_and_columns(tmp_path):
    good = pa.array(["a", "b", "c", "d"])
    offsets = pa.py_buffer(b"".join(i.to_bytes(4, "little") for i in (0, 5, 10, 14, 14)))
    chosen = pa.Array.from_buffers(pa.string(), 4, [pa.py_buffer(b"\x07"), offsets, pa.py_buffer(b" blue caf\xe9 red")])
    pq.write_table(pa.table({"prompt": good, "chosen": chosen, "rejected": good}), tmp_path / "train.parquet")
    loaded = load(tmp_path, on_bad="drop")
    assert [p.chosen for p in loaded] == [" blue", " red"]
    assert loaded.report.dropped == {"invalid_utf8": 1, "wrong_type": 1}
    assert "train.parquet:2: chosen" in loaded.report.examples["invalid_utf8"][0]

    pq.write_table(pa.Table.from_arrays([good] * 3, names=["chosen", "chosen", "rejected"]), tmp_path / "train.parquet")
    with pytest.raises(DataError, match="two columns are named 'chosen'"):
        load(tmp_path)


def test_taking_the_first_few_keeps_the_books(tmp_path):
    loaded = load(write(tmp_path / "train.jsonl", *[GOOD] * 5))
    few = loaded.take(2)
    assert [p.uid for p in few] == ["train.jsonl:1", "train.jsonl:2"]
    assert (few.report.read, few.report.kept, few.report.dropped) == (5, 2, {"over_limit": 3})
    assert (loaded.report.kept, loaded.report.dropped) == (5, {})
    assert list(loaded.take(None)) == list(loaded)
    assert "over_limit" in few.report.summary()


def test_lost_rows_and_shared_uids_are_bugs():
    pair = Preference("a", "b", "c", "here")
    with pytest.raises(ValueError, match="same uid"):
        PreferenceSet([pair, pair], DataReport())
    report = DataReport(read=1)
    with pytest.raises(AssertionError, match="read 1"):
        report.check()
