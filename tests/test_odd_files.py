"""Sound files that are odd, and small files that ask for much: read as they were written, or refused in one line."""

import gzip
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mutate import outcome, time_limit
from test_fuzz_data import ROWS, lines, read

from dpo_jax.data import formats, sources
from dpo_jax.data import parquet as parquet_module
from dpo_jax.data.files import read_rows
from dpo_jax.data.pairs import DataError, DataReport, Preference
from dpo_jax.data.snippets import load_snippets
from dpo_jax.data.sources import load_preferences
from dpo_jax.data.tfds import PreferenceBuilder, read_tfds, write_tfds
from dpo_jax.untrusted import LIMITS

BOM = b"\xef\xbb\xbf"
ARRAY = json.dumps([ROWS["trl"]] * 2, indent=1).encode()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("train.json.gz", gzip.compress(json.dumps(ROWS["trl"], indent=1).encode()), "bad_layout: a JSON object over several"),
        ("train.json.gz", gzip.compress(ARRAY)[:12], "bad_gzip"),
        ("train.jsonl", lines(ROWS["trl"]).decode().encode("utf-16"), "invalid_utf8: UTF-16; save it as UTF-8"),
        ("train.json", json.dumps({"data": [ROWS["trl"]]}).encode(), "bad_layout: one object holds all rows; write one object"),
        ("train.json", json.dumps({name: [text] for name, text in ROWS["trl"].items()}).encode(), "one object holds all rows"),
    ],
    ids=["object over lines", "cut gzip", "UTF-16", "rows in an object", "columns"],
)
def test_a_file_of_another_layout_says_which(name, content, words, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"^{name}[^\n]*: {words}"):
        load_preferences(tmp_path, "train", on_bad="drop")


