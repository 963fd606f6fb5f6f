"""Which files make up a split of a data set."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from pathlib import Path

from dpo_jax.data.files import SUFFIXES
from dpo_jax.data.pairs import Cause, DataReport, readable_name, refuse
from dpo_jax.untrusted import special_kind

_LISTED = 12  # names in a message
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
            refuse(Cause.BAD_LAYOUT, source, f"one file holds one split, and its name does not say {split!r}; give a folder")
        _stem(source)
        return [(readable_name(source.name), source)]
    if source.exists() and not source.is_dir():
        refuse(
            Cause.BAD_LAYOUT, source, f"a file or a folder is needed, this is {special_kind(source)}; write it to a file first"
        )
    if not source.is_dir():
        refuse(Cause.BAD_LAYOUT, source, f"no such file or folder{_of_the_hub(source)}")
    layouts = _layouts(source, split)
    if len(layouts) != 1:
        found = "; ".join(
            f"{layout}: {_listed(str(path.relative_to(source)) for path in paths)}" for layout, paths in layouts.items()
        )
        detail = f"ambiguous, {found}" if layouts else f"no file of split {split!r}; {_what_is_there(source, split)}"
        refuse(Cause.BAD_LAYOUT, source, detail)
    [(layout, paths)] = layouts.items()
    _check_shards(source, paths)
    if layout == f"*/{split}":
        folders = {path.parent for path in source.glob("*/*") if path.is_file() and path.name.endswith(SUFFIXES)}
        for folder in sorted(folders - {path.parent for path in paths}):
            report.notes.append(f"{readable_name(folder.name)}/ has no file of split {split!r}")
    return [(readable_name(path.relative_to(source)), path) for path in paths]


def split_names(source: str | Path) -> list[str]:
    """The splits that the names of files in the folder `source` tell of, for messages."""
    found: set[str] = set()
    for path in (*Path(source).glob("*"), *Path(source).glob("*/*")):
        if path.is_file() and path.name.endswith(SUFFIXES) and not path.name.startswith("."):
            found.add(_split_of(_stem(path)))
    return sorted(found)


def _what_is_there(source: Path, split: str) -> str:
    present = _listed(sorted(path.name + "/" * path.is_dir() for path in source.iterdir())) or "nothing"
    splits = split_names(source)
    choose = f"; choose among the splits {_listed(splits)} with --data.train-split and --data.test-split" if splits else ""
    foreign = sorted(path.name for path in source.glob("*.*") if path.is_file() and path.name.partition(".")[0] == split)
    convert = f"; {_listed(foreign)} is not read: convert it to JSON Lines (.jsonl) or .parquet" if foreign else ""
    below = sorted({path.parent for path in source.glob("*/*/*") if path.parent.name == split and path.name.endswith(SUFFIXES)})
    deeper = f"; the split is in {_listed(map(str, below))}: give the folder {below[0].parent}" if below else ""
    return f"the folder holds {present}{convert}{deeper}{choose}"


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


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
    refuse(Cause.BAD_LAYOUT, path, f"not one of {', '.join(SUFFIXES)}")


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
            refuse(Cause.BAD_LAYOUT, source, f"{twin.name} and {path.name} are the same file twice; remove one")
    numbered = [shard for path in paths if (shard := _SHARD.fullmatch(_stem(path)))]
    if numbered:
        there, count = {int(shard["number"]) for shard in numbered}, numbered[0]["count"]
        # The count is only what a name says: it may be huge.
        missing = list(itertools.islice((number for number in range(int(count)) if number not in there), _LISTED))
        if missing or len({shard["count"] for shard in numbered}) != 1:
            refuse(Cause.BAD_LAYOUT, source, f"shards {missing} of {count} are missing, or two sets of shards are mixed")
