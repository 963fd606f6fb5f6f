"""Data sets of the Hugging Face Hub by name: the files of one split, downloaded to the Hub's cache at one commit.

Only the files of the split are fetched. A repository without JSON Lines or parquet (a loading script, CSV, ...) is read from
the parquet files into which the Hub converts every public data set (branch `refs/convert/parquet`).
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

from dpo_jax.data.files import SUFFIXES
from dpo_jax.data.splits import find_names, listed, splits_of
from dpo_jax.models.folder import is_hub_id

CONVERTED = "refs/convert/parquet"
_DESCRIBES = {"dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json", "features.json"}
_COMMIT = re.compile("[0-9a-f]{40}")
_SECONDS = 20.0  # for the answer to what files there are


class HubError(Exception):
    """A data set of the Hub cannot be had. The message names it and the remedy."""


def is_dataset_id(path: str | Path) -> bool:
    """Whether `path` is no file or folder here and looks like "organization/name" on the Hub.

    A name in a folder that is here ("data/hh" beside `data/`) is a file that is missing.
    """
    folder = Path(path).expanduser().parent
    here = folder.is_dir() or folder.name in ("data", "runs")
    return not here and is_hub_id(path) and "@" not in str(path)


@dataclasses.dataclass(frozen=True)
class HubData:
    """What a repository holds at one commit. `open_dataset` makes it."""

    name: str  # "organization/name"
    revision: str  # the commit, or where there is no network the name of it that the cache knows
    config: str  # the folder of the repository with the files; "" for all of it
    sizes: Mapping[str, int | None]  # bytes of each data file, by its path in `config`
    asked: str | None = None  # the name of the commit: by a branch or tag the cache finds it where there is no network
    note: str | None = None  # for people: where the files come from, if that is not as usual

    def splits(self) -> list[str]:
        """The splits that the names of the files tell of."""
        return splits_of(PurePosixPath(name) for name in self.sizes)

    def has_split(self, split: str) -> bool:
        return bool(find_names([PurePosixPath(name) for name in self.sizes], split))

    def bytes_of(self, split: str) -> int:
        """How many bytes `fetch` downloads at most; 0 where that is not known."""
        return sum(self.sizes[name] or 0 for name in self._files(split))

    def fetch(self, split: str, *, progress: Callable[[int], None] = lambda count: None) -> tuple[Path, str]:
        """The folder with the files of `split`, and the commit. `progress` is told of each number of bytes that arrives.

        Raises `HubError`.
        """
        from huggingface_hub import snapshot_download

        prefix = f"{self.config}/" if self.config else ""
        wanted = [glob.escape(f"{prefix}{name}") for name in self._files(split)]
        with _explained(self.name, self.revision):
            options: dict[str, Any] = {"allow_patterns": wanted, "tqdm_class": _counting(progress)}
            folder = Path(snapshot_download(self.name, repo_type="dataset", revision=self.asked, **options))
            if _COMMIT.fullmatch(self.revision) and folder.name != self.revision:  # the branch has moved since
                folder = Path(snapshot_download(self.name, repo_type="dataset", revision=self.revision, **options))
        return folder / self.config, folder.name

    def _files(self, split: str) -> list[str]:
        layouts = find_names([PurePosixPath(name) for name in self.sizes], split)
        if not layouts:
            there = f"; it has {listed(self.splits())}: choose with --data.train-split and --data.test-split"
            raise HubError(f"{self.name}: no file of split {split!r}{there if self.sizes else ''}")
        if len(layouts) > 1:
            folders = sorted({str(path.parent) for paths in layouts.values() for path in paths})
            raise HubError(
                f"{self.name}: several folders have a split {split!r}: {listed(folders)}; choose one with --data.config"
            )
        return [str(path) for paths in layouts.values() for path in paths]


def open_dataset(name: str, *, revision: str | None = None, config: str | None = None) -> HubData:
    """Lists the data files of a repository: of `revision` (a branch, tag or commit), in the folder `config`, or `data/config`.

    Where it has none, and no `revision` is named, those of `refs/convert/parquet`, where `config` is a configuration of the
    data set. Without a network the cache is asked. Raises `HubError`.

    >>> open_dataset("HuggingFaceH4/ultrafeedback_binarized").splits()  # doctest: +SKIP
    ['test_gen', 'test_prefs', 'test_sft', 'train_gen', 'train_prefs', 'train_sft']
    """
    commit, sizes, note = _list_files(name, revision)
    for folder in (config, f"data/{config}") if config else ("",):
        if found := _within(sizes, folder):
            return HubData(name, commit, folder, found, revision, note)
    lacks = f"{name}: no {', '.join(SUFFIXES)} file" + (f" in a folder {config}" if config else "")
    if revision is not None:
        raise HubError(f"{lacks} at revision {revision}; leave data.revision out to read what the Hub converted ({CONVERTED})")
    try:
        commit, sizes, _ = _list_files(name, CONVERTED)
    except HubError as error:
        raise HubError(f"{lacks}, and no parquet files that the Hub converted ({CONVERTED}): {error}") from error
    configs = sorted({path.partition("/")[0] for path in sizes if path.count("/") > 1})
    if config is None and len(configs) == 1:
        config = configs[0]
    if config is None or not (found := _within(sizes, config)):
        raise HubError(f"{lacks}; converted to parquet it has the configurations {listed(configs)}: choose with --data.config")
    note = f"{lacks}, so parquet files that the Hub converted are read ({CONVERTED}, {config})"
    return HubData(name, commit, config, found, CONVERTED, note)


def _within(sizes: Mapping[str, int | None], folder: str) -> dict[str, int | None]:
    """The data files in a folder, by their paths in it."""
    prefix = f"{folder}/" if folder else ""
    inside = {path.removeprefix(prefix): size for path, size in sizes.items() if path.startswith(prefix)}
    return {
        path: size for path, size in inside.items() if path.endswith(SUFFIXES) and PurePosixPath(path).name not in _DESCRIBES
    }


def _list_files(name: str, revision: str | None) -> tuple[str, Mapping[str, int | None], str | None]:
    """(commit, bytes of each file, a note) of a revision; without a network what was listed when it was downloaded."""
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
        except Exception as error:  # of the network: the HTTP library below raises its own
            try:
                cached = huggingface_hub.get_cached_repo_tree(name, revision=revision, repo_type="dataset")
            except Exception:
                raise error from None
            files, commit = {file.path: file.size for file in cached}, revision or "main"
            note = f"{name}: the Hub was not asked ({type(error).__name__}); its copy in the cache is read"
    unsafe = [path for path in files if path.startswith("/") or ".." in PurePosixPath(path).parts]
    if unsafe:
        raise HubError(f"{name}: holds a file {unsafe[0]!r}, which lies outside of it")
    return commit, files, note


@contextlib.contextmanager
def _explained(name: str, revision: str | None) -> Iterator[None]:
    """Turns what the client of the Hub raises into a `HubError` with the remedy."""
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
        raise HubError(f"{name}: has no revision {revision or 'main'}; take a branch, tag or commit of the data set") from error
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        offline = isinstance(error, errors.OfflineModeIsEnabled) or os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0")
        why = "HF_HUB_OFFLINE forbids to ask the Hub" if offline else f"the Hub does not answer ({_short(error)})"
        raise HubError(f"{name}: no file or folder here, and {why}; {_by_hand(name)}") from error
    except Exception as error:
        raise HubError(f"{name}: could not be fetched from the Hub: {_short(error)}; {_by_hand(name)}") from error


def _by_hand(name: str) -> str:
    folder = f"data/{name.rpartition('/')[2]}"
    return f"where there is a network: hf download {name} --repo-type dataset --local-dir {folder}, then --data.path {folder}"


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}{'...' if len(text) > 200 else ''}"


def _counting(progress: Callable[[int], None]) -> type:
    """A progress bar of the Hub's client that shows nothing and tells `progress` of the bytes."""
    from huggingface_hub.utils import tqdm

    class Counting(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            # One bar counts files, and with Xet storage another what crosses the network: compressed, or parts of it.
            self._bytes = options.get("unit") == "B" and not str(options.get("name") or "").endswith(".transfer")
            super().__init__(*args, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            if self._bytes:
                progress(int(n or 0))
            return super().update(n)

    return Counting
