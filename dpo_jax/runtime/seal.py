"""Seals: lists of the files in a folder, which reveal changed, missing and extra files, even those that a restore never reads.

A seal is the file `files.json` in the folder: {"files": {path: {"bytes": size, "sha256": of the content}}, "digest": of that}.
For files above `HASHED_BYTES` it has only the size: array data are not read again for the seal, because every array has its
own digest. A flipped bit in such a file is therefore found if it is in an array; the bytes between arrays are never read.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from etils import epath

from dpo_jax.writing import naming

SEAL = "files.json"
HASHED_BYTES = 16 * 2**20


def write_seal(folder: epath.Path) -> None:
    """Seal all files now in `folder`, or leave it without a seal on failure."""
    files = _describe(folder)
    write_whole(folder / SEAL, json.dumps({"files": files, "digest": digest(files)}, indent=1))


def is_sealed(folder: epath.Path) -> bool:
    return (folder / SEAL).exists()


def check_seal(folder: epath.Path) -> None:
    """Raises ValueError, naming a file, if `folder` has changed since it was sealed. Reads small files, lists the others."""
    if not is_sealed(folder):
        raise ValueError(f"{SEAL} is missing")
    seal = json.loads((folder / SEAL).read_text())
    sealed = seal["files"]
    if seal["digest"] != digest(sealed):
        raise ValueError(f"{SEAL} differs from its digest")
    found = _describe(folder)
    for name in sorted({*sealed, *found}):
        if name not in found:
            raise ValueError(f"the file {name} is missing")
        if name not in sealed:
            raise ValueError(f"the file {name} does not belong here")
        if sealed[name] != found[name]:
            raise ValueError(f"the file {name} was changed")


def digest(content: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON object, independent of key order."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_whole(path: epath.Path, text: str) -> None:
    """Write a file atomically, on a disk or in a bucket."""
    if is_remote(path):
        path.write_text(text)  # an object appears only when complete
        return
    temporary = path.with_name(f".{path.name}")
    with naming(path), temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def is_remote(path: object) -> bool:
    """Whether this is a remote path such as `gs://...`."""
    return "://" in str(path)


def _describe(folder: epath.Path) -> dict[str, Any]:
    own = {SEAL, f".{SEAL}"}  # the second is left by a killed attempt
    files = {name: path for name, path in _walk(folder, "") if name not in own}

    def describe(path: epath.Path) -> dict[str, Any]:
        size = path.stat().length
        return {"bytes": size} | ({"sha256": hashlib.sha256(path.read_bytes()).hexdigest()} if size <= HASHED_BYTES else {})

    with ThreadPoolExecutor(16) as pool:  # a bucket is slow, but serves many requests at once
        return dict(zip(files, pool.map(describe, files.values()), strict=True))


def _walk(folder: epath.Path, prefix: str) -> list[tuple[str, epath.Path]]:
    # Not Path.walk: in a bucket it yields folders without gs://.
    found = []
    for path in folder.iterdir():
        name = f"{prefix}{path.name}"
        found += _walk(path, f"{name}/") if path.is_dir() else [(name, path)]
    return found
