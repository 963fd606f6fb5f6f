"""Metrics log `metrics.jsonl`, the record of a run. (`writers` copies it to TensorBoard and others.)

A row's `step` is the number of optimizer steps taken before it was measured. A training row `step: 7` is therefore the loss of
the eighth batch before its update, and an evaluation row `step: 7` is for those same parameters. The last entry of a line,
`crc32`, is the checksum of the others; `read_metrics` returns the rows without it.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from dpo_jax.shapes import MOST
from dpo_jax.untrusted import Lines, LongLine, Unreadable, lines_of, parse_object, regular
from dpo_jax.writing import naming, write_whole

logger = logging.getLogger(__name__)

Row = Mapping[str, float]


class Writer(Protocol):
    """A further destination of metrics. `resume` is called first, with the number of steps taken so far and the rows up to
    there.

    A writer's exceptions stop the training (`writers.Delivery` raises none). If the run ends with an error, the optional method
    `failed(error)` is called before `close`.
    """

    def resume(self, step: int, rows: Sequence[Row]) -> None: ...
    def write(self, row: Row) -> None: ...
    def close(self) -> None: ...


class MetricsLog:
    """Appends one JSON object per row to `path`. NaN and infinity, which JSON lacks, are written as null.

    Each line ends with `crc32` of the object without it, so that a line damaged later is not trusted.
    """

    def __init__(self, path: str | os.PathLike[str], *, writers: Sequence[Writer] = ()):
        self.path = Path(path)
        self._writers = writers
        if self.path.exists():
            regular(self.path)  # opening a pipe would block
        self._file = open(self.path, "ab")  # noqa: SIM115  closed by `close`

    def resume(self, step: int, *, evaluated: bool = True) -> None:
        """Drops the rows after `step` steps, so that the file has each step once. Called before the first `write`.

        Without `evaluated`, an evaluation after `step` steps is dropped too. A damaged line is dropped with a warning that
        names it. The original file is then kept in `quarantine/`, as before a run that starts over. Missing rows of earlier
        steps cause a warning.
        """
        found = _read(self.path)
        kept = [line for line in found.lines if line.row["step"] < step or (evaluated and _is_before(line.row, step))]
        if found.damaged:
            logger.warning("%s: %s; the file as it was is now %s", self.path, found.words, _set_aside(self.path))
        elif step == 0 and any(not is_evaluation(line.row) for line in found.lines):
            logger.warning("%s: the run starts over; the rows of the run before are now %s", self.path, _set_aside(self.path))
        if missing := step - len({line.row["step"] for line in kept if not is_evaluation(line.row)}):
            logger.warning("%s: rows of %d of the first %d steps are missing: curves lack them", self.path, missing, step)
        if found.damaged or kept != found.lines[: len(kept)] or not all(line.sealed for line in kept):
            self._file.close()
            write_whole(self.path, b"".join(_sealed(line.row) for line in kept))
            self._file = open(self.path, "ab")  # noqa: SIM115
        else:
            self._file.truncate(kept[-1].end if kept else 0)
        for writer in self._writers:
            writer.resume(step, [line.row for line in kept])

    def write(self, row: Row) -> None:
        """Append `row`: `step` and the metrics. Raises OSError, for example on a full disk."""
        finite = {name: value if math.isfinite(value) else None for name, value in row.items()}
        with naming(self.path):
            self._file.write(_sealed(finite))
            self._file.flush()
        for writer in self._writers:
            writer.write(row)

    def sync(self) -> None:
        """Returns once the rows written so far would survive a machine crash."""
        with naming(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self, error: BaseException | None = None) -> None:
        """`error`: the exception with which the run ends, for the writers."""
        try:
            with naming(self.path):
                self._file.close()  # raises for rows that did not fit on the disk
        except OSError as lost:
            error = error or lost
            raise
        finally:
            for writer in self._writers:
                if error is not None:
                    tell_failure(writer, error)
                writer.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.close(error)


def tell_failure(writer: Any, error: BaseException) -> None:
    """Calls `writer.failed(error)`, if there is such a method."""
    if (failed := getattr(writer, "failed", None)) is not None:
        failed(error)


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`, training (`loss`, ...) and evaluation (`eval/...`), in the order measured.

    Damaged lines are skipped with a warning.
    """
    found = read_metrics_lines(path)
    if found.damaged:
        logger.warning("%s: %s", path, found.words)
    return found.rows


def read_metrics_lines(path: str | os.PathLike[str]) -> Lines:
    """The rows as in `read_metrics`, and the problems of the other lines."""
    found = _read(Path(path))
    return Lines([line.row for line in found.lines], found.damaged)


def is_evaluation(row: Mapping[str, Any]) -> bool:
    return any(name.startswith("eval/") for name in row)


def _is_before(row: Row, step: int) -> bool:
    """Whether a row was measured no later than after `step` steps."""
    return row["step"] < step or (row["step"] == step and is_evaluation(row))


class _Line(NamedTuple):
    end: int  # bytes of the file up to the end of this line
    row: dict[str, Any]
    sealed: bool


class _Found(NamedTuple):
    lines: list[_Line]
    damaged: list[str]

    @property
    def words(self) -> str:
        return Lines([line.row for line in self.lines], self.damaged).words


_SEAL = re.compile(rb', "crc32": "([0-9a-f]{8})"\}\n\Z')


def _sealed(row: Mapping[str, Any]) -> bytes:
    text = json.dumps(row).encode()
    return text[:-1] + b', "crc32": "%08x"}\n' % zlib.crc32(text)


def _read(path: Path) -> _Found:
    """The valid lines of a log, and the problems of the others; a last line torn by a crash is neither.

    If any line has a checksum, a line without one is damaged. (Earlier versions wrote none; `resume` adds them.)
    """
    lines: list[_Line] = []
    damaged: dict[int, str] = {}
    numbers: list[int] = []
    with_checksums = False
    with regular(path).open("rb") as file:
        for number, line in enumerate(lines_of(file), start=1):
            if not isinstance(line, LongLine) and not line.endswith(b"\n"):
                break
            with_checksums |= isinstance(line, bytes) and b"crc32" in line  # even if damaged
            try:
                lines.append(_Line(file.tell(), *_row(line)))
                numbers.append(number)
            except Unreadable as error:
                damaged[number] = str(error)
    if with_checksums:
        damaged |= {number: "has no checksum" for number, line in zip(numbers, lines, strict=True) if not line.sealed}
        lines = [line for line in lines if line.sealed]
    return _Found(lines, [f"line {number}: {damaged[number]}" for number in sorted(damaged)])


def _row(line: bytes | LongLine) -> tuple[dict[str, Any], bool]:
    """(row, whether it has a checksum). Raises if the checksum is wrong."""
    if isinstance(line, LongLine):
        raise line
    if seal := _SEAL.search(line):
        line = line[: seal.start()] + b"}"
        if zlib.crc32(line) != int(seal[1], 16):
            raise Unreadable("differs from its checksum")
    row = parse_object(line, "no JSON object")
    if not (type(row.get("step")) is int and 0 <= row["step"] <= MOST and set(map(type, row.values())) <= _NUMBERS):
        raise Unreadable("no row of numbers with its step")
    return row, seal is not None


_NUMBERS = {int, float, type(None)}


def _set_aside(path: Path) -> Path:
    """Copies a file to `quarantine/`, where nothing is deleted."""
    folder = path.with_name("quarantine")
    folder.mkdir(exist_ok=True)
    copy = next(free for n in itertools.count() if not os.path.lexists(free := folder / f"{path.name}-{n}"))
    write_whole(copy, path.read_bytes())
    return copy
