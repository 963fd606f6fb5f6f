"""A model folder on this machine and its `config.json`. Needs no JAX, no weights and no network."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any


def is_hub_id(path: str | Path) -> bool:
    """Whether `path` looks like "organization/name" or "organization/name@revision"."""
    return re.fullmatch(r"\w[\w.-]*/[\w.-]+(@[\w./-]+)?", str(path)) is not None


def local_folder(path: str | Path) -> Path | None:
    """The folder `path`, or None for what looks like a Hub id ("organization/name"). Raises FileNotFoundError for neither."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise NotADirectoryError(f"{path} is a file; give the model's folder, which holds config.json and *.safetensors")
    if not is_hub_id(path):
        raise FileNotFoundError(f"no model folder {path}, and it does not look like a Hub id (organization/name)")
    return None


def read_config(folder: Path) -> dict[str, Any]:
    """The content of a folder's `config.json`. Raises FileNotFoundError or ValueError naming the file."""
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; a model folder holds config.json and *.safetensors")
    return read_object(file)


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ValueError naming the file for anything else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__} where a JSON object is expected")
    return content
