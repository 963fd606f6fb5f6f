"""Discovery of the files of a data set's split."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from pathlib import Path, PurePath

from dpo_jax.data.files import SUFFIXES
from dpo_jax.data.pairs import Cause, DataReport, readable_name, refuse
from dpo_jax.models.folder import is_hub_id
from dpo_jax.untrusted import special_kind

CUT = "hold out a part of the train split with --data.test-share 0.05"
_LISTED = 12  # names in a message
_DESCRIPTIONS = ("dataset_info.json", "state.json", "dataset_dict.json")  # of `datasets.save_to_disk`: no rows
_SEVERAL = "several files of one split go into a folder, such as {split}/, or into data.mix"
# "train-00000-of-00002", and as older versions of `datasets` pushed it to the Hub, "train-00000-of-00002-b21d99e2a8d3e3b0".
_SHARD = re.compile(r"(?P<split>.+)-(?P<number>\d+)-of-(?P<count>\d+)(-[0-9a-f]{16})?")


def find_files(source: str | Path, split: str, *, report: DataReport) -> list[tuple[str, Path]]:
    """The files of `split` under `source` as `(name, path)`, names relative to `source`, in the order of their names.

    A single file is used for the split "train" and for a split in its name; using it for another split would train and test on
    the same rows. In a folder, exactly one of these layouts may hold the split: `{split}.jsonl`, `{split}/*.jsonl`,
    `{split}-00000-of-00002.parquet` (a content hash may follow, and the files may lie one folder below, such as the `data/` of
    a repository of the Hugging Face Hub), `*/{split}.jsonl` (one folder per subset, as in Anthropic HH and SHP), each with any
    of `SUFFIXES`. Names that begin with a dot are skipped. Otherwise raises `DataError` saying what was found.
    """
    source = Path(source)
    if source.is_file():
        if not has_split(source, split):
            detail = f"one file holds one split, and its name does not say {split!r}; give a folder, or {CUT}"
            refuse(Cause.BAD_LAYOUT, source, detail)
        _stem(source)
        return [(readable_name(source.name), source)]
    if source.exists() and not source.is_dir():
        refuse(Cause.BAD_LAYOUT, source, f"expected a file or a folder, got {special_kind(source)}; write it to a file first")
    if not source.is_dir():
        several = "; " + _SEVERAL.format(split=split) if set("*?,") & set(source.name) else ""
        refuse(Cause.BAD_LAYOUT, source, f"no such file or folder{several or _of_the_hub(source)}")
    layouts = find_names(_names(source), split)
    if len(layouts) != 1:
        found = "; ".join(f"{layout}: {listed(str(path) for path in paths)}" for layout, paths in layouts.items())
        detail = f"ambiguous, {found}" if layouts else f"no file of split {split!r}; {_what_is_there(source, split)}"
        refuse(Cause.BAD_LAYOUT, source, detail)
    [(layout, found)] = layouts.items()
    paths = [source / path for path in found]
    _check_shards(source, paths)
    if layout == f"*/{split}":
        folders = {path.parent for path in source.glob("[!.]*/*") if path.is_file() and path.name.endswith(SUFFIXES)}
        for folder in sorted(folders - {path.parent for path in paths}):
            report.notes.append(f"{readable_name(folder.name)}/ has no file of split {split!r}")
    return [(readable_name(path.relative_to(source)), path) for path in paths]


def split_names(source: str | Path) -> list[str]:
    """The splits found in the file names of the folder `source`, for messages."""
    return splits_of(_names(Path(source)))


def splits_of(names: Iterable[PurePath]) -> list[str]:
    """The splits found in file names. A file that only has a number (0000.parquet) is a part of the split of its folder."""
    data = filter(_is_data, names)
    return sorted({path.parent.name if (stem := _stem(path)).isdigit() else _split_of(stem) for path in data} - {""})


def _what_is_there(source: Path, split: str) -> str:
    present = listed(sorted(path.name + "/" * path.is_dir() for path in source.iterdir())) or "nothing"
    splits = split_names(source)
    choose = f"; choose among the splits {listed(splits)} with --data.train-split and --data.test-split" if splits else ""
    choose += f", or {CUT}" if splits and split != "train" else ""
    choose += "; " + _SEVERAL.format(split=split) if len(splits) > 1 else ""
    foreign = sorted(path.name for path in source.glob("*.*") if path.is_file() and path.name.partition(".")[0] == split)
    convert = f"; {listed(foreign)} is not read: convert it to JSON Lines (.jsonl), .parquet or .csv" if foreign else ""
    convert = next(filter(None, (_unpacking(PurePath(name)) for name in foreign)), convert)
    below = sorted({path.parent for path in source.glob("*/*/*") if path.parent.name == split and path.name.endswith(SUFFIXES)})
    deeper = f"; the split is in {listed(map(str, below))}: give the folder {below[0].parent}" if below else ""
    if any(file for depth in ("*.arrow", "*/*.arrow") for file in source.glob(depth)):
        convert += (
            "; Arrow files of `save_to_disk` are not read: write each split as parquet with "
            "datasets.load_from_disk(FOLDER)[SPLIT].to_parquet(SPLIT + '.parquet')"
        )
    return f"the folder holds {present}{convert}{deeper}{choose}"


def listed(names: Iterable[str]) -> str:
    """Names for a message; only the first if there are many."""
    names = list(names)
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _of_the_hub(source: Path) -> str:
    if not is_hub_id(source) or source.parent.name in ("data", "runs"):
        return ""
    if source.parent.is_dir():
        return f"; there is a folder {source.parent}/ here, so that {source} is not taken for a data set of the Hub"
    return "; `dpo_jax.data.hub_files.open_dataset` reads data sets of the Hub"


def has_split(source: str | Path, split: str) -> bool:
    """Whether `find_files` finds files of `split` under `source`, in any layout."""
    source = Path(source)
    if source.is_file():
        return split == "train" or _says(source.name, split)
    return bool(find_names(_names(source), split))


def _says(name: str, split: str) -> bool:
    """Whether a file name has the split's name as whole words: "test" in "own_test.jsonl", but not in "latest.jsonl"."""
    return re.search(rf"(?<![0-9A-Za-z]){re.escape(split)}(?![0-9A-Za-z])", name) is not None


