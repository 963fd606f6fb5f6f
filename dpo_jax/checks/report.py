"""The self-test's report: its rows, the table on the screen, and the JSON file."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dpo_jax.runtime.rundir import environment, write_json

SILENCE = 8.0  # seconds of silence after which a row reports that it is still running
_INDENT = " " * 4


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of a row. `ok` is None if nothing was decided: an informative row, or one that was skipped."""

    figure: str
    ok: bool | None = True
    bar: str = ""
    values: dict[str, Any] = dataclasses.field(default_factory=dict)  # for the JSON file


def skipped(reason: str) -> Result:
    return Result(f"skipped: {reason}", None)


@dataclasses.dataclass(frozen=True)
class Row:
    """One check. Names are dotted, so that `--only attention` selects all that begin with it."""

    name: str
    failure: str  # what a failure means and what to do
    run: Callable[[], Result]

    def chosen(self, names: list[str]) -> bool:
        return not names or any(self.name == name or self.name.startswith(f"{name}.") for name in names)


class Report:
    """Runs rows, prints each when it is done, and rewrites the file, which after a crash names the row that was running."""

    def __init__(self, path: Path) -> None:
        self.path, self.rows, self.begun = path, [], time.perf_counter()
        self.environment: dict[str, Any] = {}
        self.write()  # an unwritable file is reported now, not after three minutes
        print(f"{'row':<32} {'result':<7} {'seconds':>7}  figure", flush=True)

    failed = property(lambda self: [row["name"] for row in self.rows if row["ok"] is False])

    def run(self, row: Row) -> Result:
        """The result of a row. A row that raises has failed; its result is the first line of the exception."""
        begin = time.perf_counter()
        self.write(running=row.name)
        error = None
        with _heartbeat(row.name):
            try:
                result = row.run()
            except Exception as raised:
                error = traceback.format_exc()
                result = Result(f"{type(raised).__name__}: {first_line(raised)}", False)
                if os.environ.get("DPO_JAX_TRACEBACK", "0") not in ("", "0"):
                    print(error)
        seconds = time.perf_counter() - begin
        word = {True: "ok", False: "FAILED", None: "-"}[result.ok]
        bar = f"  (bar: {result.bar})" if result.bar else ""
        print(f"{row.name:<32} {word:<7} {seconds:>7.1f}  {result.figure}{bar}", flush=True)
        if result.ok is False:
            print(f"{_INDENT}what to do: {row.failure}", flush=True)
        told = dataclasses.asdict(result) | {"name": row.name, "seconds": round(seconds, 3), "failure": row.failure}
        self.rows.append(told | ({"error": error} if error else {}))
        self.write()
        return result

    def write(self, **extra: Any) -> None:
        done = {"ok": not self.failed, "failed": self.failed, "seconds": round(time.perf_counter() - self.begun, 1)}
        write_json(self.path, {**done, **extra, "environment": self.environment, "rows": self.rows})

    def describe(self) -> None:
        """Adds versions and devices to the file, once JAX is known to find a device."""
        self.environment = environment()

    def summary(self) -> str:
        decided = [row for row in self.rows if row["ok"] is not None]
        seconds = time.perf_counter() - self.begun
        verdict = f"FAILED: {', '.join(self.failed)}" if self.failed else "all passed"
        return f"{len(decided)} checks in {seconds:.0f} s, {verdict}; written to {self.path}"


def first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")[:300]


@contextlib.contextmanager
def _heartbeat(name: str) -> Iterator[None]:
    """Prints a line every `SILENCE` seconds, because compiling may take longer than that."""
    done, begin = threading.Event(), time.perf_counter()

    def beat() -> None:
        while not done.wait(SILENCE):
            print(f"{_INDENT}{name}: compiling or running, {time.perf_counter() - begin:.0f} s", flush=True)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
