"""Damaged and foreign data files: each ends in rows that were counted or in one error that names the file."""

import gzip
import io
import itertools
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mutate import mutants, mutations, outcome, time_limit

from dpo_jax.cli.preflight.inputs import _rows as declared_rows
from dpo_jax.data.columns import number
from dpo_jax.data.format_table import FORMATS
from dpo_jax.data.pairs import BadRow, Cause, DataError, Preference, PreferenceSet
from dpo_jax.data.snippets import load_snippets
from dpo_jax.data.sources import load_preferences, peek
from dpo_jax.data.tfds import read_tfds, write_tfds
from dpo_jax.data.tfds_folder import find_tfds, split_rows
from dpo_jax.untrusted import LIMITS

ROWS = {
    "hh": {"chosen": "\n\nHuman: q é\n\nAssistant: a", "rejected": "\n\nHuman: q é\n\nAssistant: b"},
    "trl": {"prompt": "The sky is", "chosen": " blue.", "rejected": " green 🙂.", "subset": "easy", "note": [{"a": 2.5}]},
    "tldr": {
        "info": {"subreddit": "tifu", "title": "T", "post": "P", "id": 7},
        "summaries": [{"text": " first", "policy": "x"}, {"text": " second", "policy": "y"}],
        "choice": 1,
    },
    "shp": {"history": "q", "human_ref_A": "a", "human_ref_B": "b", "labels": 1, "score_A": 40, "score_B": 2},
    "stack_exchange": {
        "question": "<p>Q &amp; A</p><pre><code>x &lt; 1</code></pre>",
        "answers": [{"text": f"<p>{name}</p>", "pm_score": score} for name, score in (("a", 2), ("b", 5), ("c", 2))],
    },
    "rewardbench": {
        **{"prompt": "q", "chosen": "a", "rejected": "b", "chosen_model": "m", "rejected_model": "n", "subset": "s", "id": 1}
    },
}


