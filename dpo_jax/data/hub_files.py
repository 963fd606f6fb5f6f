"""Hugging Face Hub data sets by name: downloads the files of one split, at one commit, to the Hub's cache.

Only the files of the split are fetched. For a repository without JSON Lines or parquet (a loading script, CSV, ...) the Hub's
own parquet conversion is read (branch `refs/convert/parquet`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from dpo_jax.data import csv_rows
from dpo_jax.data import files as data_files
from dpo_jax.data.splits import CUT, find_names, listed, splits_of
from dpo_jax.models.folder import is_hub_id

CONVERTED = "refs/convert/parquet"
# CSV files are read converted to parquet, where columns have types; beside other data they often are statistics.
SUFFIXES = tuple(suffix for suffix in data_files.SUFFIXES if suffix not in csv_rows.SUFFIXES)
_DESCRIBES = {"dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json", "features.json"}
_COMMIT = re.compile("[0-9a-f]{40}")
_SECONDS = 20.0  # timeout for listing the files


class HubError(Exception):
    """A Hub data set is not available. The message names it and the remedy."""


def is_dataset_id(path: str | Path) -> bool:
    """Whether `path` looks like "organization/name" on the Hub and is no local file or folder.

    A name inside an existing local folder ("data/hh" if there is `data/`) is a missing file instead.
    """
    folder = Path(path).expanduser().parent
    here = folder.is_dir() or folder.name in ("data", "runs")
    return not here and is_hub_id(path) and "@" not in str(path)


@dataclasses.dataclass(frozen=True)
class HubData:
    """The data files of a repository at one commit, as listed by `open_dataset`."""

    name: str  # "organization/name"
    revision: str  # the commit, or without a network its name in the cache
    config: str  # the folder of the repository with the files; "": the whole repository
    sizes: Mapping[str, int | None]  # bytes of each data file, by path relative to `config`
    asked: str | None = None  # the requested branch or tag, by which the cache finds the commit without a network
    note: str | None = None  # tells the user where the files come from, if not from the usual place

    def splits(self) -> list[str]:
        """The splits found in the file names."""
        return splits_of(PurePosixPath(name) for name in self.sizes)

    def has_split(self, split: str) -> bool:
        return bool(find_names([PurePosixPath(name) for name in self.sizes], split))

    def check_split(self, split: str) -> None:
        """Raises `HubError` unless exactly one folder has the split."""
        self._files(split)

    def bytes_of(self, split: str) -> int:
        """The most bytes that `fetch` downloads; 0 if not known."""
        return sum(self.sizes[name] or 0 for name in self._files(split))

    def fetch(self, split: str, *, progress: Callable[[int], None] = lambda count: None) -> tuple[Path, str]:
        """The folder with the files of `split`, and the commit.

        `progress(n)` is called for every n bytes received. Raises `HubError`.
        """
        from huggingface_hub import snapshot_download

        prefix = f"{self.config}/" if self.config else ""
        wanted = [glob.escape(f"{prefix}{name}") for name in self._files(split)]
        with _explained(self.name, self.revision):
            options: dict[str, Any] = {"allow_patterns": wanted, "tqdm_class": _counting(progress)}
            folder = Path(snapshot_download(self.name, repo_type="dataset", revision=self.asked, **options))
            if _COMMIT.fullmatch(self.revision) and folder.name != self.revision:  # the branch has moved in the meantime
                folder = Path(snapshot_download(self.name, repo_type="dataset", revision=self.revision, **options))
        return folder / self.config, folder.name

    def _files(self, split: str) -> list[str]:
        layouts = find_names([PurePosixPath(name) for name in self.sizes], split)
        if not layouts:
            there = f"; it has {listed(self.splits())}: choose with --data.train-split and --data.test-split"
            there += f", or {CUT}" if split != "train" else ""
            raise HubError(f"{self.name}: no file of split {split!r}{there if self.sizes else ''}")
        if len(layouts) > 1:
            folders = sorted({str(path.parent) for paths in layouts.values() for path in paths})
            raise HubError(
                f"{self.name}: several folders have a split {split!r}: {listed(folders)}; choose one with --data.config"
            )
        return [str(path) for paths in layouts.values() for path in paths]


def open_dataset(name: str, *, revision: str | None = None, config: str | None = None) -> HubData:
    """List the data files of a repository at `revision` (a branch, tag or commit), in the folder `config` or `data/config`.

    If there are none and no `revision` is given, lists `refs/convert/parquet`, where `config` is a configuration of the data
    set. Without a network, the cache is used. Raises `HubError`.

    >>> open_dataset("HuggingFaceH4/ultrafeedback_binarized").splits()  # doctest: +SKIP
    ['test_gen', 'test_prefs', 'test_sft', 'train_gen', 'train_prefs', 'train_sft']
    """
    commit, sizes, note = _list_files(name, revision)
    for folder in (config, f"data/{config}") if config else (_only_config(name, sizes),):
        if found := _within(sizes, folder):
            return HubData(name, commit, folder, found, revision, note)
    lacks = f"{name}: no {', '.join(SUFFIXES)} file" + (f" in a folder {config}" if config else "")
    if revision is not None:
        raise HubError(f"{lacks} at revision {revision}; leave data.revision out to read what the Hub converted ({CONVERTED})")
    try:
        commit, sizes, _ = _list_files(name, CONVERTED)
    except HubError as error:
        raise HubError(f"{lacks}, and no parquet files that the Hub converted ({CONVERTED}): {error}") from error
    folder = config or _only_config(name, sizes)
    if not (found := _within(sizes, folder)):
        raise HubError(
            f"{lacks}; converted to parquet it has the configurations {listed(_configs(sizes))}: choose with --data.config"
        )
    note = f"{lacks}, so parquet files that the Hub converted are read ({CONVERTED}, {folder})"
    return HubData(name, commit, folder, found, CONVERTED, note)


def _configs(sizes: Mapping[str, int | None]) -> list[str]:
    """The configurations of a repository of the form `{config}/{split}/*`; [] for any other form."""
    found = _within(sizes, "")
    return sorted({path.partition("/")[0] for path in found}) if all(path.count("/") > 1 for path in found) else []


def _only_config(name: str, sizes: Mapping[str, int | None]) -> str:
    """The folder of the only configuration; "", the whole repository, if it has none. Raises `HubError` for several.

    The rule does not depend on the branch: later commands read the Hub's conversion by its commit.
    """
    configs = _configs(sizes)
    if len(configs) > 1:
        raise HubError(f"{name}: it has the configurations {listed(configs)}: choose with --data.config")
    return configs[0] if configs else ""


def _within(sizes: Mapping[str, int | None], folder: str) -> dict[str, int | None]:
    """The data files in a folder, by path relative to it."""
    prefix = f"{folder}/" if folder else ""
    inside = {path.removeprefix(prefix): size for path, size in sizes.items() if path.startswith(prefix)}
    return {
        path: size for path, size in inside.items() if path.endswith(SUFFIXES) and PurePosixPath(path).name not in _DESCRIBES
    }


def _list_files(name: str, revision: str | None) -> tuple[str, Mapping[str, int | None], str | None]:
    """(commit, bytes of each file, a note) of a revision; without a network, as listed at download time."""
    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    note = None
    with _explained(name, revision):
        try:
            found: Any = huggingface_hub.HfApi().repo_info(
                name, revision=revision, files_metadata=True, timeout=_SECONDS, repo_type="dataset"
            )
            files, commit = {file.rfilename: file.size for file in found.siblings or ()}, str(found.sha)
        except (RepositoryNotFoundError, RevisionNotFoundError):
            raise
        except Exception as error:  # a network error: the underlying HTTP library raises its own types
            try:
                cached = huggingface_hub.get_cached_repo_tree(name, revision=revision, repo_type="dataset")
            except Exception:
                raise error from None
            files, commit = {file.path: file.size for file in cached}, revision or "main"
            note = f"{name}: the Hub could not be reached ({type(error).__name__}); the cached copy is read"
    unsafe = [path for path in files if path.startswith("/") or ".." in PurePosixPath(path).parts]
    if unsafe:
        raise HubError(f"{name}: holds a file {unsafe[0]!r}, which lies outside of it")
    return commit, files, note


@contextlib.contextmanager
def _explained(name: str, revision: str | None) -> Iterator[None]:
    """Turn exceptions of the Hub client into a `HubError` with a remedy."""
    from huggingface_hub import errors

    token = "`hf auth login`, or the variable HF_TOKEN"
    try:
        yield
    except HubError:
        raise
    except errors.GatedRepoError as error:
        page = f"https://huggingface.co/datasets/{name}"
        raise HubError(f"{name}: gated: accept its terms at {page}, and log in with {token}") from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(f"{name}: no file or folder here, and no data set of the Hub; if it is private: {token}") from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"{name}: has no revision {revision or 'main'}; use a branch, tag or commit of the data set") from error
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        offline = isinstance(error, errors.OfflineModeIsEnabled) or os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0")
        why = "HF_HUB_OFFLINE forbids asking the Hub" if offline else f"the Hub does not answer ({_short(error)})"
        raise HubError(f"{name}: no file or folder here, and {why}; {_by_hand(name)}") from error
    except Exception as error:
        raise HubError(f"{name}: could not be fetched from the Hub: {_short(error)}; {_by_hand(name)}") from error


def _by_hand(name: str) -> str:
    folder = f"data/{name.rpartition('/')[2]}"
    return (
        f"on a machine with a network: hf download {name} --repo-type dataset --local-dir {folder}, then --data.path {folder}"
    )


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}{'...' if len(text) > 200 else ''}"


def _counting(progress: Callable[[int], None]) -> type:
    """A silent progress bar for the Hub client that reports bytes to `progress`."""
    from huggingface_hub.utils import tqdm

    class Counting(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            # One bar counts files; with Xet storage another counts network traffic, which is compressed or partial.
            self._bytes = options.get("unit") == "B" and not str(options.get("name") or "").endswith(".transfer")
            super().__init__(*args, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            if self._bytes:
                progress(int(n or 0))
            return super().update(n)

    return Counting
