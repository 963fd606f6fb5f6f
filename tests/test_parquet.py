"""Of a parquet file only what a format reads is decoded."""

import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_fuzz_data import ROWS, lines, parquet

from dpo_jax.data.files import read_rows
from dpo_jax.data.pairs import DataError, DataReport
from dpo_jax.data.sources import load_preferences


def test_columns_that_no_format_reads_may_hold_anything(tmp_path):
    """Times that Python has no value for, names and texts that are not UTF-8, two columns of one name, damaged pages."""
    row = {name: value for name, value in ROWS["stack_exchange"].items() if name != "answers"}
    answers = [{**answer, "at": 1} for answer in ROWS["stack_exchange"]["answers"]]
    bad_text = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xe9")])
    times = [pa.array([2**62 + 1], pa.timestamp(unit)) for unit in ("ns", "ms")]
    when = pa.struct({"text": pa.string(), "pm_score": pa.int64(), "at": pa.timestamp("ms")})
    table = pa.table(
        {
            "question": [row["question"]],
            "answers": pa.array([[{**answer, "at": 2**62} for answer in answers]], pa.list_(when)),
            "created": times[0],
            "far": times[1],
            "text": bad_text,
        }
    )
    for name in ("twice", "twice", "NAME", "damaged"):
        table = table.append_column(name, pa.array(["x" * 200]))
    pq.write_table(
        table,
        tmp_path / "train.parquet",
        write_page_checksum=True,
        compression="none",
        use_dictionary=False,
        store_schema=False,
    )
    content = (tmp_path / "train.parquet").read_bytes()
    place = content.rindex(b"x" * 200)
    content = content[:place] + b"y" + content[place + 1 :]
    (tmp_path / "train.parquet").write_bytes(content.replace(b"NAME", b"N\xff\xfeE"))
    (tmp_path / "train.jsonl").write_bytes(lines({**row, "answers": answers}))
    pairs = load_preferences(tmp_path / "train.parquet", "train")
    assert [pair.chosen for pair in pairs] == [p.chosen for p in load_preferences(tmp_path / "train.jsonl", "train")]


def test_a_column_that_cannot_be_decoded_is_named(tmp_path):
    columns = {name: pa.array([name, "x"]) for name in ("prompt", "chosen")}
    columns["rejected"] = pa.array([1, 2**62 + 1], pa.timestamp("ns"))
    pq.write_table(pa.table(columns), tmp_path / "train.parquet")
    with pytest.raises(DataError, match=r"train.parquet:2: rejected: wrong_type: timestamp\[ns\] cannot be read: ValueError"):
        load_preferences(tmp_path, "train")


def test_a_file_that_fits_another_format_says_so(tmp_path):
    """The first rows decide the format of all files. A column that a file's own format does not read counts as missing."""
    (tmp_path / "train").mkdir()
    unread = {name: ROWS["shp"][name] for name in ("history", "human_ref_A", "human_ref_B", "score_A")}
    (tmp_path / "train" / "a.parquet").write_bytes(parquet({**ROWS["trl"], **unread}))
    (tmp_path / "train" / "b.parquet").write_bytes(parquet(*[ROWS["shp"]] * 3))
    loaded = load_preferences(tmp_path, "train", on_bad="drop")
    assert (loaded.report.format, len(loaded), loaded.report.dropped) == ("shp", 3, {"missing_column": 1})
    assert "name the format with --data.format" in loaded.report.examples["missing_column"][0]
    with pytest.raises(DataError, match=r"b.parquet: missing_column: format 'tldr' reads none of the columns 'history'"):
        load_preferences(tmp_path, "train", format="tldr", on_bad="drop")


def test_parquet_that_lacks_rows_is_refused(tmp_path):
    good = parquet(*[ROWS["trl"]] * 2, ROWS["trl"])
    read_back = pq.ParquetFile(io.BytesIO(good)).metadata
    assert read_back.num_rows == 3
    # The footer's thrift: field 3 of FileMetaData, an i64 in zigzag: 3 rows are 0x06.
    footer = int.from_bytes(good[-8:-4], "little")
    start = len(good) - 8 - footer
    at = next(i for i in range(start, len(good)) if good[i : i + 2] == b"\x16\x06" and changed(good, i) == 63)
    (tmp_path / "train.parquet").write_bytes(good[: at + 1] + b"\x7e" + good[at + 2 :])
    with pytest.raises(DataError, match="train.parquet: bad_parquet: the file declares 63 rows but holds 3"):
        load_preferences(tmp_path, "train", on_bad="drop")


def changed(content, at):
    try:
        return pq.ParquetFile(io.BytesIO(content[: at + 1] + b"\x7e" + content[at + 2 :])).metadata.num_rows
    except (OSError, pa.ArrowException):
        return None


def test_absent_keys_of_parquet_are_absent(tmp_path):
    """Parquet gives every object the keys that any object of its column has."""
    rows = [{"messages": [{"role": "a", "call": {"city": "Oslo"}}]}, {"messages": [{"role": "b", "call": {"zone": "UTC"}}]}]
    (tmp_path / "train.parquet").write_bytes(parquet(*rows))
    found = read_rows("train.parquet", tmp_path / "train.parquet", report=DataReport())
    assert [row for _, row in found] == rows
