"""Folder of a round: its files are either finished or made again, and bound by digests to their settings and weights.

`stage.json` lists each finished file with its SHA-256, and what all of them depend on. Files it does not list are made again.
It is written last, so a kill may leave a file unlisted, but never a wrong file listed.

Several hosts all make the same calls. The first one reads and writes, and passes on what it has read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from dpo_jax.data.terminal import json_text
from dpo_jax.runtime.hosts import is_first, run_on_first
from dpo_jax.runtime.progress import SAY
from dpo_jax.runtime.rundir import write_json
from dpo_jax.shapes import Shape, check_shape
from dpo_jax.training.fingerprint import check_settings
from dpo_jax.untrusted import Unreadable, read_bytes, read_lines, read_object, regular
from dpo_jax.writing import write_whole

STAGE = "stage.json"
CONTENT = {"settings": {}, "weights": {str: str}, "files": {str: str}, "record": {}, "digest": str}


class Stage:
    """The stage in `folder`, new or continued. Its files depend on `settings` and `weights` (digests by name).

    Raises `RunMismatch`, naming the settings that differ, for a stage with other settings, because its labels may have been
    paid for. A stage with other weights is started again and reported to `say`: training with the same settings on other
    devices, for example, gives other weights. So is a stage with a damaged `stage.json`.
    """

    def __init__(
        self,
        folder: Path,
        *,
        settings: Mapping[str, Any],
        weights: Mapping[str, str],
        say: Callable[[str], None] = SAY,
    ) -> None:
        self.folder, self._say = folder, say
        self._settings = json.loads(json.dumps(dict(settings)))  # in the form they have after a round trip through the file
        self._weights = dict(weights)
        self._files: dict[str, str] = {}
        self._record: dict[str, Any] = {}
        found = run_on_first(lambda: read_stage(folder, say=say))
        if found is None:
            return
        check_settings(str(folder), found["settings"], self._settings)
        if differ := [name for name in self._weights if found["weights"].get(name) != self._weights[name]]:
            say(f"{folder}: made with other weights ({', '.join(differ)}); it is made again")
            return
        self._files, self._record = found["files"], found["record"]

    def has(self, name: str) -> bool:
        """Whether file `name` is finished and unchanged."""
        if name not in self._files:
            return False
        whole = run_on_first(lambda: self._is_whole(name))
        if not whole:
            self._say(f"{self.folder / name}: damaged or changed; it is made again")
        return whole

    def put(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Writes file `name`, one row per line, and lists it as finished."""
        content = "".join(json_text(dict(row)) + "\n" for row in rows).encode()
        if is_first():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(self.folder / name, content)
        self._files[name] = hashlib.sha256(content).hexdigest()
        self._write()

    def rows(self, name: str, shape: Shape) -> list[dict[str, Any]]:
        """The rows of file `name`, which must have passed `has`. Raises `Unreadable` for rows of another shape."""

        def read() -> list[dict[str, Any]]:
            found = read_lines(self.folder / name, lambda row: check_shape(row, shape, "no such row"))
            if found.damaged:
                raise Unreadable(f"{self.folder / name}: {found.words}")
            return found.rows

        return run_on_first(read)

    def finish(self, record: Mapping[str, Any]) -> None:
        """Marks the whole round as finished. `record`: JSON values about it."""
        self._record = dict(record)
        self._write()

    @property
    def finished(self) -> bool:
        return bool(self._record) and all(map(self.has, self._files))

    @property
    def record(self) -> Mapping[str, Any]:
        """The record given to `finish`; empty before."""
        return self._record

    def _is_whole(self, name: str) -> bool:
        try:
            return hashlib.sha256(read_bytes(regular(self.folder / name))).hexdigest() == self._files[name]
        except (OSError, Unreadable):
            return False

    def _write(self) -> None:
        if not is_first():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        content = {"settings": self._settings, "weights": self._weights, "files": self._files, "record": self._record}
        write_json(self.folder / STAGE, {**content, "digest": _digest(content)})


def read_stage(folder: Path, *, say: Callable[[str], None] = SAY) -> dict[str, Any] | None:
    """The content of the `stage.json` in `folder`; None if it is missing, or damaged (reported to `say`)."""
    try:
        found = check_shape(read_object(folder / STAGE), CONTENT, str(folder / STAGE))
        digest = found.pop("digest")
        if digest != _digest(found):
            raise Unreadable(f"{folder / STAGE}: differs from its digest")
        return found
    except FileNotFoundError:
        return None
    except Unreadable as error:
        say(f"{error}; the round is made again")
        return None


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
