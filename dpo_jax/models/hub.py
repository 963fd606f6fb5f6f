"""Models by name: a folder, or a Hub id "organization/name", with "@revision" where a certain one is meant."""

from __future__ import annotations

import re
from pathlib import Path

_WANTED = ["*.json", "*.safetensors", "tokenizer*", "*.txt", "*.jinja", "*.model", "README.md"]


def is_hub_id(path: str | Path) -> bool:
    """Whether `path` looks like "organization/name" or "organization/name@revision"."""
    return re.fullmatch(r"\w[\w.-]*/[\w.-]+(@[\w./-]+)?", str(path)) is not None


def resolve(path: str | Path) -> Path:
    """The folder of a model: `path` itself, or a download of a Hub id (safetensors, JSON, tokenizer files and the card).

    Raises FileNotFoundError if it is neither a folder nor an id that can be fetched, NotADirectoryError for a file.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise NotADirectoryError(f"{path} is a file; give the model's folder, which holds config.json and *.safetensors")
    if not is_hub_id(path):
        raise FileNotFoundError(f"no model folder {path}, and it does not look like a Hub id (organization/name)")
    try:
        return _snapshot(str(path))
    except Exception as error:  # the hub client raises its own, requests' and OSError's kinds
        raise FileNotFoundError(f"{path} is no folder here and could not be fetched from the Hub: {error}") from error


def cached_revision(path: str) -> str | None:
    """The commit of a Hub id that was downloaded to this machine, or None. Uses no network."""
    try:
        return _snapshot(path, local_files_only=True).name
    except Exception:  # not downloaded, or no cache at all
        return None


def _snapshot(path: str, *, local_files_only: bool = False) -> Path:
    from huggingface_hub import snapshot_download

    name, _, revision = path.partition("@")
    options = {"allow_patterns": _WANTED, "local_files_only": local_files_only}
    return Path(snapshot_download(name, revision=revision or None, **options))