def lines(*rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def read(folder, format, *, on_bad="drop"):
    """What `load_preferences` makes of the folder. Nothing is lost, and the report can be written."""
    loaded = outcome(lambda: load_preferences(folder, "train", format=format, on_bad=on_bad))
    if isinstance(loaded, PreferenceSet):
        report = loaded.report
        assert report.kept + sum(report.dropped.values()) == report.read >= report.rows
        json.dumps(report.to_json(), ensure_ascii=False, allow_nan=False).encode()
    else:
        assert isinstance(loaded, DataError | OSError), loaded
        assert "train." in str(loaded) or "[train]" in str(loaded), loaded
    return loaded


def meaning(format, folder, content):
    """The preferences of the lines that are JSON, each line read on its own, by line."""
    kept = {}
    for at, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            kept[at] = [
                (pair.prompt, pair.chosen, pair.rejected)
                for _, pair in FORMATS[format].candidates([("", row)], tokenizer=None)
                if isinstance(pair, Preference)
            ]
    return kept


def test_an_array_of_json_means_what_it_says_or_is_refused(tmp_path):
    """An element is read as the line that it would be; an array that does not end well is refused whole."""
    row = {**ROWS["trl"], "unended": ["chosen"]}
    good, kept = json.dumps([row] * 3, indent=1, ensure_ascii=False).encode(), 0
    for mutant in mutations(good, count=mutants(120)):
        (tmp_path / "train.json").write_bytes(mutant)
        loaded = read(tmp_path, "trl")
        if isinstance(loaded, PreferenceSet) and any("one JSON array" in note for note in loaded.report.notes):
            elements = json.loads(mutant.removeprefix(b"\xef\xbb\xbf"))
            assert loaded.report.read == len(elements)
            said = meaning("trl", tmp_path, b"\n".join(json.dumps(element).encode() for element in elements))
            for pair in loaded:
                assert [(pair.prompt, pair.chosen, pair.rejected)] == said[int(pair.uid.split(":")[1])]
                kept += 1
        read(tmp_path, "auto", on_bad="refuse")
    assert kept > 30


@pytest.mark.parametrize("format", ROWS)
def test_lines_of_json_mean_what_they_say_or_are_counted(format, tmp_path):
    good = lines(*[ROWS[format]] * 3)
    kept = 0
    for mutant in mutations(good, count=mutants(60)):
        (tmp_path / "train.jsonl").write_bytes(mutant)
        loaded = read(tmp_path, format)
        if isinstance(loaded, PreferenceSet):
            said = meaning(format, tmp_path, mutant)
            for line, pairs in itertools.groupby(loaded, lambda pair: int(pair.uid.split(":")[1].split("#")[0])):
                assert [(pair.prompt, pair.chosen, pair.rejected) for pair in pairs] == said[line]
                kept += 1
        read(tmp_path, "auto", on_bad="refuse")
        outcome(lambda: peek(tmp_path, "train"))
    assert kept > 60


def test_gzip_is_read_to_its_end_or_refused(tmp_path):
    good = gzip.compress(lines(*({**ROWS["trl"], "prompt": f"Row {i}"} for i in range(40))), mtime=0)
    (tmp_path / "train.jsonl.gz").write_bytes(good)
    whole = list(load_preferences(tmp_path, "train"))
    refused = 0
    for mutant in mutations(good, count=mutants(150)):
        (tmp_path / "train.jsonl.gz").write_bytes(mutant)
        loaded = read(tmp_path, "trl")
        refused += not isinstance(loaded, PreferenceSet)
        if isinstance(loaded, PreferenceSet):
            assert list(loaded)[:40] == whole
    assert refused > 50


def test_damaged_lines_mean_the_same_in_an_archive(tmp_path):
    good, kept = lines(*[ROWS["trl"]] * 3), 0
    for name in ("plain", "archive"):
        (tmp_path / name).mkdir()
    for mutant in mutations(good, count=mutants(40), seed=1):
        (tmp_path / "plain/train.jsonl").write_bytes(mutant)
        (tmp_path / "archive/train.jsonl.gz").write_bytes(gzip.compress(mutant, mtime=0))
        plain, archive = (read(tmp_path / name, "trl") for name in ("plain", "archive"))
        if isinstance(archive, PreferenceSet):
            assert [pair.uid.replace(".jsonl:", ".jsonl.gz:") for pair in plain] == [pair.uid for pair in archive]
            assert [vars(pair) | {"uid": 0} for pair in plain] == [vars(pair) | {"uid": 0} for pair in archive]
            assert plain.report.dropped == archive.report.dropped
            kept += mutant != good
        else:
            assert type(archive) is type(plain)
    assert kept > 10


def parquet(*rows, **columns):
    table = pa.Table.from_pylist(list(rows))
    for name, values in columns.items():
        table = table.append_column(name, values)
    file = io.BytesIO()
    pq.write_table(table, file, write_page_checksum=True)
    return file.getvalue()


def test_parquet_is_read_to_its_end_or_refused(tmp_path):
    def said(loaded):
        return [(pair.uid, pair.prompt, pair.chosen, pair.rejected) for pair in loaded]

    file = tmp_path / "train.parquet"
    for format in ("trl", "stack_exchange"):
        good, refused, kept = parquet(*[ROWS[format]] * 3), 0, 0
        file.write_bytes(good)
        whole = said(load_preferences(tmp_path, "train", format=format))
        for mutant in mutations(good, count=mutants(100)):
            file.write_bytes(mutant)
            if isinstance(loaded := read(tmp_path, format), PreferenceSet):
                assert said(loaded) == whole
                kept += mutant != good
            refused += isinstance(outcome(lambda: declared_rows(str(tmp_path), "train"), names="train.parquet"), Exception)
        assert refused > 10
        assert kept


def test_one_changed_letter_in_a_page_of_parquet_is_found(tmp_path):
    good = parquet(ROWS["trl"])
    (tmp_path / "train.parquet").write_bytes(changed := good.replace(b" blue.", b" blur.", 1))
    assert changed != good
    with pytest.raises(DataError, match=r"train\.parquet.*: bad_parquet: .*page integrity"):
        load_preferences(tmp_path, "train")


@pytest.mark.parametrize("format", ROWS)
def test_parquet_means_what_json_lines_do(format, tmp_path):
    """Also a check that each format names all columns that it reads."""
    rows = [ROWS[format]] * 3
    (tmp_path / "train.jsonl").write_bytes(lines(*rows))
    (tmp_path / "train.parquet").write_bytes(parquet(*rows))
    said = [list(load_preferences(tmp_path / f"train.{kind}", "train")) for kind in ("jsonl", "parquet")]
    assert [vars(pair) | {"uid": 0} for pair in said[0]] == [vars(pair) | {"uid": 0} for pair in said[1]] != []


# -- lines and names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_a_line_that_is_too_long_is_one_bad_row(suffix, tmp_path, monkeypatch):
    monkeypatch.setattr(LIMITS, "line_mb", 1)
    content = lines(ROWS["trl"]) + b'{"prompt": "' + b"x" * 2**21 + b'"}\n' + lines(ROWS["trl"])
    file = tmp_path / f"train.{suffix}"
    file.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    loaded = load_preferences(tmp_path, "train", on_bad="drop")
    assert [pair.uid for pair in loaded] == [f"train.{suffix}:1", f"train.{suffix}:3"]
    assert loaded.report.dropped == {"line_too_long": 1}
    with pytest.raises(DataError, match=rf"train.{suffix}:2: line_too_long: a line of 2,097,167 bytes; .*--limits.line-mb"):
        load_preferences(tmp_path, "train")


@pytest.mark.parametrize(
    ("text", "cause", "words"),
    [
        ('{"a": {"b": [1, 1e999]}}', Cause.NAN, "a.b.1: nan: 1e999 is too large a number"),
        ('{"score": ' + "9" * 5000 + "}", Cause.NAN, "score: nan: a number of 5000 digits"),
        ('{"a": {"b": NaN}, "c": [', Cause.INVALID_JSON, "invalid_json: Expecting value"),
        ('{"a":' * 101 + "1" + "}" * 101, Cause.TOO_DEEP, "101 levels deep; the limit is 100 (raise it with --limits.depth)"),
        ('{"' + "k" * 9000 + '": 1, "' + "k" * 9000 + '": 2}', Cause.DUPLICATE_KEY, "k" * 77 + "...: duplicate_key"),
        ('{"\\ud800": 1, "\\ud800": 2}', Cause.DUPLICATE_KEY, "\\ud800: duplicate_key"),
    ],
)
def test_causes_and_fields_of_strict_json(text, cause, words, tmp_path):
    (tmp_path / "train.jsonl").write_bytes(lines(ROWS["trl"]) + text.encode())
    loaded = read(tmp_path, "trl")
    assert loaded.report.dropped == {cause: 1}
    assert words in loaded.report.examples[cause][0]
    assert len(loaded.report.examples[cause][0]) < 600


def test_numbers_that_no_float_can_hold_are_bad():
    for value in (10**400, -(10**400)):
        with pytest.raises(BadRow, match=r"a.score: out_of_range: too large a number"):
            number({"score": value}, "score", inside="a.")
    assert number({"score": 10**300}, "score") == 10**300


def test_names_that_are_not_utf_8_are_written_as_escapes(tmp_path):
    folder = tmp_path / "train"
    folder.mkdir()
    with open(bytes(folder) + b"/caf\xe9.jsonl", "wb") as file:
        file.write(lines(ROWS["trl"]))
    loaded = read(tmp_path, "auto")
    assert [pair.uid for pair in loaded] == ["train/caf\\xe9.jsonl:1"]
    assert loaded.report.files[0]["path"] == "train/caf\\xe9.jsonl"


def test_absurd_counts_end_in_a_message(tmp_path):
    for shard in (0, 2):
        (tmp_path / f"train-{shard}-of-99999999999999.jsonl").write_bytes(lines(ROWS["trl"]))
    with time_limit(), pytest.raises(DataError, match=r"shards \[1, 3, 4.*\] of 99999999999999 are missing"):
        load_preferences(tmp_path, "train")
    for file in tmp_path.iterdir():
        file.unlink()
    many = {"question": "<p>q</p>", "answers": [{"text": "<p>a</p>", "pm_score": 1}] * 20_000}
    (tmp_path / "train.jsonl").write_bytes(lines(many, ROWS["stack_exchange"]))
    with time_limit():
        loaded = load_preferences(tmp_path, "train", on_bad="drop")
    assert loaded.report.dropped == {"out_of_range": 1, "tie": 1}


def test_snippets_are_read_as_they_stand_or_refused_with_their_line(tmp_path):
    good = "a fine film . \nnext\u2028line é\nsilly and tedious .\n".encode()
    (tmp_path / "rt-polarity.neg").write_bytes(b"bad .\n")
    kept = 0
    for mutant in mutations(good, count=mutants(100)):
        (tmp_path / "rt-polarity.pos").write_bytes(mutant)
        found = outcome(lambda: load_snippets(tmp_path))
        if isinstance(found, list):
            said = [line.decode().strip() for line in mutant.removeprefix(b"\xef\xbb\xbf").split(b"\n")][: len(found) - 1]
            assert [snippet.text for snippet in found if snippet.label] == said
            kept += mutant != good
        else:
            assert "rt-polarity.pos:" in str(found)
    assert kept > 10


def test_html_that_is_too_deep_is_a_bad_row(tmp_path):
    deep = {**ROWS["stack_exchange"], "question": "<b>" * 100_000}
    (tmp_path / "train.jsonl").write_bytes(lines(ROWS["stack_exchange"], deep))
    with time_limit():
        loaded = read(tmp_path, "stack_exchange")
    assert loaded.report.dropped == {"tie": 1, "too_deep": 1}
    assert "question: too_deep: HTML elements 101 levels deep" in loaded.report.examples["too_deep"][0]


# -- TFDS folders -------------------------------------------------------------------------------------------------------------

PAIRS = [Preference(f"Row {i}", " yes é", " no", f"c:{i}", chat=i % 2 == 0) for i in range(30)]


@pytest.fixture(scope="module")
def tfds(tmp_path_factory):
    return write_tfds({"train": PAIRS, "test": PAIRS[:2]}, tmp_path_factory.mktemp("tfds"), name="small")


@pytest.mark.parametrize(
    "name", ["dataset_info.json", "features.json", "metadata.json", "small-train.array_record-00000-of-00001"]
)
def test_damaged_tfds_folders_are_refused_or_read_as_they_were_written(name, tfds):
    good = (tfds / name).read_bytes()
    kept = refused = 0
    try:
        for mutant in mutations(good, count=mutants(60)):
            (tfds / name).write_bytes(mutant)
            found = outcome(lambda: read_tfds(tfds, "train", on_bad="drop"), names="small")
            if isinstance(found, PreferenceSet):
                assert list(found) == PAIRS
                assert found.report.kept + sum(found.report.dropped.values()) == found.report.read
            else:
                assert isinstance(found, DataError), found
            kept, refused = kept + isinstance(found, PreferenceSet), refused + isinstance(found, DataError)
            told = outcome(lambda: split_rows(find_tfds(tfds)).get("train"))
            assert isinstance(told, int | None | DataError), told
    finally:
        (tfds / name).write_bytes(good)
    assert refused > 10
    assert kept
    assert list(read_tfds(tfds, "train")) == PAIRS
