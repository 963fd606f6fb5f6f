"""Which files make up a split, and their rows, each with the place it stands at.

A bad row is handed on as a `BadRow` and may be dropped. A bad file (cut off, not fetched, not what its name says) is always a
`DataError`: nobody can count the rows that are missing from it.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from dpo_jax.data.pairs import BadRow, Cause, DataError, DataReport

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
Row = dict[str, Any]

_LFS = b"version https://git-lfs.github.com/spec/"
_GZIP = b"\x1f\x8b"
_PARQUET = b"PAR1"
_BOM = b"\xef\xbb\xbf"
# "train-00000-of-00002", and as older versions of `datasets` pushed it to the Hub, "train-00000-of-00002-b21d99e2a8d3e3b0".
_SHARD = re.compile(r"(?P<split>.+)-(?P<number>\d+)-of-(?P<count>\d+)(-[0-9a-f]{16})?")


def find_files(source: str | Path, split: str, *, report: DataReport) -> list[tuple[str, Path]]:
    """The files of `split` under `source` as `(name, path)`, names relative to `source`, in the order of their names.

    A file is taken as it is for the split "train", and for a split that stands in its name; asking one file for another split
    would train and test on the same rows. In a folder exactly one of these layouts may hold the split:
    `{split}.jsonl`, `{split}/*.jsonl`, `{split}-00000-of-00002.parquet` (a content hash may follow, and the files may lie one
    folder below, such as the `data/` of a repository of the Hugging Face Hub), `*/{split}.jsonl` (one folder per subset, as in
    Anthropic HH and SHP), each with any of `SUFFIXES`. Raises `DataError` saying what was found otherwise.
    """
    source = Path(source)
    if source.is_file():
        if split != "train" and split not in re.split(r"[^0-9A-Za-z]+", source.name):
            _refuse(Cause.BAD_LAYOUT, source, f"one file holds one split, and its name does not say {split!r}; give a folder")
        _stem(source)
        return [(source.name, source)]
    if not source.is_dir():
        _refuse(Cause.BAD_LAYOUT, source, f"no such file or folder{_of_the_hub(source)}")
    layouts = _layouts(source, split)
    if len(layouts) != 1:
        found = "; ".join(
            f"{layout}: {', '.join(str(p.relative_to(source)) for p in paths)}" for layout, paths in layouts.items()
        )
        detail = f"ambiguous, {found}" if layouts else f"no file of split {split!r}; {_what_is_there(source)}"
        _refuse(Cause.BAD_LAYOUT, source, detail)
    [(layout, paths)] = layouts.items()
    _check_shards(source, paths)
    if layout == f"*/{split}":
        folders = {path.parent for path in source.glob("*/*") if path.is_file() and path.name.endswith(SUFFIXES)}
        for folder in sorted(folders - {path.parent for path in paths}):
            report.notes.append(f"{folder.name}/ has no file of split {split!r}")
    return [(path.relative_to(source).as_posix(), path) for path in paths]


def split_names(source: str | Path) -> list[str]:
    """The splits that the names of files in the folder `source` tell of, for messages."""
    found: set[str] = set()
    for path in (*Path(source).glob("*"), *Path(source).glob("*/*")):
        if path.is_file() and path.name.endswith(SUFFIXES) and not path.name.startswith("."):
            found.add(_split_of(_stem(path)))
    return sorted(found)


def _what_is_there(source: Path) -> str:
    present = ", ".join(sorted(path.name + "/" * path.is_dir() for path in source.iterdir())[:12]) or "nothing"
    splits = split_names(source)[:12]
    choose = f"; choose among the splits {', '.join(splits)} with --data.train-split and --data.test-split" if splits else ""
    return f"the folder holds {present}{choose}"


def _of_the_hub(source: Path) -> str:
    looks_local = source.parent.is_dir() or source.parent.name in ("data", "runs")
    if looks_local or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(source)):
        return ""
    folder = f"data/{source.name}"
    return (
        f"; a data set of the Hugging Face Hub is downloaded first: hf download {source} --repo-type dataset --local-dir "
        f"{folder}, then --data.path {folder}"
    )


def _layouts(source: Path, split: str) -> dict[str, list[Path]]:
    def is_shard(path: Path) -> bool:
        return _stem(path) != split == _split_of(_stem(path))

    files = [path for path in source.glob("*") if path.is_file()], [path for path in source.glob("*/*") if path.is_file()]
    top, below = ([path for path in paths if path.name.endswith(SUFFIXES)] for paths in files)
    layouts = {
        split: [path for path in top if _stem(path) == split],
        f"{split}/*": [path for path in below if path.parent.name == split],
        f"{split}-*-of-*": [path for path in top if is_shard(path)],
        f"*/{split}": [path for path in below if _stem(path) == split and path.parent.name != split],
    }
    # Each folder on its own: those of two configurations of a data set must not be mixed.
    for path in below:
        if path.parent.name != split and is_shard(path):
            layouts.setdefault(f"{path.parent.name}/{split}-*-of-*", []).append(path)
    return {layout: sorted(paths) for layout, paths in layouts.items() if paths}


def _stem(path: Path) -> str:
    for suffix in sorted(SUFFIXES, key=len, reverse=True):
        if path.name.endswith(suffix):
            return path.name.removesuffix(suffix)
    _refuse(Cause.BAD_LAYOUT, path, f"not one of {', '.join(SUFFIXES)}")


def _split_of(stem: str) -> str:
    """The split that a file tells of: a shard is a part of its split, never a split of its own."""
    shard = _SHARD.fullmatch(stem)
    return shard["split"] if shard else stem


def _check_shards(source: Path, paths: list[Path]) -> None:
    seen: dict[tuple[Path, str], Path] = {}
    for path in paths:
        shard = _SHARD.fullmatch(_stem(path))
        twin = seen.setdefault((path.parent, _stem(path).removesuffix(shard[4] or "") if shard else _stem(path)), path)
        if twin is not path:
            _refuse(Cause.BAD_LAYOUT, source, f"{twin.name} and {path.name} are the same file twice; remove one")
    numbered = [shard for path in paths if (shard := _SHARD.fullmatch(_stem(path)))]
    if numbered:
        missing = sorted(set(range(int(numbered[0]["count"]))) - {int(shard["number"]) for shard in numbered})
        if missing or len({shard["count"] for shard in numbered}) != 1:
            _refuse(
                Cause.BAD_LAYOUT,
                source,
                f"shards {missing} of {numbered[0]['count']} are missing, or two sets of shards are mixed",
            )


def tfds_folders(source: Path) -> list[Path]:
    """The tfds data sets at or up to two levels below `source`: folders with a `dataset_info.json` and a `features.json`."""
    found = (path.parent for pattern in ("", "*/", "*/*/") for path in source.glob(pattern + "dataset_info.json"))
    return sorted(folder for folder in found if (folder / "features.json").is_file())


def read_rows(name: str, path: Path, *, report: DataReport) -> Iterator[tuple[str, Row | BadRow]]:
    """The rows of one file as `(where, row)`, `where` being "name:line" counted from 1; notes and digest go to the report.

    Raises `DataError` for a git-lfs pointer, a damaged or mislabelled file, and a file without a single row.
    """
    check_head(name, path)
    rows = 0
    reader = _parquet_rows(name, path) if name.endswith(".parquet") else _json_rows(name, path, report=report)
    for rows, row in enumerate(reader, 1):  # noqa: B007 (read after the loop)
        report.rows += 1
        yield row
    if rows == 0:
        _refuse(Cause.NO_ROWS, name, "the file has no rows")
    report.files.append(fingerprint(name, path))


def fingerprint(name: str, path: Path) -> dict[str, Any]:
    """How a report names a file: {"path", "bytes", "sha256"}."""
    with path.open("rb") as file:
        return {"path": name, "bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def check_head(name: str, path: Path) -> None:
    """Raises `DataError` for a file that its first bytes show to be a git-lfs pointer or not what its name says."""
    with path.open("rb") as file:
        head = file.read(len(_LFS))
    if head.startswith(_LFS):
        _refuse(Cause.GIT_LFS_POINTER, name, "a git-lfs pointer, not the data; fetch it with `git lfs pull`")
    if name.endswith(".gz") != head.startswith(_GZIP):
        _refuse(Cause.BAD_GZIP, name, "named .gz, but not gzip" if name.endswith(".gz") else "gzip, but not named .gz")
    if name.endswith(".parquet") != head.startswith(_PARQUET):
        _refuse(Cause.BAD_PARQUET, name, "named .parquet and is not, or the other way round")
    if name.endswith(".json") and head.lstrip().startswith(b"["):
        _refuse(Cause.BAD_LAYOUT, name, "one JSON array; write one object per line (JSON Lines)")


def _json_rows(name: str, path: Path, *, report: DataReport) -> Iterator[tuple[str, Row | BadRow]]:
    blank, number = 0, 0
    try:
        # Bytes, because a text file would also break lines at U+2028 and friends, which may stand inside a JSON string.
        with gzip.open(path, "rb") if name.endswith(".gz") else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if number == 1 and line.startswith(_BOM):
                    report.notes.append(f"{name}: byte order mark skipped")
                    line = line[len(_BOM) :]
                if line.strip():
                    yield f"{name}:{number}", _parse(line)
                else:
                    blank += 1
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        _refuse(Cause.BAD_GZIP, f"{name}:{number + 1}", f"the gzip stream is damaged or cut off here: {error}")
    if blank:
        report.notes.append(f"{name}: {blank} blank lines skipped")


def _parse(line: bytes) -> Row | BadRow:
    def unique(items: list[tuple[str, Any]]) -> Row:
        keys = [key for key, _ in items]
        if len(set(keys)) != len(keys):
            raise BadRow(Cause.DUPLICATE_KEY, "the key occurs twice", field=next(key for key in keys if keys.count(key) > 1))
        return dict(items)

    def constant(literal: str) -> NoReturn:
        raise BadRow(Cause.NAN, f"{literal} is not a number")

    try:
        if (nul := line.find(b"\0")) >= 0:
            raise BadRow(Cause.NUL, f"NUL at byte {nul} of the line")
        row = json.loads(line.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
        if not isinstance(row, dict):
            raise BadRow(Cause.WRONG_TYPE, f"a JSON object is needed, this is {type(row).__name__}")
        return row
    except BadRow as problem:
        return problem
    except UnicodeDecodeError as error:
        return BadRow(Cause.INVALID_UTF8, f"byte {line[error.start]:#04x} at byte {error.start} of the line: {error.reason}")
    except (ValueError, RecursionError) as error:
        cut = "" if line.endswith(b"\n") else " (last line, without a newline: is the file cut off?)"
        return BadRow(Cause.INVALID_JSON, f"{error}{cut}")


def _parquet_rows(name: str, path: Path) -> Iterator[tuple[str, Row | BadRow]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as table:
            columns = table.schema_arrow.names
            for column in columns:
                if columns.count(column) > 1:
                    _refuse(Cause.DUPLICATE_KEY, name, f"two columns are named {column!r}")
            for batch in table.iter_batches(batch_size=1024):
                for index in range(batch.num_rows):
                    number += 1
                    yield f"{name}:{number}", _parquet_row(batch, index)
    except (pa.ArrowException, OSError) as error:
        _refuse(Cause.BAD_PARQUET, f"{name}:{number + 1}", f"the file is damaged or cut off: {error}")


def _parquet_row(batch: Any, index: int) -> Row | BadRow:
    row: Row = {}
    for column, values in zip(batch.schema.names, batch.columns, strict=True):
        try:
            row[column] = values[index].as_py()
        except UnicodeDecodeError as error:
            return BadRow(Cause.INVALID_UTF8, f"byte {error.start} of the text: {error.reason}", field=column)
    return row


def _refuse(cause: Cause, where: str | Path, detail: str) -> NoReturn:
    raise DataError(f"{where}: {cause}: {detail}", causes=[cause])