def _names(folder: Path) -> list[PurePath]:
    """The files in a folder and one level below, relative to it."""
    return [path.relative_to(folder) for pattern in ("*", "*/*") for path in folder.glob(pattern) if path.is_file()]


def _is_data(path: PurePath) -> bool:
    return path.name.endswith(SUFFIXES) and path.name not in _DESCRIPTIONS and not _is_hidden(path)


def _is_hidden(path: PurePath) -> bool:
    """Whether a name on the path begins with a dot: an unfinished file, an editor's copy, a folder such as .cache."""
    return any(part.startswith(".") for part in path.parts)


def find_names(names: Iterable[PurePath], split: str) -> dict[str, list[PurePath]]:
    """The layouts that hold `split` among files of these names, relative to one folder: layout -> its files, sorted."""

    def is_shard(path: PurePath) -> bool:
        return _stem(path) != split == _split_of(_stem(path))

    data = [*filter(_is_data, names)]
    top, below = ([path for path in data if len(path.parts) == depth] for depth in (1, 2))
    layouts = {
        split: [path for path in top if _stem(path) == split],
        f"{split}/*": [path for path in below if path.parent.name == split],
        f"{split}-*-of-*": [path for path in top if is_shard(path)],
        f"*/{split}": [path for path in below if _stem(path) == split and path.parent.name != split],
    }
    # Each folder separately: two configurations of a data set must not be mixed.
    for path in below:
        if path.parent.name != split and is_shard(path):
            layouts.setdefault(f"{path.parent.name}/{split}-*-of-*", []).append(path)
    return {layout: sorted(paths) for layout, paths in layouts.items() if paths}


def _stem(path: PurePath) -> str:
    for suffix in sorted(SUFFIXES, key=len, reverse=True):
        if path.name.endswith(suffix):
            return path.name.removesuffix(suffix)
    refuse(Cause.BAD_LAYOUT, path, f"not one of {', '.join(SUFFIXES)}{_unpacking(path)}")


def _unpacking(path: PurePath) -> str:
    """How to unpack a file of another compression, for a message; "" for other files."""
    commands = {".zst": "zstd -d", ".bz2": "bunzip2", ".xz": "unxz", ".zip": "unzip"}
    return f"; unpack it: {commands[path.suffix]} {path.name}" if path.suffix in commands else ""


def _split_of(stem: str) -> str:
    """The split named by a file stem; a shard belongs to its split."""
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
        # The count comes from a file name only, and may be huge.
        missing = list(itertools.islice((number for number in range(int(count)) if number not in there), _LISTED))
        if missing or len({shard["count"] for shard in numbered}) != 1:
            refuse(Cause.BAD_LAYOUT, source, f"shards {missing} of {count} are missing, or two sets of shards are mixed")
