"""Policies that became the reference of an online run, kept as model folders for the log-probabilities of later rounds."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from dpo_jax.runtime.hosts import barrier, is_first, run_on_first
from dpo_jax.runtime.rundir import write_json
from dpo_jax.shapes import check_shape
from dpo_jax.types import Variables
from dpo_jax.untrusted import Unreadable, read_object

KEPT = 2  # a damaged checkpoint can send a run back to before the last change of the reference


class KeptReferences:
    """References in `folder`: one for each round at whose beginning the policy became the reference.

    `save(path, variables)` writes a model folder; `load(path) -> (variables, digest)` reads one onto the devices. A policy is
    always used as read back from disk, so that a resumed run has the same numbers. Several hosts share `folder` and all make
    the same calls: the first one writes in `save`, and all of them read.
    """

    def __init__(
        self, folder: Path, *, save: Callable[[Path, Variables], object], load: Callable[[Path], tuple[Variables, str]]
    ) -> None:
        self.folder, self._save, self._load = folder, save, load
        self._current: tuple[int, Variables] | None = None

    def has(self, number: int, weights: str) -> bool:
        """Whether the policy of round `number`, whose digest was `weights`, is kept."""
        found = self._record(number)
        return found is not None and found["weights"] == weights

    def digest(self, number: int) -> str:
        """The digest of the reference of round `number`; empty while it is not kept."""
        found = self._record(number)
        return "" if found is None else found["weights"]

    def keep(self, number: int, variables: Variables, weights: str) -> None:
        """Saves the policy of round `number`, unless it is there. Deletes older ones except the last."""
        if not self.has(number, weights):
            path = self._path(number)
            if is_first():
                self._file(number).unlink(missing_ok=True)
            self._current = None
            self._save(path, variables)
            barrier("a kept reference")  # until the first host has written it
            variables, digest = self._load(path)
            self._current = number, variables
            if is_first():
                write_json(self._file(number), {"weights": weights, "digest": digest})
        if is_first():
            self._forget(number)

    def _forget(self, number: int) -> None:
        kept = sorted(int(file.stem.split("-")[1]) for file in self.folder.glob("round-*.json"))
        for old in [one for one in kept if one <= number][:-KEPT]:
            self._file(old).unlink()
            shutil.rmtree(self._path(old), ignore_errors=True)

    def load(self, number: int) -> Variables:
        """The reference of round `number`, on the devices. Raises `Unreadable` if it is missing or damaged."""
        if self._current is None or self._current[0] != number:
            self._current = None  # frees the old one first: two need not fit in memory
            record, remedy = self._record(number), "restore it, or choose another run.dir"
            if record is None:
                raise Unreadable(f"{self._path(number)}: the reference of these rounds is gone; {remedy}")
            variables, digest = self._load(self._path(number))
            if digest != record["digest"]:
                raise Unreadable(f"{self._path(number)}: holds different weights from those kept; {remedy}")
            self._current = number, variables
        return self._current[1]

    def _record(self, number: int) -> dict[str, str] | None:
        def read() -> dict[str, str] | None:
            try:
                return check_shape(read_object(self._file(number)), {"weights": str, "digest": str}, str(self._file(number)))
            except (OSError, Unreadable):
                return None

        return run_on_first(read)

    def _path(self, number: int) -> Path:
        return self.folder / f"round-{number:03}"

    def _file(self, number: int) -> Path:
        return self.folder / f"round-{number:03}.json"
