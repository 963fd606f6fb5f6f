"""Append-only log of a judge's questions and answers, so that a kill loses no paid answer.

    {"line": 1, "settings": {...}, ...}                   what all verdicts depend on
    {"line": 2, "sent": KEY, "tokens_in": 300, ...}       written before a request, with its maximal cost
    {"line": 3, "fault": KEY, "cause": "429", ...}        the request failed, with what that may have cost
    {"line": 4, "answered": KEY, "choice": "A", ...}      the verdict, which is final

Guarantee: a question whose answer has arrived is never sent again. This holds after a SIGKILL (a line is one write) and, once
`answered` has returned, after the loss of the machine (fsync). A kill interrupts only the questions in flight, at most as many
as are asked at a time. Whether the endpoint has answered those cannot be known; only they are sent again, and they count as
paid.

Guarantee: a verdict that is read is the one that was written. Every line ends with a checksum (`verdict_lines`). A damaged
line is not used, its question is asked again, and what it may have cost counts as spent. The file is only ever appended to.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dpo_jax.judge.verdict_lines import Content, Damaged, Seal, read_lines, unchecked
from dpo_jax.untrusted import Unreadable, read_bytes
from dpo_jax.writing import naming, write_whole

_REMEDY = "restore it, or move it away to judge again"


class ForeignVerdicts(ValueError):
    """The log was made with other settings, or holds verdicts on other texts."""


class Tokens(NamedTuple):
    """Token counts: read and written by the judge."""

    read: int = 0
    written: int = 0

    def plus(self, other: Tokens) -> Tokens:
        return Tokens(self.read + other.read, self.written + other.written)


class VerdictLog:
    """The log at `path`, new or continued: `verdicts` by question, `requests` sent and `spent` tokens so far.

    A last line that was truncated by a crash is removed. `damaged` lines are not used, and copied to a separate file. Each
    damaged or missing line counts as a request of the largest size in the log. A log of a version without checksums is
    accepted if all of it is sound, and rewritten with checksums. Raises `ForeignVerdicts`, naming the difference, for a log
    with other `settings`, and `Unreadable` for a file that is not a log or has no sound line. Only one process may use it at a
    time; the lock of the run directory ensures this.
    """

    def __init__(self, path: str | os.PathLike[str], settings: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.verdicts: dict[str, dict[str, Any]] = {}
        self.requests, self.faults, self.spent = 0, {}, Tokens()
        self._open: dict[str, Tokens] = {}  # sent, without answer or fault yet
        self._largest = Tokens()
        content = self._read(settings)
        self.damaged, self.lost = content.damaged, content.lost
        self._seal, self._following = Seal(content.settings), content.following
        for record in content.records:
            self._take(record)
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.ftruncate(self._file, self._size)
        self._lock, self._appended, self._synced = asyncio.Lock(), 0, 0
        if not self._size:
            self._append({"settings": content.settings})
            os.fsync(self._file)
        self.interrupted = len(self._open)
        self.spent = self.committed
        self._open.clear()
        # A lost line may have been a request without an answer, at most as large as the largest in the log.
        self.requests += self.lost
        self.spent = self.spent.plus(Tokens(*(self.lost * most for most in self._largest)))

    def _read(self, settings: Mapping[str, Any]) -> Content:
        """Reads the file. Sets how many of its bytes are complete lines; the rest was truncated by a crash."""
        if self.path.exists() and not self.path.is_file():
            raise Unreadable(f"{self.path}: not a file; {_REMEDY}")
        content = read_bytes(self.path) if self.path.exists() else b""
        self._size = content.rfind(b"\n") + 1
        lines = content[: self._size].split(b"\n")[:-1]
        if not lines:
            if not Seal(settings).close(1, {"settings": dict(settings)}).startswith(content):
                raise Unreadable(f"{self.path}: no verdict log; {_REMEDY}")
            return Content(dict(settings), [], [], 0, 1)
        try:
            if (records := unchecked(lines)) is not None:
                return self._sealed(records, settings)
            found = read_lines(lines, settings)
        except Unreadable as error:
            raise Unreadable(f"{self.path}: {error}; {_REMEDY}") from None
        self._check(found.settings, settings)
        if found.damaged:
            write_whole(self.set_aside, b"".join(map(_told, found.damaged)))
        return found

    def _sealed(self, records: list[dict[str, Any]], settings: Mapping[str, Any]) -> Content:
        """Rewrites a log without checksums, adding them."""
        first = records[0]["settings"]
        self._check(first, settings)
        content = b"".join(Seal(first).close(number, record) for number, record in enumerate(records, start=1))
        write_whole(self.path, content)
        self._size = len(content)
        return Content(first, records[1:], [], 0, len(records) + 1)

    @property
    def set_aside(self) -> Path:
        """Path of the file for copies of the damaged lines."""
        return self.path.with_name(f"{self.path.stem}.damaged{self.path.suffix}")

    def _check(self, found: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        differ = [name for name in {**found, **settings} if found.get(name) != settings.get(name)]
        if differ:
            shown = "; ".join(f"{name} was {found.get(name)!r:.80} and is {settings.get(name)!r:.80}" for name in differ[:10])
            raise ForeignVerdicts(f"{self.path}: made under other settings: {shown}; restore them, or name another --judge.out")

    def _take(self, record: dict[str, Any]) -> None:
        tokens = Tokens(record["tokens_in"], record["tokens_out"])
        if "sent" in record:
            self.requests += 1
            # Sent earlier without an answer: it was in flight at a kill and may have been paid.
            self.spent = self.spent.plus(self._open.pop(record["sent"], Tokens()))
            self._open[record["sent"]] = tokens
            self._largest = Tokens(*map(max, self._largest, tokens))
            return
        self.spent = self.spent.plus(tokens)
        if "fault" in record:
            self._open.pop(record["fault"], None)
            self.faults[record["cause"]] = self.faults.get(record["cause"], 0) + 1
        else:
            self._open.pop(record["answered"], None)
            self.verdicts[record["answered"]] = record

    @property
    def committed(self) -> Tokens:
        """Tokens spent, plus the maximal cost of requests in flight."""
        total = self.spent
        for tokens in self._open.values():
            total = total.plus(tokens)
        return total

    def only_of(self, keys: Collection[str]) -> None:
        """Raises `ForeignVerdicts` if the log has a verdict on a question that is not in `keys`. New questions are allowed."""
        foreign = [key for key in self.verdicts if key not in keys]
        if foreign:
            raise ForeignVerdicts(
                f"{self.path}: holds {len(foreign):,} verdicts (of {len(self.verdicts):,}) on other texts than today's; "
                "add the files they were made for, or name another --judge.out"
            )

    def sent(self, key: str, most: Tokens) -> None:
        """Logs a request; must be called before it is sent."""
        self._add({"sent": key, "tokens_in": most.read, "tokens_out": most.written})

    def fault(self, key: str, cause: str, tokens: Tokens) -> None:
        self._add({"fault": key, "cause": cause, "tokens_in": tokens.read, "tokens_out": tokens.written})

    async def answered(self, key: str, tokens: Tokens, **verdict: Any) -> None:
        """Logs a verdict and returns once it is on disk. Questions answered at the same time share one fsync."""
        self._add({"answered": key, **verdict, "tokens_in": tokens.read, "tokens_out": tokens.written})
        mine = self._appended
        async with self._lock:
            if self._synced < mine:
                reached = self._appended
                with naming(self.path):
                    await asyncio.to_thread(os.fsync, self._file)
                self._synced = reached

    def _add(self, record: dict[str, Any]) -> None:
        self._append(record)
        self._take(record)

    def _append(self, record: Mapping[str, Any]) -> None:
        # A line is one write, so that no other process can see half of it and no kill can leave half of it.
        line = self._seal.close(self._following, record)
        try:
            with naming(self.path):
                if os.write(self._file, line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            with contextlib.suppress(OSError):  # other questions must not write after half a line
                os.ftruncate(self._file, self._size)
            raise
        self._size += len(line)
        self._following += 1
        self._appended += 1

    def close(self) -> None:
        os.close(self._file)

    def __enter__(self) -> VerdictLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _told(damaged: Damaged) -> bytes:
    said = {"line": damaged.place, "cause": damaged.cause, "content": damaged.content.decode("utf-8", "backslashreplace")}
    return json.dumps(said, ensure_ascii=False).encode() + b"\n"