def test_a_line_of_windows_1252_says_how_to_save_the_file(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(lines(ROWS["trl"]).replace(b"}", ', "note": "café"}'.encode("cp1252")))
    with pytest.raises(DataError, match="train.jsonl:1: invalid_utf8: byte 0xe9 at byte .*; save the file as UTF-8"):
        load_preferences(tmp_path, "train")


@pytest.mark.parametrize("name", ["train.ndjson", "train.jsonlines.gz"])
def test_other_suffixes_of_json_lines(name, tmp_path):
    content = lines(ROWS["trl"], ROWS["trl"])
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert len(load_preferences(tmp_path, "train")) == len(load_preferences(tmp_path / name, "train")) == 2


def test_a_file_of_another_compression_says_how_to_unpack_it(tmp_path):
    path = tmp_path / "train.jsonl.zst"
    path.write_bytes(b"(\xb5/\xfd")
    for source in (path, tmp_path):
        with pytest.raises(DataError, match=r"; unpack it: zstd -d train\.jsonl\.zst$"):
            load_preferences(source, "train")


def test_one_row_of_lists_in_a_json_file_is_a_row(tmp_path):
    (tmp_path / "train.json").write_bytes(lines({"messages": [{"role": "user", "content": "Hi"}]}))
    (where, row), *_ = read_rows("train.json", tmp_path / "train.json", report=DataReport())
    assert (where, [*row]) == ("train.json:1", ["messages"])


@pytest.mark.parametrize("name", ["train.json", "train.json.gz"])
def test_objects_of_lists_in_several_lines_are_rows(name, tmp_path):
    content = lines({"completions": ["a", "b"]}) + b"\n" + lines({"completions": ["c", "d"]})
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    found = read_rows(name, tmp_path / name, report=DataReport())
    assert [where for where, _ in found] == [f"{name}:1", f"{name}:3"]


@pytest.mark.parametrize("name", ["train.json", "train.json.gz", "train.jsonl"])
def test_a_json_array_is_read_as_its_elements(name, tmp_path):
    """As `datasets` reads it. What is wrong with an element is said as of a line."""
    rows = [ROWS["trl"], {**ROWS["trl"], "chosen": float("nan")}, 7, {**ROWS["trl"], "prompt": "Another ] , [ one."}]
    folder, lines_in = tmp_path / "array", tmp_path / "lines"
    folder.mkdir()
    for indent in (None, 1):
        content = BOM + json.dumps(rows, indent=indent).encode()
        (folder / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
        found = load_preferences(folder, "train", on_bad="drop")
        lines_in.mkdir(exist_ok=True)
        (lines_in / "train.jsonl").write_bytes(lines(rows[0], rows[3]))
        texts = [
            [(one.prompt, one.chosen, one.rejected) for one in each] for each in (found, load_preferences(lines_in, "train"))
        ]
        assert texts[0] == texts[1]
        assert [one.uid for one in found] == [f"{name}:1", f"{name}:4"]
        report = found.report
        assert (report.read, report.kept, report.dropped) == (4, 2, {"nan": 1, "wrong_type": 1})
        assert f"{name}: one JSON array; places count its elements" in report.notes


def test_windows_line_ends_and_a_byte_order_mark_are_no_part_of_a_text(tmp_path):
    for name in ("pos", "neg"):
        (tmp_path / f"rt-polarity.{name}").write_bytes(BOM + f"{name} .\r\nnext .\r\n".encode())
    assert [snippet.text for snippet in load_snippets(tmp_path)] == ["pos .", "next .", "neg .", "next ."]


def test_two_names_are_never_written_alike(tmp_path):
    (tmp_path / "train").mkdir()
    for name in (b"caf\xe9.jsonl", b"caf\\xe9.jsonl"):
        with open(os.fsencode(tmp_path / "train") + b"/" + name, "wb") as file:
            file.write(lines(ROWS["trl"]))
    assert {pair.uid for pair in read(tmp_path, "trl")} == {"train/caf\\xe9.jsonl:1", "train/caf\\\\xe9.jsonl:1"}


# -- parquet ------------------------------------------------------------------------------------------------------------------


def test_decimals_are_numbers(tmp_path):
    """DuckDB writes 40.5 as one."""
    row = {name: pa.array([value]) for name, value in ROWS["shp"].items()}
    pq.write_table(pa.table(row | {"score_A": row["score_A"].cast(pa.decimal128(21, 2))}), tmp_path / "train.parquet")
    assert [pair.chosen for pair in load_preferences(tmp_path, "train")] == [" a"]


@pytest.mark.parametrize("literal", ["NaN", "-Infinity"])
def test_what_is_no_number_is_refused_only_where_it_is_read(literal, tmp_path):
    """Python's `json` writes these for missing values, for example of a score that no format reads."""
    line = json.dumps(ROWS["shp"] | {"score": [float("nan")]}).replace("NaN", literal)
    (tmp_path / "train.jsonl").write_text(line + "\n" + line.replace('"score_A": 40', f'"score_A": {literal}') + "\n")
    loaded = load_preferences(tmp_path, "train", on_bad="drop")
    assert (loaded[0].uid, loaded.report.dropped) == ("train.jsonl:1", {"nan": 1})
    assert loaded.report.examples["nan"][0].startswith("train.jsonl:2: score_A: nan: ")


def test_a_row_that_unpacks_to_more_than_a_line_may_hold_is_one_bad_row(tmp_path, monkeypatch):
    """Repeated values take no space in the file. A large dictionary of small values is no large row."""
    monkeypatch.setattr(LIMITS, "line_mb", 1)
    row = {name: value for name, value in ROWS["stack_exchange"].items() if name != "answers"}
    few, many = ([{"text": f"<p>{i}</p>", "pm_score": i} for i in range(n)] for n in (2, 50_000))
    pq.write_table(pa.Table.from_pylist([{**row, "answers": few}, {**row, "answers": many}]), tmp_path / "train.parquet")
    loaded = read(tmp_path, "stack_exchange")
    assert (len(loaded), loaded.report.dropped) == (1, {"line_too_long": 1})
    assert "train.parquet:2: line_too_long: a row of 1," in loaded.report.examples["line_too_long"][0]
    texts = [f"{i} " + "x" * 40_000 for i in range(60)] + ["y" * 2**20, None]
    column = {"prompt": pa.array(texts).dictionary_encode(), "chosen": [" a"] * 62, "rejected": [" b"] * 62}
    pq.write_table(pa.table(column), tmp_path / "train.parquet")
    loaded = read(tmp_path, "trl")
    assert (len(loaded), loaded.report.dropped) == (60, {"line_too_long": 1, "wrong_type": 1})


def plain(table, path):
    """Written so that equal texts take no space in the file, and each its own in memory."""
    pq.write_table(table, path, store_schema=False, dictionary_pagesize_limit=2**30)


def test_few_rows_are_unpacked_at_a_time_where_they_are_large(tmp_path, monkeypatch):
    """A file of 3 kB took 5 GB: its 100 texts of 60 MB are one in the file."""
    path, sizes = tmp_path / "train.parquet", []
    original = parquet_module._rows_at_a_time

    def rows_at_a_time(*arguments):
        sizes.append(original(*arguments))
        return sizes[-1]

    monkeypatch.setattr(parquet_module, "_rows_at_a_time", rows_at_a_time)
    monkeypatch.setattr(parquet_module, "_MEMORY", 2**22)
    for text, rows in (("x" * 2**20, 3), ("x" * 2**24, 1), ("x", 1024)):
        columns = {"prompt": [text] * 40, "chosen": [" a"] * 40, "rejected": [" b"] * 40}
        plain(pa.table(columns), path)
        assert [row["prompt"] == text for _, row in read_rows("train.parquet", path, report=DataReport("", "", ""))] == [
            True
        ] * 40
        assert sizes.pop() in (rows, rows + 1)
    distinct = {"prompt": [f"{i}" * 2**16 for i in range(100)], "chosen": [" a"] * 100, "rejected": [" b"] * 100}
    pq.write_table(pa.table(distinct), path, use_dictionary=False)
    assert len(list(read_rows("train.parquet", path, report=DataReport("", "", "")))) == 100
    assert sizes == [16]  # all together are larger, and nobody knows which row is


def test_a_file_of_which_one_row_may_unpack_to_anything_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(LIMITS, "line_mb", 1)
    monkeypatch.setattr(parquet_module, "_PLAIN", 2**10)
    row = {name: value for name, value in ROWS["stack_exchange"].items() if name != "answers"}
    for count, refused in ((2, False), (60, True)):
        answers = [{"text": "y" * 2**16, "pm_score": i} for i in range(count)]
        plain(pa.Table.from_pylist([{**row, "answers": answers}]), tmp_path / "train.parquet")
        found = outcome(lambda: read(tmp_path, "stack_exchange"), names="train.parquet")
        assert ("line_too_long: a row of 3,9" in str(found)) == refused


def test_a_format_is_detected_by_fewer_rows_where_they_are_large(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_SAMPLED", 100_000)
    row = ROWS["trl"]
    for value in ("x" * 60_000, [[]] * 60_000, [{"a": "x" * 30_000}] * 2):
        (tmp_path / "train.jsonl").write_bytes(lines(*[{**row, "more": value}] * 60))
        notes = load_preferences(tmp_path, "train").report.notes
        assert notes[0] == "format 'trl': 2 of the first 2 readable rows have its columns"


def test_a_file_of_many_columns_is_read(tmp_path):
    columns = {f"c{i}": [1] for i in range(10_000)} | {name: [ROWS["trl"][name]] for name in ("prompt", "chosen", "rejected")}
    pq.write_table(pa.table(columns), tmp_path / "train.parquet")
    with time_limit():
        assert len(load_preferences(tmp_path, "train")) == 1


# -- what grows ---------------------------------------------------------------------------------------------------------------


def test_the_pairs_of_a_question_share_its_text(tmp_path):
    """500 answers of which half are blank form 31,125 pairs: a question of 900 kB for each would be 28 GB."""
    answers = [{"text": "<p>" + " " * 10_000 + (str(i) if i % 2 else "") + "</p>", "pm_score": i} for i in range(500)]
    (tmp_path / "train.jsonl").write_bytes(lines({"question": f"<p>{'x' * 900_000}</p>", "answers": answers}))
    with time_limit():
        loaded = read(tmp_path, "stack_exchange")
    assert len({id(pair.prompt) for pair in loaded}) == 1
    assert (len(loaded), loaded.report.dropped) == (250 * 249 // 2, {"empty": 500 * 499 // 2 - 250 * 249 // 2})
    assert "train.jsonl:1#0-1: answers.0.text: empty" in loaded.report.examples["empty"][0]


def test_no_place_is_looked_for_in_a_long_line(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(lines(ROWS["trl"]) + b'{"a": [' + b"[]," * 400_000 + b"1e999]}\n")
    loaded = read(tmp_path, "trl")
    assert loaded.report.dropped == {"nan": 1}
    assert loaded.report.examples["nan"][0].startswith("train.jsonl:2: nan: 1e999")


def test_more_rows_than_memory_holds_end_in_a_message(tmp_path, monkeypatch):
    def full(rows, *, tokenizer):
        yield next(rows)[0], Preference("p", " a", " b", "u")
        raise MemoryError

    (tmp_path / "train.jsonl").write_bytes(lines(ROWS["trl"], ROWS["trl"]))
    monkeypatch.setattr(formats, "hh", full)
    error = outcome(lambda: load_preferences(tmp_path, "train", format="hh"), names=f"{tmp_path} [train]: out of memory")
    assert isinstance(error, DataError)


# -- TFDS ---------------------------------------------------------------------------------------------------------------------


def test_records_are_in_files(tmp_path):
    """A pipe would be waited for, where no time limit reaches; so here a folder stands for whatever is no file."""
    folder = write_tfds({"train": [Preference("p", " a", " b", "u")]}, tmp_path, name="small")
    (record,) = folder.glob("*.array_record*")
    record.unlink()
    record.mkdir()
    assert isinstance(outcome(lambda: read_tfds(folder, "train"), names=f"{record}: bad_array_record: no such file"), DataError)


def test_records_of_one_uid_are_refused_before_they_are_written_and_when_they_are_read(tmp_path):
    twins = {"train": [Preference("p", " a", " b", "u"), Preference("q", " a", " b", "u")]}
    with pytest.raises(DataError, match="train: duplicate_key: two preferences have the same uid"):
        write_tfds(twins, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    builder = PreferenceBuilder(preferences=twins, name="twins", data_dir=tmp_path)
    builder.download_and_prepare()
    assert isinstance(outcome(lambda: read_tfds(tmp_path, "train"), names="twins/train:2: duplicate_key"), DataError)
