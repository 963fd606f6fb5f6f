"""The log of a judge: every question sent and every answer, appended line by line, so that a kill loses nothing that was paid.

    {"settings": {...}}                                   first line: what all verdicts depend on
    {"sent": KEY, "tokens_in": 300, "tokens_out": 200}    before a request, with the most it can cost
    {"fault": KEY, "cause": "429", ...}                   it brought no answer, and what that may have cost
    {"answered": KEY, "choice": "A", "text": "...", ...}  the verdict, which is final

Guarantee: a question whose answer has arrived is never sent again, also after a SIGKILL (a line is one write) and, from the
moment that `answered` returns, after the loss of the machine (fsync). At a kill at most as many questions are on their way as
are asked at a time. Nobody can know whether the endpoint has answered those; they alone are sent again, and count as paid.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dpo_jax.writing import naming


class ForeignVerdicts(ValueError):
    """The log was made under other settings, or holds verdicts on other texts."""


class Tokens(NamedTuple):
    """Read and written by the judge."""

    read: int = 0
    written: int = 0

    def plus(self, other: Tokens) -> Tokens:
        return Tokens(self.read + other.read, self.written + other.written)


class VerdictLog:
    """The log at `path`, new or continued: `verdicts` by question, `requests` sent and `spent` tokens so far.

    Raises `ForeignVerdicts`, naming what differs, for a log of other `settings`, and OSError for a damaged one. A last line
    that was cut off by a crash is removed. Use it in one process at a time, as the lock of a run directory ensures.
    """

    def __init__(self, path: str | os.PathLike[str], settings: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.verdicts: dict[str, dict[str, Any]] = {}
        self.requests, self.faults, self.spent = 0, {}, Tokens()
        self._open: dict[str, Tokens] = {}  # sent, and no word since
        kept = self._read(settings)
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.ftruncate(self._file, kept)
        self._lock, self._appended, self._synced = asyncio.Lock(), 0, 0
        if not kept:
            self._append({"settings": dict(settings)})
            os.fsync(self._file)
        self.interrupted = len(self._open)
        self.spent = self.committed
        self._open.clear()

    def _read(self, settings: Mapping[str, Any]) -> int:
        """Takes in what is there; returns how many bytes of it are whole lines."""
        content = self.path.read_bytes() if self.path.exists() else b""
        kept = content.rfind(b"\n") + 1
        for number, line in enumerate(content[:kept].split(b"\n")[:-1], start=1):
            try:
                record = json.loads(line)
                self._check(record["settings"], settings) if number == 1 else self._take(record)
            except (ValueError, KeyError, TypeError) as error:
                if isinstance(error, ForeignVerdicts):
                    raise
                raise OSError(
                    errno.EIO, f"line {number} is damaged; move the file away to judge anew", str(self.path)
                ) from error
        return kept

    def _check(self, found: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        differ = [name for name in {**found, **settings} if found.get(name) != settings.get(name)]
        if differ:
            shown = "; ".join(f"{name} was {found.get(name)!r} and is {settings.get(name)!r}" for name in differ)
            raise ForeignVerdicts(f"{self.path}: made under other settings: {shown}; restore them, or name another --judge.out")

    def _take(self, record: dict[str, Any]) -> None:
        tokens = Tokens(record["tokens_in"], record["tokens_out"])
        if "sent" in record:
            self.requests += 1
            # Sent before and no word since: that one was on its way at a kill, and may have been paid.
            self.spent = self.spent.plus(self._open.pop(record["sent"], Tokens()))
            self._open[record["sent"]] = tokens
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
        """Tokens spent, and those that what is on its way can cost at most."""
        total = self.spent
        for tokens in self._open.values():
            total = total.plus(tokens)
        return total

    def only_of(self, keys: Collection[str]) -> None:
        """Raises `ForeignVerdicts` if the log holds a verdict on another question than `keys`. There may be new ones."""
        foreign = [key for key in self.verdicts if key not in keys]
        if foreign:
            raise ForeignVerdicts(
                f"{self.path}: holds {len(foreign):,} verdicts (of {len(self.verdicts):,}) on other texts than today's; "
                "add the files they were made for, or name another --judge.out"
            )

    def sent(self, key: str, most: Tokens) -> None:
        """To be called before a request."""
        self._add({"sent": key, "tokens_in": most.read, "tokens_out": most.written})

    def fault(self, key: str, cause: str, tokens: Tokens) -> None:
        self._add({"fault": key, "cause": cause, "tokens_in": tokens.read, "tokens_out": tokens.written})

    async def answered(self, key: str, tokens: Tokens, **verdict: Any) -> None:
        """Returns once the verdict is on disk; questions that are answered at the same time share the wait for it."""
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
        # One write for a line: no other process can see, and no kill can leave, half of it.
        line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
        with naming(self.path):
            if os.write(self._file, line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._appended += 1

    def close(self) -> None:
        os.close(self._file)

    def __enter__(self) -> VerdictLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
